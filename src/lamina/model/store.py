"""Store: the directory of a model, and what may be done to it.

MODEL/
  model.json             the settings, the backbone by name and hash, and `head`: the folder of the newest version
  tasks/0001-NAME/       a version: what was learnt up to and including this task; never changed after it was written
    card.json            data, settings, parent, figures and cost of the task
    state.json clock.json
    adapters.safetensors classifier.safetensors statistics.safetensors method.safetensors    those that are not empty
    manifest.json        sha256 and size of every file above
    probes.safetensors rehearsal.safetensors     examples that the model keeps, if it may; they can be deleted
  events.jsonl           a line for everything that happened
  README.md              the model card
  base/                  the backbone's files, if they are embedded
  work/                  a task that is being learnt: its plan and checkpoints
  lock                   held by the process that changes the model

A version is written under a temporary name, synced and renamed. It counts from the moment that `model.json` names it, which is
one rename; so a crash leaves the old version or the new one. A tensor that is the same in the parent is not stored again:
`stored` in state.json says in which folder it lies.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lamina.config.renamed import is_other_method, made_before
from lamina.engine import checkpoint
from lamina.engine.state import now
from lamina.errors import CheckpointError, ModelError, RunError
from lamina.files import read_checked, write_checked
from lamina.model.card import Card, Facts, Kept
from lamina.runs.directory import locked

FORMAT = 1
"""It changes whenever an older or newer lamina could not read a model."""
FILE, EVENTS, README = "model.json", "events.jsonl", "README.md"
TASKS, WORK, BASE = "tasks", "work", "base"
PLAN = "plan.json"
CARD = "card"
OF_LEARNER = {"classifier": ("head/",), "adapters": ("finished/", "live/")}
"""Files that share the learner's tensors, and how the names of each one's tensors begin."""
GROUPS = {"memory": "method", "consolidation": "statistics"}
"""Files of the other groups of tensors of a checkpoint."""
_FOLDER = re.compile(r"\d{4,}-[\w.-]{1,80}")


class Store:
    """The directory of a model. Raises ModelError for what is no model, is damaged, or is of another version of lamina."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- reading ------------------------------------------------------------------------------------------------------

    def facts(self) -> Facts:
        """Returns what model.json says."""
        file = self.path / FILE
        if not file.is_file():
            lacks = f"it has no {FILE}" if self.path.is_dir() else "there is no such directory"
            if (self.path / "config.json").is_file() and (self.path / "checkpoints").is_dir():
                raise ModelError(
                    f"{self.path} is a run, not a model. Make a model of it: `lamina create MODEL --from-run {self.path}`."
                )
            if (self.path / "config.json").is_file() and any(self.path.glob("*.safetensors")):
                raise ModelError(
                    f"{self.path} is a backbone, not a model: `lamina create MODEL --backbone {self.path}`."
                )
            raise ModelError(f"{self.path} is not a model: {lacks}. `lamina create {self.path}` makes one.")
        try:
            content = read_checked(file)
        except RunError as error:
            raise ModelError(
                f"{error} Restore the file from a backup: nothing else says which version is the newest."
            ) from error
        if content.get("format") != FORMAT:
            raise ModelError(
                f"{file} has format {content.get('format')!r}, and this version of lamina reads format {FORMAT}. Use the "
                "version that wrote it."
            )
        try:
            facts = Facts.model_validate({key: value for key, value in content.items() if key != "format"})
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(f"{file} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
        if is_other_method(facts.config.method):
            raise ModelError(
                f"{self.path} {made_before(facts.config.method)} Use that version with it, or teach a new model its tasks."
            )
        for folder in (*facts.versions, *([] if facts.head is None else [facts.head])):
            if not _FOLDER.fullmatch(folder):
                raise ModelError(f"{file} is damaged: {folder!r} is not the name of a folder in {TASKS}.")
        return facts

    def card(self, folder: str) -> Card:
        """Returns the card of a version, checked against its manifest."""
        directory = self.path / TASKS / folder
        manifest = self._manifest(directory)
        self._verify(directory, f"{CARD}.json", manifest)
        content = self._json(directory / f"{CARD}.json")
        where = directory / f"{CARD}.json"
        try:
            card = Card.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(f"{where} is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
        if card.folder != folder:
            raise ModelError(f"{where} is damaged: it is that of {card.folder!r}. {self._remedy()}")
        return card

    def lineage(self, head: str | None) -> list[Card]:
        """Returns the cards of a version and of all versions before it, the oldest first."""
        found: list[Card] = []
        while head is not None:
            found.append(self.card(head))
            head = found[-1].parent
            if len(found) > 100_000 or (head is not None and not _FOLDER.fullmatch(head)):
                raise ModelError(
                    f"{self.path / TASKS / found[-1].folder}/{CARD}.json is damaged: its parent is {head!r}."
                )
        return found[::-1]

    def state(self, folder: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """Returns documents and tensors of a version, as a checkpoint of the engine has them. Every file is verified."""
        directory = self.path / TASKS / folder
        manifest = self._manifest(directory)
        documents: dict[str, Any] = {}
        for name in ("state", "clock"):
            self._verify(directory, f"{name}.json", manifest)
            documents[name] = self._json(directory / f"{name}.json")
        stored = self._stored(directory, documents["state"])
        del documents["state"]["stored"]
        files: dict[tuple[str, str], dict[str, Tensor]] = {}
        tensors: dict[str, dict[str, Tensor]] = {
            group: {} for group in ("learner", "optimizer", "predictions", *GROUPS)
        }
        for file, places in stored.items():
            group = next((g for g, f in GROUPS.items() if f == file), "learner")
            for name, place in places.items():
                if (place, file) not in files:
                    files[place, file] = self._tensors(place, file)
                if name not in files[place, file]:
                    raise ModelError(f"{self.path / TASKS / place / file}.safetensors is damaged: it lacks {name}.")
                tensors[group][name] = files[place, file][name]
        return documents, tensors

    def versions(self) -> tuple[str, ...]:
        """Returns the folders of all versions, those that were rolled back included, in the order they were learnt in."""
        return self.facts().versions

    def events(self) -> list[dict[str, Any]]:
        """Returns everything that happened, the oldest first. A line that a crash cut off is left out."""
        file = self.path / EVENTS
        found = []
        for line in file.read_bytes().split(b"\n") if file.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:  # UnicodeDecodeError is one
                continue
        return [event for event in found if isinstance(event, dict)]

    # -- writing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the model, so that no other process changes it. Raises ModelError naming the one that does."""
        self.facts()
        try:
            with locked(self.path):
                self._clean()
                yield
        except RunError as error:
            raise ModelError(str(error)) from error

    def write_facts(self, facts: Facts) -> None:
        """Replace model.json. This is the moment at which a version begins to count."""
        write_checked(self.path / FILE, {"format": FORMAT, **facts.model_dump(mode="json")})

    def new_folder(self, name: str) -> str:
        """Returns the folder for a new version, which ends in the name of its task."""
        newest = max((int(folder.partition("-")[0]) for folder in self.versions()), default=0)
        plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60] or "task"
        return f"{newest + 1:04d}-{plain}"

    def add(
        self,
        card: Card,
        documents: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        kept: Mapping[str, Mapping[str, Tensor]],
    ) -> None:
        """Write the folder of a new version. kept: examples that the model keeps, by the name of their file.

        Raises ModelError where it cannot be written, for example because the disk is full. The model is as before then.
        """
        parent = self._parent_tensors(card.parent)
        groups: dict[str, dict[str, Tensor]] = {file: {} for file in (*OF_LEARNER, *GROUPS.values())}
        for name, value in tensors["learner"].items():
            groups[next(file for file, starts in OF_LEARNER.items() if name.startswith(starts))][name] = value
        for group, file in GROUPS.items():
            groups[file] = dict(tensors.get(group, {}))
        stored: dict[str, dict[str, str]] = {}
        own: dict[str, dict[str, Tensor]] = {}
        for file, group_of in groups.items():
            stored[file], own[file] = {}, {}
            for name, value in group_of.items():
                place, before = parent.get((file, name), (None, None))
                if before is not None and before.dtype == value.dtype and torch.equal(before, value.cpu()):
                    stored[file][name] = str(place)
                else:
                    stored[file][name] = card.folder
                    own[file][name] = value
        state = {**documents["state"], "stored": stored}
        content = {"state": state, "clock": documents["clock"], CARD: card.model_dump(mode="json")}
        try:
            checkpoint.write(self.path / TASKS / card.folder, content, {f: g for f, g in {**own, **kept}.items() if g})
        except CheckpointError as error:
            raise ModelError(
                f"the new version {error}. The model is as it was before. Make room or correct the rights, then give the "
                f"command again: it goes on from the trained task."
            ) from error

    def commit(
        self,
        card: Card,
        documents: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        kept: Mapping[str, Mapping[str, Tensor]],
        event: str,
        **details: Any,
    ) -> None:
        """Make a version the newest: write its folder, let model.json name it, and note the event. Raises what `add` raises."""
        facts = self.facts()
        self.add(card, documents, tensors, kept)
        versions = (*facts.versions, card.folder)
        changed = facts.model_copy(update={"head": card.folder, "version": card.version, "versions": versions})
        try:
            self.write_facts(changed)
        except OSError as error:
            raise ModelError(
                f"{self.path / FILE} cannot be written: {error}. The model is as it was before. Make room or correct the "
                f"rights, then give the command again: it goes on from the trained task."
            ) from error
        try:
            self.note(event, folder=card.folder, version=card.version, **details)
        except OSError:  # the version counts; the next command that changes the model notes it
            return

    def note(self, event: str, **details: Any) -> None:
        """Append a line to events.jsonl."""
        file = self.path / EVENTS
        line = json.dumps({"time": now(), "event": event, **details}, ensure_ascii=False) + "\n"
        with file.open("a+b") as log:
            log.seek(0, os.SEEK_END)
            if log.tell():
                log.seek(-1, os.SEEK_END)
                if log.read(1) != b"\n":  # a crash cut the last line off
                    line = "\n" + line
            log.write(line.encode())
            log.flush()
            os.fsync(log.fileno())

    def _clean(self) -> None:
        """Put right what a crash has left: half-written folders, a version that never counted, the work of a task that is
        learnt, and a version without an event. Other folders of versions that model.json does not name are renamed."""
        facts, folder = self.facts(), self.path / TASKS
        for path in folder.glob(".*.tmp") if folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)
        plan = self.plan()
        try:
            learnt = [task.name for card in self.lineage(facts.head) for task in card.tasks]
        except ModelError:  # a rollback to another version must be possible
            learnt = []
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if _FOLDER.fullmatch(path.name) and path.name not in facts.versions:
                if plan is not None and path.name == self.new_folder(str(plan["name"])):
                    shutil.rmtree(path)  # what is in work makes it again
                else:
                    path.rename(_free(folder / f"unclaimed-{path.name}"))
        if plan is not None and plan["name"] in learnt:
            shutil.rmtree(self.path / WORK)
        if facts.version and not any(event.get("version") == facts.version for event in self.events()):
            self.note("recovered", folder=facts.head, version=facts.version)

    def plan(self) -> dict[str, Any] | None:
        """Returns what is being learnt in MODEL/work; None if nothing is, or it cannot be read."""
        try:
            found = checkpoint.read_json(self.path / WORK / PLAN)
        except CheckpointError:
            return None
        return found if isinstance(found, dict) and "name" in found else None

    # -- files --------------------------------------------------------------------------------------------------------

    def kept(self, folder: str, what: str) -> dict[str, Tensor] | None:
        """Returns the kept examples of a version; None where there are none, or they were deleted."""
        directory = self.path / TASKS / folder
        if not (directory / f"{what}.safetensors").is_file():
            return None
        try:
            return self._tensors(folder, what)
        except ModelError as error:
            raise ModelError(
                f"{str(error).partition(' Restore it')[0]} Restore it from a backup, or delete it: `lamina forget {self.path}`."
            ) from error

    def kept_now(self, card: Card) -> dict[str, Kept]:
        """Returns what is still kept of a version's examples."""
        folder = self.path / TASKS / card.folder
        return {what: part for what, part in card.kept.items() if (folder / f"{what}.safetensors").is_file()}

    def delete_kept(self, folder: str, what: str) -> int:
        """Delete kept examples of a version. Returns how many bytes they took."""
        file = self.path / TASKS / folder / f"{what}.safetensors"
        size = file.stat().st_size if file.is_file() else 0
        file.unlink(missing_ok=True)
        return size

    def _stored(self, directory: Path, state: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Returns in which folder every tensor lies, by file and name."""
        stored = state.get("stored")
        known = {*OF_LEARNER, *GROUPS.values()}
        if (
            not isinstance(stored, dict)
            or not stored.keys() <= known
            or not all(
                isinstance(places, dict) and all(isinstance(place, str) for place in places.values())
                for places in stored.values()
            )
        ):
            raise ModelError(
                f"{directory}/state.json is damaged: it must say where each tensor is stored. {self._remedy()}"
            )
        return stored

    def prune(self, keep: int) -> int:
        """Delete the tensors that none of the newest `keep` versions needs. Returns how many bytes they took."""
        newest = [card.folder for card in self.lineage(self.facts().head)[-keep:]]
        needed = {file for folder in newest for file in self._files_of(folder)}
        freed = 0
        for folder in self.versions():
            for file in (*OF_LEARNER, *GROUPS.values()):
                path = self.path / TASKS / folder / f"{file}.safetensors"
                if path.is_file() and path not in needed:
                    freed += path.stat().st_size
                    path.unlink()
        return freed

    def pruned(self, folder: str) -> bool:
        """Whether tensors of a version were deleted."""
        return not all(path.is_file() for path in self._files_of(folder))

    def _files_of(self, folder: str) -> set[Path]:
        """Returns the files that the tensors of a version lie in."""
        directory = self.path / TASKS / folder
        stored = self._stored(directory, self._json(directory / "state.json"))
        places = {
            (place, file) for file, names in stored.items() for place in names.values() if _FOLDER.fullmatch(place)
        }
        return {self.path / TASKS / place / f"{file}.safetensors" for place, file in places}

    def _parent_tensors(self, parent: str | None) -> dict[tuple[str, str], tuple[str, Tensor]]:
        """Returns folder and value of every tensor of a version, by its file and name."""
        if parent is None:
            return {}
        stored = self._stored(self.path / TASKS / parent, self._json(self.path / TASKS / parent / "state.json"))
        found, files = {}, dict[tuple[str, str], dict[str, Tensor]]()
        for file, places in stored.items():
            for name, place in places.items():
                if (place, file) not in files:
                    files[place, file] = self._tensors(place, file)
                found[file, name] = (place, files[place, file][name])
        return found

    def _tensors(self, folder: str, file: str) -> dict[str, Tensor]:
        if not _FOLDER.fullmatch(folder):
            raise ModelError(f"{self.path / TASKS} is damaged: {folder!r} is not the name of a folder in it.")
        directory = self.path / TASKS / folder
        self._verify(directory, f"{file}.safetensors", self._manifest(directory))
        try:
            return checkpoint.read_tensors(directory / f"{file}.safetensors")
        except CheckpointError as error:
            raise ModelError(f"{error}. {self._remedy()}") from error

    def _manifest(self, directory: Path) -> dict[str, Any]:
        found = self._json(directory / checkpoint.MANIFEST)
        if not isinstance(found, dict) or not all(
            isinstance(entry, dict) and entry.keys() == {"sha256", "bytes"} for entry in found.values()
        ):
            raise ModelError(
                f"{directory / checkpoint.MANIFEST} is damaged: it must give sha256 and bytes of every file."
            )
        return found

    def _json(self, path: Path) -> Any:
        try:
            return checkpoint.read_json(path)
        except CheckpointError as error:
            raise ModelError(f"{error}. {self._remedy()}") from error

    def _verify(self, directory: Path, name: str, manifest: Mapping[str, Any]) -> None:
        path, expected = directory / name, manifest.get(name)
        if expected is None:
            raise ModelError(f"{directory / checkpoint.MANIFEST} does not list {name}. {self._remedy()}")
        try:
            whole = path.is_file() and not path.is_symlink() and path.stat().st_size == expected["bytes"]
            whole = whole and checkpoint.sha256(path) == expected["sha256"]
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error}") from error
        if not whole:
            raise ModelError(
                f"{path} is {'damaged' if path.exists() else 'missing'}: its sha256 or size is not the one in "
                f"{checkpoint.MANIFEST}. {self._remedy()}"
            )

    def _remedy(self) -> str:
        return f"Restore it from a backup, or go back to an earlier version with `lamina rollback {self.path} TASK`."


def file_bytes(folder: Path) -> int:
    """Returns the bytes of all files below a folder. Files that vanish meanwhile are not counted."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _free(path: Path) -> Path:
    """Returns this path, with a number behind it if something is there."""
    number, found = 1, path
    while found.exists():
        number, found = number + 1, path.with_name(f"{path.name}-{number}")
    return found
