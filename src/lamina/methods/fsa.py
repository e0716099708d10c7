"""FSA: first-session adaptation (Panos et al., ICCV 2023, arXiv 2303.13199). Adapt to the first task, then train no more.

    task 1       one adapter is trained with the outputs of the task                              features f_1
    every task   statistics of f_1(x) are added, and one linear discriminant of all outputs is refitted

After the first task the features never change, so no stored statistic grows stale and nothing is forgotten. What later
tasks could teach the backbone is given up. Where that is little, no method that trains on every task has a point.

The discriminant is the unified classifier (`consolidation.classifier`: lda), as in the paper. Under `own` the class means of
f_1 are the outputs' weights, compared by their cosine: the prototypes of APER (Zhou et al., IJCV 2025, arXiv 2303.07338).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from lamina.methods.base import Departure, Needs, Paper
from lamina.methods.first_session import FirstSession, FirstSessionConfig


class FSAConfig(FirstSessionConfig):
    around: ClassVar[Mapping[str, Any]] = {"consolidation.classifier": "lda"}


class FSA(FirstSession[FSAConfig]):
    name = "fsa"
    advice = "As the strong baseline: train on the first task only. Best if it resembles the later ones."
    paper = Paper(
        title="First Session Adaptation: A Strong Replay-Free Baseline for Class-Incremental Learning",
        authors="Panos et al.",
        venue="ICCV 2023",
        link="https://arxiv.org/abs/2303.13199",
        departures=(
            Departure(
                "a low-rank adapter is trained, where the paper trains FiLM layers or the whole backbone", "ours"
            ),
            Departure("a class that returns has an output per task, and the largest score counts", "ours"),
        ),
    )
    needs = Needs(
        per_task="a mean per class",
        storage="One adapter. A mean, a count and a classifier output per class and task; one scatter matrix.",
        step="none",
        extra="Only the first task has training steps. One pass over the data of every task.",
    )
    config_type = FSAConfig
