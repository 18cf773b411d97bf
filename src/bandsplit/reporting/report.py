"""Figures and a table of run directories. Reads only `config.toml` and `metrics.jsonl`, no checkpoints.

Runs whose resolved configurations are equal except for `seed` form one group: a mean with a band of ± 2 standard
deviations. Units: `seconds` is training time without validation, `top1` and `top5` are percent, `data_wait` is a
fraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bandsplit.errors import UserError
from bandsplit.reporting.figures import FIGURES, STYLE, branches_figure, curves_figure
from bandsplit.reporting.runs import Group, group_runs, read_runs
from bandsplit.reporting.tables import markdown_table


def report(folders: Sequence[Path], output: Path | None = None) -> None:
    """Writes figures (PNG and SVG) and `table.md` to `output`; prints the table and the output folder.

    Skips runs that cannot be read, with a message. Raises UserError if none can, or if `output` cannot be written.
    """
    runs, left_out = read_runs(folders)
    if not runs:
        raise UserError("\n".join(left_out if len(left_out) == 1 else ["none of these can be drawn:", *left_out]))
    for remark in [*(f"left out: {problem}" for problem in left_out), *(told for run in runs for told in run.remarks)]:
        print(remark)
    output = output or (folders[0] / "plots" if len(folders) == 1 else Path("plots"))
    groups = group_runs(runs)
    table = markdown_table(groups)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(STYLE):
            for name, figure in draw(groups).items():
                if figure is None:
                    print(f"{name}: left out, these runs have no data for it")
                    continue
                figure.savefig(output / f"{name}.png")
                figure.savefig(output / f"{name}.svg", metadata={"Date": None})
        (output / "table.md").write_text(table, encoding="utf-8")
    except OSError as error:
        reason = "exists and is not a folder" if output.is_file() else f"cannot be written: {error.strerror or error}"
        raise UserError(f"{output}: {reason}; --output names another folder") from error
    print(f"figures and table.md: {output}\n\n{table}", end="")


def draw(groups: Sequence[Group]) -> dict[str, Figure | None]:
    """All figures by name; None if the runs have no data for a figure."""
    curves = {name: curves_figure(groups, x, panels) for name, (x, panels) in FIGURES.items()}
    return {**curves, "branches": branches_figure(groups)}
