"""Reuse of what is computed below the first adapted block: the same features, computed once, and no bit depends on what
happens to be kept."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tests.conformance.cases import EVALUATION, TRAINING, Killed, make_method, newest, run_in_pieces, state, stream
from tests.pretend import pretended_card
from tests.tiny import (
    ImageTable,
    TextTable,
    noise,
    scatter,
    tiny_bert,
    tiny_fused_vit,
    tiny_images,
    tiny_texts,
    tiny_vit,
)
from torch import Tensor, nn

from lamina import reuse
from lamina.adapters import LowRank
from lamina.backbones import Backbone, from_module, load
from lamina.config import ConsolidationConfig, RunConfig, fingerprint
from lamina.data import ImageTransform, PixelTable
from lamina.data.pixels import PixelStore
from lamina.engine import checkpoint
from lamina.engine.loop import Loop
from lamina.errors import BackboneError, ConfigError
from lamina.learner import Learner
from lamina.methods import METHODS
from lamina.methods.inflora import InfLoRAConfig
from lamina.streams import Stream
from lamina.types import SPLITS, Augment, Batch, Examples, Ints, Task

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
IDS = torch.tensor([[1, 5, 9, 7], [1, 4, 0, 0], [1, 8, 6, 0]])
MASK = (IDS > 0).long()
IMAGES = {"pixel_values": noise((3, 3, 16, 16), "reuse")}
TEXTS = {"input_ids": IDS, "attention_mask": MASK}
LARGE = 100
"""Megabytes that hold all there is in these tests."""


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_fsync", lambda _: None)


def made(kind: str, folder: Path, pooling: str = "auto") -> tuple[Backbone, dict[str, Tensor]]:
    """A tiny backbone of this architecture, with inputs for it."""
    text = kind in ("Bert", "Roberta", "DistilBert")
    sizes = {"vocab_size": 60, "hidden_dim": 64, "pad_token_id": 0} if text else {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**SMALL, **sizes))
        scatter(model).eval().save_pretrained(folder)
    return load(str(folder), pooling=pooling), TEXTS if text else IMAGES


def examples_through(backbone: Backbone) -> Counter[int]:
    """Counts, from now on, how many examples each block computes."""
    counts: Counter[int] = Counter()

    def counting(block: int) -> Callable[..., None]:
        return lambda _, inputs: counts.update({block: len(inputs[0])})

    for site in backbone.sites:
        if site.role == "fc1":
            backbone.module.get_submodule(site.path).register_forward_pre_hook(counting(site.block))
    return counts


def altered(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if "forward" in vars(part)]


# ---------------------------------------------------------------------------------------------- below and above


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Dinov2", "Bert", "Roberta", "DistilBert"])
def test_below_and_above_a_block_make_the_features_and_compute_only_their_part(kind, pooling, tmp_path):
    backbone, inputs = made(kind, tmp_path, pooling)
    with torch.no_grad():
        whole_bd = backbone.features(inputs)
        for block in range(3):
            counts = examples_through(backbone)
            hidden_btd = backbone.below(inputs, block)
            assert set(counts) == set(range(block))
            counts.clear()
            assert torch.equal(backbone.above(hidden_btd, inputs, block), whole_bd)
            assert set(counts) == set(range(block, 3))
        assert torch.equal(backbone.features(inputs), whole_bd)


def test_the_model_is_left_as_it_was_after_an_error_too(tmp_path):
    backbone, inputs = made("ViT", tmp_path)
    hidden_btd = backbone.below(inputs, 1)
    with pytest.raises(BackboneError, match="takes 16 px images"):
        backbone.below({"pixel_values": torch.zeros(1, 3, 8, 8)}, 1)
    with pytest.raises(RuntimeError):
        backbone.above(hidden_btd[..., :5], inputs, 1)
    assert altered(backbone.module) == []


def test_stages_of_a_model_of_ones_own_are_checked():
    backbone = tiny_vit()
    how = {"kind": "image", "width": 32, "features": backbone.forward}
    with pytest.raises(BackboneError, match=r"nothing at layers\.7"):
        from_module(backbone.module, backbone.sites, **how, stages=["embeddings", "layers.0", "layers.1", "layers.7"])
    with pytest.raises(BackboneError, match="each of the 3 blocks, in their order; found 3 paths"):
        from_module(backbone.module, backbone.sites, **how, stages=["embeddings", "layers.0", "layers.1"])


# ---------------------------------------------------------------------------------------------- the learner


def learner_on(backbone: Backbone, block: int = 1, **how: Any) -> Learner:
    learner = Learner(backbone, ("k", "v"), range(block, backbone.blocks), **how)
    for slot in learner.slots.values():
        branch = LowRank.fresh(slot.d_out, slot.d_in, 2, torch.Generator().manual_seed(1))
        nn.init.normal_(dict(branch.named_parameters())["up"], std=0.3, generator=torch.Generator().manual_seed(2))
        slot.add("task", branch)
    return learner


IMAGE_DATA, TEXT_DATA = tiny_images(n=90), tiny_texts(n=90)
WORLDS = {"image": (tiny_vit, IMAGE_DATA), "text": (lambda: tiny_bert(blocks=3), TEXT_DATA)}


def examples(kind: str) -> Examples:
    data = WORLDS[kind][1]
    return Examples(data.table, np.arange(90), data.labels_n)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Callable[..., Learner]]:
    """Makes learners that keep; they are closed at the end."""
    learners: list[Learner] = []

    def make(backbone: Backbone, megabytes: int = LARGE, views: int | None = None, **how: Any) -> Learner:
        learners.append(learner_on(backbone, **how))
        learners[-1].reuse_below(tmp_path, megabytes, views)
        return learners[-1]

    yield make
    for learner in learners:
        learner.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_features_moments_and_gradients_are_those_without_reuse(kind, dtype, kept):
    plain, keeping = learner_on(WORLDS[kind][0](), dtype=dtype), kept(WORLDS[kind][0](), dtype=dtype)
    batches = [examples(kind).batch(positions) for positions in np.array_split(np.arange(90), 3)]
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for _ in range(2):  # computed, then read
        for batch in batches:
            torch.testing.assert_close(keeping.features(batch), plain.features(batch), **near)
        found, wanted = keeping.input_moments(batches), plain.input_moments(batches)
        for group, moment_dd in wanted.items():
            torch.testing.assert_close(found[group], moment_dd, **near, check_dtype=False)
        for ways in (Learner.folded, Learner.bare):
            with ways(plain), ways(keeping):
                torch.testing.assert_close(keeping.features(batches[0]), plain.features(batches[0]), **near)
        with plain.per_example("task", 30) as there, keeping.per_example("task", 30) as here:
            gradients = [
                torch.autograd.grad(learner.features(batches[1]).square().sum(), [*copies.values()])
                for learner, copies in ((plain, there), (keeping, here))
            ]
        for wanted_grad, found_grad in zip(*gradients, strict=True):
            torch.testing.assert_close(found_grad, wanted_grad, **near)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_what_is_kept_is_not_computed_again(kind, kept):
    learner = kept(WORLDS[kind][0]())
    counts = examples_through(learner.backbone)
    first = learner.features(examples(kind).batch(np.arange(40)))
    once = counts[0]
    assert once >= 40
    again = learner.features(examples(kind).batch(np.arange(40)))
    with learner.bare():
        learner.features(examples(kind).batch(np.arange(7, 33)[::-1].copy()))
    assert counts[0] == once
    assert counts[1] == once + 26 + 40 - (once - 40)
    assert torch.equal(first, again)
    learner.features(examples(kind).batch(np.arange(41)))
    assert counts[0] == once + reuse.CHUNK[kind]


def test_examples_of_no_table_and_augmentations_that_do_not_come_again_go_the_plain_way(kept):
    learner = kept(tiny_vit(), views=2)
    batch = examples("image").batch(np.arange(5))
    assert learner.reuse.covers(batch)
    assert not learner.reuse.covers(Batch(inputs=batch.inputs, labels_b=batch.labels_b))
    views = {epoch: examples("image").batch(np.arange(5), Augment(0, epoch)) for epoch in (-2, -1, 0, 1, 2)}
    assert [epoch for epoch, view in views.items() if learner.reuse.covers(view)] == [0, 1]
    expected = {epoch: learner.backbone.features(view.inputs) for epoch, view in views.items()}
    for _ in range(2):
        for epoch, view in views.items():
            torch.testing.assert_close(learner.features(view), expected[epoch])


def test_a_batch_knows_its_rows_and_view_wherever_it_goes():
    batch = examples("image").select(np.arange(20, 90)).batch(np.array([3, 5, 8]), Augment(7, 4))
    moved = batch.to(torch.device("cpu"))
    assert (moved.rows_b.tolist(), moved.view, moved.task) == ([23, 25, 28], 4, None)
    some = moved.select(torch.tensor([True, False, True]))
    assert (some.rows_b.tolist(), some.view, some.labels_b.tolist()) == ([23, 28], 4, batch.labels_b[[0, 2]].tolist())
    assert torch.equal(some.inputs["pixel_values"], batch.inputs["pixel_values"][[0, 2]])
    assert examples("text").batch(np.array([1]), Augment(7, 4)).view is None


@pytest.mark.parametrize(("augment", "view"), [("none", None), ("crop", 4), ("crop-flip", 4)])
def test_a_transform_without_augmentation_has_no_views(augment, view):
    store = PixelStore(np.zeros((2, 16, 16, 3), np.uint8), np.full((2, 2), 16, np.int64))
    table = PixelTable(store, ImageTransform(16, (0.5,) * 3, (0.5,) * 3, train=augment))
    assert Examples(table, np.arange(2), np.zeros(2, np.int64)).batch(np.arange(2), Augment(0, 4)).view == view


# ---------------------------------------------------------------------------------------------- the file


def files_in(folder: Path) -> list[str]:
    """What this process has open there, names or not."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(descriptor))
        except FileNotFoundError:
            continue
    return [link for link in links if link.startswith(str(folder))]


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_budget_bounds_the_file_whose_room_is_used_again(kind, kept, monkeypatch, tmp_path):
    large, learner = kept(WORLDS[kind][0]()), kept(WORLDS[kind][0]())
    learner.reuse.room = 5000
    whole = examples(kind)
    few, others = np.arange(0, 40), np.arange(40, 90)
    for positions in (few, others):
        assert torch.equal(learner.features(whole.batch(positions)), large.features(whole.batch(positions)))
    size = os.fstat(learner.reuse._file.fileno()).st_size
    assert 4000 < size <= 5000 < os.fstat(large.reuse._file.fileno()).st_size
    assert set(learner.reuse._places) < {(row, None) for row in few}
    learner.reuse.free(few)
    assert not learner.reuse._places
    assert torch.equal(learner.features(whole.batch(others)), large.features(whole.batch(others)))
    assert learner.reuse._places
    assert torch.equal(learner.features(whole.batch(others)), large.features(whole.batch(others)))
    assert os.fstat(learner.reuse._file.fileno()).st_size <= 5000


def test_the_file_has_no_name_and_is_gone_when_closed(kept, tmp_path):
    learner = kept(tiny_vit())
    assert files_in(tmp_path) == []
    features_bd = learner.features(examples("image").batch(np.arange(40)))
    assert len(files_in(tmp_path)) == 1
    assert [*tmp_path.iterdir()] == []
    learner.close()
    assert files_in(tmp_path) == []
    assert torch.equal(learner.features(examples("image").batch(np.arange(40))), features_bd)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("way", ["an error", "half a write"])
def test_a_full_disk_costs_time_only(way, kept, tmp_path):
    learner, batch = kept(tiny_vit()), examples("image").batch(np.arange(40))
    features_bd = learner.features(batch)

    class Full:
        def __init__(self, file: Any) -> None:
            self.seek, self.readinto, self.close = file.seek, file.readinto, file.close

        def write(self, value: memoryview) -> int:
            if way == "an error":
                raise OSError(28, "No space left on device")
            return len(value) // 2

    learner.reuse._file = Full(learner.reuse._file)
    learner.features(examples("image").batch(np.arange(30, 50)))
    assert files_in(tmp_path) == []
    assert torch.equal(learner.features(batch), features_bd)


# ---------------------------------------------------------------------------------------------- settings


def test_reuse_with_nothing_below_or_of_unknown_blocks_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"backbone\.reuse_mb = 7: there are adapters in block 0.*backbone\.blocks = \[2\]"
    ):
        learner_on(tiny_vit(), 0).reuse_below(tmp_path, 7)
    with pytest.raises(ConfigError, match=r"backbone\.reuse_mb = 7: backbone 'tiny_fused_vit'.*Leave it at 0.*stages"):
        learner_on(tiny_fused_vit(), 1).reuse_below(tmp_path, 7)


def test_how_much_is_kept_is_no_part_of_a_fingerprint_but_whether_and_views_are():
    def of(reuse_mb: int, views: int | None = None) -> str:
        return fingerprint(RunConfig(backbone={"reuse_mb": reuse_mb}, data={"views": views}), InfLoRAConfig)

    assert of(0) == fingerprint(RunConfig(), InfLoRAConfig)
    assert of(5) == of(6) != of(0)
    assert len({of(0), of(0, 1), of(0, 2)}) == 3


# ---------------------------------------------------------------------------------------------- whole runs


def uneven(backbone: Backbone) -> Backbone:
    """Its numbers depend on how many examples, and of how many tokens, are computed together, as last bits may."""

    def stray(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + 0.01 * len(output) + 0.003 * output.shape[1]

    site = next(site for site in backbone.sites if (site.block, site.role) == (0, "fc2"))
    backbone.module.get_submodule(site.path).register_forward_hook(stray)
    return backbone


class Padded(TextTable):
    """Texts padded to the longest of their batch, as those of a run are."""

    def inputs(self, rows: Ints, augment: Augment | None) -> dict[str, Tensor]:
        longest = int(self.lengths(rows).max())
        return {name: value_bt[:, :longest] for name, value_bt in super().inputs(rows, augment).items()}


def stream_of(kind: str) -> Stream:
    def padded(task: Task) -> Task:
        table = Padded(task.train.table.ids_nt, task.train.table.mask_nt)
        return replace(task, **{split: replace(task.split(split), table=table) for split in SPLITS})

    whole = stream(kind, "class")
    return whole if kind == "image" else replace(whole, tasks=tuple(map(padded, whole.tasks)))


def loop_of(
    name: str, kind: str, folder: Path, megabytes: int | None, room: int | None = None, epochs: int = 3, **how: Any
) -> Loop:
    backbone = how.pop("backbone", None) or {"image": lambda: tiny_vit(blocks=2), "text": tiny_bert}[kind]()
    device = how.pop("device", "cpu")
    learner = Learner(backbone, ("k", "v"), [1], device=device)
    folder.mkdir(exist_ok=True)
    if megabytes is not None:
        learner.reuse_below(folder, megabytes, 2)
        learner.reuse.room = learner.reuse.room if room is None else room
    return Loop(
        learner=learner,
        method=make_method(name),
        stream=stream_of(kind),
        training=TRAINING.model_copy(update={"epochs": epochs}),
        evaluation=EVALUATION,
        seed=0,
        checkpoints=folder / "checkpoints",
        views=2,
        **how,
    )


def finished(loop: Loop) -> dict[str, str]:
    loop.run()
    loop.learner.close()
    return state(newest(loop.checkpoints))


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("kind", ["image", "text"])
def test_no_bit_of_a_run_depends_on_what_is_kept(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "CHUNK", {"image": 12, "text": 3})
    unbroken = finished(loop_of(name, kind, tmp_path / "large", LARGE, backbone=uneven(backbone_of(kind))))
    little = loop_of(name, kind, tmp_path / "little", LARGE, 9000, backbone=uneven(backbone_of(kind)))
    assert finished(little) == unbroken

    def start(number: int) -> Loop:
        """Killed after a few events more than the process before it."""
        left = [3 + 5 * number]

        def die(_: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        how = {"on_event": die, "checkpoint_seconds": 0.0}
        loop = loop_of(name, kind, tmp_path / "pieces", LARGE, backbone=uneven(backbone_of(kind)), **how)
        loops.append(loop)
        return loop

    loops: list[Loop] = []
    try:
        last, processes = run_in_pieces(start)
    finally:
        for loop in loops:
            loop.learner.close()
    assert processes > 2
    assert state(newest(last.checkpoints)) == unbroken


def backbone_of(kind: str) -> Backbone:
    return tiny_vit(blocks=2) if kind == "image" else tiny_bert()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_run_with_reuse_is_near_one_without_and_computes_less(kind, tmp_path):
    found = {}
    for megabytes in (None, LARGE):
        loop = loop_of("inflora", kind, tmp_path / str(megabytes), megabytes, epochs=12)
        counts = examples_through(loop.learner.backbone)
        loop.run()
        loop.learner.close()
        found[megabytes] = loop, counts[0]
    (plain, without), (keeping, with_reuse) = found[None], found[LARGE]
    assert with_reuse < without / 2
    losses = [torch.tensor([loss for *_, loss in loop.losses]) for loop in (plain, keeping)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)


def test_training_images_are_freed_and_evaluation_images_stay(tmp_path):
    loop = loop_of("finetune", "image", tmp_path, LARGE)
    for phase in ("end", "evaluate"):
        loop.run(until=phase)
        if phase == "end":
            train = set(loop.stream[0].train.rows_n.tolist())
            assert {(row, view) for row in train for view in (0, 1)} <= loop.learner.reuse._places.keys()
    assert not train & {row for row, _ in loop.learner.reuse._places}
    loop.run(until="begin")
    test = {(row, None) for row in loop.stream[0].test.rows_n.tolist()}
    assert test <= loop.learner.reuse._places.keys()
    loop.run()
    assert test <= loop.learner.reuse._places.keys()
    loop.learner.close()


@pytest.mark.parametrize("views", [None, 1, 2])
def test_epochs_take_the_views_in_turn(views, tmp_path):
    class Noting(ImageTable):
        def inputs(self, rows: Any, augment: Augment | None) -> dict[str, Tensor]:
            if augment is not None and augment.epoch >= 0:
                epochs.append(augment.epoch)
            return super().inputs(rows, augment)

    epochs: list[int] = []
    loop = loop_of("finetune", "image", tmp_path, None)
    loop.views = views
    task = loop.stream[0]
    table = Noting(task.train.table.pixels_nchw)
    loop.stream = replace(loop.stream, tasks=(replace(task, train=replace(task.train, table=table)),))
    loop.run()
    assert [*dict.fromkeys(epochs)] == {None: [0, 1, 2], 1: [0], 2: [0, 1]}[views]
    steps = len(epochs) // 3
    assert epochs == [epoch % (views or 3) for epoch in range(3) for _ in range(steps)]


@pytest.mark.parametrize("name", ["color", "duallora", "ewc"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_on_a_pretended_card_it_has_the_bits_of_the_processor(name, kind, tmp_path):
    around = {"consolidation": ConsolidationConfig()}
    with pretended_card():
        there = loop_of(name, kind, tmp_path / "there", LARGE, device="cuda", **around)
        there.run()
        there.learner.close()
        found = {key: value.cpu() for key, value in there.learner.tensors().items()}
    here = loop_of(name, kind, tmp_path / "here", LARGE, **around)
    here.run()
    here.learner.close()
    wanted = here.learner.tensors()
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
