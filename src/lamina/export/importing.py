"""An adapter that was trained elsewhere becomes a task of a model: it takes the place of that task's training.

    before     as before any task: features of the new data are stored for drift compensation, merged weights are kept
    training   the adapter is added to every adapted layer as a finished branch; the adapter's classifier gives the outputs
    after      as after any task: weights are merged, old statistics moved, new ones measured, the classifier is fitted

So the meaning of a model stays what its method says. Where all branches add up, the new task changes the features of the old
ones, and the gate measures that. Where a router selects adapters (lamina, CoLoR), each acts alone.

Shape letters: o outputs, i inputs of a linear layer, r rank, d width, j outputs of the head, n examples.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lamina import backbones
from lamina.adapters import LowRank
from lamina.backbones import Backbone
from lamina.data.names import listed
from lamina.engine.consolidate import Consolidation
from lamina.engine.loop import restore
from lamina.engine.rehearsal import chosen, keep
from lamina.engine.state import Clock, Position, RunState, TaskEntry, now
from lamina.errors import BackboneError, MethodError, ModelError
from lamina.export.adapter_files import MOST_JSON, ForeignAdapter, plain_file, read_adapter
from lamina.export.foreign_head import head_of, prefixes_of
from lamina.export.written import FACTS
from lamina.learner import AdapterSite, Learner, learner_of
from lamina.maths.metrics import AccuracyMatrix
from lamina.methods import METHODS
from lamina.methods.base import Method
from lamina.model import Card, Facts, GateRefused, Learnt, Model, kept, readme
from lamina.model.card import Figures, LearntTask
from lamina.model.gate import Outcomes, Probes, judged
from lamina.model.predictor import load_backbone, outcomes, temperature_of
from lamina.model.settings import load_model_config
from lamina.model.tasks import Request, figures_of, new_task
from lamina.rng import seed_of
from lamina.runs.setup import Watch, image_transform, load_data
from lamina.speed import precision
from lamina.types import SPLITS, Batch, Examples, Task

BY_END = {"olora": False, "inflora": True, "color": True, "lamina": True}
"""Methods whose own end of a task takes over a plain branch, and whether it needs the task's data."""
ROUTED = ("color", "lamina")
"""Methods that select an adapter per input. Every layer has one."""
ADDED = ("finetune", "sora", "ewc", "clora", "sdlora", "slca")
"""Methods that add all branches up; the adapter becomes a finished one. Nothing protects it from later tasks."""
REFUSED = {
    "taskarithmetic": "it rebuilds its weights from the updates and examples that it stored itself",
    "prototype": "its classifier is the means of the bare backbone, and an adapter has no place in it",
    "fsa": "its features may not change after the first task",
    "ranpac": "its features may not change after the first task",
    "duallora": "each of its tasks consists of two adapters and the space that they protect",
    "moram": "its adapters compete for every token, and this one was trained alone",
}


@dataclass(frozen=True)
class _Parts:
    """A version that is changed in memory."""

    learner: Learner
    method: Method[Any]
    consolidation: Consolidation
    documents: Mapping[str, Any]


def import_adapter(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    *,
    name: str,
    classes: Sequence[str],
    data: str | os.PathLike[str] | None = None,
    same_base: bool = False,
    force: bool = False,
    watch: Watch = lambda *_: None,
) -> Learnt:
    """Make a PEFT LoRA adapter a task of a model, as a new version. Returns its card and what the gate has found.

    classes: the adapter's classes, in the order of its outputs. data: labelled data of them, needed for a unified classifier,
    and for methods that describe the inputs of every task. same_base: insist that the adapter's base is that of the model,
    where only its name says otherwise. force: accept what the gate refuses; recorded.
    Raises ModelError naming what is wrong with the adapter; MethodError for methods that cannot take one; GateRefused.
    """
    opened, path = Model(model), Path(adapter)
    with opened.store.writing():
        learnt = _import(opened, path, name, tuple(classes), data, same_base, force, watch)
        readme.write(opened.store)
    return learnt


def _import(
    model: Model,
    path: Path,
    name: str,
    classes: tuple[str, ...],
    data: str | os.PathLike[str] | None,
    same_base: bool,
    force: bool,
    watch: Watch,
) -> Learnt:
    store, facts = model.store, model.store.facts()
    lineage = store.lineage(facts.head)
    _check_request(facts, lineage, name, classes, given=data is not None)
    backbone = load_backbone(facts, store.path)
    found = read_adapter(path, _layers(backbone), prefixes_of(backbone))
    exported = _exported(found)
    _check_base(found, facts, exported, same_base)
    parts = _open(facts, backbone, store.state(facts.head) if facts.head is not None else None)
    spread = _spread(found, parts.learner, everywhere=facts.config.method["name"] in ROUTED)
    own = facts.config.consolidation.classifier == "own"
    if own and exported is not None and list(classes) != exported.get("outputs", list(classes)):
        raise ModelError(
            f"{path / FACTS} says that the adapter's outputs are {','.join(map(str, exported['outputs']))}, and --classes "
            f"names {','.join(classes)}. Give them as they are, in that order."
        )
    weight_jd, bias_j = head_of(found, backbone, len(classes), needed=own)
    task, names, mark = _task(facts, backbone, lineage[-1].class_names if lineage else (), name, classes, data, watch)
    probes = _probes(model, facts, lineage, backbone)
    size = facts.config.evaluation.batch_size
    earlier = lineage[-1].temperature if lineage else 1.0
    before = [
        (one, examples, outcomes(parts.learner, parts.consolidation, examples, size, earlier))
        for one, examples in probes
    ]
    torch.manual_seed(seed_of(facts.config.seed, "import", name))
    _add(parts, task, spread, weight_jd, bias_j, size)
    tau = temperature_of(parts.learner, parts.consolidation, task, size)
    new = outcomes(parts.learner, parts.consolidation, task.test, size, tau) if len(task.test) else None
    after = [
        Probes(one, then, outcomes(parts.learner, parts.consolidation, examples, size, tau))
        for one, examples, then in before
    ]
    measured = {one for one, _ in probes}
    old = [part.name for card in lineage for part in card.tasks]
    gate = None
    if facts.head is not None:
        unmeasured = [one for one in old if one not in measured]
        gate = judged(name, after, names, facts.config.gate, new=new, milliseconds=None, unmeasured=unmeasured)
        if not gate.accepted and not force:
            store.note("refused", task=name, problems=list(gate.problems), version=facts.version)
            raise GateRefused(
                f"{store.path}: the gate refused {path}, and the model is as it was before. {'. '.join(gate.problems)}. Give "
                f"--force to accept it all the same.",
                gate,
            )
    positions_n = chosen(task.test, facts.config.probes.per_class) if new is not None else np.zeros(0, np.int64)
    sets = {
        kept.PROBES: task.test.select(positions_n),
        kept.REHEARSAL: keep(task.train, facts.config.rehearsal.per_class),
    }
    packed = {what: kept.packed(examples) for what, examples in sets.items() if len(examples)}
    state = _state(parts, len(old), name, new.select(positions_n) if new is not None else None)
    card = _card(model, lineage, task, names, classes).model_copy(
        update={
            "data": None if data is None else os.fspath(data),
            "fingerprint": mark,
            "temperature": tau,
            "figures": Figures() if new is None else figures_of(new, names),
            "gate": gate,
            "forced": gate is not None and not gate.accepted,
            "kept": {what: kept.facts_of(tensors) for what, tensors in packed.items()},
            "stored_parameters": parts.learner.stored_parameters(),
            "imported_from": str(path),
        }
    )
    documents, tensors = _content(parts, state)
    store.commit(card, documents, tensors, packed, "imported", task=name, forced=card.forced, adapter=str(path))
    return Learnt(card, gate)


def _card(model: Model, lineage: Sequence[Card], task: Task, names: tuple[str, ...], classes: tuple[str, ...]) -> Card:
    """Returns the card of the new version, without what was measured and what is kept."""
    facts, known = model.store.facts(), {one for card in lineage for part in card.tasks for one in part.classes}
    learnt = LearntTask(
        name=task.name,
        classes=classes,
        new_classes=tuple(one for one in classes if one not in known),
        examples={split: len(task.split(split)) for split in SPLITS},
    )
    return Card(
        folder=model.store.new_folder(task.name),
        parent=facts.head,
        version=facts.version + 1,
        created=now(),
        tasks=(learnt,),
        class_names=names,
    )


def _content(parts: _Parts, state: RunState) -> tuple[dict[str, Any], dict[str, Mapping[str, Tensor]]]:
    """Returns the documents and tensors of the new version."""
    identity = parts.documents.get("state", {}).get("identity", {})
    documents = {
        "state": {"identity": identity, "outline": parts.learner.outline(), **state.to_json()},
        "clock": asdict(state.clock),
    }
    tensors: dict[str, Mapping[str, Tensor]] = {
        "learner": parts.learner.tensors(),
        "memory": parts.method.memory,
        "consolidation": parts.consolidation.memory,
        "predictions": {},
    }
    return documents, tensors


# -- checks ---------------------------------------------------------------------------------------------------------------


def _check_request(facts: Facts, lineage: Sequence[Card], name: str, classes: tuple[str, ...], *, given: bool) -> None:
    if facts.kind == "language":
        raise ModelError(
            "an adapter is imported into a classifier only, and this model is a language model. Fold the adapter into its base "
            "with peft's merge_and_unload, save that, and begin with it: `lamina create MODEL --backbone FOLDER`."
        )
    method, config = facts.config.method["name"], facts.config.consolidation
    if method in REFUSED:
        raise MethodError(f"method {method!r} cannot take an adapter that was trained elsewhere: {REFUSED[method]}.")
    if name in [task.name for card in lineage for task in card.tasks]:
        raise ModelError(f"the model has learnt a task named {name!r} already. Give this one another name with --name.")
    if not classes or len(set(classes)) < len(classes) or not all(one.strip() for one in classes):
        raise ModelError(
            f"--classes {','.join(classes)!r} must name each output of the adapter once, none of them empty."
        )
    why = None
    if config.classifier != "own":
        why = f"the {config.classifier} classifier needs the statistics of the new classes"
    elif BY_END.get(method):
        why = f"method {method!r} describes the inputs of every task"
    elif config.merging == "weighted":
        why = "weighted merging needs the second moments of the new inputs"
    if why is not None and not given:
        raise ModelError(f"{why}: give labelled data of {listed(classes, 10)} with --data.")


def _exported(found: ForeignAdapter) -> dict[str, Any] | None:
    """Returns what an export of lamina says of itself; None for an adapter that is none. Raises ModelError where that is
    damaged."""
    told = found.path / FACTS
    if not (told.exists() or told.is_symlink()):
        return None
    try:
        content: dict[str, Any] = json.loads(plain_file(told, MOST_JSON).read_text(encoding="utf-8"))
        if not isinstance(content["base"]["sha256"], str) or not isinstance(content.get("outputs", []), list):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{told} is damaged ({type(error).__name__}). Remove it to judge the base by its name."
        ) from error
    return content


def _check_base(found: ForeignAdapter, facts: Facts, exported: Mapping[str, Any] | None, same_base: bool) -> None:
    """Raises ModelError where the adapter belongs to other weights, as far as it is known: by the hash that an export of lamina
    brings along, by the weights in the folder that the adapter names, which are loaded, or by that name as a whole."""
    if exported is not None:
        theirs = exported["base"]["sha256"]
        if theirs != facts.base.hash:
            raise ModelError(
                f"{found.path} belongs to a base with the hash {theirs[:12]}, and that of the model is {facts.base.hash[:12]}: "
                f"its update means nothing there."
            )
        return
    if same_base:
        return
    place = found.base
    if place and os.path.isdir(place):  # of any string
        try:
            theirs = backbones.load(place).hash
        except BackboneError:
            theirs = ""  # a base with a classifier of its own, for example
        if theirs == facts.base.hash:
            return
        if theirs:
            raise ModelError(f"{found.path} was trained on {place}, whose weights are not those of {facts.base.name}.")
    if not place or "\0" in place or os.path.realpath(place) != os.path.realpath(facts.base.name):
        raise ModelError(
            f"{found.path} says that its base is {place!r}, and the model's is {facts.base.name!r}. If they are the same "
            f"weights, give --same-base."
        )


def _layers(backbone: Backbone) -> dict[str, tuple[int, int]]:
    """Returns (outputs, inputs) of every linear layer of the backbone, by path."""
    return {
        path: (module.out_features, module.in_features)
        for path, module in backbone.module.named_modules()
        if isinstance(module, nn.Linear)
    }


# -- the parts ------------------------------------------------------------------------------------------------------------


def _open(
    facts: Facts, backbone: Backbone, state: tuple[dict[str, Any], dict[str, dict[str, Tensor]]] | None
) -> _Parts:
    config = facts.config.run
    dtype = precision.DTYPES["bf16" if config.precision == "bf16" else "fp32"]
    learner = learner_of(backbone, config.backbone.targets, config.backbone.blocks, dtype)
    kind = METHODS[config.method["name"]]
    settings = {key: value for key, value in config.method.items() if key != "name"}
    method = kind(kind.config_type(**settings), facts.task_count)
    consolidation = Consolidation(config.consolidation, method)
    if state is None:
        return _Parts(learner, method, consolidation, {})
    documents, tensors = state
    restore(learner, method, consolidation, documents["state"]["outline"], tensors)
    return _Parts(learner, method, consolidation, documents)


def _spread(
    found: ForeignAdapter, learner: Learner, *, everywhere: bool
) -> dict[str, tuple[AdapterSite, Tensor, Tensor]]:
    """Returns the updates by adapter site: of layers that several sites share, each gets its outputs. Raises ModelError for an
    update of what the model does not adapt. everywhere: sites without an update get one of zeros."""
    spread: dict[str, tuple[AdapterSite, Tensor, Tensor]] = {}
    targets = sorted({site.role for site in learner.sites.values()})
    for path, (up_or, down_ri) in found.updates.items():
        rest_or = up_or.clone()
        for site in learner.sites.values():
            if site.where.path == path:
                rows = slice(site.outputs.start, site.outputs.stop)
                if bool(up_or[rows].any()):
                    spread[site.name] = (site, up_or[rows], down_ri)
                rest_or[rows] = 0
        if bool(rest_or.any()):
            raise ModelError(
                f"{found.path} updates {path}, and the model adapts {', '.join(targets)} in its blocks only. Make one with "
                f"`lamina create --set backbone.targets=...` that adapts it too."
            )
    if everywhere:
        for site in learner.sites.values():
            if site.name not in spread:
                spread[site.name] = (site, torch.zeros(site.d_out, 1), torch.zeros(1, site.d_in))
    return spread


def _task(
    facts: Facts,
    backbone: Backbone,
    class_names: tuple[str, ...],
    name: str,
    classes: tuple[str, ...],
    data: str | os.PathLike[str] | None,
    watch: Watch,
) -> tuple[Task, tuple[str, ...], str | None]:
    """Returns the task with its examples, the names of all classes, and the fingerprint of the data."""
    if data is not None:
        config = load_model_config(None, [("data.source", os.fspath(data))], base=facts.config).run
        labelled = load_data(config, backbone, watch)
        task, names, _ = new_task(
            Request(source=os.fspath(data), name=name, classes=classes), config, labelled, class_names
        )
        return task, names, labelled.fingerprint
    names = (*class_names, *(one for one in classes if one not in class_names))
    ids = tuple(names.index(one) for one in classes)
    return Task(name=name, classes=ids, train=kept.nothing(), val=kept.nothing(), test=kept.nothing()), names, None


def _probes(model: Model, facts: Facts, lineage: Sequence[Card], backbone: Backbone) -> list[tuple[str, Examples]]:
    """Returns the probes that are kept, by task."""
    transform = image_transform(facts.config.run, backbone) if backbone.image is not None else None
    sets = [(card.name, kept.unpacked(model.store.kept(card.folder, kept.PROBES), transform)) for card in lineage]
    return [(name, examples) for name, examples in sets if len(examples)]


def _add(
    parts: _Parts,
    task: Task,
    spread: Mapping[str, tuple[AdapterSite, Tensor, Tensor]],
    weight_jd: Tensor,
    bias_j: Tensor,
    size: int,
) -> None:
    """Learn the task, with the adapter in place of the training."""
    learner, method = parts.learner, parts.method

    def batches(*, augmented: bool) -> Iterator[Batch]:  # noqa: ARG001 - nothing is trained on them
        for start in range(0, len(task.train), size):
            yield task.train.batch(np.arange(start, min(start + size, len(task.train)))).to(learner.device)

    parts.consolidation.begin(learner, batches)
    block = learner.head.add(task.name, task.classes)
    block.load_state_dict({"weight": weight_jd, "bias": bias_j})
    learner.head.freeze()
    for site, up_or, down_ri in spread.values():
        site.add(task.name, LowRank(trained={}, frozen={"up": up_or, "down": down_ri}))
    if method.name in BY_END:
        method.end(learner, task, batches)
    else:
        learner.finish(task.name)
    parts.consolidation.end(learner, task, batches)


def _state(parts: _Parts, number: int, name: str, new: Outcomes | None) -> RunState:
    """Returns the state of a run that has learnt the task as its last."""
    state = RunState()
    if parts.documents:
        state = RunState.from_json(parts.documents["state"], parts.documents["clock"])
    entry = TaskEntry(
        task=name,
        trainable_parameters=0,
        steps=0,
        accuracy_when_learnt=new.accuracy if new is not None and len(new.labels_n) else None,
        stored_parameters=parts.learner.stored_parameters(),
        memory_bytes=parts.method.memory_bytes + parts.consolidation.memory_bytes,
    )
    right = {number: (new.correct, len(new.labels_n))} if new is not None else {}
    matrix = state.matrix
    while matrix.tasks < number:
        matrix = matrix.with_row({})
    return replace(
        state,
        lineage=(*state.lineage, entry),
        matrix=matrix.with_row(right) if matrix.tasks == number else _cut(matrix, number).with_row(right),
        position=Position(number, "done"),
        clock=Clock(finished={str(number): now()}),
    )


def _cut(matrix: AccuracyMatrix, rows: int) -> AccuracyMatrix:
    """Returns the first rows of a matrix."""
    return AccuracyMatrix(matrix.correct_ij[:rows], matrix.total_ij[:rows])
