"""The table and the picture of a study: rows with several seeds each."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from vqrae_jax.tokenizer import report

_COLUMNS = 4  # of the picture


class StudyRow(NamedTuple):
    """What came out of a row of a study.

    Attributes:
      name: of the row.
      seeds: of its runs.
      metrics: of the run of each seed.
    """

    name: str
    seeds: list[int]
    metrics: list[dict[str, float]]


class Spread(NamedTuple):
    """A metric of a row.

    Attributes:
      values: those that are there and finite, by seed.
      mean: of them; NaN if there are none.
      deviation: the sample standard deviation (n - 1); NaN of fewer than two.
    """

    values: dict[int, float]
    mean: float
    deviation: float


def spread(row: StudyRow, metric: str) -> Spread:
    """A metric over the seeds of a row."""
    values = {seed: metrics[metric] for seed, metrics in zip(row.seeds, row.metrics, strict=True)
              if metric in metrics and metrics[metric] is not None and math.isfinite(metrics[metric])}
    return Spread(values, statistics.fmean(values.values()) if values else math.nan,
                  statistics.stdev(values.values()) if len(values) > 1 else math.nan)


def study_table(rows: Sequence[StudyRow], metrics: Sequence[str]) -> str:
    """The study as a Markdown table: mean ± sample standard deviation over seeds, or the value of a single seed."""
    lines = [["", "seeds", *map(report.label, metrics)], ["---", *["---:"] * (1 + len(metrics))],
             *([row.name, str(len(row.seeds)), *(_cell(row, metric) for metric in metrics)] for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in lines)


def _cell(row: StudyRow, metric: str) -> str:
    values, mean, deviation = spread(row, metric)
    if not values:
        return "-"
    shown = report.number(mean)
    if len(values) > 1:
        shown += f" ± {report.number(deviation, like=mean)}"
    # A seed whose number is missing must be seen: the mean of the others may flatter the row.
    return shown if len(values) == len(row.seeds) else f"{shown} ({len(values)} of {len(row.seeds)})"


def study_json(rows: Sequence[StudyRow]) -> dict[str, Any]:
    """The study as numbers: `{row: {metric: {"mean", "deviation", "values": {seed: value}}}}`, with all metrics."""
    return {row.name: {metric: {**(found := spread(row, metric))._asdict(),
                                "values": {str(seed): value for seed, value in found.values.items()}}
                       for metric in dict.fromkeys(name for metrics in row.metrics for name in metrics)}
            for row in rows}


def draw_study(file: Path, rows: Sequence[StudyRow], metrics: Sequence[str]) -> None:
    """Draws a study as a PNG: a panel a metric, a line a row, a dot a seed, with mean and standard deviation."""
    with matplotlib.rc_context(report.STYLE):
        _figure(rows, metrics).savefig(file, format="png", dpi=150)


def write_study_report(file: Path, *, title: str, recipe: Mapping[str, Any], rows: Sequence[StudyRow],
                       metrics: Sequence[str]) -> None:
    """Writes table and picture of a study as a page for the browser that needs no other file."""
    with matplotlib.rc_context(report.STYLE):
        picture = report.picture(_figure(rows, metrics))
    cells = [(row.name, len(row.seeds), [_cell(row, metric) for metric in metrics]) for row in rows]
    report.write_page(file, "study.html.jinja", title=title, recipe=recipe, metrics=metrics, rows=cells,
                      picture=picture)


def _figure(rows: Sequence[StudyRow], metrics: Sequence[str]) -> Figure:
    columns = min(_COLUMNS, len(metrics))
    lines = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(2 + 2.2 * columns, lines * (0.8 + 0.2 * len(rows))), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    height = np.arange(len(rows))
    for metric, axes in zip(metrics, panels, strict=False):
        found = [spread(row, metric) for row in rows]
        mean, deviation = (np.array([getattr(values, name) for values in found]) for name in ("mean", "deviation"))
        axes.hlines(height, mean - deviation, mean + deviation, color="tab:blue", linewidth=1)
        axes.plot(mean, height, "|", color="tab:blue", markersize=8, markeredgewidth=1.4)
        for y, row in enumerate(found):
            axes.plot(list(row.values.values()), [y] * len(row.values), "o", color="tab:orange", markersize=3.5,
                      markeredgewidth=0, alpha=0.8)
        axes.set_xlabel(report.label(metric))
    panels[0].set(yticks=height, yticklabels=[row.name for row in rows], ylim=(len(rows) - 0.5, -0.5))
    for axes in panels[len(metrics):]:
        axes.set_visible(False)
    return figure
