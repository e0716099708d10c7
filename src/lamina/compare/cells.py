"""Cells: the directories of a comparison's runs, and the identity of a run.

CELLS/METHOD-WHAT-CODE/
  config.yaml    the configuration of the run
  cell.json      the values that WHAT and CODE are hashes of
  run/           the directory of the run
  log.txt        its output
  failed.txt     the end of the log, if the last attempt failed
  lock           held by the process that runs it, and by the comparison that started this
  lease.json     kept by the process that runs it, for other machines
  ended.json     how the last attempt ended
  job.json       the job of SLURM that was submitted for it

WHAT is a hash of the settings that decide the result, of the data and of the backbone's files. CODE is a hash of the code that
can change the result. A run whose settings, data, weights or code changed therefore has another directory; the old one is kept.
A run is finished when its record is there: in its directory, or in a file of records, which holds what a table needs of many
runs and is small enough to be kept beside it.
"""

import ast
import errno
import fcntl
import fnmatch
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import lamina
from lamina import __version__, backbones, record, runs
from lamina import config as configuration
from lamina.compare import lease
from lamina.config import RunConfig
from lamina.data import Source
from lamina.errors import RunError
from lamina.files import alone, replace_text
from lamina.methods import METHODS
from lamina.record import Record

PACKAGE = Path(lamina.__file__).parent
WITHOUT_EFFECT = frozenset({"__init__.py", "record.py", "cli", "report", "compare", "methods"})
"""Code that no result depends on. Of the methods, a run depends on its own file, and on those that no method has to itself."""
LAST_LINES = 12
"""How much of the log of a failed run is shown."""

ATTEMPT = "==== "
"""Begins the first line that an attempt writes into its log."""

State = Literal["new", "begun", "failed", "done"]


class Place:
    """The directory of a cell."""

    def __init__(self, folder: Path, noted: Record | None = None) -> None:
        """noted: its record in a file of records, if it is there."""
        self.folder, self.noted = folder, noted
        self.run, self.log, self.config = folder / "run", folder / "log.txt", folder / "config.yaml"
        self._failed = folder / "failed.txt"

    @property
    def state(self) -> State:
        if self.noted or (self.run / record.FILE).exists():
            return "done"
        if self._failed.exists():
            return "failed"
        return "begun" if (self.run / "config.json").exists() else "new"

    @property
    def failure(self) -> str:
        return self._failed.read_text(encoding="utf-8") if self._failed.exists() else ""

    def record(self) -> Record:
        """Returns the record of the finished run; where it is only noted, the part of it that a table needs."""
        if (self.run / record.FILE).exists() or self.noted is None:
            return record.read(self.run)
        return self.noted

    def begin(self, config: RunConfig, identity: dict[str, Any]) -> None:
        """Writes the configuration and identity of the run."""
        self._failed.unlink(missing_ok=True)
        replace_text(self.config, configuration.to_yaml(config))
        replace_text(self.folder / "cell.json", json.dumps(identity, indent=1) + "\n")

    def has_this_code(self) -> bool:
        """Returns whether the code of lamina is that with which the cell was begun."""
        file = self.folder / "cell.json"
        if not file.exists():
            return True
        identity = json.loads(file.read_text(encoding="utf-8"))
        return bool(identity["lamina"] == __version__ and identity["code"] == code_hash(identity["method"]))

    def fail(self, why: str) -> None:
        replace_text(self._failed, f"{why}\n{self.last_lines()}".strip() + "\n")

    def last_lines(self, most: int = LAST_LINES) -> str:
        """Returns the end of the output of the last attempt."""
        if not self.log.exists():
            return ""
        text = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        return "\n".join(text.rpartition(ATTEMPT)[2].splitlines()[1:][-most:])

    def lock(self) -> IO[str] | None:
        """Holds the cell and returns its lock file; None where another process holds it, here or on another machine. It is free
        once this file is closed here and in the run that inherits it, so a run that outlives a killed comparison still holds
        it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if lease.holder(self.folder) is not None:
            return None
        file = (self.folder / "lock").open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                file.close()
                raise
            # The file system knows no locks: the lease alone tells processes apart.
        note_holder(file, f"process {os.getpid()}")
        return file

    def holder(self) -> str:
        """Returns who holds it, in words."""
        if (elsewhere := lease.holder(self.folder)) is not None:
            return elsewhere
        file = self.folder / "lock"
        return file.read_text(encoding="utf-8").strip() if file.exists() else "another process"


def note_holder(lock: IO[str], who: str) -> None:
    """Writes the holder into a lock."""
    lock.truncate(0)
    lock.write(who)
    lock.flush()


class Store:
    """All cells, and the map from a configuration to its cell."""

    def __init__(self, folder: Path, records: Path | None = None) -> None:
        """records: a file of records of finished runs, or the name of a new one. Raises RunError where it cannot be read.

        Data, backbones and code are hashed once, so a cell keeps its identity as long as this object lives."""
        self.folder, self.records = folder, records
        self.noted = read_records(records) if records and records.exists() else {}
        self._data = functools.cache(self._data_hash)
        self._stream = functools.cache(_check_stream)
        self._backbone = functools.cache(backbones.content_hash)
        self._code = functools.cache(code_hash)

    def identity(self, config: RunConfig) -> dict[str, Any]:
        """Returns everything that decides a result. Raises DataError or BackboneError where something is missing."""
        section = config.data.model_dump(mode="json", include={"source", "kind", "columns", "test_fraction"})
        return {
            "method": config.method["name"],
            "configuration": configuration.fingerprint(config, METHODS[config.method["name"]].config_type),
            "data": self._data(json.dumps(section)),
            "backbone": self._backbone(config.backbone.name),
            "lamina": __version__,
            "code": self._code(config.method["name"]),
        }

    def check_stream(self, config: RunConfig) -> None:
        """Raises DataError where the data cannot be split into these tasks."""
        self._stream(
            json.dumps({key: getattr(config, key).model_dump(mode="json") for key in ("data", "stream", "evaluation")})
        )

    def code_changed(self, config: RunConfig) -> bool:
        """Returns whether the code has changed since this store first hashed it."""
        return code_hash(config.method["name"]) != self._code(config.method["name"])

    def place(self, config: RunConfig) -> Place:
        identity = self.identity(config)
        return self._place(f"{identity['method']}-{_what(identity)}-{_code(identity)}")

    def of_older_code(self, config: RunConfig) -> Place | None:
        """Returns the newest finished run that differs in its code only."""
        identity = self.identity(config)
        same = f"{identity['method']}-{_what(identity)}-*"
        names = {path.name for path in self.folder.glob(same)} | set(fnmatch.filter(self.noted, same))
        done = [place for name in sorted(names) if (place := self._place(name)).state == "done"]
        return max(done, key=lambda place: place.record().created or "", default=None)

    def note(self, places: Iterable[Place]) -> None:
        """Adds the records of these finished runs to the file of records."""
        assert self.records is not None
        self.records.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with alone(self.folder / "records.lock"):
            if self.records.exists():  # another comparison may have added runs
                self.noted = read_records(self.records) | self.noted
            self.noted |= {place.folder.name: place.record().for_table() for place in places}
            lines = [json.dumps({"cell": name} | noted.to_json()) + "\n" for name, noted in sorted(self.noted.items())]
            replace_text(self.records, "".join(lines))

    def _place(self, name: str) -> Place:
        return Place(self.folder / name, self.noted.get(name))

    def _data_hash(self, section: str) -> str:
        """Returns a hash of the content. A folder of images is read again when times of its files change."""
        source = runs.open_source(RunConfig.model_validate({"data": json.loads(section)}))
        if not source.stamp:
            return source.fingerprint
        note = self.folder / ".data" / f"{source.fingerprint}-{source.stamp}"
        if not note.exists():
            note.parent.mkdir(parents=True, exist_ok=True)
            replace_text(note, _content(source), shared=True)
        return note.read_text(encoding="utf-8")


def read_records(file: Path) -> dict[str, Record]:
    """Returns the records of a file by the name of their cell. Raises RunError where it is no file of records."""
    remedy = "Give the file that an earlier --records wrote, or a name that is free."
    found = {}
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            content = json.loads(line)
            cell = content.pop("cell")
            found[cell] = Record.from_json(content, f"{file}, line {number},")
    except RunError as error:
        raise RunError(f"{error} {remedy}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{file}: not a file of records ({type(error).__name__}: {error}). {remedy}") from error
    return found


def code_hash(method: str) -> str:
    """Returns a hash of the code that can change a result of this method, without comments, docstrings and layout."""
    digest = hashlib.blake2b(digest_size=16)
    others = {Path(inspect.getfile(one)) for name, one in METHODS.items() if name != method}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        of_methods = name.parts[0] == "methods" and name.name != "__init__.py" and path not in others
        if of_methods or name.parts[0] not in WITHOUT_EFFECT:
            digest.update(f"|{name.as_posix()}|{_bare(path, path.stat().st_mtime_ns)}".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=256)
def _bare(path: Path, _changed: int) -> str:
    return bare(path.read_text(encoding="utf-8"))


def bare(code: str) -> str:
    """Returns code without comments, docstrings and layout."""
    return ast.dump(_WithoutText().visit(ast.parse(code)))


class _WithoutText(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def _check_stream(sections: str) -> None:
    runs.check_stream(RunConfig.model_validate(json.loads(sections)))


def _content(source: Source) -> str:
    digest = hashlib.blake2b(source.fingerprint.encode(), digest_size=16)
    for payload in _payloads(source):
        digest.update(hashlib.blake2b(payload).digest())
    return digest.hexdigest()


def _payloads(source: Source) -> Iterator[bytes]:
    for i in range(len(source)):
        try:
            yield bytes(source.read(i))  # type: ignore[arg-type]
        except OSError:
            yield b"unreadable"


def _what(identity: dict[str, Any]) -> str:
    return _hash(identity["configuration"], identity["data"], identity["backbone"])


def _code(identity: dict[str, Any]) -> str:
    return _hash(identity["lamina"], identity["code"])


def _hash(*parts: str) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=6).hexdigest()
