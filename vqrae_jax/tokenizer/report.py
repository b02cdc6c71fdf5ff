"""What an evaluation found, as one page for the browser that needs no other file."""

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from PIL import Image

from vqrae_jax.training import reporting

_TEMPLATES = Path(__file__).parents[1] / "assets"
_COLOURS = [to_hex(matplotlib.colormaps["tab20"](i)) for i in (*range(0, 20, 2), *range(1, 20, 2))]
STYLE: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "axes.grid": True, "grid.linewidth": 0.4, "grid.color": "0.88", "axes.axisbelow": True, "lines.linewidth": 1.2,
    "text.parse_math": False, "svg.hashsalt": "report"}  # names are no formulas; the same numbers make the same file
_POINTS = 500  # of a line: more cannot be seen, and make the file large
# Units and the better direction, of names that start so; the first that fits.
_UNITS = {"psnr": "dB ↑", "ssim": "↑", "lpips": "↓", "rfid": "↓", "fd_": "↓", "inception_score": "↑", "knn_top1": "↑",
          "probe_": "↑", "zero_shot": "↑", "code_perplexity": "codes", "code_bits": "bits"}
# Of metrics.jsonl; the first rows first.
_CURVES = ("loss/total", "loss/", "code_usage_window", "code_perplexity_window", "eval/", "grad_norm")


class Extremes(NamedTuple):
    """The images of a run that came out worst or best, that one first.

    Attributes:
      originals: `[n, H, W, 3]` float in [0, 1].
      reconstructions: likewise.
      names: of the images.
      values: by metric, `n` numbers.
    """

    originals: np.ndarray
    reconstructions: np.ndarray
    names: list[str]
    values: dict[str, list[float]]


class RunReport(NamedTuple):
    """What is shown of a run.

    Attributes:
      metrics: numbers by name.
      intervals: 95 % bootstrap intervals, of some metrics.
      failed: why a metric is not there, in one line.
      images: `[n, H, W, 3]` float in [0, 1], the same for all runs of a report.
      reconstructions: likewise, of this run.
      worst: images by PSNR.
      best: likewise.
      code_counts: `[K]` int, how often each code was used; empty without codes.
      robustness: metrics after a share of the codes was replaced:
        `{"kind": "random" or "nearest", "share": in [0, 1], metric: number}`; with share 0 none were, of either kind.
      curves: `(steps, values)` by metric, from `curves`.
      differing: the config keys in which the runs differ.
    """

    metrics: dict[str, Any]
    intervals: dict[str, tuple[float, float]]
    failed: dict[str, str]
    images: np.ndarray
    reconstructions: np.ndarray
    worst: Extremes
    best: Extremes
    code_counts: np.ndarray
    robustness: list[dict[str, Any]]
    curves: dict[str, tuple[list[int], list[float]]]
    differing: dict[str, Any]


class _Line(NamedTuple):
    colour: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    style: str = "-"


def curves(metrics_jsonl: Path) -> dict[str, tuple[list[int], list[float]]]:
    """A run's losses, usage of codes, evaluations and gradient norm: `{name: (steps, values)}`, NaN where not finite.

    A last line that a killed process left incomplete is left out; without a file there are no curves.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in map(json.loads, reporting.lines_until(metrics_jsonl, math.inf)):
        for name, value in line.items():
            if name.startswith(_CURVES[:-1]) or name == _CURVES[-1]:
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(math.nan if value is None else value)
    found.pop("eval/num_images", None)
    return dict(sorted(found.items(), key=lambda item: [not item[0].startswith(prefix) for prefix in _CURVES]))


def write_report(file: Path, *, title: str, recipe: Mapping[str, Any], runs: Mapping[str, RunReport]) -> None:
    """Writes the page that shows runs side by side.

    Args:
      file: HTML.
      title: of the page, one line.
      recipe: what the numbers are numbers of; values may be mappings.
      runs: by name, measured on the same images.
    """
    reports = list(runs.values())
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(runs)}
    usage = [_Line(colours[name], np.arange(1, 1 + np.count_nonzero(run.code_counts)),
                   np.sort(run.code_counts[run.code_counts > 0])[::-1])
             for name, run in runs.items() if np.any(run.code_counts)]
    training = {curve: [_Line(colours[name], *run.curves[curve]) for name, run in runs.items() if curve in run.curves]
                for curve in _union(run.curves for run in reports)}
    write_page(
        file, "report.html.jinja", title=title, recipe=recipe, runs=runs, colours=colours, originals=reports[0].images,
        metrics=_union(metrics for run in reports for metrics in (run.metrics, run.failed)),
        differing=_union(run.differing for run in reports),
        usage=_chart(usage, title="uses of each code", x="codes, the most used first", log=True) if usage else None,
        robustness=[_chart(lines, title=label(metric), x="replaced codes (%)")
                    for metric, lines in _robustness(runs, colours).items()],
        training=[_chart(lines, title=label(curve), x="step") for curve, lines in training.items()])


def _union(names: Iterable[Iterable[str]]) -> list[str]:
    """All names, in the order in which they appear."""
    return list(dict.fromkeys(name for some in names for name in some))


def _robustness(runs: Mapping[str, RunReport], colours: Mapping[str, str]) -> dict[str, list[_Line]]:
    """The lines of each metric's chart."""
    charts: dict[str, list[_Line]] = {}
    for name, run in runs.items():
        for metric in [name for name in _union(run.robustness) if name not in ("kind", "share")]:
            for kind, style in {"random": "-", "nearest": "--"}.items():
                points = sorted((100 * entry["share"], entry[metric]) for entry in run.robustness
                                if metric in entry and (not entry["share"] or entry["kind"] == kind))
                if points:
                    shares, values = zip(*points, strict=True)
                    charts.setdefault(metric, []).append(_Line(colours[name], shares, values, style))
    return charts


def _chart(lines: Sequence[_Line], *, title: str, x: str, log: bool = False) -> str:
    """A small chart, as wide as a telephone, as the address of an SVG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.3), layout="constrained")
        axes = figure.subplots()
        for line in lines:
            points = np.unique(np.linspace(0, len(line.x) - 1, _POINTS).astype(int))
            axes.plot(np.asarray(line.x)[points], np.asarray(line.y)[points], line.style, color=line.colour,
                      marker="o" if len(points) < 20 else "", markersize=3,
                      markerfacecolor="white" if line.style == "--" else line.colour)
        axes.set_title(title, loc="left")
        axes.set_xlabel(x)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter())  # labels what lies between powers of ten where there are few
        return picture(figure)


def picture(figure: Figure) -> str:
    """A drawing as the address of an SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _address("image/svg+xml", buffer.getvalue())


def write_page(file: Path, template: str, *, title: str, recipe: Mapping[str, Any], **content: Any) -> None:
    """Renders a template of assets/ that extends page.html.jinja; whatever is a name or a number is escaped."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(png=_png, width=_width, number=number, label=label)
    summary = " · ".join(f"{name} {value}" for name, value in recipe.items() if not isinstance(value, Mapping))
    file.write_text(environment.get_template(template).render(
        title=title, recipe=dict(_flat(recipe)), summary=summary, **content), encoding="utf-8")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]


def label(name: str) -> str:
    """A metric's name with its unit, and an arrow to the better side where there is one."""
    metric = name.rpartition("/")[2]
    unit = next((unit for prefix, unit in _UNITS.items() if metric.startswith(prefix)), "")
    return f"{name} ({unit})" if unit else name


def number(value: Any, like: float | None = None) -> str:
    """A number for people: with four digits, or with as many decimals as `like` then has.

    None, to which JSON turns what it cannot say, is not finite either.
    """
    if value is None or (isinstance(value, float | np.floating) and not math.isfinite(value)):
        return "not finite"
    if not isinstance(value, float | np.floating):
        return f"{value:,}" if isinstance(value, int | np.integer) and not isinstance(value, bool) else str(value)
    decimals = 3 - math.floor(math.log10(abs(value if like is None else like) or 1))
    return f"{value:,.{max(decimals, 0)}f}" if decimals < 9 else f"{value:.1e}"


def _width(image: np.ndarray) -> int:
    """How wide an image is shown: small ones at a whole multiple, large ones no wider than 256."""
    width = image.shape[1]
    return min(width * max(1, 128 // width), 256)


def _png(image: np.ndarray) -> str:
    """An image, `[H, W, 3]` float in [0, 1], as the address of a PNG; what is not finite becomes black."""
    buffer = io.BytesIO()
    Image.fromarray(reporting.to_8_bits(image)).save(buffer, format="PNG")
    return _address("image/png", buffer.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
