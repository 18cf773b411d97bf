"""Tables of groups of runs, as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from bandsplit.reporting.runs import Group, Run, span

MISSING = "—"

TWO_SIGMA = "± is twice the sample standard deviation over the n runs. "

RESULTS_CAPTION = (
    f"{TWO_SIGMA}Top-1 and top-5 in percent: the ensemble at the last validation. Best branch: top-1 of the best "
    "branch there. Hours: training time without validation. In the figures, training loss, throughput and data wait "
    "are running means over 2 % of a run, or 5 points where that is more."
)

COSTS_CAPTION = (
    f"{TWO_SIGMA}Params (parameters) and MACs (multiply-accumulates of convolutions and matrix products in a forward "
    "pass over one image of full size) are of all branches. Train MACs: 3 × images × MACs of the branches that train, "
    "without validation and teacher. Images/s and data wait: medians over the lines of metrics.jsonl. Memory: the peak "
    "of rank 0."
)

LATEX = str.maketrans({"±": r"$\pm$", "—": "---", "×": r"$\times$", "−": "$-$"})
"""Characters that we use and that pdflatex does not know without packages."""

ESCAPED = str.maketrans(
    {
        **{c: f"\\{c}" for c in "%_&#${}"},
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
    }
)
"""Characters with a meaning in LaTeX."""

LATEX_FORM = r"""%% \usepackage{booktabs,graphicx}
\begin{table}
\centering\footnotesize\setlength{\tabcolsep}{4pt}
\caption{%s}\smallskip
\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%%
%s}
\end{table}
"""

LONG = 30
"""Characters of a first column that LaTeX breaks into lines."""


def mean_two_sigma(values: Sequence[float | None], digits: int = 2) -> str:
    """`76.07 ± 0.22`; a single value without ±; a dash if any value is missing."""
    series = pd.Series(values, dtype=float)
    if series.isna().any():
        return MISSING
    mean = f"{series.mean():,.{digits}f}"
    return f"{mean} ± {2 * series.std(ddof=1):,.{digits}f}" if len(series) > 1 else mean


@dataclass(frozen=True)
class Column:
    """A column of a table of groups: a value of each run, and the text for the values of a group."""

    name: str
    """In CSV files."""
    title: str
    value: Callable[[Run], float | None]
    text: Callable[[Sequence[float | None]], str] = mean_two_sigma


def _digits(digits: int, scale: float = 1.0) -> Callable[[Sequence[float | None]], str]:
    return lambda values: mean_two_sigma([None if value is None else value / scale for value in values], digits)


def _exact(scale: float) -> Callable[[Sequence[float | None]], str]:
    """values / scale to at least three significant digits; without ± where all are equal."""

    def text(values: Sequence[float | None]) -> str:
        scaled = [None if value is None else value / scale for value in values]
        smallest = min((abs(value) for value in scaled if value), default=1.0)
        digits = next((d for d in range(6) if smallest >= 10 ** (2 - d)), 6)
        return mean_two_sigma(scaled[:1] if len(set(scaled)) == 1 else scaled, digits)

    return text


def _span(values: Sequence[float | None]) -> str:
    return span(round(value, 1) for value in values if value is not None)


def _hours(values: Sequence[float | None]) -> str:
    return mean_two_sigma(values, digits=2 if min(filter(None, values), default=0) >= 1 else 3)


def _last(key: str) -> Callable[[Run], float | None]:
    return lambda run: None if run.validation.empty else run.validation.iloc[-1].get(key)


def _best_branch(run: Run) -> float | None:
    top1 = [] if run.validation.empty else run.validation["branch_top1"].iloc[-1]
    return max(top1) if len(top1) > 1 else None


def _median(key: str) -> Callable[[Run], float | None]:
    return lambda run: float(run.train[key].median()) if key in run.train else None


def _peak_memory(run: Run) -> float | None:
    return float(run.train["peak_memory_mib"].max()) if "peak_memory_mib" in run.train else None


def _parameters(run: Run) -> float | None:
    return run.branches.parameters if run.branches else None


def _macs(run: Run) -> float | None:
    return max(run.branches.macs.values()) if run.branches else None


RESULTS = (
    Column("epochs", "epochs", lambda run: run.epoch, _span),
    Column("steps", "steps", lambda run: run.steps, _span),
    Column("top1", "top-1", _last("top1")),
    Column("top5", "top-5", _last("top5")),
    Column("best_branch_top1", "best branch", _best_branch),
    Column("hours", "hours", lambda run: run.seconds / 3600, _hours),
)

COSTS = (
    Column("parameters", "params (M)", _parameters, _exact(1e6)),
    Column("macs", "GMACs", _macs, _exact(1e9)),
    Column("training_macs", "train TMACs", lambda run: run.macs, _exact(1e12)),
    Column("images_per_second", "images/s", _median("images_per_second"), _digits(0)),
    Column("data_wait", "data wait (%)", _median("data_wait"), _digits(1, scale=0.01)),
    Column("peak_memory_mib", "memory (GiB)", _peak_memory, _digits(2, scale=2**10)),
)


@dataclass(frozen=True)
class Table:
    """A table as text for readers and as numbers for programs."""

    text: pd.DataFrame
    """Cells are str; the first column is a name."""
    numbers: pd.DataFrame
    caption: str
    notes: list[str] = field(default_factory=list)
    """Sentences below the table, one a paragraph."""

    def markdown(self) -> str:
        """With the caption; cells are padded so that it also reads well in a terminal."""
        header = list(self.text.columns)
        rows = self.text.to_numpy().tolist()
        widths = [max(2, *(len(cell) for cell in column)) for column in zip(header, *rows, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in (header, rule, *rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in aligned)
        return "\n\n".join([table, *self.notes, self.caption]) + "\n"

    def latex(self) -> str:
        """A table environment for \\input, shrunk to the width of the text if it is wider."""
        names = self.text.iloc[:, 0]
        first = r"p{0.3\linewidth}" if names.str.len().max() > LONG else "l"
        style = self.text.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
        tabular = style.to_latex(hrules=True, column_format=first + "r" * (self.text.shape[1] - 1))
        caption = " ".join([*self.notes, self.caption]).translate(ESCAPED)
        return (LATEX_FORM % (caption, tabular)).translate(LATEX)

    def write(self, folder: Path, name: str) -> None:
        """Writes name.md, name.csv and name.tex. Raises OSError."""
        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        (folder / f"{name}.csv").write_text(self.numbers.to_csv(index=False), encoding="utf-8")
        (folder / f"{name}.tex").write_text(self.latex(), encoding="utf-8")


def results_table(groups: Sequence[Group]) -> Table:
    return _table(groups, RESULTS, RESULTS_CAPTION)


def costs_table(groups: Sequence[Group]) -> Table:
    return _table(groups, COSTS, COSTS_CAPTION)


def _table(groups: Sequence[Group], columns: Sequence[Column], caption: str) -> Table:
    """One row per group. The numbers are the mean of each column and, as name_two_sd, twice the standard deviation."""
    text, numbers = [], []
    for group in groups:
        name = {"configuration": group.label, "n": len(group.runs)}
        values = {column: [column.value(run) for run in group.runs] for column in columns}
        text.append({**name, "n": str(name["n"]), **{column.title: column.text(of) for column, of in values.items()}})
        series = {column.name: pd.Series(of, dtype=float) for column, of in values.items()}
        numbers.append(
            name
            | {key: each.mean(skipna=False) for key, each in series.items()}
            | {f"{key}_two_sd": 2 * each.std(ddof=1, skipna=False) for key, each in series.items()}
        )
    notes = [note for group in groups for note in group.repeated_seeds]
    return Table(pd.DataFrame(text), pd.DataFrame(numbers), caption, notes)
