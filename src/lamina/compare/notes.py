"""The notes below a table. A row with missing runs, runs of older code, another stream or a
search of its own says so."""

import statistics
from collections.abc import Iterable, Mapping

from lamina.compare import stats
from lamina.compare.rows import RowRuns, by_run
from lamina.compare.stats import Difference
from lamina.record import Record
from lamina.report.text import count, percent


def notes_of(rows: Mapping[str, RowRuns], gains: Mapping[str, Difference], baseline: str | None) -> list[str]:
    """Returns the notes of one stream. gains: the differences from the baseline that are known, by name of the row."""
    return [*_row_notes(rows, baseline), *_code_notes(rows), *_source_notes(rows), *_difference_notes(gains)]


def code_of(record: Record) -> str:
    """Returns the code that made a run, in words."""
    if record.code is None:
        return "unknown"
    return f"lamina {record.code.version}" + (f", commit {record.code.commit}" if record.code.commit else "")


def _row_notes(rows: Mapping[str, RowRuns], baseline: str | None) -> Iterable[str]:
    usual_row = baseline or next(iter(rows))
    streams = {(run.seed, run.order): run.record.stream.fingerprint for run in rows[usual_row].runs}
    searched = [len(row.trials) for row in rows.values() if row.trials]
    usual = statistics.mode(searched) if searched else 0
    for name, row in rows.items():
        if missing := row.planned - len(row.runs):
            yield f"`{name}`: {count(missing, 'run')} of {row.planned} missing."
        if any(
            streams.get((r.seed, r.order), r.record.stream.fingerprint) != r.record.stream.fingerprint
            for r in row.runs
            if not r.joint
        ):
            yield f"`{name}` did not learn the same examples as `{usual_row}`: their difference is not due to the method alone."
        if kept := max((run.record.cost.kept_examples or 0 for run in row.runs), default=0):
            yield f"`{name}` keeps {count(kept, 'training example')} and trains on them again. Its memory does not count them."
        if row.trials and len(row.trials) != usual:
            yield f"`{name}`: its search had {count(len(row.trials), 'trial')}, where most had {usual}."
    if joint := [name for name, row in rows.items() if any(run.joint for run in row.runs)]:
        yield (
            f"{_codes(joint)}: all tasks at once, as one task. Only micro accuracy can be compared, so the difference from the "
            "baseline is one of micro accuracies."
        )
    if usual and (unsearched := [name for name, row in rows.items() if not row.trials]):
        yield f"Not searched (settings given, or the defaults): {_codes(unsearched)}."


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _code_notes(rows: Mapping[str, RowRuns]) -> Iterable[str]:
    older = {name: [run for run in row.runs if run.older] for name, row in rows.items()}
    trials = {name: sum(trial.older for trial in row.trials) for name, row in rows.items()}

    def named(counts: Mapping[str, int], totals: Iterable[int]) -> str:
        whole = sum(counts.values()) == sum(totals)
        return "all" if whole else ", ".join(f"{number} of `{name}`" for name, number in counts.items() if number)

    if any(older.values()):
        code = sorted({code_of(run.record) for runs in older.values() for run in runs})
        found = named({name: len(runs) for name, runs in older.items()}, (len(row.runs) for row in rows.values()))
        yield f"Runs made with other code than this one ({'; '.join(code)}): {found}."
    if any(trials.values()):
        found = named(trials, (len(row.trials) for row in rows.values()))
        yield f"Trials of the search made with other code than this one: {found}."


def _difference_notes(gains: Mapping[str, Difference]) -> Iterable[str]:
    """Yields what the brackets are, one sentence for each number of units."""
    by_units: dict[int, list[str]] = {}
    for name, gain in gains.items():
        by_units.setdefault(gain.units, []).append(name)
    for units, names in sorted(by_units.items(), reverse=True):
        of = "" if len(by_units) == 1 else f" ({_codes(names)})"
        several = any(gains[name].pairs > units for name in names)
        more = "class orders" if any(gains[name].by_order for name in names) else "seeds"
        if units == 1:
            yield f"One pair of runs has no spread, so there is no interval{of}. Use more {more}."
            continue
        what = (
            "class orders, each with the mean of its seeds"
            if several
            else "pairs of runs with the same seed and class order"
        )
        yield (
            f"In brackets{of}: interval of the mean difference over {units} {what}, from the means of their subsets. It covers "
            f"the centre of symmetric differences with probability {percent(stats.coverage(units), 0)}."
        )
        if units < stats.LEAST_UNITS:
            yield (
                f"With {units} {'class orders' if several else 'pairs'} that interval is the range of the differences, and a "
                f"permutation test cannot give a p-value below {2.0 ** (1 - units):.2g}, so none is shown{of}. Use more "
                f"{more}; {stats.units_for(len(gains))} are needed for 5 % with {count(len(gains), 'row')} tested."
            )


def _source_notes(rows: Mapping[str, RowRuns]) -> Iterable[str]:
    """Yields what seeds and class orders contribute to the spread, where both were varied."""
    found = {name: stats.spread_by_source(by_run(row.runs, "final_accuracy")) for name, row in rows.items()}
    both = {name: s for name, s in found.items() if s.seeds is not None and s.orders is not None}
    if both:
        parts = ", ".join(
            f"`{name}` {100 * (s.seeds or 0):.1f} and {100 * (s.orders or 0):.1f}" for name, s in both.items()
        )
        yield f"Standard deviation of the final accuracy over seeds and over class orders, in points: {parts}."
