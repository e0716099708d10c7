"""Trackers: figures of a run for TensorBoard, MLflow, Weights & Biases or trackio, beside lamina's own record.

A tracker has three methods. Each library is imported when it is asked for, and writes into the directory of the run, or where
its own environment variables say; none uses the network unless told to by these. A tracker that fails is dropped with a note:
the run goes on.
"""

import hashlib
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lamina.config import RunConfig, flat
from lamina.data.streams import Stream
from lamina.engine.loop import Event
from lamina.engine.state import RunState
from lamina.errors import ConfigError
from lamina.maths import metrics

NEEDS = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb", "trackio": "trackio"}
"""The module of each tracker."""


class Tracker(Protocol):
    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        """Opens the run, or goes on with it. settings: by dotted key."""
        ...

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def end(self) -> None: ...


class TensorBoard:
    def __init__(self, project: str, folder: Path) -> None:
        del project  # a folder is a run
        self.folder = folder / "tensorboard"

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter(str(self.folder))
        self._writer.add_text(
            f"settings of {name}", "\n".join(f"    {key}: {value}" for key, value in settings.items())
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def end(self) -> None:
        self._writer.close()


class MLflow:
    """Writes to $MLFLOW_TRACKING_URI, or to a SQLite file in the run."""

    def __init__(self, project: str, folder: Path) -> None:
        self.project, self.folder = project, folder

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._mlflow = mlflow = import_module("mlflow")
        self._before = os.environ.get("MLFLOW_TRACKING_URI")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{self.folder.resolve() / 'mlflow.db'}")
        mlflow.set_experiment(self.project)
        mark = {"lamina.run": str(self.folder.resolve())}
        found = mlflow.search_runs(filter_string=f"tags.`lamina.run` = '{mark['lamina.run']}'", output_format="list")
        self._run = (
            mlflow.start_run(run_id=found[0].info.run_id) if found else mlflow.start_run(run_name=name, tags=mark)
        )
        if not found:
            mlflow.log_params({key: str(value)[:500] for key, value in settings.items()})

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def end(self) -> None:
        self._mlflow.end_run()
        if self._before is None:  # it was set for this run alone
            os.environ.pop("MLFLOW_TRACKING_URI", None)
            self._mlflow.set_tracking_uri(None)


class WandB:
    """Offline unless $WANDB_MODE says otherwise; `wandb sync` uploads what was written."""

    def __init__(self, project: str, folder: Path) -> None:
        self.project, self.folder = project, folder

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        wandb = import_module("wandb")
        mark = hashlib.blake2b(str(self.folder.resolve()).encode(), digest_size=6).hexdigest()
        self._run = wandb.init(
            project=self.project,
            name=name,
            id=mark,
            resume="allow",
            config=dict(settings),
            dir=str(self.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log({**figures, "step": step})

    def end(self) -> None:
        self._run.finish()


class Trackio:
    """Writes to $TRACKIO_DIR, or to a folder in the run. `trackio show` reads it there."""

    def __init__(self, project: str, folder: Path) -> None:
        self.project, self.folder = project, folder

    def begin(self, name: str, settings: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(self.folder.resolve() / "trackio"))  # read when it is imported
        self._trackio = import_module("trackio")
        self._trackio.init(
            self.project, name=name, config=dict(settings), resume="allow", embed=False, auto_log_cpu=False
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._trackio.log(dict(figures), step=step)

    def end(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[str, Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "trackio": Trackio,
}


def check_trackers(config: RunConfig) -> None:
    """Raises ConfigError for a tracker that is not installed."""
    for name in config.tracking.to:
        if importlib.util.find_spec(NEEDS[name]) is None:
            raise ConfigError(f"tracking.to: {name} is not installed. pip install 'lamina[{name}]'")


class Tracking:
    """The trackers of a run, fed with its events."""

    def __init__(self, config: RunConfig, out: Path, note: Callable[[str], None]) -> None:
        """note: is told once of a tracker that failed."""
        self.every, self.note = config.tracking.every, note
        self._trackers: dict[str, Tracker] = {}
        settings = dict(flat(config.model_dump(mode="json")))
        for name in config.tracking.to:
            made = TRACKERS[name](config.tracking.project, out)
            if self._safely(name, lambda made=made: made.begin(out.name, settings)):  # type: ignore[misc]
                self._trackers[name] = made

    def event(self, event: Event, stream: Stream, state: RunState) -> None:
        """Logs the loss of a training step, or what was measured after a task. Steps count on over the tasks."""
        before = sum(entry.steps for entry in state.lineage[: event.task])
        if event.phase == "train" and event.loss is not None and event.done % self.every == 0:
            self._log({"loss": event.loss}, before + event.done)
        elif event.accuracy is not None:
            last = state.matrix.accuracy_ij[event.task]
            found = {f"accuracy/{stream[j].name}": float(last[j]) for j in range(event.task + 1)}
            found |= {"average accuracy": event.accuracy, "tasks learnt": event.task + 1}
            if event.task:
                found["forgetting"] = float(metrics.forgetting_after(state.matrix)[event.task])
            steps = sum(entry.steps for entry in state.lineage[: event.task + 1])
            self._log({key: value for key, value in found.items() if not math.isnan(value)}, steps)

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._safely(name, tracker.end)

    def _log(self, figures: Mapping[str, float], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            self._safely(name, lambda tracker=tracker: tracker.log(figures, step))  # type: ignore[misc]

    def _safely(self, name: str, work: Callable[[], None]) -> bool:
        """Returns whether the work of a tracker succeeded. One that fails is not used again."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work()
        except Exception as error:  # noqa: BLE001 - whatever it raises, the run goes on
            self._trackers.pop(name, None)
            self.note(f"{name} failed and is not used any more ({type(error).__name__}: {error}). The run goes on.")
            return False
        return True
