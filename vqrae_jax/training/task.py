"""What the training loop asks of a task: the one thing it knows about what is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from vqrae_jax.config import Run

# `(state, frozen, batch) -> (state, metrics)`: pure, to be compiled; metrics are float32 scalars by name.
TrainStep = Callable[[Any, Any, Any], tuple[Any, dict[str, Any]]]

# `(state, frozen) -> (metrics, rows)`: numbers, and for a picture captioned rows of images, float in [0, 1]
# `[N, H, W, 3]`; perhaps none.
Evaluator = Callable[[Any, Any], tuple[dict[str, float], dict[str, np.ndarray]]]


class Best(NamedTuple):
    """By which metric of the evaluation the best checkpoint is kept, and whether more of it is better."""

    metric: str
    higher: bool


class Batches(Protocol):
    """This process's rows of one batch after another, without end."""

    def __next__(self) -> Any:
        """A tree of arrays `[B / processes, ...]`."""
        ...

    def get_state(self) -> dict[str, int]:
        """The position after the batch that came last, as JSON."""
        ...

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a position: the next batch is the one that came next there."""
        ...

    def close(self) -> None:
        """Ends threads and processes that read ahead."""
        ...


class Task(Protocol):
    """Something to be trained.

    Its state is a NamedTuple, of which the loop reads `step` (batches seen) and `skipped_in_a_row` (steps that were not
    finite, see `update.guarded`). What is frozen is a NamedTuple of `{path: array}`, written once, as `init` makes it;
    steps and evaluations take it in the types that `abstract` says, into which the loop casts it.

    Attributes:
      config: of the run.
      best: which checkpoint is the best.
      unit: what a batch has `train.batch_size` of, for throughput: "images".
    """

    @property
    def config(self) -> Run: ...
    @property
    def best(self) -> Best: ...
    @property
    def unit(self) -> str: ...

    def describe(self) -> list[str]:
        """What is trained, as lines of the log."""
        ...

    def write_files(self, workdir: Path) -> None:
        """Writes the task's own files into a new run's folder."""
        ...

    def abstract(self, mesh: Mesh) -> tuple[Any, Any, Any]:
        """Shapes, types and shardings of what a step takes: state, frozen arrays, batch; nothing is allocated."""
        ...

    def init(self, mesh: Mesh) -> tuple[Any, Any]:
        """State and frozen arrays at the start of a run, placed as `abstract` says, and as they are to be saved."""
        ...

    def items(self, state: Any) -> dict[str, Any]:
        """What a checkpoint holds of a state, a tree for each of its files by name; takes arrays or their shapes."""
        ...

    def state(self, items: dict[str, Any]) -> Any:
        """The inverse of `items`."""
        ...

    def batches(self) -> Batches:
        """Training batches from the beginning."""
        ...

    def phase(self, step: int) -> str:
        """The phase of the `step`-th step, counted from 1; each is compiled once, before the first step."""
        ...

    def train_step(self, phase: str) -> TrainStep:
        """The training step of a phase."""
        ...

    def evaluator(self, mesh: Mesh) -> Evaluator:
        """The evaluation, which may compile something that all evaluations of a run use."""
        ...

    def shown(self, metrics: dict[str, float]) -> str:
        """What the progress line says of a step's metrics."""
        ...
