"""RanPAC: ridge regression on random features of a backbone that is adapted once (McDonnell et al., NeurIPS 2023,
arXiv 2307.02251).

    task 1       one adapter is trained (phase 1, as in `fsa`)                                    features f_1
    every task   φ(x) = relu(R f_1(x)),  G += Σ φ φ^T,  C += Σ φ y^T,  V = (G + λ I)^{-1} C       (phase 2)

Phase 2 is `maths/ranpac.py`, the unified classifier `gram`. G and C are sums over all examples ever seen, so the classifier
is the one of joint training on f_1, exactly. On the bare backbone it is `prototype` with `--classifier gram`.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lamina.methods.base import Departure, Needs, Paper
from lamina.methods.first_session import FirstSession, FirstSessionConfig


class RanPACConfig(FirstSessionConfig):
    around: ClassVar[Mapping[str, Any]] = {
        "consolidation.classifier": "gram",
        "consolidation.random_features": 10_000,
    }


class RanPAC(FirstSession[RanPACConfig]):
    name = "ranpac"
    advice = "As the strong baseline with much memory: 10,000 random features (400 MB), fitted exactly."
    paper = Paper(
        title="RanPAC: Random Projections and Pre-trained Models for Continual Learning",
        authors="McDonnell et al.",
        venue="NeurIPS 2023",
        link="https://arxiv.org/abs/2307.02251",
        departures=(
            Departure(
                "a low-rank adapter is trained in phase 1, where the paper takes AdaptFormer, SSF or VPT", "ours"
            ),
            Departure("λ is selected on every fifth of at most 5,000 examples of the newest task", "ours"),
        ),
    )
    needs = Needs(
        per_task="an output per class",
        storage="One adapter. A Gram matrix of the random features: 400 MB for 10,000. A mean, a count and two vectors of "
        "random features per class and task.",
        step="none",
        extra="Only the first task has training steps. One pass over the data of every task, and the solution of a linear "
        "system in as many unknowns as there are random features.",
    )
    config_type = RanPACConfig
