"""Rehearsal: which examples are kept, how they are drawn, and the loss of a batch of new and kept ones.

Shape letters: n examples, b batch, j outputs of the head, c classes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import TextTable, tiny_images, tiny_texts, tiny_vit
from torch import Tensor

from lamina.data.streams import Stream, class_plan, make_stream
from lamina.engine.rehearsal import Kept, concatenated, drawn, keep
from lamina.learner import Learner
from lamina.types import Batch, Examples, Ints, Task

often = settings(deadline=None, max_examples=60, derandomize=True)
labellings = st.lists(st.integers(0, 4), min_size=1, max_size=40)


def examples_of(labels: list[int], rows: list[int] | None = None) -> Examples:
    """No table: nothing looks at an input."""
    return Examples(None, np.array(rows or range(len(labels)), np.int64), np.array(labels, np.int64))  # type: ignore[arg-type]


def pairs(examples: Examples) -> list[tuple[int, int]]:
    return [*zip(examples.rows_n.tolist(), examples.labels_n.tolist(), strict=True)]


def counts(labels_n: Ints) -> dict[int, int]:
    labels, found = np.unique(labels_n, return_counts=True)
    return dict(zip(labels.tolist(), found.tolist(), strict=True))


def stream(tasks: int = 3, kind: str = "image") -> Stream:
    data = (tiny_images if kind == "image" else tiny_texts)(96, 2 * tasks)
    return make_stream(data, class_plan(data, tasks), "class")


# ------------------------------------------------------------------------------------------------------ what is kept


@often
@given(labellings, st.integers(0, 9))
def test_of_every_class_so_many_are_kept_or_all(labels: list[int], per_class: int):
    examples = examples_of(labels)
    found = keep(examples, per_class)
    assert counts(found.labels_n) == {c: min(n, per_class) for c, n in counts(examples.labels_n).items() if per_class}
    assert set(pairs(found)) <= set(pairs(examples))
    assert len(set(pairs(found))) == len(found)


@often
@given(labellings, st.integers(0, 9), st.integers(0, 9))
def test_the_first_of_what_is_kept_are_the_first_of_all(labels: list[int], some: int, more: int):
    """In their order too: so a task of which only the kept examples remain is rehearsed to the same bits."""
    examples = examples_of(labels)
    some, more = min(some, more), max(some, more)
    assert pairs(keep(keep(examples, more), some)) == pairs(keep(examples, some))


@often
@given(labellings, st.integers(1, 9), st.randoms())
def test_what_is_kept_does_not_depend_on_the_order_of_the_examples(labels: list[int], per_class: int, chance: object):
    examples = examples_of(labels)
    order = np.arange(len(labels))
    chance.shuffle(order)  # type: ignore[attr-defined]
    assert pairs(keep(examples.select(order), per_class)) == pairs(keep(examples, per_class))


def test_what_is_kept_is_no_stretch_of_the_rows():
    found = keep(examples_of([0] * 1000), 20)
    assert found.rows_n.min() < 200
    assert found.rows_n.max() > 800


# ---------------------------------------------------------------------------------------------------------- draws


@often
@given(labellings, st.integers(1, 50), st.integers(0, 1000))
def test_a_draw_is_balanced_over_the_classes_and_within_each(labels: list[int], count: int, key: int):
    labels_n = np.array(labels)
    positions_b = drawn(labels_n, count, key)
    assert len(positions_b) == count
    sizes, often_drawn = counts(labels_n), counts(labels_n[positions_b])
    fewest = min(often_drawn.get(label, 0) for label in sizes)
    assert max(often_drawn.values()) <= fewest + 1
    for label, size in sizes.items():
        own = counts(positions_b[labels_n[positions_b] == label])
        assert all(often_drawn[label] // size <= n <= often_drawn[label] // size + 1 for n in own.values())


def test_every_class_and_every_example_of_it_is_equally_likely():
    labels_n = np.repeat([3, 5, 9], [2, 7, 20])
    draws = [drawn(labels_n, 2, 11, step) for step in range(6000)]
    by_class = counts(labels_n[np.concatenate(draws)])
    assert all(abs(n / 12000 - 1 / 3) < 0.02 for n in by_class.values())
    by_example = counts(np.concatenate(draws))
    for label, size in counts(labels_n).items():
        own = [n for position, n in by_example.items() if labels_n[position] == label]
        assert len(own) == size
        assert all(abs(n / by_class[label] - 1 / size) < 0.03 for n in own)


def test_a_draw_is_a_function_of_its_keys():
    labels_n = np.repeat(np.arange(5), 10)
    assert np.array_equal(drawn(labels_n, 8, 1, 2), drawn(labels_n, 8, 1, 2))
    assert not np.array_equal(drawn(labels_n, 8, 1, 2), drawn(labels_n, 8, 1, 3))


# ---------------------------------------------------------------------------------------------------------- batches


def mixed(finished: list[Task], new: Batch, seed: int = 0, task: str = "now", step: int = 0) -> Batch:
    return Kept(finished, 3).mixed(new, seed, task, step)


def test_a_mixed_batch_is_the_new_one_and_as_many_kept_examples():
    first, second, now = stream()
    new = now.train.batch(np.arange(8))
    batch = mixed([first, second], new)
    assert len(batch) == 16
    assert torch.equal(batch.inputs["pixel_values"][:8], new.inputs["pixel_values"])
    assert torch.equal(batch.labels_b[:8], new.labels_b)
    assert counts(batch.labels_b[8:].numpy()) == dict.fromkeys([*first.classes, *second.classes], 2)


def test_a_mixed_batch_is_a_function_of_seed_task_and_step():
    first, second, now = stream()
    new = now.train.batch(np.arange(8))

    def pixels(**changed: object) -> Tensor:
        return mixed([first, second], new, **changed).inputs["pixel_values"]  # type: ignore[arg-type]

    assert torch.equal(pixels(), pixels())
    for other in ({"seed": 1}, {"task": "other"}, {"step": 1}):
        assert not torch.equal(pixels(**other), pixels()), other


def test_kept_examples_have_the_training_augmentation_a_new_one_in_every_step():
    first, _, now = stream()
    new = now.train.batch(np.arange(4))
    one = Task(name="one", classes=(0,), train=first.train.select(np.array([0])), val=first.val, test=first.test)
    drawn_at = [mixed([one], new, step=step).inputs["pixel_values"][4:] for step in (0, 1)]
    plain = one.train.batch(np.array([0])).inputs["pixel_values"]
    assert torch.equal(drawn_at[0][0], drawn_at[0][1]), "the one example, as often as there are new ones"
    assert not torch.equal(drawn_at[0], drawn_at[1])
    for pixels in drawn_at:
        assert 0 < (pixels[:1] - plain).abs().mean() < 0.2


def test_kept_examples_may_lie_in_several_tables():
    """Texts of another length too: all are padded to one, and the mask excludes the padding."""
    first, second, now = stream(kind="text")
    table = second.train.table
    assert isinstance(table, TextTable)
    longer = TextTable(
        torch.nn.functional.pad(table.ids_nt, (0, 4)), torch.nn.functional.pad(table.mask_nt, (0, 4), value=1)
    )
    second = replace(second, train=replace(second.train, table=longer))
    new = now.train.batch(np.arange(8))
    batch = mixed([first, second], new)
    assert batch.inputs["input_ids"].shape == batch.inputs["attention_mask"].shape == (16, 12)
    assert torch.equal(batch.inputs["input_ids"][:8, :8], new.inputs["input_ids"])
    assert not batch.inputs["attention_mask"][:8, 8:].any()
    assert counts(batch.labels_b[8:].numpy()) == dict.fromkeys([*first.classes, *second.classes], 2)
    from_second = np.isin(batch.labels_b.numpy(), second.classes)
    assert batch.inputs["attention_mask"][torch.from_numpy(from_second)][:, 8:].all()
    assert not batch.inputs["attention_mask"][torch.from_numpy(~from_second)][:, 8:].any()


def test_a_task_of_which_only_the_kept_examples_remain_gives_the_same_batches():
    first, second, now = stream()
    new = now.train.batch(np.arange(8))
    left = [replace(task, train=keep(task.train, 3)) for task in (first, second)]
    assert torch.equal(mixed(left, new).inputs["pixel_values"], mixed([first, second], new).inputs["pixel_values"])


@pytest.mark.parametrize(("finished", "per_class"), [(0, 3), (2, 0)])
def test_where_nothing_is_kept_batch_and_loss_are_those_of_the_task_alone(finished: int, per_class: int):
    *old, now = stream()
    kept = Kept(old[:finished], per_class)
    new = now.train.batch(np.arange(8))

    def own(batch: Batch) -> Tensor:
        return batch.labels_b.float().mean()

    assert len(kept) == 0
    assert kept.mixed(new, 0, "now", 0) is new
    assert kept.loss(Learner(tiny_vit(blocks=1)), own) is own


def test_batches_are_put_end_to_end():
    a, b = (Batch(inputs={"x": torch.full((n, 3), float(n))}, labels_b=torch.full((n,), n)) for n in (2, 1))
    assert concatenated([a, b]).labels_b.tolist() == [2, 2, 1]
    assert concatenated([a, b]).inputs["x"].tolist() == [[2.0] * 3, [2.0] * 3, [1.0] * 3]


# -------------------------------------------------------------------------------------------------------------- loss


def learner_of(tasks: list[Task]) -> Learner:
    torch.manual_seed(0)
    learner = Learner(tiny_vit(blocks=1))
    for task in tasks:
        learner.add_outputs(task)
    return learner


def test_every_class_in_the_batch_has_the_same_weight():
    """By hand: the mean over classes of the mean over their examples of the cross-entropy over all known classes. A class
    with outputs of two tasks has the larger score."""
    first, second, _ = stream()
    again = replace(first, name="again", classes=(1, 5))  # 1 is known, 5 is new
    learner = learner_of([first, second, again])
    batch = concatenated([first.train.batch(np.arange(7)), second.train.batch(np.arange(2))])
    scores_bj = learner.head(learner.features(batch))
    labels = [output.label for output in learner.outputs]
    known = sorted(set(labels))
    losses: dict[int, list[Tensor]] = {}
    for scores_j, label in zip(scores_bj, batch.labels_b.tolist(), strict=True):
        score = {c: max(s for s, own in zip(scores_j, labels, strict=True) if own == c) for c in known}
        total = torch.stack([score[c] for c in known]).logsumexp(0)
        losses.setdefault(label, []).append(total - score[label])
    by_hand = torch.stack([torch.stack(own).mean() for own in losses.values()]).mean()
    torch.testing.assert_close(learner.loss_of_all(batch, balanced=True), by_hand)


def test_the_loss_adds_the_methods_own_on_the_new_half():
    first, second, now = stream()
    learner = learner_of([first, second, now])
    kept = Kept([first, second], 3)
    new = now.train.batch(np.arange(8))
    batch = kept.mixed(new, 0, "now", 0)
    seen: list[Batch] = []

    def own(given: Batch) -> Tensor:
        seen.append(given)
        return torch.tensor(3.0)

    loss = kept.loss(learner, own)(batch)
    torch.testing.assert_close(loss, 3.0 + learner.loss_of_all(batch, balanced=True))
    assert torch.equal(seen[0].labels_b, new.labels_b)
    assert torch.equal(seen[0].inputs["pixel_values"], new.inputs["pixel_values"])


def test_old_outputs_get_no_gradient_and_unknown_classes_no_nan():
    _, second, now = stream()
    learner = learner_of([second, now])  # classes 0 and 1 have no outputs
    batch = concatenated([second.train.batch(np.arange(4)), now.train.batch(np.arange(4))])
    loss = learner.loss_of_all(batch, balanced=True)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is None for parameter in learner.head.block(second.name).parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in learner.head.block(now.name).parameters())
