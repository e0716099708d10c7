"""Where the cells of a comparison run: processes of this machine, a SLURM cluster (through submitit), or a Ray cluster.

Every runner starts the same command, `lamina run-cell`, in the folder of the cell. On a cluster this folder, the data, the
backbone and the Python environment must be on a file system that all machines share. There, a cell whose machine or process is
lost is started again, elsewhere, and resumes from its last checkpoint. On this machine it has failed, and the next comparison
resumes it.
"""

import importlib
import importlib.util
import json
import os
import socket
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
from lamina.report.text import count
from lamina.runs.side_by_side import Process

JOB = "job.json"
WAITING = ("PENDING", "REQUEUED", "CONFIGURING", "RUNNING")
"""States of SLURM in which a job will run, or has only just begun to."""
STOPPED = 130
"""Exit code of a run that was asked to stop, and saved."""
MANY = 1000
"""Cells that a cluster is given at a time where nothing else was said."""
ANSWER = 10.0
"""Seconds in which a cluster must answer."""
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

    def reason(self, place: Place) -> str:
        """Returns what the cluster says of the last job of a cell that was lost, in a line; empty where it says nothing."""
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

    def reason(self, place: Place) -> str:
        return place.last_lines(1)

    def _start(self, cell: Started) -> Process:
        free = [n for n in range(self.gpus) if n not in self._busy or self._busy[n].poll() is not None]
        given = free[: cell.resources.gpus]
        inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = inherited.split(",") if inherited else [str(n) for n in range(self.gpus)]
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(names[n] for n in given)} if self.gpus else {}
        process = cell_run.launch(cell.place.folder, "--held", pass_fds=[cell.lock.fileno()], environment=seen)
        self._busy |= dict.fromkeys(given, process)
        note_holder(cell.lock, f"process {process.pid}")
        return process


def local(side_by_side: int, needed: Sequence[Resources]) -> Local:
    """Returns the runner of this machine. Raises ConfigError where runs need more cores or GPUs than it has."""
    cpus, gpus = max(r.cpus for r in needed), max(r.gpus for r in needed)
    cores = len(os.sched_getaffinity(0))
    if cpus > cores:
        raise ConfigError(
            f"resources.cpus = {cpus}: this machine has {count(cores, 'core')}. Ask for fewer, or use a cluster."
        )
    if not gpus:
        return Local(side_by_side)
    there = _gpus()
    if gpus > there:
        raise ConfigError(
            f"resources.gpus = {gpus}: this machine has {count(there, 'GPU')}. Ask for fewer, or use a cluster."
        )
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

    def __init__(self, folder: Path, side_by_side: int | None, parameters: Mapping[str, str], here: int = 1) -> None:
        """folder: for the files of submitit. parameters: of submitit's executor for SLURM, such as partition, account or
        setup; `cluster: local` tries everything out with processes of this machine. here: how many of those at a time.

        Raises ConfigError where submitit is not installed, SLURM is not found, or a parameter is unknown."""
        submitit = _needed("submitit", "slurm")
        given = dict(parameters)
        self._cluster = given.pop("cluster", "slurm")
        if self._cluster not in ("slurm", "local"):
            raise ConfigError(f"--slurm cluster={self._cluster}: allowed are slurm and local")
        if self._cluster == "slurm" and submitit.SlurmExecutor.affinity() < 0:
            raise ConfigError("--runner slurm: `sbatch` is not found. Give the command on a login node of the cluster.")
        self.folder, self.side_by_side = folder, side_by_side or (MANY if self._cluster == "slurm" else here)
        self._submitit = submitit
        self._parameters = {f"slurm_{key}": _value(key, text) for key, text in given.items()}
        self._executor(Resources())

    def start(self, cells: Sequence[Started]) -> list[Process]:
        free = _free(cells)
        noted = {place: job for place, _, _ in free if (job := self._noted(place)) is not None}
        found = {place: one for place, one in noted.items() if one.job.state in WAITING}
        for resources in dict.fromkeys(resources for place, resources, _ in free if place not in found):
            group = [(place, attempt) for place, needed, attempt in free if needed == resources and place not in found]
            executor = self._executor(resources)
            try:
                with executor.batch():  # one array of SLURM
                    jobs = [
                        executor.submit(SlurmRun(), str(place.folder.resolve()), attempt) for place, attempt in group
                    ]
            except RuntimeError as error:  # submitit's errors of jobs and submissions are RuntimeErrors
                raise ConfigError(f"--runner slurm: the jobs were refused ({_last_line(str(error))})") from error
            for (place, attempt), job in zip(group, jobs, strict=True):
                replace_text(place.folder / JOB, json.dumps({"attempt": attempt, "job": str(job.job_id)}) + "\n")
                found[place] = self._remote(place, attempt, job)
        return [found[place] for place, _, _ in free]

    def _noted(self, place: Place) -> Remote | None:
        """Returns the job that an earlier comparison submitted for a cell."""
        file = place.folder / JOB
        if self._cluster != "slurm" or not file.exists():
            return None
        noted = json.loads(file.read_text(encoding="utf-8"))
        return self._remote(place, noted["attempt"], self._submitit.SlurmJob(folder=self.folder, job_id=noted["job"]))

    def reason(self, place: Place) -> str:
        file = place.folder / JOB
        if not file.exists():
            return ""
        job = json.loads(file.read_text(encoding="utf-8"))["job"]
        logs = sorted(self.folder.glob(f"{job}_*log.err"))
        return f"{_last_line(logs[-1].read_text(encoding='utf-8', errors='replace'))} ({logs[-1]})" if logs else ""

    def _remote(self, place: Place, attempt: str, job: Any) -> Remote:
        return Remote(place, attempt, job, lambda j: bool(j.done()), lambda j, _: j.cancel())

    def leave(self) -> str | None:
        if self._cluster == "local":
            return "the processes that submitit started go on."
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

    def __init__(self, address: str, side_by_side: int | None, needed: Sequence[Resources]) -> None:
        """Raises ConfigError where ray is not installed, no cluster is found at this address, or none of its nodes has what a
        run needs."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = _needed("ray", "ray")
        try:
            _check_answer(address)
            self._ray.init(address=address, log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--runner ray: no cluster at {address!r} ({str(error).splitlines()[0]}). Start one with `ray start --head`, "
                "and join other machines with `ray start --address HOST:6379`."
            ) from error
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for one in needed:
            if not any(n.get("CPU", 0) >= one.cpus and n.get("GPU", 0) >= one.gpus for n in nodes):
                raise ConfigError(
                    f"resources cpus = {one.cpus}, gpus = {one.gpus}: no node of the Ray cluster has them. Ask for fewer, or "
                    "add a node."
                )
        self.side_by_side = side_by_side or MANY
        self._jobs: dict[Path, Any] = {}
        self._task = self._ray.remote(cell_run.run_there)

    def start(self, cells: Sequence[Started]) -> list[Process]:
        return [self._start(*cell) for cell in _free(cells)]

    def leave(self) -> str | None:
        return None

    def reason(self, place: Place) -> str:
        try:
            self._ray.get(self._jobs[place.folder], timeout=1)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises is what is asked for
            return _last_line(str(error))
        return ""

    def _start(self, place: Place, resources: Resources, attempt: str) -> Process:
        needs: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": 0}
        needs |= {"memory": int(resources.memory_gb * 2**30)} if resources.memory_gb else {}
        job = self._task.options(**needs).remote(str(place.folder.resolve()), attempt)
        self._jobs[place.folder] = job
        return Remote(place, attempt, job, self._gone, lambda j, at_once: self._ray.cancel(j, force=at_once))

    def _gone(self, job: Any) -> bool:
        ready, _ = self._ray.wait([job], timeout=0)
        return bool(ready)


def _check_answer(address: str) -> None:
    """Raises OSError where nothing listens at a HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()


def _needed(package: str, extra: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"--runner {extra} needs {package}: pip install 'lamina[{extra}]'")
    return importlib.import_module(package)


LISTS = ("setup", "teardown", "srun_args")
"""Parameters of submitit that are lists of commands."""


def _value(key: str, text: str) -> Any:
    """Returns the value of a parameter of submitit: true and false, whole numbers, lists where they are wanted, or text."""
    if key in LISTS:
        return [text]
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.isascii() and text.isdigit() and str(int(text)) == text else text


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")[:300]
