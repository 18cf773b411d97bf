"""The table of groups of runs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from bandsplit.reporting.runs import Group, span

CAPTION = (
    "± is twice the sample standard deviation over the n runs. Top-1 and top-5 in percent: the ensemble at the last "
    "validation. Best branch: the best single branch there. Hours: training time without validation. "
    "In the figures, training loss and throughput are running means over 2 % of a run, or 5 points where that is more."
)


def mean_two_sigma(values: Sequence[float | None], digits: int = 2) -> str:
    """`76.07 ± 0.22`; a single value without ±; a dash if any value is missing."""
    series = pd.Series(values, dtype=float)
    if series.isna().any():
        return "—"
    mean = f"{series.mean():.{digits}f}"
    return f"{mean} ± {2 * series.std(ddof=1):.{digits}f}" if len(series) > 1 else mean


def table_row(group: Group) -> dict[str, str]:
    """One row of the table, as text."""
    last = [{} if run.validation.empty else run.validation.iloc[-1].to_dict() for run in group.runs]
    branches = [row.get("branch_top1", []) for row in last]
    hours = [run.seconds / 3600 for run in group.runs]
    return {
        "configuration": group.label,
        "n": str(len(group.runs)),
        "epochs": span(round(run.epoch, 1) for run in group.runs),
        "steps": span(run.steps for run in group.runs),
        "top-1": mean_two_sigma([row.get("top1") for row in last]),
        "top-5": mean_two_sigma([row.get("top5") for row in last]),
        "best branch top-1": mean_two_sigma([max(top1) if len(top1) > 1 else None for top1 in branches]),
        "hours": mean_two_sigma(hours, digits=2 if min(hours) >= 1 else 3),
    }


def markdown_table(groups: Sequence[Group]) -> str:
    """The table with its caption; cells are padded so that it also reads well in a terminal."""
    rows = [table_row(group) for group in groups]
    header = list(rows[0])
    widths = [max(2, len(key), *(len(row[key]) for row in rows)) for key in header]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    cells = [header, rule, *(list(row.values()) for row in rows)]
    aligned = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned) + f"\n\n{CAPTION}\n"
