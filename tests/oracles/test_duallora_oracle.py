"""DualLoRA against a slow and obvious numpy version of its reconstruction (docs/papers/duallora.md).

The oracle keeps all probes as a matrix and decomposes that, computes attention token by token, and predicts one input at
a time with a plain model whose weights are those that this input should meet.

Shape letters: b batch, n probes, t tokens, h heads, e width of a head, d width, k directions, j tasks, r rank.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import noise, tiny_bert, tiny_fused_vit, tiny_images, tiny_texts, tiny_vit

from lamina.adapters import Mixture
from lamina.backbones import Backbone
from lamina.config import EvaluationConfig, TrainingConfig
from lamina.data.streams import class_plan, make_stream
from lamina.engine.loop import Loop
from lamina.errors import MethodError
from lamina.learner import Learner
from lamina.learner.probes import watchers
from lamina.maths import attention
from lamina.maths.block_subspaces import main_directions, new_directions
from lamina.maths.linalg import remove_span
from lamina.methods.base import Step, growing_threshold
from lamina.methods.duallora import DualLoRA, DualLoRAConfig, orthogonal, residual
from lamina.types import Batch, Task

MAKERS = {"vit": tiny_vit, "fused": tiny_fused_vit, "bert": tiny_bert}
HEADS, BLOCKS = 2, 2
every_backbone = pytest.mark.parametrize("kind", MAKERS)


def softmax(x_t: np.ndarray) -> np.ndarray:
    grown_t = np.exp(x_t - x_t.max())
    return grown_t / grown_t.sum()


def look(
    x_td: np.ndarray, q: tuple, k: tuple, *, first: bool, mask_t: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Queries (n, d) and pooled inputs (h, d) of one example, with all keys and their bias spelt out."""
    real = [t for t in range(len(x_td)) if mask_t is None or mask_t[t]]
    readers, width = [0] if first else real, len(q[0]) // HEADS
    asked_nd = np.stack([q[0] @ x_td[n] + q[1] for n in readers])
    pooled = np.zeros((HEADS, x_td.shape[1]))
    for h in range(HEADS):
        part = slice(h * width, (h + 1) * width)
        for asked_d in asked_nd:
            logits = [asked_d[part] @ (k[0][part] @ x_td[t] + k[1][part]) / np.sqrt(width) for t in real]
            for a, t in zip(softmax(np.array(logits)), real, strict=True):
                pooled[h] += a * x_td[t] / len(readers)
    return asked_nd, pooled


def class_output(x_td: np.ndarray, q: tuple, k: tuple, v: tuple) -> np.ndarray:
    """What the class token gets from the layer, heads side by side."""
    width, (_, pooled_hd) = len(q[0]) // HEADS, look(x_td, q, k, first=True)
    parts = [slice(h * width, (h + 1) * width) for h in range(HEADS)]
    return np.concatenate([v[0][part] @ pooled_hd[h] + v[1][part] for h, part in enumerate(parts)])


def weights(d: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    return {role: (generator.normal(size=(d, d)) / np.sqrt(d), generator.normal(size=d)) for role in "qkv"}


def moment_of(probes_nd: np.ndarray, blocks: int) -> torch.Tensor:
    parts_gne = torch.from_numpy(probes_nd).reshape(len(probes_nd), blocks, -1).transpose(0, 1)
    return parts_gne.mT @ parts_gne


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("first", [True, False], ids=["class token", "all tokens"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_the_readers_read(first: bool, masked: bool):
    b, t, d, generator = 4, 5, 12, np.random.default_rng(1)
    x_btd = generator.normal(size=(b, t, d))
    mask_bt = (np.arange(t) < np.array([5, 3, 1, 4])[:, None]).astype(np.int64) if masked else None
    all_weights = weights(d, 0)
    ups_jor, downs_jrd = generator.normal(size=(3, d, 2)), generator.normal(size=(3, 2, d))
    gates_bj = generator.uniform(size=(b, 3))
    x, mask = torch.from_numpy(x_btd), None if mask_bt is None else torch.from_numpy(mask_bt)
    q, k = all_weights["q"], all_weights["k"]
    asked = attention.queries(x, *map(torch.from_numpy, q), mask, first=first)
    logits = attention.key_logits(asked, x, torch.from_numpy(k[0]), HEADS)
    logits += attention.routed_logits(asked, x, *map(torch.from_numpy, (ups_jor, downs_jrd, gates_bj)), HEADS)
    pooled = attention.pooled_inputs(logits, x, d // HEADS, mask)
    for i in range(b):
        changed_od = k[0] + np.einsum("j,jor,jrd->od", gates_bj[i], ups_jor, downs_jrd)
        mask_t = None if mask_bt is None else mask_bt[i]
        asked_nd, pooled_hd = look(x_btd[i], q, (changed_od, k[1]), first=first, mask_t=mask_t)
        np.testing.assert_allclose(asked[i, : len(asked_nd)], asked_nd, atol=1e-10)
        assert torch.count_nonzero(asked[i, len(asked_nd) :]) == 0
        np.testing.assert_allclose(pooled[i], pooled_hd, atol=1e-10)


def test_a_change_of_values_orthogonal_to_what_is_pooled_is_not_felt():
    """Nor is one of keys orthogonal, per head, to the class token's query; orthogonality to the class token is no help."""
    d, images = 32, 6
    given, generator = weights(d, 3), np.random.default_rng(4)
    x_itd = generator.normal(size=(images, 7, d))
    asked_id, pooled_nd = [], []
    for x_td in x_itd:
        asked_nd, pooled_hd = look(x_td, given["q"], given["k"], first=True)
        asked_id.append(asked_nd[0])
        pooled_nd.extend(pooled_hd)
    bases = {
        "v": new_directions(moment_of(np.stack(pooled_nd), 1), torch.zeros(d, 0), 1.0),
        "k": new_directions(moment_of(np.stack(asked_id), HEADS), torch.zeros(d, 0), 1.0),
    }
    assert bases["v"].shape == (d, images * HEADS)
    assert bases["k"].shape == (d, images * HEADS), "six of the sixteen dimensions of each head"
    change_od = torch.from_numpy(generator.normal(size=(d, d)))
    changes = {
        "v": remove_span(change_od.T, bases["v"]).T.numpy(),
        "k": remove_span(change_od, bases["k"]).numpy(),
    }
    token_dk = torch.linalg.qr(torch.from_numpy(x_itd[:, 0].T))[0]
    useless_od = remove_span(change_od.T, token_dk).T.numpy()
    fresh_td = generator.normal(size=(7, d))
    for role, change in changes.items():
        new = given | {role: (given[role][0] + change, given[role][1])}
        for x_td in x_itd:
            np.testing.assert_allclose(class_output(x_td, **new), class_output(x_td, **given), atol=1e-10)
        assert np.abs(class_output(fresh_td, **new) - class_output(fresh_td, **given)).max() > 1e-2
    for role in "kv":
        moved = given | {role: (given[role][0] + useless_od, given[role][1])}
        assert np.abs(class_output(x_itd[0], **moved) - class_output(x_itd[0], **given)).max() > 1e-2


# --------------------------------------------------------------------------------------------------- subspaces


def novel(probes_ne: np.ndarray, old_ek: np.ndarray, epsilon: float) -> np.ndarray:
    """GPM's step on the matrix of probes: the fewest singular vectors, but at least one."""
    rest_en = probes_ne.T - old_ek @ (old_ek.T @ probes_ne.T)
    u_ek, s_k, _ = np.linalg.svd(rest_en, full_matrices=False)
    total, alive = np.sum(probes_ne**2), int(np.sum(s_k**2 > 1e-10 * np.sum(probes_ne**2)))
    count, held = 0, total - np.sum(rest_en**2)
    while count < alive and (count == 0 or held / total < epsilon):
        held += s_k[count] ** 2
        count += 1
    return u_ek[:, :count]


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("epsilon", [0.6, 0.9, 1 - 1e-7])
def test_new_directions_over_a_stream(blocks: int, epsilon: float):
    e, generator, sizes = 8, np.random.default_rng(blocks), []
    bases_dk, old = torch.zeros(blocks * e, 0), [np.zeros((e, 0)) for _ in range(blocks)]
    for task in range(5):
        spread_e = 0.6 ** np.arange(e)
        parts = [generator.normal(size=(30, e)) * spread_e @ generator.normal(size=(e, e)) for _ in range(blocks)]
        if task < 2:
            parts = [part[:3] for part in parts]  # of low rank
        moment_gee = moment_of(np.concatenate(parts, 1), blocks)
        main_dr = main_directions(moment_gee, bases_dk, 4).numpy().reshape(blocks, e, 4)
        new_dk = new_directions(moment_gee, bases_dk, epsilon)
        expected = [novel(part, o, epsilon) for part, o in zip(parts, old, strict=True)]
        assert new_dk.shape[1] == sum(u.shape[1] for u in expected)
        start = 0
        for g, u_ek in enumerate(expected):
            mine_gek = new_dk[:, start : start + u_ek.shape[1]].numpy().reshape(blocks, e, u_ek.shape[1])
            start += u_ek.shape[1]
            np.testing.assert_allclose(mine_gek[g] @ mine_gek[g].T, u_ek @ u_ek.T, atol=1e-6)
            assert np.count_nonzero(np.delete(mine_gek, g, 0)) == 0, "a column is of one block"
            all_ek = novel(parts[g], old[g], 1.0)
            kept = min(4, all_ek.shape[1])
            np.testing.assert_allclose(main_dr[g] @ main_dr[g].T, all_ek[:, :kept] @ all_ek[:, :kept].T, atol=1e-5)
            old[g] = np.hstack([old[g], u_ek])
        bases_dk = torch.cat([bases_dk, new_dk.float()], 1)
        sizes.append(new_dk.shape[1])
    gram_kk = bases_dk.double().T @ bases_dk.double()
    np.testing.assert_allclose(gram_kk, np.eye(len(gram_kk)), atol=1e-6, err_msg="all Ψ are orthogonal to each other")
    assert len(gram_kk) <= blocks * e
    assert all(sizes[:2])


# ------------------------------------------------------------------------------------------------ whole runs


def run(folder: Path, kind: str = "vit", *, watch: Callable[[Loop], None] | None = None, **settings: object) -> Loop:
    data = (tiny_texts if kind == "bert" else tiny_images)(72, 6)
    stream = make_stream(data, class_plan(data, 3), "class")
    loop = Loop(
        learner=Learner(MAKERS[kind](blocks=BLOCKS), ("k", "v")),
        method=DualLoRA(DualLoRAConfig(**{"rank": 3, "epsilon": 0.5, **settings}), task_count=3),
        stream=stream,
        training=TrainingConfig(epochs=2, lr=0.05, batch_size=8),
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=folder,
    )
    if watch is not None:
        loop.on_event = lambda event: watch(loop)
    loop.run()
    return loop


def everything(loop: Loop) -> Batch:
    examples = loop.stream.joint()[0].test
    return examples.batch(np.arange(len(examples)))


def submodule(model: Backbone, site) -> tuple[torch.Tensor, slice]:
    linear = model.module.get_submodule(site.path)
    return linear, slice(*site.outputs) if site.outputs else slice(None)


def plain_model(kind: str, learner: Learner, gates: dict[str, list[float]], tasks: list[str]) -> Backbone:
    """The pre-trained model plus every O, plus each task's R times its gate in each site."""
    made = MAKERS[kind](blocks=BLOCKS)
    for site in learner.sites.values():
        linear, rows = submodule(made, site.where)
        for task, gate in zip(tasks, gates.get(site.name, [0.0] * len(tasks)), strict=True):
            parts = site.finished()
            for name, scale in ((orthogonal(task), 1.0), (residual(task), gate)):
                if name in parts:
                    linear.weight.data[rows] += scale * parts[name].up_or @ parts[name].down_ri
    return made


def input_of(model: Backbone, inputs: dict, block: int) -> np.ndarray:
    """What the attention of this block reads, of one example (t, d)."""
    site = next(s for s in model.sites if (s.block, s.role) == (block, "k"))
    seen: list[torch.Tensor] = []
    handle = model.module.get_submodule(site.path).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        model.features(inputs)
    handle.remove()
    return seen[0][0].double().numpy()


def weight_of(model: Backbone, block: int, role: str) -> tuple[np.ndarray, np.ndarray]:
    linear, rows = submodule(model, next(s for s in model.sites if (s.block, s.role) == (block, role)))
    return linear.weight[rows].detach().double().numpy(), linear.bias[rows].detach().double().numpy()


def nearness(memory: dict, name: str, probes_nd: np.ndarray) -> list[float]:
    found, start = [], 0
    for size in memory[f"{name}/sizes"].tolist():
        part_dk = memory[f"{name}/bases"][:, start : start + size].double().numpy()
        start += size
        found.append(sum(np.sum((part_dk.T @ p_d) ** 2) for p_d in probes_nd) / np.sum(probes_nd**2))
    return found


def gates_from(near_j: list[float], shares_j2: np.ndarray, reading: str) -> list[float]:
    gates = []
    for j, near in enumerate(near_j):
        if reading == "own":
            gates.append(min(1.0, near / max(shares_j2[j][0], 1e-6)))
        elif j == 0:
            gates.append(0.0)  # there is no such residual
        else:
            before, here = max(shares_j2[j - 1][0], 1e-6), shares_j2[j][1]
            gates.append(min(1.0, max(0.0, (1 - near_j[j - 1] / before) / max(1 - here / before, 0.1))))
    return gates


def answer(kind: str, loop: Loop, inputs: dict) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Scores (r,) of one input, and the gates it met, site by site in the order of the network."""
    learner, memory, config = loop.learner, loop.method.memory, loop.method.config
    tasks, gates, relative = [task.name for task in loop.stream], {}, []
    mask_t = inputs["attention_mask"][0].numpy() if kind == "bert" else None
    for block in range(BLOCKS):
        for role in "kv":  # the gates of the keys decide what the values' probes are
            model = plain_model(kind, learner, gates, tasks)
            x_td = input_of(model, inputs, block)
            q, k = weight_of(model, block, "q"), weight_of(model, block, "k")
            probes_nd = look(x_td, q, k, first=kind != "bert", mask_t=mask_t)[0 if role == "k" else 1]
            name = f"block{block}.{role}"
            near_j, shares_j2 = nearness(memory, name, probes_nd), memory[f"{name}/shares"].double().numpy()
            relative.append(near_j / np.maximum(shares_j2[:, 0], 1e-6))
            if config.residual != "none":
                gates[name] = gates_from(near_j, shares_j2, config.residual) if config.dynamic_memory else [1.0] * 3
    with torch.no_grad():
        scores_r = learner.head(plain_model(kind, learner, gates, tasks).features(inputs))[0].numpy()
    confidence_j = softmax(np.mean(relative, 0) / config.temperature)
    row = 0
    for j, task in enumerate(loop.stream):
        scores_r[row : row + len(task.classes)] -= config.calibration * (confidence_j.max() - confidence_j[j])
        row += len(task.classes)
    return scores_r, gates


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("vit", {"residual": "own", "calibration": 3.0}),
        ("vit", {"residual": "previous"}),
        ("fused", {"residual": "own"}),
        ("fused", {"residual": "previous", "calibration": 1.0, "temperature": 0.5}),
        ("bert", {"residual": "own", "calibration": 1.0}),
        ("vit", {"residual": "own", "dynamic_memory": False}),
        ("vit", {"residual": "none", "calibration": 3.0}),
    ],
    ids=str,
)
def test_predictions_are_those_of_one_plain_model_per_input(kind: str, settings: dict, tmp_path: Path):
    loop = run(tmp_path, kind, **settings)
    batch = everything(loop)
    with loop.learner.folded():
        scores_br = loop.method.predict(loop.learner, batch)
    met = []
    for b in range(len(batch)):
        expected_r, gates = answer(kind, loop, {k: v[b : b + 1] for k, v in batch.inputs.items()})
        np.testing.assert_allclose(scores_br[b].numpy(), expected_r, atol=2e-4, rtol=1e-3)
        met += [gate for values in gates.values() for gate in values]
    if settings["residual"] != "none" and settings.get("dynamic_memory", True):
        assert min(met) < 0.7
        assert max(met) == pytest.approx(1)
        assert len({round(gate, 3) for gate in met}) > 10, "gates differ from input to input"


@pytest.mark.parametrize("reading", ["own", "previous", "none"])
def test_told_the_task_its_residual_counts_in_full_and_no_other(reading: str, tmp_path: Path):
    loop = run(tmp_path, residual=reading)
    batch, tasks = everything(loop), [task.name for task in loop.stream]
    for j, task in enumerate(tasks):
        with loop.learner.folded():
            told_br = loop.method.predict_task_aware(loop.learner, batch, task)
        alone = {name: [float(i == j) for i in range(3)] for name in loop.learner.sites}
        with torch.no_grad():
            features_bd = plain_model("vit", loop.learner, alone, tasks).features(batch.inputs)
        torch.testing.assert_close(told_br, loop.learner.head(features_bd), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_with_gates_of_one_residuals_are_summed_and_with_zero_only_o_is_left(
    gate: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loop = run(tmp_path)
    batch, tasks = everything(loop), [task.name for task in loop.stream]
    monkeypatch.setattr(loop.method, "gates", lambda site, near_bj: torch.full_like(near_bj, gate))
    with loop.learner.folded():
        scores_br = loop.method.predict(loop.learner, batch)
    with torch.no_grad():
        model = plain_model("vit", loop.learner, dict.fromkeys(loop.learner.sites, [gate] * 3), tasks)
        expected_br = loop.learner.head(model.features(batch.inputs))
        other_br = loop.learner.head(
            plain_model("vit", loop.learner, dict.fromkeys(loop.learner.sites, [1 - gate] * 3), tasks).features(
                batch.inputs
            )
        )
    torch.testing.assert_close(scores_br, expected_br, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(scores_br, other_br, atol=1e-2)


@every_backbone
def test_after_every_step_o_does_not_touch_what_is_kept(kind: str, tmp_path: Path):
    seen: list[float] = []

    def watch(loop: Loop) -> None:
        for name, site in loop.learner.sites.items():
            bases_dk = loop.method.memory.get(f"{name}/bases", torch.zeros(32, 0))
            for task, branch in site.live().items():
                if task.startswith("orthogonal:") and bases_dk.shape[1]:
                    up_or, down_ri = (factor.detach().double() for factor in branch.factors())
                    touched = bases_dk.T.double() @ up_or if name.endswith("k") else down_ri @ bases_dk.double()
                    assert touched.abs().max() < 1e-5 * max(1.0, float((up_or @ down_ri).abs().max()))
                    seen.append(float((up_or @ down_ri).abs().max()))

    run(tmp_path, kind, watch=watch, residual="none")
    assert len(seen) > 2 * len(tiny_vit().sites)
    assert max(seen) > 1e-2, "O has learnt something"


@pytest.mark.parametrize("reading", ["own", "previous"])
@every_backbone
def test_where_residuals_live(kind: str, reading: str, tmp_path: Path):
    """All are at work, but for those that have no basis: the class token's query in the first block is one direction."""
    loop = run(tmp_path, kind, residual=reading)
    for name, site in loop.learner.sites.items():
        bases_dk, sizes = loop.method.memory[f"{name}/bases"].double(), loop.method.memory[f"{name}/sizes"].tolist()
        starts, blocks = np.cumsum([0, *sizes]), HEADS if name.endswith("k") else 1
        assert (residual("task-01") in site.finished()) == (reading == "own")
        for j in (1, 2):
            part = site.finished()[residual(f"task-{j + 1:02d}")]
            change_oi = (part.up_or @ part.down_ri).double()
            change_do = change_oi if name.endswith("k") else change_oi.T
            none_left = kind != "bert" and name == "block0.k" and (reading == "own" or j == 2)
            assert change_do.abs().max() == 0 if none_left else change_do.abs().max() > 1e-3
            inside_dk = bases_dk[:, : starts[j]] if reading == "own" else bases_dk[:, starts[j - 1] : starts[j]]
            left_do = remove_span(change_do, inside_dk)
            if reading == "own":
                torch.testing.assert_close(left_do, change_do, atol=1e-5, rtol=0)
            else:
                assert left_do.abs().max() < 1e-5
        gram_rr = {"k": lambda p: p.up_or.T @ p.up_or, "v": lambda p: p.down_ri @ p.down_ri.T}[name[-1]](part)
        lengths_r = gram_rr.diagonal()[gram_rr.diagonal() > 1e-6]
        assert none_left or len(lengths_r) >= 1
        assert (lengths_r <= blocks / 3 + 1e-5).all()


def test_shares_are_of_the_tasks_own_energy_and_all_psi_are_orthogonal(tmp_path: Path):
    loop = run(tmp_path, residual="none", epsilon=0.8)
    learner, memory, task = loop.learner, loop.method.memory, loop.stream[-1]
    probes: dict[str, list[np.ndarray]] = {}
    model = plain_model("vit", learner, {}, [t.name for t in loop.stream])
    for row in range(len(task.train)):
        inputs = task.train.batch(np.array([row])).inputs
        for block in range(BLOCKS):
            x_td = input_of(model, inputs, block)
            found = look(x_td, weight_of(model, block, "q"), weight_of(model, block, "k"), first=True)
            for role, probes_nd in zip("kv", found, strict=True):
                probes.setdefault(f"block{block}.{role}", []).extend(probes_nd)
    for name, of_name in probes.items():
        probes_nd, sizes = np.stack(of_name), memory[f"{name}/sizes"].tolist()
        bases_dk = memory[f"{name}/bases"].double().numpy()
        np.testing.assert_allclose(bases_dk.T @ bases_dk, np.eye(sum(sizes)), atol=1e-6)
        total, (_, b, c) = np.sum(probes_nd**2), np.cumsum(sizes)
        a = sizes[0]
        own, last = (np.sum((probes_nd @ bases_dk[:, part]) ** 2) / total for part in (slice(b, c), slice(a, b)))
        np.testing.assert_allclose(memory[f"{name}/shares"][-1], [own, last], rtol=1e-3, atol=1e-6)
        blocks = HEADS if name.endswith("k") else 1
        for g in range(blocks):
            part = slice(g * 32 // blocks, (g + 1) * 32 // blocks)
            inside = np.sum((probes_nd[:, part] @ bases_dk[part]) ** 2) / np.sum(probes_nd[:, part] ** 2)
            assert inside >= growing_threshold(0.8, 2, 3) - 1e-4, "each head keeps its share"


def test_rounding_noise_is_no_direction():
    """In the first block the class token, and so its query, is the same for all images: one direction per head, for ever."""
    data = tiny_images(240, classes=8)
    stream = make_stream(data, class_plan(data, 8), "class")
    learner = Learner(tiny_vit(blocks=2), ("k", "v"))
    method = DualLoRA(DualLoRAConfig(rank=2, epsilon=0.5, residual="none"), task_count=8)
    for task in stream:

        def batches(*, augmented: bool, task: Task = task) -> Iterator[Batch]:
            for rows in np.array_split(np.arange(len(task.train)), 4):  # in batches of different sizes
                yield task.train.batch(rows)

        method.begin(learner, task, batches)
        for site in learner.sites.values():
            branch = site.live()[orthogonal(task.name)]
            branch.up.data += 0.1 * noise((site.d_out, 2), site.name, task.name)
        method.end(learner, task, batches)
    assert method.memory["block0.k/sizes"].tolist() == [HEADS, 0, 0, 0, 0, 0, 0, 0]
    assert all(size > 0 for name in ("block0.v", "block1.k") for size in method.memory[f"{name}/sizes"].tolist()[:3])


def test_features_of_an_old_task_stay_where_all_it_reads_is_kept(tmp_path: Path):
    """In one block, whose input nothing changes: exactly; with hardly anything kept, they move."""
    data = tiny_images(24, classes=4)
    stream = make_stream(data, class_plan(data, 2), "class", per_class=4)
    moved = {}
    for epsilon in (0.01, 1.0):
        loop = Loop(
            learner=Learner(tiny_vit(blocks=1, width=96), ("k", "v")),
            method=DualLoRA(DualLoRAConfig(rank=4, epsilon=epsilon, residual="none", growing_threshold=False)),
            stream=stream,
            training=TrainingConfig(epochs=4, lr=0.05, schedule="constant"),
            evaluation=EvaluationConfig(),
            seed=0,
            checkpoints=tmp_path / str(epsilon),
        )
        old, before = stream[0].train.batch(np.arange(len(stream[0].train))), []

        def keep(event, loop=loop, old=old, before=before) -> None:
            if (event.task, event.phase) == (0, "evaluate"):
                with loop.learner.folded():
                    before.append(loop.learner.features(old))

        loop.on_event = keep
        loop.run()
        with loop.learner.folded():
            now_bd = loop.learner.features(old)
        moved[epsilon] = float((now_bd - before[-1]).norm() / before[-1].norm())
    assert moved[0.01] > 1e-2
    assert moved[1.0] < 1e-5


@every_backbone
def test_routed_adapters_of_the_keys_count_in_the_probes_of_the_values(kind: str):
    """Shown is what the layer does: compared with the keys it really gives out, experts and live branch included."""
    learner = Learner(MAKERS[kind](blocks=1), ("k", "v"))
    data = (tiny_texts if kind == "bert" else tiny_images)(12)
    batch = Batch(inputs=data.table.inputs(np.arange(6), None), labels_b=torch.zeros(6))
    site = learner.sites["block0.k"]
    ups_jor, downs_jrd, gates_bj = noise((2, 32, 3), "u"), 0.3 * noise((2, 3, 32), "d"), noise((6, 2), "g").abs()
    site.layer.mixtures["k"] = Mixture(site.outputs, ups_jor, downs_jrd, lambda x: gates_bj)
    DualLoRA(DualLoRAConfig(residual="none")).begin(learner, _task(), lambda *, augmented: iter(()))
    for live in site.live().values():
        live.up.data.copy_(noise((32, 10), "live"))
    shown: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    handles = []
    for role in "qk":
        site = next(s for s in learner.backbone.sites if s.role == role)
        linear = learner.backbone.module.get_submodule(site.path)
        rows = slice(*site.outputs) if site.outputs else slice(None)
        handles.append(
            linear.register_forward_hook(
                lambda _, x, y, role=role, rows=rows: kept.update({role: y[..., rows], "x": x[0]})
            )
        )
    with (
        learner.watching(watchers(learner, batch, lambda s, probes: shown.update({s.role: probes}))),
        torch.no_grad(),
    ):
        learner.features(batch)
    mask_bt = batch.inputs.get("attention_mask", torch.ones(kept["x"].shape[:2]))
    logits = torch.einsum("bnhe,bthe->bhnt", *(kept[role].view(*kept[role].shape[:2], HEADS, -1) for role in "qk")) / 4
    attention_bhnt = logits.masked_fill(mask_bt[:, None, None] == 0, -torch.inf).softmax(-1)
    if kind == "bert":
        share_bn = mask_bt / mask_bt.sum(1, keepdim=True)
        mean_bht, asked = torch.einsum("bhnt,bn->bht", attention_bhnt, share_bn), kept["q"] * mask_bt[..., None]
    else:
        mean_bht, asked = attention_bhnt[:, :, 0], kept["q"][:, :1]
    torch.testing.assert_close(shown["v"], mean_bht @ kept["x"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shown["k"], asked, atol=1e-5, rtol=1e-5)


def _task():
    data = tiny_images(24)
    return make_stream(data, class_plan(data, 2), "class")[0]


def test_what_does_not_fit_is_refused():
    method = DualLoRA(DualLoRAConfig())
    with pytest.raises(MethodError, match=r"keys and values only, and backbone.targets has fc1, k\."):
        method.begin(Learner(tiny_vit(), ("k", "fc1")), _task(), lambda *, augmented: iter(()))
    unknown = tiny_vit()
    unknown.heads = None
    with pytest.raises(
        MethodError, match=r"number of attention heads, which backbone 'tiny_vit' does not say\. Give `heads`"
    ):
        method.begin(Learner(unknown), _task(), lambda *, augmented: iter(()))


@pytest.mark.parametrize("targets", [("k",), ("v",)])
def test_keys_or_values_alone(targets: tuple[str, ...], tmp_path: Path):
    data = tiny_images(48, 4)
    loop = Loop(
        learner=Learner(tiny_vit(blocks=1), targets),
        method=DualLoRA(DualLoRAConfig(rank=2, calibration=1.0), task_count=None),
        stream=make_stream(data, class_plan(data, 2), "class"),
        training=TrainingConfig(epochs=1),
        evaluation=EvaluationConfig(),
        seed=0,
        checkpoints=tmp_path,
    )
    loop.run()
    assert {key.split("/")[0] for key in loop.method.memory} == {f"block0.{targets[0]}"}
    loop.method.after_step(loop.learner, Step(0, 1, 0.1))
