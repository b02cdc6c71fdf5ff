"""Studies: the runs of a grid of configs and seeds, trained and measured where they are missing, and their table."""

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from vqrae_jax.config import Config, call_file, load, load_config
from vqrae_jax.files import disk_errors
from vqrae_jax.foreign import shown
from vqrae_jax.tokenizer import recipe, study_report, task
from vqrae_jax.tokenizer.comparison import Comparison, Options
from vqrae_jax.tokenizer.study_report import StudyRow
from vqrae_jax.training import checkpoint, distributed, reporting
from vqrae_jax.weights import tensors

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a study's table: a config, with keys changed, trained from one or several seeds.

    Attributes:
      config: a file of configs/, with arguments after a colon.
      changes: values by dotted key.
      seeds: of its runs.
      init_from: the row whose runs of the same seed it starts from; empty is none.
    """

    config: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    init_from: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What a file of configs/studies/ gives by its `get_study()`.

    Attributes:
      title: one line, over the table.
      rows: by name.
      data: SPEC of the images that all runs train on.
      metrics: the table's columns; all metrics are in `table.json`.
      probe: whether to fit kNN and linear probes, to the training images of `data`.
      options: what else to measure, and on what; see `comparison.Options`.
    """

    title: str
    rows: Mapping[str, Row]
    data: str
    metrics: tuple[str, ...]
    probe: bool = False
    options: Options = dataclasses.field(default_factory=Options)


class Cell(NamedTuple):
    """One run of a study: its row, its folder and its config."""

    row: str
    seed: int
    workdir: Path
    config: Config


def read(file: str) -> Study:
    """The study of a Python file that defines `get_study()`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it fails, gives no study, or one that contradicts itself.
    """
    study = call_file(file, "get_study", "study")
    if not isinstance(study, Study):
        raise ValueError(f"{file}: get_study() must return a vqrae_jax.tokenizer.study.Study, not {shown(study)}")
    _check_types(study, file)
    if not study.rows or not study.metrics:
        raise ValueError(f"{file}: a study needs at least one row and one of metrics, the table's columns")
    for name, row in study.rows.items():
        if "/" in name or not name.strip("."):
            raise ValueError(f"{file}: the row {name!r} needs another name, for a folder is called so")
        before = list(study.rows)[:list(study.rows).index(name)]
        if row.init_from and row.init_from not in before:
            raise ValueError(f"{file}: {name} starts from {row.init_from!r}, which is no row before it")
        if row.init_from and (missing := set(row.seeds) - set(study.rows[row.init_from].seeds)):
            raise ValueError(f"{file}: {name} starts from {row.init_from}, which has no seed {min(missing)}")
    return study


def _check_types(values: Study | Row, where: str) -> None:
    """Raises ValueError where a field has another type than its class says."""
    types = {"rows": Mapping, "changes": Mapping, "seeds": tuple | list, "metrics": tuple | list, "probe": bool,
             "options": Options}
    of_entries = {"seeds": int, "metrics": str, "rows": str, "changes": str}  # or of keys
    for field in dataclasses.fields(values):
        value, wanted = getattr(values, field.name), types[field.name] if field.name in types else str
        if not isinstance(value, wanted) or not all(
                type(entry) is of_entries[field.name] for entry in (value if field.name in of_entries else ())):
            raise ValueError(f"{where}: {field.name} must be {field.type}, not {shown(value)}")
    for name, row in values.rows.items() if isinstance(values, Study) else ():
        if not isinstance(row, Row):
            raise ValueError(f"{where}: the row {name!r} must be a vqrae_jax.tokenizer.study.Row, not {shown(row)}")
        _check_types(row, f"{where}: row {shown(name)}")


def cells(study: Study, out: Path) -> list[Cell]:
    """All runs of a study, those first that others start from.

    Raises:
      FileNotFoundError: a config file is not there.
      ValueError: a row's config cannot be; the message names the row.
    """

    def listed(name: str, row: Row) -> Iterator[Cell]:
        for seed in row.seeds:
            start = {"init_from": str(_workdir(out, row.init_from, seed))} if row.init_from else {}
            try:
                config = load_config(row.config, **{**row.changes, **start, "seed": seed, "data.source": study.data})
                if not isinstance(config, Config):
                    raise ValueError(f"{row.config} is the config of a {config.task}, and a study is of tokenizers")
            except ValueError as error:
                raise ValueError(f"row {name} of the study: {error}") from error
            yield Cell(name, seed, _workdir(out, name, seed), config)

    return [cell for name, row in study.rows.items() for cell in listed(name, row)]


def _workdir(out: Path, row: str, seed: int) -> Path:
    return out / "runs" / row / f"seed{seed}"


def run(study: Study, out: Path, mesh: Mesh, only: int | None = None) -> None:
    """Trains and measures the runs of a study that are missing, and writes the table of all.

    Whatever ends it, the same call goes on where it stopped: in the midst of a run, or between two.

    Args:
      study: the study.
      out: its folder, of `runs/ROW/seedN/`, `table.md`, `table.json`, `study.png` and `report.html`.
      mesh: the devices that measure.
      only: the number of the one run to train and measure, from 0, without a table; None is all.

    Raises:
      ValueError, OSError: there is no such run, or one cannot be trained or measured.
    """
    every = cells(study, out)
    if only is not None and only not in range(len(every)):
        raise ValueError(f"the study has the runs 0 to {len(every) - 1}, not {only}")
    options = dataclasses.replace(study.options, probe=study.data if study.probe else "")
    comparison = None
    for number, cell in enumerate(every):
        if only in (None, number):
            for start, other in enumerate(every):
                if cell.config.init_from == str(other.workdir) and not _is_trained(other):
                    raise ValueError(f"run {number} starts from run {start} ({other.row}, seed {other.seed}), which is "
                                     "not trained to its end")
            log.info("run %d of %d: %s, seed %d", number, len(every), cell.row, cell.seed)
            # What is shown must not depend on which runs were missing.
            first = next(other.config for other in every
                         if other.config.data.image_size == cell.config.data.image_size)
            # Runs that are measured at the same time each name their bad images.
            folder = out if only is None else cell.workdir / "evaluation"
            comparison = _complete(cell, first, options, mesh, folder, comparison)
            _check_columns(study, cell)
    if only is None and distributed.is_first():
        _write(study, every, out)


def _complete(cell: Cell, first: Config, options: Options, mesh: Mesh, out: Path,
              comparison: Comparison | None) -> Comparison | None:
    """Trains and measures a run as far as it is missing; returns what measured it, for the next one.

    Args:
      cell: the run.
      first: the config of the first run for images of this size, which says of what images.
      options: what to measure.
      mesh: the devices that measure.
      out: folder for the names of bad images.
      comparison: what measured the run before, if it was measured.
    """
    if not _is_trained(cell):
        task.train(cell.config, cell.workdir)
    if _is_measured(cell, options):
        return comparison
    if comparison is None or comparison.image_size != cell.config.data.image_size:
        comparison = Comparison(first, options, mesh, out)
    result = comparison.measure(cell.workdir)
    if distributed.is_first():
        comparison.write({cell.row: result}, cell.workdir / "evaluation")
    distributed.wait_for_all("measured")
    return comparison


def _check_columns(study: Study, cell: Cell) -> None:
    """Says after the first run, and not after the last, that a column of the table has a name that no metric has."""
    found = json.loads((cell.workdir / "evaluation" / "metrics.json").read_text())
    for metric in study.metrics:
        if metric not in found and metric not in found["failed"]:
            raise ValueError(f"the study shows {metric!r}, which is no metric: there are "
                             + ", ".join(name for name, value in found.items() if isinstance(value, int | float)))


def _is_trained(cell: Cell) -> bool:
    steps = checkpoint.steps(cell.workdir)
    return bool(steps) and steps[-1] == cell.config.train.steps and load(cell.workdir / "config.json") == cell.config


def _is_measured(cell: Cell, options: Options) -> bool:
    """Whether its numbers are those of this config, of these options and of this version."""
    file = cell.workdir / "evaluation" / "metrics.json"
    if not file.exists():
        return False
    found = json.loads(file.read_text())["recipe"]
    return found["version"] == recipe.version() and found["options"] == recipe.plain(options) and (
        found["configs"] == {cell.row: tensors.sha256(cell.workdir / "config.json")})


def _write(study: Study, every: list[Cell], out: Path) -> None:
    found = [json.loads((cell.workdir / "evaluation" / "metrics.json").read_text()) for cell in every]
    # null is a metric that was not finite; texts, lists and mappings are no metrics.
    numbers: list[dict[str, Any]] = [
        {name: value for name, value in measured.items() if value is None or isinstance(value, int | float)}
        for measured in found]
    rows = [StudyRow(name, [cell.seed for cell in every if cell.row == name],
                     [metrics for cell, metrics in zip(every, numbers, strict=True) if cell.row == name])
            for name in study.rows]
    made = {name: value for name, value in found[0]["recipe"].items() if name not in ("weights", "configs")}
    table = study_report.study_table(rows, study.metrics)
    print(table)
    with disk_errors(out):
        (out / "table.md").write_text(table)
        (out / "table.json").write_text(reporting.to_json({"recipe": made, "rows": study_report.study_json(rows)},
                                                          indent=2) + "\n")
        study_report.draw_study(out / "study.png", rows, study.metrics)
        study_report.write_study_report(out / "report.html", title=study.title, recipe=made, rows=rows,
                                        metrics=study.metrics)
