"""The information that an attention layer passes on to the feature, from its input and weights alone.

The *readers* are the tokens that become the feature: the class token, or every real token if the feature is their mean. In
each head, a reader's query q gives the attention a = softmax(q W_k x_j / sqrt(e)) over all tokens x_j, and W_v maps the
pooled input z = X^T a to the reader's output. So an update of the values matters through z alone, one of the keys through q
alone.

Shape letters: b batch, t tokens, n readers, h heads, e width of a head, o = h e, d width of the input, j routed adapters,
r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def queries(x_btd: Tensor, weight_od: Tensor, bias_o: Tensor | None, mask_bt: Tensor | None, *, first: bool) -> Tensor:
    """Returns the readers' queries (b, n, o), all heads side by side: of the first token, or of all. Padded ones are zero."""
    if first:
        return F.linear(x_btd[:, :1], weight_od, bias_o)
    queries_bno = F.linear(x_btd, weight_od, bias_o)
    return queries_bno if mask_bt is None else queries_bno * mask_bt[..., None]


def key_logits(queries_bno: Tensor, x_btd: Tensor, key_od: Tensor, heads: int) -> Tensor:
    """Returns q^T W_k x_j of every head, reader and token, (b, h, n, t). It omits the keys' bias, the same for all tokens."""
    queries_bnhe = by_head(queries_bno, heads)
    if queries_bno.shape[1] == 1:  # W_k^T q first: cheaper than all keys
        key_hed = key_od.view(heads, -1, key_od.shape[1])
        return torch.einsum("bnhd,btd->bhnt", torch.einsum("bnhe,hed->bnhd", queries_bnhe, key_hed), x_btd)
    return torch.einsum("bnhe,bthe->bhnt", queries_bnhe, by_head(F.linear(x_btd, key_od), heads))


def routed_logits(
    queries_bno: Tensor, x_btd: Tensor, ups_jor: Tensor, downs_jrd: Tensor, gates_bj: Tensor, heads: int
) -> Tensor:
    """Returns what routed adapters of the keys add to these logits, with gates for each example, (b, h, n, t)."""
    ups_jhre = by_head(ups_jor.mT, heads).transpose(1, 2)
    inner_bnhjr = torch.einsum("bnhe,jhre->bnhjr", by_head(queries_bno, heads), ups_jhre)
    inner_bnhjr = inner_bnhjr * gates_bj[:, None, None, :, None]
    return torch.einsum("bnhjr,btjr->bhnt", inner_bnhjr, torch.einsum("btd,jrd->btjr", x_btd, downs_jrd))


def by_head(values: Tensor, heads: int) -> Tensor:
    """Returns (..., h e) as (..., h, e)."""
    return values.reshape(*values.shape[:-1], heads, -1)


def pooled_inputs(logits_bhnt: Tensor, x_btd: Tensor, head_width: int, mask_bt: Tensor | None) -> Tensor:
    """Returns z = X^T a of every head, (b, h, d), the mean over the readers. Padded tokens are neither read nor readers."""
    logits_bhnt = logits_bhnt / head_width**0.5
    if mask_bt is not None:
        logits_bhnt = logits_bhnt.masked_fill(~mask_bt.bool()[:, None, None], -torch.inf)
    attention_bhnt = logits_bhnt.softmax(-1)
    if mask_bt is None or attention_bhnt.shape[2] == 1:
        mean_bht = attention_bhnt.mean(2)
    else:
        mean_bht = torch.einsum("bhnt,bn->bht", attention_bhnt, mask_bt / mask_bt.sum(1, keepdim=True).to(x_btd.dtype))
    return mean_bht @ x_btd
