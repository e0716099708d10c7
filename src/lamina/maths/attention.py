"""What an attention layer reads on behalf of the tokens that become the feature, from its input and the weights alone.

Those tokens are the *readers*: the class token, or every real token where the feature is their mean. Per head, their
queries q ask every token x_j, the softmax of q W_k x_j / sqrt(e) answers with attention a, and W_v turns z = X^T a into
what they get. So the layer's values matter through z alone, and its keys through q alone.

Shape letters: b batch, t tokens, n readers, h heads, e width of a head, d width of the input, j experts, r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def queries(x_btd: Tensor, weight_od: Tensor, bias_o: Tensor | None, mask_bt: Tensor | None, *, first: bool) -> Tensor:
    """Queries (b, n, o) of the readers, all heads side by side: of the first token, or of all; padded ones are zeros."""
    if first:
        return F.linear(x_btd[:, :1], weight_od, bias_o)
    asked_bno = F.linear(x_btd, weight_od, bias_o)
    return asked_bno if mask_bt is None else asked_bno * mask_bt[..., None]


def key_logits(queries_bno: Tensor, x_btd: Tensor, key_od: Tensor, heads: int) -> Tensor:
    """q^T W_k x_j of every head, reader and token, (b, h, n, t). The keys' bias, the same for all tokens, is left out."""
    queries_bnhe = by_head(queries_bno, heads)
    if queries_bno.shape[1] == 1:  # W_k^T q first: no key is ever computed
        key_hed = key_od.view(heads, -1, key_od.shape[1])
        return torch.einsum("bnhd,btd->bhnt", torch.einsum("bnhe,hed->bnhd", queries_bnhe, key_hed), x_btd)
    return torch.einsum("bnhe,bthe->bhnt", queries_bnhe, by_head(F.linear(x_btd, key_od), heads))


def expert_logits(
    queries_bno: Tensor, x_btd: Tensor, ups_jor: Tensor, downs_jrd: Tensor, gains_bj: Tensor, heads: int
) -> Tensor:
    """What experts on the keys add to these logits, each input with gains of its own, (b, h, n, t)."""
    ups_jhre = by_head(ups_jor.mT, heads).transpose(1, 2)
    asked_bnhjr = torch.einsum("bnhe,jhre->bnhjr", by_head(queries_bno, heads), ups_jhre)
    asked_bnhjr = asked_bnhjr * gains_bj[:, None, None, :, None]
    return torch.einsum("bnhjr,btjr->bhnt", asked_bnhjr, torch.einsum("btd,jrd->btjr", x_btd, downs_jrd))


def by_head(values: Tensor, heads: int) -> Tensor:
    """(..., h e) as (..., h, e)."""
    return values.reshape(*values.shape[:-1], heads, -1)


def pooled_inputs(logits_bhnt: Tensor, x_btd: Tensor, head_width: int, mask_bt: Tensor | None) -> Tensor:
    """z = X^T a of every head, (b, h, d), the mean over the readers. Padded tokens are neither read nor readers."""
    logits_bhnt = logits_bhnt / head_width**0.5
    if mask_bt is not None:
        logits_bhnt = logits_bhnt.masked_fill(~mask_bt.bool()[:, None, None], -torch.inf)
    attention_bhnt = logits_bhnt.softmax(-1)
    if mask_bt is None or attention_bhnt.shape[2] == 1:
        mean_bht = attention_bhnt.mean(2)
    else:
        mean_bht = torch.einsum("bhnt,bn->bht", attention_bhnt, mask_bt / mask_bt.sum(1, keepdim=True).to(x_btd.dtype))
    return mean_bht @ x_btd
