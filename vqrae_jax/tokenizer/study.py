"""Studies: the runs of a grid of configs and seeds, trained where they are missing."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vqrae_jax.config import Config, load_config
from vqrae_jax.tokenizer import task

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
    """

    title: str
    rows: Mapping[str, Row]
    data: str


class Cell(NamedTuple):
    """One run of a study."""

    row: str
    seed: int
    workdir: Path
    config: Config


def cells(study: Study, out: Path) -> list[Cell]:
    """All runs of a study, those first that others start from."""

    def listed(name: str, row: Row) -> Iterator[Cell]:
        for seed in row.seeds:
            start = {"init_from": str(_workdir(out, row.init_from, seed))} if row.init_from else {}
            config = load_config(row.config, **{**row.changes, **start, "seed": seed, "data.source": study.data})
            yield Cell(name, seed, _workdir(out, name, seed), config)

    return [cell for name, row in study.rows.items() for cell in listed(name, row)]


def _workdir(out: Path, row: str, seed: int) -> Path:
    return out / "runs" / row / f"seed{seed}"


def train(cell: Cell) -> None:
    """Trains a run as far as it is missing."""
    log.info("%s, seed %d", cell.row, cell.seed)
    task.train(cell.config, cell.workdir)
