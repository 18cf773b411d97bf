"""Figures and tables of run directories. Reads no checkpoints.

Runs whose resolved configurations are equal except for `seed`, `split.sigma` and keys without effect on results form
one group: a mean with a band of ± 2 standard deviations. Units: `seconds` is training time without validation, `top1`
and `top5` are percent, `data_wait` is a fraction, `macs` are multiply-accumulates of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bandsplit.errors import UserError
from bandsplit.progress import followed
from bandsplit.reporting import frequency
from bandsplit.reporting.compare import Side, compare_figure, compare_table, side
from bandsplit.reporting.figures import (
    ACCURACY,
    FIGURES,
    STYLE,
    branches_figure,
    curves_figure,
    left_out,
    of_several_branches,
)
from bandsplit.reporting.runs import Group, group_runs, read_run, read_runs
from bandsplit.reporting.tables import Table, costs_table, results_table

Compared = tuple[Sequence[Path], Sequence[Path]]
"""Run directories of A and of B."""

FORMATS: dict[str, dict[str, None]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Of figures, with metadata that leave the time out."""


def report(folders: Sequence[Path], output: Path | None = None, compared: Compared | None = None) -> None:
    """Writes figures (PNG, SVG, PDF) and tables (Markdown, CSV, LaTeX) to `output`; prints the tables.

    Runs to compare are drawn with the others. Skips runs that cannot be read, with a message. Raises UserError if none
    can be read, if one to compare cannot, or if `output` cannot be written.
    """
    to_compare = [folder for folders_of_side in compared or () for folder in folders_of_side]
    folders = [*folders, *to_compare]
    for folder in to_compare:
        read_run(folder)
    runs, problems = read_runs(folders)
    if not runs:
        raise UserError("\n".join(problems if len(problems) == 1 else ["none of these can be drawn:", *problems]))
    groups = group_runs(runs)
    remarks = [*(told for run in runs for told in run.remarks), *(told for group in groups for told in group.remarks)]
    for remark in [*(f"left out: {problem}" for problem in problems), *remarks]:
        print(remark)
    sides = [side(name, each, groups) for name, each in zip("AB", compared or (), strict=False)]
    output = output or (folders[0] / "plots" if len(folders) == 1 else Path("plots"))
    tables = make_tables(groups, sides)
    told = without(groups)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            drawn = draw(groups, sides)
            for name, figure in followed(drawn.items(), "writing figures", len(drawn), "figures"):
                for what in told.get(name, []):
                    print(f"{name}: left out: {what}")
                if figure is None:
                    if not told.get(name):
                        print(f"{name}: left out, these runs have no data for it")
                    continue
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # laid out once, for all formats
                for ending, metadata in FORMATS.items():
                    figure.savefig(output / f"{name}.{ending}", metadata=metadata)
        for name, table in tables.items():
            table.write(output, name)
    except OSError as error:
        reason = "exists and is not a folder" if output.is_file() else f"cannot be written: {error.strerror or error}"
        raise UserError(f"{output}: {reason}; --output names another folder") from error
    shown = "\n".join(table.markdown() for table in tables.values())
    print(f"figures and tables: {output}\n\n{shown}", end="")


def draw(groups: Sequence[Group], sides: Sequence[Side] = ()) -> dict[str, Figure | None]:
    """All figures by name; None if the runs have no data for a figure. `sides`: none, or A and B."""
    curves = {name: curves_figure(groups, x, panels) for name, (x, panels) in FIGURES.items()}
    compared = {"compare": compare_figure(*sides)} if sides else {}
    maps = frequency.frequency_figure(groups)
    return {**curves, "branches": branches_figure(groups), "frequency": maps, **compared}


def without(groups: Sequence[Group]) -> dict[str, list[str]]:
    """By name of a figure, what it leaves out of runs that it could show."""
    curves = {name: left_out(groups, x, panels) for name, (x, panels) in FIGURES.items()}
    branches = left_out(of_several_branches(groups), "step", ACCURACY[:1])
    return {**curves, "branches": branches, "frequency": frequency.left_out(groups)}


def make_tables(groups: Sequence[Group], sides: Sequence[Side] = ()) -> dict[str, Table]:
    """All tables by name. `sides`: none, or A and B."""
    compared = {"compare": compare_table(*sides)} if sides else {}
    return {"table": results_table(groups), "costs": costs_table(groups), **compared}
