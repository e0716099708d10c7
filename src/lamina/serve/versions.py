"""The version that is served, and its replacement by a newer one while requests go on.

A newer version is loaded beside the old one, checked on the probes that the model keeps, and swapped by one reference. The old
one is closed when its last request has ended. Whatever cannot be loaded, fails the check, or takes other inputs is not served.
"""

import asyncio
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lamina.errors import LaminaError, ModelError
from lamina.model import Card, Facts, LanguagePredictor, Model, Predictor, Store, kept
from lamina.runs.setup import image_transform

log = logging.getLogger("lamina.serve")
RETRY = 10
"""Looks at the model's directory until a version is tried again that failed for a passing reason, such as a lack of memory."""
MOST_ASKED = 64
"""Probes of a task of a language model that are checked before a version is served."""
ALLOWED_LOSS = 0.02
"""Accuracy on the kept probes may be this much below the recorded one: another CPU rounds otherwise."""


@dataclass(eq=False)
class Version:
    """One version in memory, and what the model says about it."""

    predictor: Predictor | LanguagePredictor
    facts: Facts
    lineage: list[Card]
    checked: str
    """What the check before the swap has found."""
    since: float = field(default_factory=time.time)
    users: int = 0
    retired: bool = False

    @property
    def number(self) -> int:
        return self.predictor.version

    @property
    def classifier(self) -> Predictor:
        """The predictor of a classifier."""
        assert isinstance(self.predictor, Predictor)
        return self.predictor

    @property
    def language(self) -> LanguagePredictor:
        """The predictor of a language model."""
        assert isinstance(self.predictor, LanguagePredictor)
        return self.predictor


@dataclass(frozen=True)
class Refused:
    """A version that is not served, and why."""

    version: int
    reason: str


def load(path: Path, device: str | None = None) -> Version:
    """Returns the newest version of a model, checked. Raises LaminaError where it cannot be loaded, or fails the check."""
    model = Model(path)
    predictor = model.deployed(device)
    try:
        facts = model.facts
        lineage = model.store.lineage(predictor.card.folder)
        checked = check(model.store, predictor, lineage)
    except BaseException:
        predictor.close()
        raise
    return Version(predictor, facts, lineage, checked)


def check(store: Store, predictor: Predictor | LanguagePredictor, lineage: list[Card]) -> str:
    """Returns what a check of a version on the model's probes has found; without probes, on noise. Raises ModelError where a
    prediction is not finite, or the probes of earlier tasks are predicted worse than when the version was learnt.

    Of a language model, tasks with more than 64 probes are left out, since generating takes long.
    """
    transform = image_transform(predictor.config, predictor.backbone) if predictor.kind == "image" else None
    tokenise = predictor.reader.tokenise if isinstance(predictor, LanguagePredictor) else None
    recorded = {} if predictor.card.gate is None else {change.name: change for change in predictor.card.gate.tasks}
    examples, correct, expected, compared = 0, 0, 0.0, 0
    for card in lineage:
        probes = kept.unpacked(store.kept(card.folder, kept.PROBES), transform, tokenise)
        if not len(probes) or (tokenise is not None and len(probes) > MOST_ASKED):
            continue
        found = predictor.outcomes(probes)
        if found.confidence_n is not None and not np.isfinite(found.confidence_n).all():
            raise ModelError(
                f"a prediction for the probes of task {card.name!r} is not finite: the weights are damaged."
            )
        examples += len(probes)
        change = recorded.get(card.name)
        if change is not None and change.examples == len(probes):
            compared += len(probes)
            correct += found.correct
            expected += change.after * len(probes)
    if not examples:
        return _check_noise(predictor)
    if isinstance(predictor, LanguagePredictor):
        predictor.check_finite()  # texts and outcomes do not show it
    if compared and expected - correct > max(1.0, ALLOWED_LOSS * compared):
        raise ModelError(
            f"it predicts {correct} of {compared} probes of earlier tasks correctly, where {expected:.0f} were correct when it "
            "was learnt: its weights are not those that were measured."
        )
    recorded_as = "as recorded" if round(expected) == correct else f"{expected:.0f} as recorded"
    told = f"; {correct} of {compared} correct, {recorded_as}" if compared else ""
    return f"{examples} probes, all predictions finite{told}"


def _check_noise(predictor: Predictor | LanguagePredictor) -> str:
    """Returns what predictions for something that is in no data have shown. Raises ModelError where one is not finite."""
    if isinstance(predictor, LanguagePredictor):
        predictor.check_finite()
        return "no probes are used; the log-likelihood of a text is finite"
    predictor.scores(_noise(predictor))
    return "no probes are kept; predictions for noise are finite"


def _noise(predictor: Predictor) -> Any:
    size = 64
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    batch, errors = predictor.read(["noise"] if predictor.kind == "text" else [noise])
    if batch is None:
        raise ModelError(f"it cannot read an input: {errors[0]}.")
    return batch


def without_folders(message: str, root: Path) -> str:
    """Returns a message in which the model's directory is called by its last name, and any other absolute path has lost its
    folders."""
    name = root.resolve().name
    for folder in sorted({str(root.resolve()), str(root.absolute()), str(root)}, key=len, reverse=True):
        if folder not in (".", "/"):
            message = message.replace(folder, name)
    return re.sub(r"(?<![\w.~-])(?:/[^\s/:'\"]+)+/(?=[^\s/])", "", message)


class Versions:
    """Holds the version that is served. All its methods are called on the event loop.

    seconds: between two looks at the model's directory.
    """

    def __init__(self, path: Path, *, device: str | None = None, seconds: float = 1.0) -> None:
        self.path, self.device, self.seconds = path, device, seconds
        self.store = Store(path)
        self._seen = self._stamp()
        self.current = load(path, device)
        self.refused: Refused | None = None
        self.refusals = 0
        self.told: tuple[object, dict[str, Any]] = (None, {})
        """The newest response to /tasks, after the version and the history that it tells."""
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="lamina-load")

    def take(self) -> Version:
        """Returns the version that is served, for one request. `give` hands it back."""
        self.current.users += 1
        return self.current

    def give(self, version: Version) -> None:
        version.users -= 1
        self._close_unused(version)

    async def watch(self) -> None:
        """Look for a newer version, until cancelled."""
        left = 0
        while True:
            await asyncio.sleep(self.seconds)
            stamp, left = self._stamp(), left - 1
            if stamp != self._seen or left == 0:
                self._seen = stamp
                left = 0 if await self._follow() else RETRY

    async def _follow(self) -> bool:
        """Serve the newest version, if it is another and passes its check. Returns False where another try may succeed."""
        loop = asyncio.get_running_loop()
        number = None
        try:
            number = (await loop.run_in_executor(self._loader, self.store.facts)).version
            if number == self.current.number:
                self.refused = None
                return True
            fresh = await loop.run_in_executor(self._loader, load, self.path, self.device)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a new version, the old one goes on
            self._refuse(number, error)
            return isinstance(error, LaminaError)
        takes, took = fresh.predictor.kind, self.current.predictor.kind
        if takes != took:
            fresh.retired = True
            self._close_unused(fresh)
            self._refuse(
                number, ModelError(f"it takes {takes}s, and the server was started for {took}s: start another.")
            )
            return True
        before, self.current = self.current, fresh
        self.refused = None
        before.retired = True
        log.info("version %d is served now, in place of %d (%s)", fresh.number, before.number, fresh.checked)
        self._close_unused(before)
        return True

    def _refuse(self, number: int | None, error: BaseException) -> None:
        # The message may name folders of this machine, which are nobody's business.
        message = str(error) if isinstance(error, LaminaError) else f"{type(error).__name__}: {error}"
        refused = Refused(-1 if number is None else number, without_folders(message, self.path))
        if refused == self.refused:
            return
        self.refused = refused
        self.refusals += 1
        told = "the newest version" if number is None else f"version {number}"
        log.error("%s is refused, and version %d goes on being served: %s", told, self.current.number, error)

    def _close_unused(self, version: Version) -> None:
        if version.retired and not version.users:
            try:
                self._loader.submit(version.predictor.close)
            except RuntimeError:  # the server ends
                version.predictor.close()

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            found = (self.path / "model.json").stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def close(self) -> None:
        self._loader.shutdown(wait=False, cancel_futures=True)  # a version that is being loaded is not waited for
        self.current.predictor.close()
