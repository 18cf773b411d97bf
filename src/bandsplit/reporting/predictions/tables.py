"""Tables of saved predictions: a summary in Markdown, and everything as CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from bandsplit.models.fusion import MEAN
from bandsplit.reporting.predictions.results import Results, printable

WORST = 10
"""Rows of the summary's tables of classes and of confusions."""

_CROPS = {"center": "", "flip": ", with their mirror images", "ten": ", ten crops each"}


def tables(results: Results) -> dict[str, pd.DataFrame]:
    """Every table, by name; accuracies in percent."""
    return {
        "fusions": fusions(results),
        "branches": branches(results),
        "growth": growth(results),
        "classes": classes(results),
        "confusions": confusions(results),
    }


def fusions(results: Results) -> pd.DataFrame:
    weights = results.predictions.fusions
    return pd.DataFrame(
        [
            {
                "fusion": name,
                "top1": each.top1,
                "top5": each.top5,
                "loss": each.loss,
                "ece": each.ece,
                "above_mean": each.gain,
                "interval_low": each.gain_interval[0],
                "interval_high": each.gain_interval[1],
                **{f"weight_{k}": weight for k, weight in enumerate(weights[name])},
            }
            for name, each in results.fusions.items()
        ]
    )


def branches(results: Results) -> pd.DataFrame:
    top1, top5 = results.branch_top.T
    return pd.DataFrame({"branch": range(len(top1)), "bands": results.branches, "top1": top1, "top5": top5})


def growth(results: Results) -> pd.DataFrame:
    """Top-1 of the first n branches, in several orders; `added` is the branch that comes n-th, as in `branches`."""
    rows = [
        {"order": curve.label, "branches": n, "added": branch, "top1": top1}
        for curve in results.growth
        for n, (branch, top1) in enumerate(zip(curve.order, curve.top1, strict=True), start=1)
    ]
    return pd.DataFrame(rows, columns=["order", "branches", "added", "top1"])


def classes(results: Results) -> pd.DataFrame:
    """One row per class, in order; `taken_for` is the class that its images are most often wrongly taken for."""
    worst = [results.taken_for.get(c) for c in range(len(results.classes))]
    return pd.DataFrame(
        {
            "folder": [printable(name) for name in results.predictions.classes],
            "class": results.classes,
            "images": results.class_images,
            "correct": results.class_correct,
            "top1": results.class_top1,
            "taken_for": [results.classes[found[0]] if found else "" for found in worst],
            "times": [found[1] if found else 0 for found in worst],
        }
    )


def confusions(results: Results) -> pd.DataFrame:
    """The confusion matrix without its diagonal and its zeros, the most frequent first."""
    c = results.confusions
    return pd.DataFrame(
        {
            "true": [results.classes[i] for i in c.true],
            "predicted": [results.classes[i] for i in c.predicted],
            "images": c.images,
            "share": 100 * c.images / results.class_images[c.true],
        }
    )


def summary(results: Results, made: Mapping[str, pd.DataFrame]) -> str:
    """In Markdown. `made` are the `tables`."""
    p = results.predictions
    of = f"{len(p.labels):,} images"
    if results.is_sample:
        of = f"A sample of {len(p.labels):,} of {p.images:,} images"
    runs = dict.fromkeys(f"{branch.run}, step {branch.step}" for branch in p.branches)
    parts = [
        f"# Predictions of {'; '.join(runs)}",
        f"{of}{_CROPS[p.crops]}, {len(p.classes):,} classes. Accuracies in percent. "
        + (f"The ensemble: fusion {p.fusion}." if len(p.branches) > 1 else "One branch."),
    ]
    used = made["fusions"]
    rows = pd.DataFrame(
        {
            "fusion": used["fusion"],
            "top-1": used["top1"].map("{:.2f}".format),
            "top-5": used["top5"].map("{:.2f}".format),
            "loss": used["loss"].map("{:.4f}".format),
            "ECE (%)": used["ece"].map("{:.2f}".format),
        }
    )
    if len(used) > 1:
        gains = zip(used["fusion"], used["above_mean"], used["interval_low"], used["interval_high"], strict=True)
        rows["above the mean (95 %)"] = [
            "" if name == MEAN else f"{gain:+.2f} ({low:+.2f} to {high:+.2f})" for name, gain, low, high in gains
        ]
    parts += ["## Fusion", markdown(rows)]
    parts += ["## Branches", markdown(_branch_rows(results, made["branches"]))]
    worst = made["classes"].dropna(subset="top1").sort_values(["top1", "images"], ascending=[True, False])
    parts += [
        "## Worst classes",
        markdown(
            pd.DataFrame(
                {
                    "class": worst["class"],
                    "top-1": worst["top1"].map("{:.2f}".format),
                    "images": worst["images"].map("{:,}".format),
                    "most often taken for": [
                        f"{name} ({times})" if times else ""
                        for name, times in zip(worst["taken_for"], worst["times"], strict=True)
                    ],
                }
            ).head(WORST)
        ),
    ]
    pairs = made["confusions"].head(WORST)
    if len(pairs):
        parts += [
            "## Most confused",
            markdown(
                pd.DataFrame(
                    {
                        "class": pairs["true"],
                        "taken for": pairs["predicted"],
                        "images": pairs["images"].map("{:,}".format),
                        "% of the class": pairs["share"].map("{:.1f}".format),
                    }
                )
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _branch_rows(results: Results, frame: pd.DataFrame) -> pd.DataFrame:
    rows = pd.DataFrame({"branch": frame["bands"]})
    rows["top-1"] = frame["top1"].map("{:.2f}".format)
    rows["top-5"] = frame["top5"].map("{:.2f}".format)
    for name, weights in results.predictions.fusions.items():
        if name != MEAN:
            rows[f"weight, {name}"] = [f"{weight:.3f}" for weight in weights]
    return rows


def markdown(rows: pd.DataFrame) -> str:
    """A table of text; cells are padded so that it also reads well in a terminal, numbers to the right."""
    header = [str(column) for column in rows.columns]
    cells = [[_cell(value) for value in row] for row in rows.itertuples(index=False)]
    widths = [max(2, *(len(line[i]) for line in [header, *cells])) for i in range(len(header))]
    right = [i > 0 and all(_is_number(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * (width - 1) + ":" if r else "-" * width for width, r in zip(widths, right, strict=True)]
    return "\n".join(f"| {' | '.join(_aligned(line, widths, right))} |" for line in [header, rule, *cells])


def _aligned(line: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    return [text.rjust(width) if r else text.ljust(width) for text, width, r in zip(line, widths, right, strict=True)]


def _cell(value: object) -> str:
    """Text for one cell: a bar would end it, and so would a line break."""
    return " ".join(str(value).replace("|", r"\|").split())


def _is_number(text: str) -> bool:
    return not text.strip("+-0123456789.,() to")
