"""Probes: what attention reads at the sites of keys and values. See `maths/attention.py`.

The probes of a site of keys are the queries q of the readers. Those of a site of values are the pooled inputs z. An update of
the site that is orthogonal to all probes does not change the features.

Shape letters: b batch, t tokens, n readers, p probes of an example, d width, g blocks, e size of a block.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor

from lamina.errors import MethodError
from lamina.learner.learner import Learner
from lamina.learner.moments import check_moment
from lamina.learner.sites import AdapterSite
from lamina.maths import attention
from lamina.types import Batch

Show = Callable[[AdapterSite, Tensor], None]


def check_sites(learner: Learner, method: str) -> None:
    """Raises MethodError, naming the method, for sites other than keys and values, an unknown number of heads, or attention
    with relative positions."""
    roles = sorted({site.role for site in learner.sites.values()})
    if not set(roles) <= {"k", "v"}:
        raise MethodError(
            f"method {method!r} adapts keys and values only, and backbone.targets has {', '.join(roles)}. Set "
            f"backbone.targets to k and v, or to one of them."
        )
    if learner.backbone.heads is None:
        raise MethodError(
            f"method {method!r} needs the number of attention heads, which backbone {learner.backbone.name!r} does not "
            f"say. Give `heads` to from_module()."
        )
    if learner.backbone.relative:
        raise MethodError(
            f"method {method!r} needs attention that depends on queries and keys alone, and that of backbone "
            f"{learner.backbone.name!r} depends on relative positions too. Choose another method or backbone."
        )


def watchers(learner: Learner, batch: Batch, show: Show) -> dict[str, Callable[[Tensor], None]]:
    """Returns functions for `Learner.watching`: they show each site its probes (b, p, d) of this batch, keys before values."""
    mask_bt = batch.inputs.get("attention_mask")
    return {
        group: partial(_probe, learner, {site.role: site for site in sites}, mask_bt, show)
        for group, sites in learner.groups().items()
    }


def _probe(
    learner: Learner, sites: Mapping[str, AdapterSite], mask_bt: Tensor | None, show: Show, x_btd: Tensor
) -> None:
    """Show q to the site of the keys and z to that of the values, computed with all branches and mixtures in use."""
    block, heads, x_btd = next(iter(sites.values())).block, learner.backbone.heads or 1, x_btd.float()
    weight_od, bias_o = learner.linear(block, "q")
    bias_o = None if bias_o is None else bias_o.float()
    queries_bno = attention.queries(x_btd, weight_od.float(), bias_o, mask_bt, first=learner.backbone.pooling == "cls")
    if "k" in sites:
        show(sites["k"], queries_bno)
    if "v" in sites:
        logits_bhnt = attention.key_logits(queries_bno, x_btd, learner.linear(block, "k")[0].float(), heads)
        if "k" in sites and "k" in sites["k"].layer.mixtures:
            mixture = sites["k"].layer.mixtures["k"]
            ups_jor, downs_jrd = mixture.ups_eor.float(), mixture.downs_eri.float()
            gates_bj = mixture.gates(x_btd)
            logits_bhnt += attention.routed_logits(queries_bno, x_btd, ups_jor, downs_jrd, gates_bj, heads)
        show(sites["v"], attention.pooled_inputs(logits_bhnt, x_btd, queries_bno.shape[2] // heads, mask_bt))


def blocks(learner: Learner, site: AdapterSite) -> int:
    """Returns how many blocks the probes of a site consist of: one per head for keys, one for values."""
    return (learner.backbone.heads or 1) if site.role == "k" else 1


def probe_moments(learner: Learner, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Returns the sum of p p^T over the probes of each site, block by block, (g, e, e) float64, by the name of the site.
    Raises TrainingError for a sum that is not finite."""
    sums: dict[str, Tensor] = {}

    def add(site: AdapterSite, probes_bpd: Tensor) -> None:
        # Float64: the rounding of float32 products would look like directions, where all probes are alike.
        probes_gne = attention.by_head(probes_bpd.flatten(0, 1).double(), blocks(learner, site)).transpose(0, 1)
        product_gee = probes_gne.mT @ probes_gne
        sums[site.name] = sums[site.name] + product_gee if site.name in sums else product_gee

    with learner.folded():
        for batch in batches:
            with learner.watching(watchers(learner, batch, add)):
                learner.features(batch)
    for name, moment_gee in sums.items():
        check_moment(moment_gee, f"probes of {name}")
    return sums
