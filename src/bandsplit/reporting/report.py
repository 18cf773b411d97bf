"""From run directories to figures and a table. Reads `config.toml` and `metrics.jsonl`, never a checkpoint.

Runs whose resolved configurations are equal except for `seed` form one group: a mean with a band of ± 2 standard
deviations. Units: `seconds` is training time without validation, `top1` and `top5` are percent, `data_wait` is a share.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from bandsplit.errors import UserError
from bandsplit.reporting.figures import FIGURES, STYLE, branches_figure, curves_figure
from bandsplit.reporting.runs import group_runs, read_run
from bandsplit.reporting.tables import markdown_table


def report(folders: Sequence[Path], output: Path | None = None) -> None:
    """Write each figure as PNG and SVG and `table.md` to `output`; print the table and where everything is."""
    runs = [read_run(folder) for folder in dict.fromkeys(folder.resolve() for folder in folders)]
    output = output or (folders[0] / "plots" if len(folders) == 1 else Path("plots"))
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: exists and is not a folder")
    output.mkdir(parents=True, exist_ok=True)
    groups = group_runs(runs)
    with mpl.rc_context(STYLE):
        figures = {name: curves_figure(groups, x, panels) for name, (x, panels) in FIGURES.items()}
        figures["branches"] = branches_figure(groups)
        for name, figure in figures.items():
            if figure is None:
                print(f"{name}: left out, these runs have no data for it")
                continue
            figure.savefig(output / f"{name}.png")
            figure.savefig(output / f"{name}.svg", metadata={"Date": None})
    table = markdown_table(groups)
    (output / "table.md").write_text(table, encoding="utf-8")
    print(f"figures and table.md: {output}\n\n{table}", end="")
