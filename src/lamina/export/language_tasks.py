"""`peft-tasks` of a language model: one PEFT adapter per task, the router if there is one, and a script that completes prompts.

Shape letters: b batch, n prompts, v vocabulary.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.export.adapter import BASE, write_lora
from lamina.export.checking import by_library, need, script_tensors, together, told_together, write_script
from lamina.export.language_adapter import note_precision
from lamina.export.language_files import (
    base_of,
    placed,
    refuse_routed,
    told_rank,
    transposed,
    write_generation,
    write_tokenizer,
)
from lamina.export.language_opened import MOST_NEW, OpenedLanguage, open_language
from lamina.export.language_tokens import Computed, compare, generated
from lamina.export.tasks import LAYOUT, ROUTER, TASKS, branches, folders_of, posterior_tensors, save_tensors
from lamina.export.updates import Factors, of_branch
from lamina.export.written import Draft, Exported, drafted, finished, write_json
from lamina.methods.color import CoLoR
from lamina.methods.lamina import Lamina

OTHERWISE = "other versions of transformers may help."


def export_language_tasks(
    path: Path, target: Path, *, inputs: str | os.PathLike[str] | None = None, with_base: bool = False
) -> Exported:
    """Write an adapter per task of a language model. Arguments and errors are those of `export_tasks`."""
    need("peft", "peft", "the format peft-tasks")
    opened = open_language(path, inputs)
    names, router = opened.saved.tasks, _router(opened)
    parts = branches(opened.learner, opened.method, names)
    wanted = Computed(_next_scores(opened), generated(opened, opened.learner))
    note_precision(opened, wanted.written)
    with drafted(target, "peft-tasks", opened) as draft:
        draft.otherwise = OTHERWISE
        place, base = base_of(opened, draft, with_base=with_base)
        named, folders = BASE if with_base else place, folders_of(names)
        updates = {name: of_branch(opened.learner, parts[name]) for name in names}
        flipped = any(transposed(opened.backbone, factors) for factors in updates.values())
        for folder, name in zip(folders, names, strict=True):
            (draft.folder / TASKS / folder).mkdir(parents=True)
            ready = placed(opened.backbone, updates[name])
            write_lora(draft.folder / TASKS / folder, ready, named, "CAUSAL_LM", transposed=flipped)
        write_tokenizer(draft)
        write_generation(draft.folder, opened)
        told: dict[str, Any] = {
            "base": named,
            "names": list(names),
            "tasks": [{"name": name, "folder": folder} for name, folder in zip(names, folders, strict=True)],
            "form": opened.saved.config.data.form,
            "pad": opened.pad,
            "most": MOST_NEW,
            "transposed": flipped,
        }
        if isinstance(opened.method, CoLoR):
            centroids = {key: value for key, value in opened.method.memory.items() if key.startswith("centroids/")}
            save_tensors(draft.folder / ROUTER, centroids)
        elif isinstance(opened.method, Lamina):
            save_tensors(draft.folder / ROUTER, posterior_tensors(opened.method))
        write_json(draft.folder / LAYOUT, told | router)
        write_script(draft.folder, "language")
        compare(draft, "load.py with plain transformers", wanted, _by_script(draft, place))
        base = _check_adapters(draft, base, folders, updates)
        used = [folder for folder, name in zip(folders, names, strict=True) if updates[name]]
        if used and router["mode"] == "sum":
            _check_together(draft, base, used, wanted)
        if ranks := [one.rank for factors in updates.values() for one in factors.values()]:
            draft.notes.append(told_rank(max(ranks), "in every layer" if len({*ranks}) == 1 else "at most"))
        draft.notes.append(
            f"{told_together(used)} One alone is not the model."
            if router["mode"] == "sum"
            else "`load.py` selects the adapter of a prompt. One adapter loaded with peft completes prompts of its task."
        )
        if not with_base:
            draft.notes.append(f"The base is {place}; `load.py` finds another place in the environment variable BASE.")
        draft.code = f'python {target}/load.py "a prompt"'
        return finished(draft)


def _router(opened: OpenedLanguage) -> dict[str, Any]:
    """Returns what the script must know to choose adapters. Raises MethodError for a choice that it does not compute."""
    method = opened.method
    if isinstance(method, CoLoR):
        first = method.config.identify == "first expert"
        return {"mode": "route", "distance": method.config.distance, "identify_with": [0] if first else []}
    if isinstance(method, Lamina):
        return {"mode": "least squares", "identify_with": []}
    refuse_routed(opened, "one adapter per task")
    return {"mode": "sum"}


def _next_scores(opened: OpenedLanguage) -> Tensor:
    """Returns the scores of the token after each prompt, (n, v)."""
    learner, found = opened.learner, []
    with learner.folded():
        for batch in opened.asked:
            last_b = batch.inputs["attention_mask"].sum(1) - 1
            with opened.method.predicting(learner, batch):
                hidden_btd = learner.backbone.hidden(batch.inputs)
            found.append(learner.backbone.token_logits(hidden_btd[torch.arange(len(batch)), last_b]))
    return torch.cat(found)


def _by_script(draft: Draft[OpenedLanguage], place: str) -> Computed:
    asked = draft.opened.asked
    found = script_tensors(draft.folder, asked, BASE=place)
    scores_nv = torch.cat([found[str(n)] for n in range(len(asked))])
    rows = [row for n in range(len(asked)) for row in found[f"{n}.tokens"].tolist()]
    return Computed(scores_nv, tuple(tuple(token for token in row if token >= 0) for row in rows))


def _check_adapters(
    draft: Draft[OpenedLanguage], base: Any, folders: Sequence[str], updates: dict[str, dict[str, Factors]]
) -> Any:
    """Load every adapter with plain peft, and compare the next scores with those of its branch alone. Returns the base."""
    from peft import PeftModel

    opened, learner = draft.opened, draft.opened.learner
    batch = opened.asked[0]
    last_b = batch.inputs["attention_mask"].sum(1) - 1
    rows_b = torch.arange(len(batch))
    for folder, (name, wanted) in zip(folders, updates.items(), strict=True):
        if not wanted:
            continue
        with by_library(f"loading the adapter of task {name!r} with plain peft", OTHERWISE), torch.no_grad():
            tuned = PeftModel.from_pretrained(base, str(draft.folder / TASKS / folder)).eval()
            found_bv = tuned(**dict(batch.inputs)).logits[rows_b, last_b].float()
            base = tuned.unload()
        with torch.no_grad():
            for path, layer in learner.layers.items():
                update = wanted.get(path)
                layer.weight_oi = layer.base_oi if update is None else layer.base_oi + update.up_or @ update.down_ri
                layer.live_apart = False
            reference_bv = learner.backbone.token_logits(learner.backbone.hidden(batch.inputs)[rows_b, last_b])
            for layer in learner.layers.values():
                layer.refold()
        labels = [f"token {token}" for token in range(found_bv.shape[1])]
        by = f"plain peft, the next token with task {name!r} alone"
        draft.compare(by, [reference_bv], [found_bv], labels, "the first batch")
    return base


def _check_together(draft: Draft[OpenedLanguage], base: Any, folders: Sequence[str], wanted: Computed) -> None:
    """Load all adapters with plain peft, activate them, and compare the next scores with those of the model."""
    batch = draft.opened.asked[0]
    last_b = batch.inputs["attention_mask"].sum(1) - 1
    with by_library("activating all adapters with plain peft", OTHERWISE), torch.no_grad():
        model = together(base, [draft.folder / TASKS / folder for folder in folders])
        found_bv = model(**dict(batch.inputs)).logits[torch.arange(len(batch)), last_b].float()
    labels = [f"token {token}" for token in range(found_bv.shape[1])]
    by = "plain peft, the next token with all adapters"
    draft.compare(by, [wanted.logits_nv[: len(batch)]], [found_bv], labels, "the first batch")
