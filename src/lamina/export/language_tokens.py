"""Compares an export of a language model with it: scores of next tokens, and the tokens that are generated greedily.

Shape letters: b batch, t tokens, n chosen positions, v vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamina.errors import ModelError
from lamina.export.language_opened import MOST_NEW, OpenedLanguage
from lamina.export.written import ROUNDING, TOLERANCE, Draft, spread_of
from lamina.learner import LanguageLearner
from lamina.learner.language import until
from lamina.types import Batch

MOST_NUMBERS = 2**22
"""Scores that are compared at most."""
MOST_STATES = 256
"""Positions that they are compared at."""
OTHERWISE = "another version may help, and `--format merged` needs no peft."


@dataclass(frozen=True)
class Computed:
    """What a model computes for the prompts of a comparison."""

    logits_nv: Tensor
    written: tuple[tuple[int, ...], ...]
    """The tokens that follow each prompt greedily, without the one that ends them."""


def of_learner(opened: OpenedLanguage) -> Computed:
    """Returns what lamina computes."""
    logits, learner = [], opened.learner
    with learner.folded():
        for batch, place_bt in zip(opened.whole, places(opened), strict=True):
            with opened.method.predicting(learner, batch):
                hidden_btd = learner.backbone.hidden(batch.inputs)
            logits.append(learner.backbone.token_logits(hidden_btd[place_bt]))
    return Computed(torch.cat(logits), generated(opened, learner))


def generated(opened: OpenedLanguage, learner: LanguageLearner) -> tuple[tuple[int, ...], ...]:
    """Returns the tokens that lamina writes after each prompt."""
    written: list[list[int]] = []
    with learner.folded():
        for batch in opened.asked:
            with opened.method.predicting(learner, batch):
                written += learner.generate(batch, MOST_NEW, opened.stops, opened.pad)
    return tuple(map(tuple, written))


def places(opened: OpenedLanguage) -> list[Tensor]:
    """Returns where scores are compared, (b, t) boolean for every batch: evenly over the real tokens."""
    masks = [batch.inputs["attention_mask"].bool() for batch in opened.whole]
    vocabulary = opened.backbone.vocabulary or 1
    most = max(sum(map(len, opened.examples)), min(MOST_STATES, MOST_NUMBERS // vocabulary))
    total = sum(int(mask_bt.sum()) for mask_bt in masks)
    chosen_n = torch.zeros(total, dtype=torch.bool)
    chosen_n[torch.linspace(0, total - 1, min(most, total)).long()] = True
    found, start = [], 0
    for mask_bt in masks:
        count = int(mask_bt.sum())
        found.append(torch.zeros_like(mask_bt).masked_scatter(mask_bt, chosen_n[start : start + count]))
        start += count
    return found


def of_plain(opened: OpenedLanguage, model: Any) -> Computed:
    """Returns what a model of plain transformers, or of peft, computes: scores without any padding, tokens with padding, by the
    settings of generation that the model has from the written files."""
    logits, written = [], []
    stops = model.generation_config.eos_token_id
    with torch.no_grad():
        for batch, place_bt in zip(opened.whole, places(opened), strict=True):
            ids_bt, mask_bt = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
            for ids_t, mask_t, place_t in zip(ids_bt, mask_bt, place_bt, strict=True):
                found_tv = model(input_ids=ids_t[mask_t][None], use_cache=False).logits[0]
                logits.append(found_tv[place_t[mask_t]].float())
        for batch in opened.asked:
            ids_bt, mask_bt = _padded_left(batch, opened.pad)
            found_bt = model.generate(input_ids=ids_bt, attention_mask=mask_bt, max_new_tokens=MOST_NEW)
            written += [tuple(until(row, stops)) for row in found_bt[:, ids_bt.shape[1] :].tolist()]
    return Computed(torch.cat(logits), tuple(written))


def compare(draft: Draft[OpenedLanguage], by: str, wanted: Computed, found: Computed) -> None:
    """Compare scores and generated tokens. Raises ModelError where a score differs by more than is allowed, or other tokens are
    written though the model's scores are clearly apart."""
    opened = draft.opened
    same = [mine == theirs for mine, theirs in zip(wanted.written, found.written, strict=True)]
    agreement = sum(same) / len(same)
    labels = [f"token {token}" for token in range(wanted.logits_nv.shape[1])]
    draft.compare(by, [wanted.logits_nv], [found.logits_nv], labels, None, (agreement, "generated tokens"))
    limit = TOLERANCE * spread_of(wanted.logits_nv.double(), torch.ones_like(wanted.logits_nv, dtype=torch.bool))
    number = 0
    for batch in opened.asked:
        for k in range(len(batch)):
            mine, theirs = wanted.written[number], found.written[number]
            if mine != theirs:
                apart, largest = _apart(opened, batch.select(slice(k, k + 1)), mine, theirs)
                if apart > limit + ROUNDING * largest:
                    raise ModelError(
                        f"{draft.differences.pop()}. After prompt {number + 1} it writes {_told(opened, theirs)}, and the "
                        f"model {_told(opened, mine)}, so nothing was written. The installed versions of the libraries may "
                        f"compute this architecture differently; {draft.otherwise}"
                    )
            number += 1


def share(first: Sequence[object], second: Sequence[object]) -> float:
    """Returns the share of places at which two sequences are equal."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def _apart(opened: OpenedLanguage, batch: Batch, mine: Sequence[int], theirs: Sequence[int]) -> tuple[float, float]:
    """Returns how far the model's scores of two next tokens are apart where two continuations of one prompt first differ, and
    the larger score. Where one has ended, the score is the largest of the tokens that end a text."""
    first = next((k for k, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    ids_t = batch.inputs["input_ids"][batch.inputs["attention_mask"].bool()]
    ids_1t = torch.cat([ids_t, torch.tensor(list(mine[:first]), dtype=ids_t.dtype)])[None]
    learner = opened.learner
    with learner.folded(), opened.method.predicting(learner, batch):
        hidden_1td = learner.backbone.hidden({"input_ids": ids_1t, "attention_mask": torch.ones_like(ids_1t)})
        logits_v = learner.backbone.token_logits(hidden_1td[:, -1])[0]
    scores = [
        float(logits_v[tokens[first]] if first < len(tokens) else logits_v[list(opened.stops)].max())
        for tokens in (mine, theirs)
    ]
    return abs(scores[0] - scores[1]), max(map(abs, scores))


def _told(opened: OpenedLanguage, tokens: Sequence[int]) -> str:
    told = repr(opened.decode(tokens))
    return told if len(told) <= 60 else told[:57] + "..."


def _padded_left(batch: Batch, pad: int) -> tuple[Tensor, Tensor]:
    """Returns the prompts as plain transformers takes them to generate: the real tokens at the end."""
    ids_bt, mask_bt = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    lists = [row_t[own_t] for row_t, own_t in zip(ids_bt, mask_bt, strict=True)]
    longest = max(map(len, lists))
    ids_bt = torch.stack([torch.cat([row.new_full((longest - len(row),), pad), row]) for row in lists])
    mask_bt = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in lists])
    return ids_bt, mask_bt
