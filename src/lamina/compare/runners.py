"""Where the cells of a comparison run: processes of this machine, a SLURM cluster (through submitit), or a Ray cluster.

Every runner starts the same command, `lamina run-cell`, in the folder of the cell. On a cluster this folder, the data, the
backbone and the Python environment must be on a file system that all machines share. A cell whose machine or process is lost
is started again, elsewhere, and resumes from its last checkpoint.
"""

import importlib
import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import Field

from lamina.compare import cell_run
from lamina.compare.cells import Place, note_holder
from lamina.config import Section
from lamina.errors import ConfigError
from lamina.files import replace_text
from lamina.runs.side_by_side import Process

JOB = "job.json"
WAITING = ("PENDING", "REQUEUED", "CONFIGURING", "RUNNING")
"""States of SLURM in which a job will run, or has only just begun to."""
STOPPED = 130
"""Exit code of a run that was asked to stop, and saved."""
LOST = -999
"""In place of an exit code: the process or its machine is gone, and the cell should be started again."""


class Resources(Section):
    """What a run needs."""

    cpus: int = Field(1, ge=1)
    """Cores."""
    gpus: int = Field(0, ge=0)
    """GPUs."""
    memory_gb: float | None = Field(None, gt=0)
    """Main memory, GB. Not set: not limited."""
    minutes: int = Field(60, ge=1)
    """Time that SLURM gives a job. A run that needs more saves, and continues in another."""


@dataclass(frozen=True)
class Started:
    """A cell to start: its lock is held here."""

    place: Place
    lock: IO[str]
    resources: Resources


class Runner(Protocol):
    side_by_side: int
    """Most cells at a time."""
    pause: float
    """Seconds between two looks at the cells at work."""

    def start(self, cells: Sequence[Started]) -> list[Process]:
        """Begins or resumes the runs of these cells."""
        ...

    def leave(self) -> str | None:
        """Returns what the user is told of runs that go on when the comparison is stopped; None where they stop with it."""
        ...


@dataclass
class Local:
    """Processes of this machine."""

    side_by_side: int = 1
    gpus: int = 0
    """GPUs of this machine: each is given to one run at a time."""
    pause: float = 0.2
    _busy: dict[int, Process] = field(default_factory=dict)

    def start(self, cells: Sequence[Started]) -> list[Process]:
        return [self._start(cell) for cell in cells]

    def leave(self) -> str | None:
        return None

    def _start(self, cell: Started) -> Process:
        free = [n for n in range(self.gpus) if n not in self._busy or self._busy[n].poll() is not None]
        given = free[: cell.resources.gpus]
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, given))} if given else {}
        process = cell_run.launch(cell.place.folder, "--held", pass_fds=[cell.lock.fileno()], environment=seen)
        self._busy |= dict.fromkeys(given, process)
        note_holder(cell.lock, f"process {process.pid}")
        return process


def local(side_by_side: int, needed: Sequence[Resources]) -> Local:
    """Returns the runner of this machine. Raises ConfigError where runs need more cores or GPUs than it has."""
    cpus, gpus = max(r.cpus for r in needed), max(r.gpus for r in needed)
    cores = len(os.sched_getaffinity(0))
    if cpus > cores:
        raise ConfigError(f"resources.cpus = {cpus}: this machine has {cores} cores. Ask for fewer, or use a cluster.")
    if not gpus:
        return Local(side_by_side)
    there = _gpus()
    if gpus > there:
        raise ConfigError(f"resources.gpus = {gpus}: this machine has {there} GPUs. Ask for fewer, or use a cluster.")
    return Local(min(side_by_side, there // gpus), there)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


# ---------------------------------------------------------------------------------------------- other machines


@dataclass
class Remote:
    """A run on another machine. `job` is what the cluster calls it."""

    place: Place
    attempt: str
    job: Any
    gone: Callable[[Any], bool]
    """Whether the cluster has no such job any more."""
    cancel: Callable[[Any, bool], None]
    """Takes the job from the queue or ends it; at once where the second argument says so."""
    pid: int = 0

    def poll(self) -> int | None:
        code = cell_run.how_it_ended(self.place.folder, self.attempt)
        if code in (None, STOPPED) and self.gone(self.job):
            code = cell_run.how_it_ended(self.place.folder, self.attempt)  # it may have ended just now
            return LOST if code in (None, STOPPED) else code
        return None if code == STOPPED else code  # SLURM has queued it again

    def terminate(self) -> None:
        self.cancel(self.job, False)

    def kill(self) -> None:
        self.cancel(self.job, True)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.5)
        return code


def _free(cells: Sequence[Started]) -> list[tuple[Place, Resources, str]]:
    """Lets go of the locks, which the runs will take, and returns each cell with a name for this attempt."""
    for cell in cells:
        cell.lock.close()
    return [(cell.place, cell.resources, uuid.uuid4().hex) for cell in cells]


class Slurm:
    """Jobs of a SLURM cluster, submitted as arrays. They go on when the comparison ends."""

    pause = 2.0

    def __init__(self, folder: Path, side_by_side: int | None, parameters: Mapping[str, str]) -> None:
        """folder: for the files of submitit. parameters: of submitit's executor for SLURM, such as partition, account or
        setup; `cluster: local` tries everything out with processes of this machine.

        Raises ConfigError where submitit is not installed, SLURM is not found, or a parameter is unknown."""
        submitit = _needed("submitit", "slurm")
        given = dict(parameters)
        self._cluster = given.pop("cluster", "slurm")
        if self._cluster not in ("slurm", "local"):
            raise ConfigError(f"--slurm cluster={self._cluster}: allowed are slurm and local")
        if self._cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
            raise ConfigError("--runner slurm: `sbatch` is not found. Give the command on a login node of the cluster.")
        self.folder, self.side_by_side = folder, side_by_side or 1000
        self._submitit = submitit
        self._parameters = {f"slurm_{key}": _value(text) for key, text in given.items()}
        self._executor(Resources())

    def start(self, cells: Sequence[Started]) -> list[Process]:
        free = _free(cells)
        found = {place: waiting for place, _, _ in free if (waiting := self._in_the_queue(place))}
        for resources in dict.fromkeys(resources for _, resources, _ in free):
            group = [(place, attempt) for place, needed, attempt in free if needed == resources and place not in found]
            executor = self._executor(resources)
            with executor.batch():  # one array of SLURM
                jobs = [executor.submit(SlurmRun(), str(place.folder.resolve()), attempt) for place, attempt in group]
            for (place, attempt), job in zip(group, jobs, strict=True):
                replace_text(place.folder / JOB, json.dumps({"attempt": attempt, "job": str(job.job_id)}) + "\n")
                found[place] = self._remote(place, attempt, job)
        return [found[place] for place, _, _ in free]

    def _in_the_queue(self, place: Place) -> Process | None:
        """Returns the job that an earlier comparison submitted for a cell, where it is still waiting."""
        file = place.folder / JOB
        if self._cluster != "slurm" or not file.exists():
            return None
        noted = json.loads(file.read_text(encoding="utf-8"))
        job = self._submitit.SlurmJob(folder=self.folder, job_id=noted["job"])
        return self._remote(place, noted["attempt"], job) if job.state in WAITING else None

    def _remote(self, place: Place, attempt: str, job: Any) -> Process:
        return Remote(place, attempt, job, lambda j: bool(j.done()), lambda j, _: j.cancel())

    def leave(self) -> str | None:
        return "the jobs go on in SLURM (`squeue --me` lists them, `scancel` ends them)."

    def _executor(self, resources: Resources) -> Any:
        executor = self._submitit.AutoExecutor(folder=self.folder, cluster=self._cluster, slurm_max_num_timeout=1000)
        needs: dict[str, Any] = {"name": "lamina", "cpus_per_task": resources.cpus, "gpus_per_node": resources.gpus}
        needs |= {"timeout_min": resources.minutes, "slurm_array_parallelism": self.side_by_side}
        needs |= {"mem_gb": resources.memory_gb} if resources.memory_gb else {}
        try:
            executor.update_parameters(**needs, **self._parameters)
        except (NameError, TypeError, ValueError) as error:
            raise ConfigError(f"--slurm: {str(error).splitlines()[0]}") from error
        return executor


class SlurmRun:
    """What a job of SLURM does. Before its time is over, submitit submits it again, and the run continues there."""

    def __call__(self, folder: str, attempt: str) -> int:
        return cell_run.run_there(folder, attempt)

    def checkpoint(self, folder: str, attempt: str) -> Any:
        import submitit

        return submitit.helpers.DelayedSubmission(self, folder, attempt)


class Ray:
    """Tasks of a Ray cluster, which gives each its CPUs and GPUs."""

    pause = 1.0

    def __init__(self, address: str, side_by_side: int | None) -> None:
        """Raises ConfigError where ray is not installed, or no cluster is found at this address."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = _needed("ray", "ray")
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--runner ray: no cluster at {address!r} ({str(error).splitlines()[0]}). Start one with `ray start --head`, "
                "and join other machines with `ray start --address HOST:6379`."
            ) from error
        self.side_by_side = side_by_side or 1000
        self._task = self._ray.remote(cell_run.run_there)

    def start(self, cells: Sequence[Started]) -> list[Process]:
        return [self._start(*cell) for cell in _free(cells)]

    def leave(self) -> str | None:
        return None

    def _start(self, place: Place, resources: Resources, attempt: str) -> Process:
        needs: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": 0}
        needs |= {"memory": int(resources.memory_gb * 2**30)} if resources.memory_gb else {}
        job = self._task.options(**needs).remote(str(place.folder.resolve()), attempt)
        return Remote(place, attempt, job, self._gone, lambda j, at_once: self._ray.cancel(j, force=at_once))

    def _gone(self, job: Any) -> bool:
        ready, _ = self._ray.wait([job], timeout=0)
        return bool(ready)


def _needed(package: str, extra: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"--runner {extra} needs {package}: pip install 'lamina[{extra}]'")
    return importlib.import_module(package)


def _value(text: str) -> Any:
    """Returns a number where the text is one."""
    try:
        return int(text)
    except ValueError:
        return text
