"""What `language.py` and `language_gpu.py` compare: lamina, PEFT and transformers on the same causal language model.

Every PEFT loop is written as a competent user would: a frozen base in the same precision, float32 adapters, no gradients but
those of the adapters, and the fused AdamW that lamina uses. Labels are -100 outside the completion.

Shape letters: b batch, t tokens, m options, s tokens of an option, o outputs, i inputs, r rank.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina import backbones
from lamina.config import TrainingConfig
from lamina.engine import optim
from lamina.engine.steps import backward
from lamina.learner import LanguageLearner
from lamina.speed import Accelerated, accelerate
from lamina.types import Batch, Task

TARGETS = ("q", "v")
MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
"""Names of the same layers in transformers."""
TASK = Task(name="now", classes=(0,), train=None, val=None, test=None)  # type: ignore[arg-type]
LR = 1e-4
Step = Callable[[Batch], float]
"""Does a training step and returns the loss before it."""
Logits = Literal["all", "needed"]
"""The positions whose scores over the vocabulary are computed: all, or those before tokens of a completion."""


# ---------------------------------------------------------------------------------------------- lamina


class Lamina:
    """A learner with one LoRA branch in every site, accelerated or not. It must be closed."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, rank: int, *, accelerated: bool = True, device: str = "cpu"
    ) -> None:
        where: Literal["cpu", "cuda"] = "cuda" if device == "cuda" else "cpu"
        self.learner = LanguageLearner(backbones.load(str(folder), dtype=dtype), TARGETS, dtype=dtype, device=where)
        self.learner.add_lora(TASK, rank, "benchmark")
        scatter(self.learner.trainable())
        self.parameters = self.learner.trainable()
        self.optimizer = optim.make_optimizer(self.parameters, TrainingConfig(optimizer="adamw", lr=LR))
        self.faster: Accelerated | None = accelerate(self.learner) if accelerated else None

    def loss(self, batch: Batch) -> Tensor:
        return self.learner.loss(batch, TASK)

    def step(self, batch: Batch) -> float:
        value = backward(self.loss, [*self.parameters.values()], batch).item()
        self.optimizer.step()
        return value

    def close(self) -> None:
        if self.faster is not None:
            self.faster.close()


class Floor:
    """The frozen model that learns nothing: a forward, and a backward of the gradients of inputs down to the outputs of the
    first layers that would be adapted. It must be closed."""

    def __init__(self, folder: Path, dtype: torch.dtype, *, device: str = "cpu") -> None:
        where: Literal["cpu", "cuda"] = "cuda" if device == "cuda" else "cpu"
        self.learner = LanguageLearner(backbones.load(str(folder), dtype=dtype), TARGETS, dtype=dtype, device=where)
        for site in self.learner.sites.values():
            if site.block == 0:
                site.layer.register_forward_hook(differentiated)
        self.faster = accelerate(self.learner)

    def step(self, batch: Batch) -> float:
        return backward(lambda batch: self.learner.loss(batch, TASK), [], batch).item()

    def close(self) -> None:
        self.faster.close()


def differentiated(_: nn.Module, __: object, output: Tensor) -> Tensor:
    return output.requires_grad_()


def scatter(parameters: Mapping[str, nn.Parameter]) -> None:
    """Fill the factors with small random numbers, a function of their order only: LoRA's own start has zeros, for which
    gradients of half of them are zero too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))


# ---------------------------------------------------------------------------------------------- PEFT and transformers


class Peft:
    """transformers' model with PEFT's adapters, alpha = r. attention: "sdpa" (the default of transformers) or "eager"."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        rank: int,
        *,
        logits: Logits = "all",
        attention: Literal["sdpa", "eager"] = "sdpa",
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device)
        settings = LoraConfig(
            r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=[MODULES[role] for role in TARGETS]
        )
        self.model: Any = get_peft_model(base, settings, autocast_adapter_dtype=True).train()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        assert {p.dtype for p in self.trained.values()} == {torch.float32}
        scatter(self.trained)
        self.optimizer = torch.optim.AdamW([*self.trained.values()], lr=LR, fused=True)
        self.logits = logits
        if compiled:
            self.model.compile(dynamic=False)

    def take(self, learner: LanguageLearner) -> None:
        """Give the adapters the factors of lamina's learner."""
        with torch.no_grad():
            for site in learner.sites.values():
                up_or, down_ri = site.live()[TASK.name].factors()
                for part, factor in (("A", down_ri), ("B", up_or)):
                    self.trained[f"base_model.model.{site.where.path}.lora_{part}.default.weight"].copy_(factor)

    def loss(self, batch: Batch) -> Tensor:
        ids_bt, mask_bt, completion_bt = (
            batch.inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")
        )
        given = {"input_ids": ids_bt, "attention_mask": mask_bt, "use_cache": False}
        if self.logits == "all":
            loss: Tensor = self.model(**given, labels=ids_bt.masked_fill(completion_bt == 0, -100)).loss
            return loss
        # transformers takes a boolean mask of the positions whose scores are wanted, and returns them one after another.
        before_bt = F.pad(completion_bt[:, 1:], (0, 1)).bool()
        logits_nv: Tensor = self.model(**given, logits_to_keep=before_bt).logits
        return F.cross_entropy(logits_nv.float(), ids_bt[completion_bt.bool()])

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        value = loss.item()
        self.optimizer.step()
        return value

    def merged(self) -> Any:
        """Returns transformers' model with the adapters merged into its weights. This object must not be used afterwards."""
        return self.model.merge_and_unload().eval()

    def close(self) -> None:
        """Does nothing: what `language.py` compares can be closed."""


def agreement(ours: Lamina, theirs: Peft, given: Sequence[Batch]) -> dict[str, float]:
    """Returns the losses of both with lamina's factors, means over the batches, and the largest relative distance of the
    gradients of a factor on the first batch. In bf16 one batch says little: each loss is rounded by 1 to 2 %."""
    theirs.take(ours.learner)
    theirs.optimizer.zero_grad(set_to_none=True)
    own, loss = backward(ours.loss, [*ours.parameters.values()], given[0]).item(), theirs.loss(given[0])
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        others = [(ours.loss(batch).item(), theirs.loss(batch).item()) for batch in given[1:]]
    own, their = (statistics.mean(losses) for losses in zip((own, loss.item()), *others, strict=True))
    distances = []
    for site in ours.learner.sites.values():
        for part, name in (("A", "down"), ("B", "up")):
            found = ours.parameters[f"{site.name}/{TASK.name}/{name}"].grad
            wanted = theirs.trained[f"base_model.model.{site.where.path}.lora_{part}.default.weight"].grad
            assert found is not None
            assert wanted is not None
            distances.append(float((found - wanted).norm() / wanted.norm().clamp_min(1e-12)))
    return {"lamina": own, "peft": their, "gradients": max(distances)}


# ---------------------------------------------------------------------------------------------- ranking


@torch.inference_mode()
def ranked_apart(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the log-likelihood of every option (b, m), each scored as a sequence of its own, all in one batch. Scores over
    the vocabulary are computed where they are needed."""
    ids_nt, mask_nt, completion_nt = sequences(inputs)
    before_nt = F.pad(completion_nt[:, 1:], (0, 1)).bool()
    logits_kv = model(input_ids=ids_nt, attention_mask=mask_nt, use_cache=False, logits_to_keep=before_nt).logits
    tokens_k = ids_nt[completion_nt.bool()]
    log_k = logits_kv.float().log_softmax(-1).gather(1, tokens_k[:, None])[:, 0]
    rows_k, _ = before_nt.nonzero(as_tuple=True)
    scores_n = log_k.new_zeros(len(ids_nt)).index_add(0, rows_k, log_k)
    scores_bm: Tensor = scores_n.view(inputs["option_mask"].shape[:2])
    return scores_bm.masked_fill(~inputs["option_mask"].bool().any(2), -torch.inf)


def sequences(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ids, attention mask and completion mask (b m, t) of every prompt with each of its options, padded on the right.

    inputs: a batch of questions, with padding on the right.
    """
    length_b, (b, m, s) = inputs["attention_mask"].sum(1), inputs["option_ids"].shape
    longest = int(inputs["option_mask"].sum(2).amax() + length_b.max())
    ids_nt = F.pad(inputs["input_ids"].repeat_interleave(m, 0), (0, s))
    place_n1 = length_b.repeat_interleave(m)[:, None]
    places_ns = place_n1 + torch.arange(s, device=place_n1.device)
    ids_nt = ids_nt.scatter(1, places_ns, inputs["option_ids"].view(b * m, s))
    completion_nt = torch.zeros_like(ids_nt).scatter(1, places_ns, inputs["option_mask"].view(b * m, s))
    prompt_nt = torch.arange(ids_nt.shape[1], device=ids_nt.device) < place_n1
    return ids_nt[:, :longest], (prompt_nt | completion_nt.bool()).long()[:, :longest], completion_nt[:, :longest]


@torch.inference_mode()
def ranked_by_cache(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the log-likelihood of every option (b, m): each prompt is computed once, and its keys and values are copied for
    all of its options, which are computed as a second batch."""
    mask_bt, option_bms, own_bms = (inputs[name] for name in ("attention_mask", "option_ids", "option_mask"))
    length_b, (b, m, s) = mask_bt.sum(1), option_bms.shape
    first = model(
        input_ids=inputs["input_ids"], attention_mask=mask_bt, use_cache=True, logits_to_keep=length_b[:, None] - 1
    )
    logits_nsv = first.logits.repeat_interleave(m, 0)
    option_ns, own_ns = option_bms.view(b * m, s), own_bms.view(b * m, s)
    if s > 1:
        first.past_key_values.batch_repeat_interleave(m)
        place_n1 = length_b.repeat_interleave(m)[:, None]
        later = model(
            input_ids=option_ns[:, :-1],
            attention_mask=torch.cat([mask_bt.repeat_interleave(m, 0), own_ns[:, :-1]], 1),
            position_ids=place_n1 + torch.arange(s - 1, device=place_n1.device),
            past_key_values=first.past_key_values,
            use_cache=True,
        )
        logits_nsv = torch.cat([logits_nsv, later.logits], 1)
    log_ns = logits_nsv.float().log_softmax(-1).gather(2, option_ns[..., None])[..., 0]
    scores_bm: Tensor = (log_ns * own_ns).sum(1).view(b, m)
    return scores_bm.masked_fill(~own_bms.bool().any(2), -torch.inf)


def ranked_by_lamina(ours: Lamina, batch: Batch) -> Tensor:
    return ours.learner.option_scores(batch)


# ---------------------------------------------------------------------------------------------- generation


@torch.inference_mode()
def generated(model: Any, batch: Batch, count: int, pad: int) -> list[list[int]]:
    """Returns exactly `count` tokens after each prompt, greedily, by transformers."""
    from transformers import GenerationConfig

    mask_bt = batch.inputs["attention_mask"]
    order_bt = mask_bt.argsort(dim=1, stable=True)  # padding to the left
    settings = GenerationConfig(max_new_tokens=count, do_sample=False, use_cache=True, pad_token_id=pad)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.generation_config = settings
    found_bt = model.generate(
        input_ids=batch.inputs["input_ids"].gather(1, order_bt),
        attention_mask=mask_bt.gather(1, order_bt),
        generation_config=settings,
    )
    rows: list[list[int]] = found_bt[:, mask_bt.shape[1] :].tolist()
    return rows


def generated_by_lamina(ours: Lamina, batch: Batch, count: int, pad: int) -> list[list[int]]:
    return ours.learner.generate(batch, count, stop_nowhere(ours), pad)


def stop_nowhere(ours: Lamina) -> Sequence[int]:
    """Returns a stop token that greedy text never has: the last of the vocabulary."""
    vocabulary = ours.learner.backbone.vocabulary
    assert vocabulary is not None
    return (vocabulary - 1,)


def folded(ours: Lamina) -> AbstractContextManager[None]:
    return ours.learner.folded()


# ---------------------------------------------------------------------------------------------- batches


def long_batch(b: int, t: int, completion: int, vocabulary: int, device: str = "cpu") -> Batch:
    """Returns random tokens (b, t), the last `completion` of each sequence to be learnt."""
    generator = torch.Generator().manual_seed(0)
    ids_bt = torch.randint(0, vocabulary, (b, t), generator=generator)
    mask_bt = torch.ones_like(ids_bt)
    inputs = {
        "input_ids": ids_bt,
        "attention_mask": mask_bt,
        "completion_mask": mask_bt * (torch.arange(t) >= t - completion),
    }
    return Batch(inputs=inputs, labels_b=torch.zeros(b, dtype=torch.int64)).to(torch.device(device))
