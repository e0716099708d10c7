"""Rows of a table: the runs of one method on one stream, their means and spreads.

Every figure is a function of a run's counts, or of its record's costs.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lamina.compare import stats
from lamina.compare.stats import Difference
from lamina.record import Record
from lamina.report.text import DASH, known, scaled, signed

ACCURACIES = {
    "final_accuracy": "Final accuracy",
    "final_accuracy_micro": "Micro accuracy",
    "average_accuracy": "Average accuracy",
    "forgetting": "Forgetting",
    "task_aware_accuracy": "Task-aware",
    "task_inference_accuracy": "Task inference",
}
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("Seconds", lambda v: f"{v:,.0f}"),
    "trainable_parameters": ("Trainable", scaled),
    "stored_parameters": ("Stored", scaled),
    "memory_bytes": ("Memory kept", lambda v: scaled(v, "B")),
    "peak_memory_mb": ("Peak memory", lambda v: scaled(v * 2**20, "B")),
}
COST_DEFINITIONS = {
    "seconds": "the whole run on the machine named below, loading and evaluation included",
    "trainable_parameters": "parameters trained in the last task, its head outputs included",
    "stored_parameters": "parameters kept after the last task to go on learning and to predict, without the frozen backbone",
    "memory_bytes": "what else the method keeps from task to task",
    "peak_memory_mb": "peak memory of the process of the run",
}
TOKENS = "tokens_per_second"
LANGUAGE: dict[str, tuple[str, Callable[[float], str]]] = {
    "zero_shot_accuracy": ("Zero-shot", lambda v: f"{100 * v:.1f}"),
    "backward_transfer": ("Backward transfer", lambda v: signed(f"{100 * v:.1f}")),
    "forward_transfer": ("Forward transfer", lambda v: signed(f"{100 * v:.1f}")),
    "perplexity_before": ("Perplexity before", lambda v: f"{v:.1f}"),
    "perplexity_after": ("Perplexity after", lambda v: f"{v:.1f}"),
    TOKENS: ("Tokens/s", lambda v: f"{v:,.0f}"),
}
"""Columns for language models only."""
LANGUAGE_DEFINITIONS = {TOKENS: "tokens trained on, padding not included, by seconds of training"}
LEAST_HEADROOM = 0.03
"""With less, the share of the headroom is mostly noise and is not shown."""
ONLY_JOINT = "final_accuracy_micro"
"""The one metric of joint training, which has a single task: the others compare tasks."""


@dataclass(frozen=True)
class Run:
    """A finished run of a row."""

    seed: int
    order: int | None
    record: Record
    folder: str
    older: bool
    """Made with other code than this."""

    @property
    def joint(self) -> bool:
        return self.record.stream.joint

    @property
    def accuracy(self) -> float | None:
        """Final accuracy; micro accuracy in joint training."""
        return self.figures[ONLY_JOINT if self.joint else "final_accuracy"]

    @property
    def figures(self) -> dict[str, float | None]:
        found, cost = asdict(self.record.metrics), self.record.cost
        accuracies = {key: found[key] if not self.joint or key == ONLY_JOINT else None for key in ACCURACIES}
        costs = {"seconds": cost.total_seconds} | {key: getattr(cost, key) for key in COSTS if key != "seconds"}
        return {key: value if known(value) else None for key, value in (accuracies | costs | self._language()).items()}

    def _language(self) -> dict[str, float | None]:
        language, found = self.record.language, asdict(self.record.metrics)
        train = self.record.cost.seconds.get("train")
        if language is None:
            return dict.fromkeys(LANGUAGE)
        speed = language.tokens / train if language.tokens and train else None
        shown = {key: found[key] for key in LANGUAGE if key in found}
        if self.joint:
            shown |= dict.fromkeys(("backward_transfer", "forward_transfer", "zero_shot_accuracy"), math.nan)
        return shown | {"tokens_per_second": speed}


@dataclass(frozen=True)
class Trial:
    """What the search tried, and its score on validation data; None where it is not done or has failed."""

    settings: Mapping[str, Any]
    score: float | None
    failed: bool
    older: bool = False
    """Made with other code than this."""


@dataclass(frozen=True)
class RowRuns:
    runs: Sequence[Run]
    planned: int
    trials: Sequence[Trial] = ()
    chosen: Mapping[str, Any] | None = None

    def forgotten(self, most: int) -> list[tuple[str, float]]:
        """Returns the classes that were forgotten most, with the mean over the runs of their forgetting."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for one in run.record.classes:
                if one.forgetting is not None and not run.joint:
                    found.setdefault(one.name, []).append(one.forgetting)
        means = {name: stats.mean_and_spread(values)[0] for name, values in found.items()}
        return sorted(((name, mean) for name, mean in means.items() if mean > 0), key=lambda pair: -pair[1])[:most]

    def values(self, key: str) -> list[float]:
        """Returns one figure of every run that has it."""
        return [value for run in self.runs if (value := run.figures[key]) is not None]

    def spread(self, key: str) -> tuple[float | None, float | None]:
        """Returns mean and standard deviation of one figure over the runs; None where no run has it."""
        values = self.values(key)
        return stats.mean_and_spread(values) if values else (None, None)

    def median(self, key: str) -> float | None:
        """Returns the median of one figure over the runs, which a run on a busy machine hardly moves; None where no run has
        it."""
        values = self.values(key)
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Line:
    """A row as it is shown."""

    name: str
    accuracies: list[str]
    costs: list[str]
    row: RowRuns
    gain: Difference | None
    p: float | None
    """The p-value of this gain, corrected for the number of rows; None where there are too few runs for one below 5 %."""
    language: list[str]
    """What is shown of language models only."""
    headroom_share: float | None
    """The share of the headroom that is reached."""

    def to_json(self) -> dict[str, Any]:
        """Returns the row for programs."""
        row = self.row
        spread = {key: row.spread(key) for key in (*ACCURACIES, *COSTS, *LANGUAGE)}
        final = stats.spread_by_source(by_run(row.runs, "final_accuracy"))
        return {
            "name": self.name,
            "method": row.runs[0].record.method.name if row.runs else None,
            "chosen": row.chosen,
            "figures": {
                key: {"mean": m, "std": s, "median": row.median(key), "values": row.values(key)}
                for key, (m, s) in spread.items()
            },
            "difference": vars(self.gain) | {"p_holm": self.p} if self.gain else None,
            "std_of_final_accuracy": vars(final),
            "headroom_share": self.headroom_share,
            "trials": [vars(trial) for trial in row.trials],
            "runs": [
                {"seed": r.seed, "order": r.order, "cell": r.folder, "older_code": r.older, "figures": r.figures}
                for r in row.runs
            ],
            "planned": row.planned,
        }


@dataclass(frozen=True)
class Headroom:
    """What training can gain on a stream: joint training minus the frozen backbone, in micro accuracy."""

    frozen: str
    joint: str
    rows: Mapping[str, RowRuns]

    @property
    def gain(self) -> Difference | None:
        """The headroom; None where it is not measured."""
        return difference(self.rows[self.joint].runs, self.rows[self.frozen].runs, ONLY_JOINT)

    def share_of(self, name: str) -> float | None:
        """Returns the share of the headroom that a row reaches; None where it is not known, or too small to be shared."""
        whole = self.gain
        mine = difference(self.rows[name].runs, self.rows[self.frozen].runs, ONLY_JOINT)
        return mine.mean / whole.mean if whole and mine and whole.mean >= LEAST_HEADROOM else None

    def note(self) -> str:
        """Returns the sentence about it below a table."""
        gain, rows = self.gain, f"`{self.joint}` minus `{self.frozen}`"
        if gain is None:
            return f"Headroom: {rows}, not measured yet."
        told = (
            ""
            if gain.mean >= LEAST_HEADROOM
            else (
                f" That is less than {100 * LEAST_HEADROOM:.0f} points: this stream tells little about methods that train."
            )
        )
        return f"Headroom: {_gain_text(gain)} points, {rows} in micro accuracy.{told}"


def known_figures(rows: Collection[RowRuns], keys: Iterable[str]) -> list[str]:
    """Returns the keys of figures that some run has: no task is inferred by a language model's outputs, for example."""
    return [key for key in keys if any(row.values(key) for row in rows)]


def line_of(
    name: str, row: RowRuns, gain: Difference | None, baseline: str | None, *, shown: Sequence[str],
    of_language: Sequence[str], tested: Mapping[str, float] | None = None, headroom: Headroom | None = None,
) -> Line:  # fmt: skip
    """Returns a row as it is shown. gain: over the baseline, if there is one. shown: the accuracies. of_language: the figures
    of language models. tested: corrected p-values of the gains, where the table shows them."""
    texts = [_spread_text(*row.spread(key)) for key in shown]
    if baseline:
        texts.append("baseline" if name == baseline else _gain_text(gain))
    p = tested.get(name) if tested is not None else None
    if tested is not None:
        texts.append(DASH if p is None else p_text(p))
    share = headroom.share_of(name) if headroom else None
    if headroom:
        texts.append(DASH if share is None else signed(f"{100 * share:.0f}") + " %")
    texts.append(str(len(row.runs)) if len(row.runs) == row.planned else f"{len(row.runs)} of {row.planned}")
    costs = [DASH if (half := row.median(key)) is None else write(half) for key, (_, write) in COSTS.items()]
    language = [
        DASH if (found := row.median(key) if key == TOKENS else row.spread(key)[0]) is None else LANGUAGE[key][1](found)
        for key in of_language
    ]
    return Line(name, texts, costs, row, gain, p, language, share)


def difference(ours: Sequence[Run], theirs: Sequence[Run], key: str = "final_accuracy") -> Difference | None:
    """Returns the paired difference in final accuracy, or another; in micro accuracy where either is joint training."""
    if any(run.joint for run in [*ours, *theirs]):
        key = ONLY_JOINT

    return stats.paired(by_run(ours, key), by_run(theirs, key))


def by_run(runs: Sequence[Run], key: str) -> dict[stats.Key, float]:
    """Returns one figure of every run that has it, by seed and class order."""
    return {(run.seed, run.order): value for run in runs if (value := run.figures[key]) is not None}


def p_text(p: float) -> str:
    """Returns a p-value as it is shown."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _spread_text(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return DASH
    return signed(f"{100 * mean:.1f}") + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _gain_text(gain: Difference | None) -> str:
    if gain is None:
        return DASH

    def text(value: float) -> str:
        return signed(f"{100 * value:+.1f}") if round(100 * value, 1) else "0.0"

    bracket = "" if gain.low is None or gain.high is None else f" [{text(gain.low)}, {text(gain.high)}]"
    return text(gain.mean) + bracket
