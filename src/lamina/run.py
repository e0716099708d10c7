"""A run: one method on one stream, in a directory of its own that can be killed, resumed, evaluated and reported.

DIR/
  config.json        every setting
  environment.json   what was decided or found at the start: device, precision, threads, machine, versions
  checkpoints/       see engine/checkpoint.py
  events.jsonl       a line per finished phase
  results.json       the record of the finished run
  report.html        the same for people
  parallel/          while tasks are trained side by side, see parallel.py
  lock               held by the process at work
"""

import dataclasses
import fcntl
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from lamina import __version__, backbones, data, metrics, parallel, report, streams
from lamina import config as configuration
from lamina.backbones import Backbone
from lamina.config import RunConfig
from lamina.data import Source
from lamina.engine import checkpoint, device, precision
from lamina.engine.consolidation import Memo
from lamina.engine.evaluate import answers
from lamina.engine.loop import Event, Loop, Position
from lamina.engine.order import in_order
from lamina.errors import CheckpointError, ConfigError, RunError
from lamina.learner import Learner
from lamina.methods import METHODS
from lamina.methods.base import Method, describe
from lamina.streams import Stream
from lamina.types import Batch, Examples, LabelledData, Split

FORMAT = 1
LEFTOVERS = frozenset({"lock", "environment.json", ".environment.json.tmp", ".config.json.tmp"})
"""What a run that was killed before it had begun may leave: no obstacle to a new one."""
Watch = Callable[[Stream | None, Event], None]
"""Told what is going on; there is no stream yet while data is loaded."""


def load_config(file: Path | None, overrides: list[tuple[str, Any]]) -> RunConfig:
    """The configuration of a run from a YAML file and settings on top. Raises ConfigError naming every error."""
    types = {name: method.config_type for name, method in METHODS.items()}
    return configuration.load(file, overrides, method_settings=types)


def create(config: RunConfig, out: Path, watch: Watch = lambda *_: None) -> dict[str, Any]:
    """Run in a new directory, from the start to the end, and return the record.

    Raises RunError where the directory holds something already, DataError, BackboneError, ConfigError or MethodError
    where the run cannot begin (nothing is left behind then), Interrupted when asked to stop by SIGINT or SIGTERM.
    """
    _refuse_used(out)
    config = with_whole_paths(config)
    setup = _Setup(config, None, watch)
    loop = setup.loop(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be made ({error.strerror}). Choose another directory with --out.") from error
    with _locked(out):
        _refuse_used(out)  # by a run that began meanwhile
        checkpoint.replace_text(out / "environment.json", json.dumps(setup.environment, indent=1) + "\n")
        checkpoint.replace_text(out / "config.json", config.model_dump_json(indent=1) + "\n")
        return _work(setup, loop, out, watch)


def resume(out: Path, watch: Watch = lambda *_: None, jobs: int | None = None) -> dict[str, Any]:
    """Go on with a run from its newest whole checkpoint; a finished one returns its record at once. jobs: tasks trained at
    a time from now on, where that is not what the run began with.

    Raises RunError where the directory is not a run or in use, CheckpointError where its state is damaged or belongs to
    other data, weights or settings.
    """
    _refuse_other(out)
    with _locked(out):
        config, environment = _saved(out)
        if (out / "results.json").exists():
            return report.read_record(out)
        setup = _Setup(config.model_copy(update={"jobs": jobs or config.jobs}), environment, watch)
        return _work(setup, setup.loop(out), out, watch)


def replay(
    chain: Path, config: RunConfig, out: Path, memo: Memo | None = None, watch: Watch = lambda *_: None
) -> dict[str, Any]:
    """The run that this configuration describes, without training: what the method made of every task is taken from a run
    that kept it (`keep_chain`), is finished, and differs from this one in `consolidation` and `evaluation` at most. The result
    is that of training anew, seconds included: those of the training, and those of features that were found in the memo. Only
    the peak of memory is not known.

    memo: features are noted there and taken from there, so that several replays of one run compute them once.
    Raises RunError where the other run is not finished, or has no chain or another configuration.
    """
    kept, environment = _saved(chain)
    config = with_whole_paths(config)
    same = {"consolidation": kept.consolidation, "evaluation": kept.evaluation, "keep_chain": True}
    if (
        not kept.keep_chain
        or config.model_copy(update=same) != kept
        or config.consolidation.init != kept.consolidation.init
    ):
        raise RunError(
            f"{chain} cannot stand for the training of this run: it must have keep_chain = true, the same "
            "consolidation.init, and differ in nothing else outside consolidation and evaluation."
        )
    if not (chain / "results.json").exists():
        raise RunError(
            f"{chain} cannot stand for the training of this run: it is not finished. `lamina resume {chain}` goes on."
        )
    _refuse_used(out)
    spent = report.read_record(chain)["cost"]["seconds"]
    setup = _Setup(config, environment, watch)
    loop = setup.loop(out, replay=chain / "chain")
    loop.consolidation.memo = memo
    loop.clock["seconds"] = {phase: spent[phase] for phase in ("begin", "train", "end") if phase in spent}
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        checkpoint.replace_text(out / "environment.json", json.dumps(setup.environment, indent=1) + "\n")
        checkpoint.replace_text(out / "config.json", config.model_dump_json(indent=1) + "\n")
        return _work(setup, loop, out, watch)


def evaluate(out: Path, split: Split = "test") -> list[dict[str, Any]]:
    """Measure the newest model of a run on each task it has learnt: names, counts of right answers, and of examples."""
    config, environment = _saved(out)
    setup = _Setup(config, environment)
    loop = setup.loop(out)
    loop.restore()
    learnt = {row.task for row in loop.learner.rows}
    found = []

    def batches(examples: Examples) -> Iterator[Batch]:
        positions = in_order(len(examples), config.evaluation.batch_size)
        return (examples.batch(p).to(loop.learner.device) for p in positions)

    with device.keeping_memory(), closing(loop.learner):
        for task in setup.stream:
            examples = task.split(split)
            if task.name in learnt and len(examples):
                answer = answers(
                    loop.learner, loop.consolidation, examples, batches, task.name, told=setup.stream.tells_task
                )
                found.append(
                    {
                        "task": task.name,
                        "correct": answer.correct,
                        "correct_known_task": answer.correct_known_task,
                        "total": len(examples),
                    }
                )
    if not found:
        raise RunError(f"{out}: no task is learnt yet, or none has {split} examples. `lamina resume {out}` goes on.")
    return found


def train_task(out: Path, number: int, parent: int, watch: Watch) -> None:
    """Train one task of a run in a folder of its own, for the process `parent`; stop when that one is gone."""
    config, environment = _saved(out)
    folder = parallel.place(out, number)
    with _locked(folder, wait=True), stop_on_signals() as asked:
        setup = _Setup(config, environment)
        loop = setup.loop(folder)
        loop.position = Position(number)
        loop.on_event = lambda event: watch(setup.stream, event)
        loop.should_stop = lambda: asked() or os.getppid() != parent
        with device.keeping_memory(), closing(loop.learner):
            loop.restore()
            loop.run(until="end")


class _Setup:
    """Everything a run needs, made from its configuration. environment: what an earlier process decided, if any."""

    def __init__(self, config: RunConfig, environment: dict[str, Any] | None, watch: Watch = lambda *_: None) -> None:
        self.started = time.perf_counter()
        self.config = config
        self.method = METHODS[config.method["name"]]
        if config.jobs > 1 and not self.method.independent:
            raise ConfigError(
                f"jobs = {config.jobs}: method {self.method.name!r} learns each task from what earlier ones left, so its "
                f"tasks cannot be trained side by side. Leave jobs at 1, or choose a method that learns each task from the "
                f"pre-trained model alone: {', '.join(name for name, known in METHODS.items() if known.independent)}."
            )
        if config.jobs > 1 and config.training.distil:
            raise ConfigError(
                f"jobs = {config.jobs} does not go with training.distil = {config.training.distil}, which compares every task "
                f"with what the ones before it left. Leave jobs at 1, or training.distil at 0."
            )
        settings = {key: value for key, value in config.method.items() if key != "name"}
        self.settings = self.method.config_type(**settings)
        self.device = device.resolve(environment.get("device", "cpu") if environment else config.device)
        self.backbone = backbones.load(
            config.backbone.name,
            image_size=config.backbone.image_size,
            pooling=config.backbone.pooling,
            mean=config.backbone.mean,
            std=config.backbone.std,
        )
        self.backbone_parameters = sum(p.numel() for p in self.backbone.module.parameters())
        self.data = load_data(config, self.backbone, watch)
        self.stream = make_stream(config, self.data)
        if config.evaluation.split == "val" and not all(len(task.val) for task in self.stream):
            raise ConfigError(
                "evaluation.split = 'val': the data has no validation split. Hold one out, for example with "
                "--set stream.validation=0.2"
            )
        device.prepare(self.device)
        self.environment = environment or _environment(config, self.device, self.backbone.width)
        torch.set_num_threads(self.environment["threads"])

    def loop(self, out: Path, replay: Path | None = None) -> Loop:
        config = self.config
        dtype = precision.DTYPES[self.environment["precision"]]
        learner = Learner(self.backbone, config.backbone.targets, config.backbone.blocks, dtype, self.device)
        if config.backbone.reuse_mb:
            learner.reuse_below(out, config.backbone.reuse_mb, config.data.views)
        method: Method[Any] = self.method(self.settings, len(self.stream))
        return Loop(
            learner=learner,
            method=method,
            stream=self.stream,
            training=config.training,
            evaluation=config.evaluation,
            consolidation=config.consolidation,
            seed=config.seed,
            checkpoints=out / "checkpoints",
            checkpoint_seconds=config.checkpoint_seconds,
            keep_chain=out / "chain" if config.keep_chain else None,
            replay=replay,
            views=config.data.views,
            identity={
                "configuration": configuration.fingerprint(config, self.method.config_type),
                "stream": self.stream.fingerprint,
                "backbone": self.backbone.hash,
            },
        )


def open_source(config: RunConfig) -> Source:
    """The examples a configuration names, not decoded yet."""
    section = config.data
    return data.open_source(
        section.source,
        kind=section.kind,
        columns=data.Columns(**section.columns.model_dump()),
        test_fraction=section.test_fraction,
    )


def load_data(config: RunConfig, backbone: Backbone, watch: Watch = lambda *_: None) -> LabelledData:
    """The labelled data a configuration names, as this backbone takes it."""
    section = config.data
    source = open_source(config)
    if source.kind != backbone.kind:
        raise ConfigError(
            f"data.source = {section.source!r} holds {source.kind}s, and backbone {backbone.name!r} takes {backbone.kind}s. "
            f"Choose a backbone or data to match."
        )
    if backbone.image is None:
        if backbone.tokenizer is None:
            raise ConfigError(
                f"backbone.name = {config.backbone.name!r} has no tokenizer beside its weights. Put tokenizer.json or "
                f"vocab.txt into its folder."
            )
        return data.load_texts(source, backbone.tokenizer, max_length=section.max_length)
    transform = data.ImageTransform(
        size=backbone.image.size,
        mean=backbone.image.mean,
        std=backbone.image.std,
        evaluate=section.evaluate,
        train=section.augment,
        scale=section.crop_scale,
    )
    cache = Path(section.cache).expanduser() if section.cache else None

    def progress(done: int, total: int) -> None:
        watch(None, Event(task=0, phase="load", done=done, total=total))

    return data.load_images(source, transform, cache=cache, on_damaged=section.on_damaged, progress=progress)


def make_stream(config: RunConfig, labelled: LabelledData) -> Stream:
    """The stream a configuration describes. Raises DataError where the data cannot be cut so."""
    section = config.stream
    if section.scenario == "mixed":
        if section.plan is None:
            raise ConfigError(
                "stream.scenario = 'mixed' needs stream.plan: a list of tasks with name, classes, domains."
            )
        plan = streams.named_plan(labelled, [(p.name, p.classes, p.domains) for p in section.plan])
    elif section.scenario == "domain":
        plan = streams.domain_plan(labelled, section.domains)
    else:
        plan = streams.class_plan(labelled, section.tasks, section.order_seed)
    stream = streams.make_stream(
        labelled,
        plan,
        section.scenario,
        per_class=config.data.per_class,
        validation=section.validation,
        measured_per_class=config.evaluation.per_class,
    )
    if section.first is not None:
        stream = stream.first(section.first)
    return stream.joined() if section.joined else stream


def check_stream(config: RunConfig) -> None:
    """Raises what `make_stream` would raise, without decoding any data."""
    make_stream(config, data.undecoded(open_source(config)))


def _work(setup: _Setup, loop: Loop, out: Path, watch: Watch) -> dict[str, Any]:
    def on_event(event: Event) -> None:
        if event.seconds:
            with (out / "events.jsonl").open("a", encoding="utf-8") as log:
                record = dataclasses.asdict(event) | {"time": _now(), "task": setup.stream[event.task].name}
                log.write(json.dumps(record) + "\n")
        watch(setup.stream, event)

    with stop_on_signals() as should_stop, device.keeping_memory(), closing(loop.learner):
        loop.on_event, loop.should_stop = on_event, should_stop
        loop.restore()
        seconds = loop.clock["seconds"]
        seconds["load"] = seconds.get("load", 0.0) + time.perf_counter() - setup.started
        if setup.config.jobs > 1 or (out / "parallel").exists():
            _train_side_by_side(setup, loop, out)
        loop.run()
    record = _record(setup, loop)
    shutil.rmtree(out / "parallel", ignore_errors=True)
    report.write([record], out / "report.html")
    checkpoint.replace_text(out / "results.json", json.dumps(record, indent=1) + "\n")  # last: it says that all is done
    return record


def _train_side_by_side(setup: _Setup, loop: Loop, out: Path) -> None:
    """All tasks whose training has not begun in the loop, which then takes what other processes have trained."""
    now = loop.position
    begun = now.phase in ("end", "evaluate", "done") or now.step > 0
    names = {n: task.name for n, task in enumerate(setup.stream) if n >= now.task + begun}
    loop.trained = {n: parallel.place(out, n) / "checkpoints" for n in names}
    left = {n: name for n, name in names.items() if loop.trained_aside(n) is None}
    if not left:
        return
    started, total = time.perf_counter(), len(setup.stream)

    def show(done: int, at_work: str, seconds: float = 0.0) -> None:
        done += total - len(left)
        loop.on_event(Event(task=now.task, phase="parallel", done=done, total=total, at_work=at_work, seconds=seconds))

    try:
        parallel.train(out, left, setup.config.jobs, show, loop.should_stop)
        show(len(left), "", time.perf_counter() - started)
    finally:
        loop.clock["side_by_side"] = loop.clock.get("side_by_side", 0.0) + time.perf_counter() - started
        loop.save()


def _record(setup: _Setup, loop: Loop) -> dict[str, Any]:
    """What `results.json` holds."""
    config, stream, learner = setup.config, setup.stream, loop.learner
    seconds = {phase: round(value, 3) for phase, value in loop.clock["seconds"].items()}
    total, train = sum(seconds.values()), seconds.get("train", 0.0)
    for index, entry in enumerate(loop.lineage):
        of_task = [loss for task, _, loss in loop.losses if task == index]
        entry |= {
            "classes": [stream.class_names[c] for c in stream[index].classes],
            "loss_first": of_task[0] if of_task else None,
            "loss_last": of_task[-1] if of_task else None,
            "seconds": loop.clock["tasks"].get(str(index)),
            "learnt": loop.clock["learnt"].get(str(index)),
            "accuracy_at_end": float(loop.matrix.accuracy_ij[-1, index]),
        }
    shares = [
        sum(right) / sum(int(n) for n in loop.matrix.total_ij[i, : i + 1]) for i, right in enumerate(loop.right_task)
    ]
    figures = metrics.summary(loop.matrix) | {
        "final_accuracy_oracle": metrics.final_accuracy(loop.known_task),
        "task_id_accuracy": shares[-1],
    }
    if config.evaluation.unseen:
        guess = 1 / len({label for task in stream for label in task.classes})
        figures["forward_transfer"] = metrics.forward_transfer(loop.matrix, np.full(len(stream), guess))
    return {
        "format": FORMAT,
        "name": config.method["name"] + ("-joined" if config.stream.joined else ""),
        "created": _now(),
        "method": describe(setup.method),
        "config": config.model_dump(mode="json"),
        "stream": {
            "scenario": {"mixed": "mixed"}.get(stream.scenario, f"{stream.scenario}-incremental"),
            "fingerprint": stream.fingerprint,
            "data": stream.data_name,
            "kind": stream.kind,
            "tasks": [
                {
                    "name": task.name,
                    "classes": [stream.class_names[c] for c in task.classes],
                    "domain": task.domain,
                    **{split: len(task.split(split)) for split in ("train", "val", "test")},
                }
                for task in stream
            ],
        },
        "backbone": {
            "name": Path(setup.backbone.name).name,
            "hash": setup.backbone.hash,
            "parameters": setup.backbone_parameters,
            "kind": setup.backbone.kind,
        },
        "machine": setup.environment,
        "code": {"version": __version__, "commit": setup.environment["commit"]},
        "matrix": loop.matrix.as_dict(),
        "oracle": loop.known_task.as_dict(),
        "task_id_accuracy": shares,
        "metrics": figures,
        "classes": _class_counts(setup, loop),
        "cost": {
            "seconds": seconds | {"total": round(total, 3)},
            "steps": sum(entry["steps"] for entry in loop.lineage),
            "train_examples_per_second": loop.clock["examples"] / train if loop.clock["examples"] and train else None,
            "side_by_side_seconds": round(loop.clock["side_by_side"], 3) if "side_by_side" in loop.clock else None,
            "outside_training_share": 1 - train / total if total else None,
            "peak_memory_mb": None if loop.replay else _peak_memory_mb(),
            "peak_device_memory_mb": device.peak_memory_mb(setup.device),
            "trainable_parameters": loop.lineage[-1]["trainable_parameters"],
            "stored_parameters": learner.stored_parameters(),
            "memory_bytes": loop.method.memory_bytes + loop.consolidation.memory_bytes,
        },
        "lineage": loop.lineage,
        "losses": [
            [sum(entry["steps"] for entry in loop.lineage[:task]) + step, loss] for task, step, loss in loop.losses
        ],
        "skipped": list(setup.data.skipped),
    }


def _class_counts(setup: _Setup, loop: Loop) -> list[dict[str, Any]]:
    """For every class: examples of it in all tasks, and how many the last model answered right."""
    counts: dict[int, list[int]] = {}
    for j in range(loop.matrix.tasks):
        labels = setup.stream[j].split(setup.config.evaluation.split).labels_n
        for label, answer in zip(labels.tolist(), loop.last_answers[str(j)].tolist(), strict=True):
            right, total = counts.get(label, [0, 0])
            counts[label] = [right + (label == answer), total + 1]
    first_task = {label: task.name for task in reversed(setup.stream.tasks) for label in task.classes}
    return [
        {"name": setup.stream.class_names[c], "task": first_task[c], "correct": counts[c][0], "total": counts[c][1]}
        for c in sorted(counts)
    ]


def _refuse_used(out: Path) -> None:
    """Raises RunError where something is in the way of a new run."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file. Choose a directory with --out.")
    if out.is_dir() and any(path.name not in LEFTOVERS for path in out.iterdir()):
        remedy = "`lamina resume` goes on with it" if (out / "config.json").exists() else "it is not a run"
        raise RunError(f"{out} is not empty ({remedy}). Choose another directory with --out, or remove it.")


def _refuse_other(out: Path) -> None:
    """Raises RunError for what is not the directory of a run."""
    if not (out / "config.json").is_file():
        lacks = "it has no config.json" if out.is_dir() else "there is no such directory"
        raise RunError(f"{out} is not a run: {lacks}. `lamina run --out {out}` starts one.")


def _saved(out: Path) -> tuple[RunConfig, dict[str, Any]]:
    _refuse_other(out)
    try:
        content = checkpoint.read_json(out / "config.json")
        return load_config(None, list(content.items())), checkpoint.read_json(out / "environment.json")
    except (CheckpointError, ConfigError) as error:
        raise RunError(f"{out}: its settings cannot be read: {error}") from error


def with_whole_paths(config: RunConfig) -> RunConfig:
    """Paths as seen from anywhere, so that a run can be resumed from another working directory."""

    def whole(name: str) -> str:
        return str(Path(name).expanduser().resolve()) if name != "nano" and Path(name).expanduser().exists() else name

    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"source": whole(config.data.source)}),
            "backbone": config.backbone.model_copy(update={"name": whole(config.backbone.name)}),
        }
    )


def _environment(config: RunConfig, where: device.Device, width: int) -> dict[str, Any]:
    """What this machine is, and what was decided for it. A resumed run keeps these decisions, wherever it resumes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    elif config.jobs > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // config.jobs))
    return {
        "device": where,
        "card": device.card(where),
        "precision": precision.resolve(config.precision, width, where),
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lamina": __version__,
        "commit": _commit(),
        "started": _now(),
    }


def _peak_memory_mb() -> float:
    """Of this process alone: getrusage would count what the process that started it had in use."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this code runs from, None where it is installed without one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    found = subprocess.run(
        ["git", "-C", str(folder), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


@contextmanager
def _locked(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the run directory. The system frees the lock when the process ends, however it ends. Where another process
    holds it: wait for that, or raise RunError naming it."""
    with (out / "lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            lock.seek(0)
            raise RunError(
                f"{out} is in use by {lock.read().strip() or 'another process'}. Wait for it, or stop it first."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()} since {_now()}\n")
        lock.flush()
        yield


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], bool]]:
    """While open, SIGINT and SIGTERM ask for a stop (a second SIGINT kills at once); the function tells if one came."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, _: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
