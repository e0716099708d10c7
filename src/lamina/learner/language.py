"""LanguageLearner: a causal language model with adapters. The head of the model itself predicts the tokens of a completion.

    loss     mean over the completion tokens of a batch of  -log p(token | everything before it)
    ranking  log p(option | prompt) = Σ_k log p(o_k | prompt, o_1 ... o_{k-1}),  the last o_k being the end of the completion

All options of a prompt are ranked in one forward: its tokens are followed by those of every option. An option sees the prompt
and itself only, and has the positions that follow the prompt. The keys and values of the prompt are thus computed once
and shared, and the scores are those of one sequence per option.

Shape letters: b batch, t tokens, d width, m options, s tokens of an option, n chosen tokens, v vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lamina.learner.head import Head, drawn
from lamina.learner.learner import Draw, Learner
from lamina.types import Batch, Task

ROWS = 512
"""Hidden states whose scores over the vocabulary are held at a time."""


class NoOutputs(Head):
    """The head of a language model: its blocks are empty, since completions are written in tokens."""

    def add(self, task: str, classes: Sequence[int]) -> nn.Linear:
        """Append an empty block, and return it. Raises ValueError if the task has one already."""
        block = super().add(task, [0])  # PyTorch warns where it is to initialise nothing
        self.outputs.clear()
        block.out_features = 0
        block.weight, block.bias = (nn.Parameter(part[:0].detach().clone()) for part in (block.weight, block.bias))
        return block.requires_grad_(False)


class LanguageLearner(Learner):
    """A frozen causal language model whose linear layers are adapted in place. Tasks add no outputs to it."""

    head_type = NoOutputs
    recompute = False
    """Whether training keeps the inputs of blocks only, and computes the rest again in the backward."""

    @property
    def generates(self) -> bool:
        return True

    # -- training -----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, task: Task) -> Tensor:
        """Returns the mean negative log-likelihood () of the completion tokens of a batch."""
        return self.loss_of_all(batch)

    def loss_of_all(self, batch: Batch, *, balanced: bool = False) -> Tensor:
        """As `loss`: all tasks share the head of the model. balanced: ignored."""
        return -self._completion(batch)[0].mean()

    def log_likelihood(self, batch: Batch, task: Task, draw: Draw | None = None) -> Tensor:
        """Returns the log-likelihood (b,) of the completions.

        draw: draws every token of the completion from the model's own prediction at its place instead (given the tokens
        before it in the data); draw(k) returns uniform numbers (b,) for the k-th of them.
        """
        log_n, row_n = self._completion(batch, draw)
        return log_n.new_zeros(len(batch)).index_add(0, row_n, log_n)

    def _completion(self, batch: Batch, draw: Draw | None = None) -> tuple[Tensor, Tensor]:
        """Returns the log-likelihood (n,) of every completion token, and the example (n,) that it belongs to."""
        saving = self.recompute and torch.is_grad_enabled()
        with self.backbone.recomputing() if saving else nullcontext():
            hidden_btd = self.backbone.hidden(batch.inputs)
        wanted_bt = batch.inputs["completion_mask"][:, 1:].bool()
        row_n, _ = wanted_bt.nonzero(as_tuple=True)
        states_nd, token_n = hidden_btd[:, :-1][wanted_bt], batch.inputs["input_ids"][:, 1:][wanted_bt]
        uniform_n = None
        if draw is not None:
            place_n = (wanted_bt.cumsum(1) - 1)[wanted_bt]
            uniform_n = torch.stack([draw(k) for k in range(int(place_n.max()) + 1)])[place_n, row_n]
        if len(token_n) <= ROWS:
            return self._log_of(states_nd, token_n, uniform_n), row_n
        # The scores over the vocabulary are the largest tensors of a step: those of one part at a time are held.
        parts = [None] * len(token_n) if uniform_n is None else torch.split(uniform_n, ROWS)
        found = [
            checkpoint(self._log_of, states, tokens, uniform, use_reentrant=False)
            for states, tokens, uniform in zip(
                torch.split(states_nd, ROWS), torch.split(token_n, ROWS), parts, strict=False
            )
        ]
        return torch.cat(found), row_n

    def _log_of(self, states_nd: Tensor, token_n: Tensor, uniform_n: Tensor | None) -> Tensor:
        """Returns log p(token | state), (n,) float32. uniform_n: the tokens are drawn with these numbers instead."""
        log_nv = F.log_softmax(self.backbone.token_logits(states_nd), 1)
        if uniform_n is not None:
            token_n = drawn(log_nv, uniform_n)
        return log_nv.gather(1, token_n[:, None])[:, 0]

    # -- prediction ---------------------------------------------------------------------------------------------------

    def features(self, batch: Batch, layers: int = 1) -> Tensor:
        """Returns the mean of the last hidden states over the tokens of the prompt, (b, d) float32. layers: must be 1."""
        assert layers == 1, "unified classifiers, which read several blocks, are refused for language models"
        mask_bt = batch.inputs["attention_mask"]
        if "completion_mask" in batch.inputs:
            mask_bt = mask_bt - batch.inputs["completion_mask"]
        hidden_btd = self.backbone.hidden(batch.inputs)
        total_bd = (hidden_btd * mask_bt.unsqueeze(-1)).sum(1, dtype=torch.float32)
        return total_bd / mask_bt.sum(1, keepdim=True).clamp(min=1)

    def option_scores(self, batch: Batch) -> Tensor:
        """Returns the log-likelihood of every option of a batch of questions, (b, m) float32; minus infinity for options that
        an example does not have."""
        prompt_bt, mask_bt = (batch.inputs[name] for name in ("input_ids", "attention_mask"))
        option_bms, own_bms = (batch.inputs[f"option_{name}"] for name in ("ids", "mask"))
        b, m, s = option_bms.shape
        if m == 0:
            return torch.zeros(b, 0, device=prompt_bt.device)
        inputs, last_b = packed(prompt_bt, mask_bt, option_bms[..., :-1], own_bms[..., :-1])
        hidden_btd = self.backbone.hidden(inputs)
        # The state before each option token: that of the prompt's end for the first one, then those of the option.
        first_b1d = hidden_btd[torch.arange(b, device=last_b.device), last_b][:, None]
        states_bkd = torch.cat([first_b1d, hidden_btd[:, prompt_bt.shape[1] :]], 1)
        before_ms = torch.arange(1, 1 + m * (s - 1), device=last_b.device).reshape(m, s - 1)
        before_ms = torch.cat([before_ms.new_zeros(m, 1), before_ms], 1)
        log_bms = torch.zeros(option_bms.shape, device=last_b.device)
        wanted_bms = own_bms.bool()
        rows_n, option_n, place_n = wanted_bms.nonzero(as_tuple=True)
        log_bms[wanted_bms] = self._log_probabilities(
            states_bkd, rows_n, before_ms[option_n, place_n], option_bms[wanted_bms]
        )
        return log_bms.sum(2).masked_fill(~wanted_bms.any(2), -torch.inf)

    def _log_probabilities(self, states_bkd: Tensor, row_n: Tensor, place_n: Tensor, token_n: Tensor) -> Tensor:
        """Returns log p(token | state), (n,) float32, for tokens after the states at these rows and places. The scores of a
        state are computed once, however many tokens follow it."""
        flat_n = row_n * states_bkd.shape[1] + place_n
        used_u, which_n = torch.unique(flat_n, return_inverse=True)
        found_n = torch.empty(len(token_n), device=states_bkd.device)
        states_ud = states_bkd.flatten(0, 1)[used_u]
        for start in range(0, len(used_u), ROWS):
            own_n = (which_n >= start) & (which_n < start + ROWS)
            log_uv = F.log_softmax(self.backbone.token_logits(states_ud[start : start + ROWS]), 1)
            found_n[own_n] = log_uv[which_n[own_n] - start, token_n[own_n]]
        return found_n

    def generate(
        self,
        batch: Batch,
        most: int,
        stop: Sequence[int],
        pad: int,
        each: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[int]]:
        """Returns the tokens that follow each prompt of a batch, greedily: up to `most` of them, to the model's last position,
        or to a token in `stop`, which is not returned. Keys and values of earlier tokens are kept. pad: id of the padding
        token. each: as in `Backbone.generate`."""
        ids_bt, mask_bt = (left_padded(batch.inputs[name], batch.inputs["attention_mask"], fill)
                           for name, fill in (("input_ids", pad), ("attention_mask", 0)))  # fmt: skip
        found_bt = self.backbone.generate(ids_bt, mask_bt, most=most, stop=stop, pad=pad, each=each)
        room_b = [
            most if self.backbone.positions is None else self.backbone.positions - n for n in mask_bt.sum(1).tolist()
        ]
        rows = found_bt[:, ids_bt.shape[1] :].tolist()
        return [until(row[:room], stop) for row, room in zip(rows, room_b, strict=True)]

    def text_loss(self, batch: Batch) -> tuple[float, int]:
        """Returns the negative log-likelihood of the tokens of a window, given those before them, and their number."""
        ids_t = batch.inputs["input_ids"][0, 1:]
        logits_tv = self.backbone.token_logits(self.backbone.hidden(batch.inputs)[0, :-1])
        return F.cross_entropy(logits_tv, ids_t, reduction="sum").item(), len(ids_t)


def packed(prompt_bt: Tensor, mask_bt: Tensor, option_bms: Tensor, own_bms: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the inputs of one forward for prompts and all their options, and the place (b,) of each prompt's last token.

    Tokens: the prompt (t), then every option (s each). A token sees the tokens of the prompt up to itself; one of an option
    also sees its own option up to itself.
    """
    t = prompt_bt.shape[1]
    _, m, s = option_bms.shape
    length_b = mask_bt.sum(1)
    last_b = (mask_bt * torch.arange(1, t + 1, device=mask_bt.device)).argmax(1)
    place_bt = (mask_bt.cumsum(1) - 1).clamp_min(0)
    # Padding has position 0: after a long prompt it would be beyond the positions of the model.
    place_bms = (length_b[:, None, None] + torch.arange(s, device=mask_bt.device)) * own_bms
    # Which option each token belongs to, -1 for the prompt; a token sees those of the prompt and of its own option.
    owner_k = torch.cat([
        torch.full((t,), -1, device=mask_bt.device), torch.arange(m, device=mask_bt.device).repeat_interleave(s)
    ])  # fmt: skip
    order_k = torch.arange(len(owner_k), device=mask_bt.device)
    sees_kk = ((owner_k[None] == -1) | (owner_k[None] == owner_k[:, None])) & (order_k[None] <= order_k[:, None])
    real_bk = torch.cat([mask_bt, own_bms.flatten(1)], 1).bool()
    # Padding sees itself, so that no softmax is over nothing.
    seen_bkk = (sees_kk & real_bk[:, None]) | torch.eye(len(owner_k), dtype=torch.bool, device=mask_bt.device)
    inputs = {
        "input_ids": torch.cat([prompt_bt, option_bms.flatten(1)], 1),
        "attention_mask": seen_bkk[:, None],
        "position_ids": torch.cat([place_bt, place_bms.flatten(1)], 1),
    }
    return inputs, last_b


def left_padded(values_bt: Tensor, mask_bt: Tensor, fill: int) -> Tensor:
    """Returns the real tokens of each row at its end, and `fill` before them."""
    order_bt = mask_bt.argsort(dim=1, stable=True)
    return values_bt.masked_fill(mask_bt == 0, fill).gather(1, order_bt)


def until(tokens: list[int], stop: Collection[int]) -> list[int]:
    """Returns the tokens before the first one in `stop`."""
    end = next((k for k, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]
