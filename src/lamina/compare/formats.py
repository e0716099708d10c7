"""The table of a comparison for other programs: CSV with a line for every run, and LaTeX as a paper prints it."""

import csv
import io
from collections.abc import Sequence
from typing import NamedTuple

from lamina.compare.rows import ACCURACIES, COSTS, LANGUAGE, Line

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "±": r"$\pm$",
    "–": "--",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
}


class Rows(NamedTuple):
    """The rows of a stream."""

    stream: str
    caption: str
    lines: Sequence[Line]


def as_csv(streams: Sequence[Rows], *, language: bool) -> str:
    """Returns one line for every run, with figures as fractions and costs as numbers."""
    figures = [*ACCURACIES, *COSTS, *(LANGUAGE if language else ())]
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["stream", "row", "method", "seed", "class_order", *figures, "lamina", "commit", "cell"])
    for rows in streams:
        for line in rows.lines:
            for run in line.row.runs:
                values = ["" if (value := run.figures[key]) is None else repr(value) for key in figures]
                order = "" if run.order is None else run.order
                code = (run.record.code.version, run.record.code.commit or "") if run.record.code else ("", "")
                out.writerow(
                    [rows.stream, line.name, run.record.method.name, run.seed, order, *values, *code, run.folder]
                )
    return text.getvalue()


def as_latex(streams: Sequence[Rows], columns: Sequence[str]) -> str:
    """Returns one table for every stream, to be used with the package booktabs. columns: titles of the accuracies."""
    return "\n".join(_latex_of(rows.caption, columns, rows.lines) for rows in streams)


def _latex_of(caption: str, columns: Sequence[str], lines: Sequence[Line]) -> str:
    def row(texts: Sequence[str]) -> str:
        return " & ".join(map(latex, texts)) + r" \\"

    body = [row([line.name, *line.accuracies]) for line in lines]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            f"  \\caption{{{latex(caption)}}}",
            f"  \\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"    \toprule",
            f"    {row(['Method', *columns])}",
            r"    \midrule",
            *(f"    {text}" for text in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def latex(text: str) -> str:
    """Returns text with what LaTeX would take for a command written out."""
    return "".join(_LATEX.get(letter, letter) for letter in text)
