"""A run's folder on disk, of any task: its config, its checkpoints, and the arrays that do not change.

    config.json    the resolved config
    checkpoints/   Orbax, one folder a step: the items that the task names, and `data`, the position in the data; the
                   last two and the best one are kept
    frozen/        Orbax, written once: what does not learn, so that the run needs nothing but its folder
"""

import logging
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import orbax.checkpoint as ocp

from vqrae_jax import config as config_lib
from vqrae_jax.files import disk_errors
from vqrae_jax.models.flat import Arrays
from vqrae_jax.training import distributed, lock

log = logging.getLogger(__name__)
NOT_READ = ocp.PLACEHOLDER
Weights = Literal["ema", "raw"]


def open_run(workdir: Path, config: config_lib.Run, write_files: Callable[[Path], None]) -> config_lib.Changes:
    """Completes a new run's folder, or checks that an existing one belongs to this config; it must be held.

    Args:
      workdir: the folder.
      config: of the run.
      write_files: writes a task's own files into a folder that has no checkpoint yet.

    Returns:
      what a run that continues does differently; empty for a new one.

    Raises:
      OSError: the folder cannot be written.
      ValueError: it belongs to another config; the message names the first key that differs.
    """
    file = workdir / "config.json"
    existing = config_lib.load(file, type(config)) if file.exists() else None  # refuses a file that is not ours
    changed = {}
    if existing and has_checkpoint(workdir):
        kept, changed = config_lib.differences(existing, config)
        if kept:
            key, (old, new) = next(iter(kept.items()))
            more = f" (and {len(kept) - 1} more)" if len(kept) > 1 else ""
            raise ValueError(f"{workdir} holds a run with another config: {key}: {old!r} -> {new!r}{more}; choose "
                             "another --workdir, or the same config to continue that run")
    if distributed.is_first():
        with disk_errors(workdir):
            if not has_checkpoint(workdir):
                write_files(workdir)
            if existing != config:
                config_lib.save(config, file)
    distributed.wait_for_all("open_run")
    if not file.exists():
        raise OSError(f"{workdir} is not the same folder for all processes of the run: put it on a file system that "
                      "they share")
    return changed


def write_run(workdir: Path, config: config_lib.Run, write_files: Callable[[Path], None], items: dict[str, Any],
              frozen: Any) -> None:
    """Makes a run's folder of a state from elsewhere: one checkpoint, at step 0, that can be loaded and trained on.

    Args:
      workdir: the folder.
      config: of the run.
      write_files: see `open_run`.
      items: of the state, see `Task.items`.
      frozen: a NamedTuple of arrays that do not change.

    Raises:
      ValueError: the folder holds a run already.
      OSError: it cannot be written.
    """
    check_new(workdir)
    with lock.held(workdir):
        open_run(workdir, config, write_files)
        save_frozen(workdir, frozen)
        with closing(Checkpoints(workdir, items)) as checkpoints:
            checkpoints.save(0, items, {"next_batch": 0})


def check_new(workdir: Path) -> None:
    """Raises ValueError where a folder holds a run already."""
    if has_checkpoint(workdir):
        raise ValueError(f"{workdir} holds a run already: choose another --workdir")


def has_checkpoint(workdir: Path) -> bool:
    """Whether a folder holds at least one complete checkpoint."""
    return bool(steps(workdir))


def steps(workdir: Path) -> list[int]:
    """The steps of all complete checkpoints, in order."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())


def load_item(workdir: Path, step: int, name: str, abstract: Any) -> Any:
    """One item of a checkpoint of a run, which may be going on.

    Args:
      workdir: the run's folder.
      step: of the checkpoint.
      name: of the item; see `Task.items`.
      abstract: shapes, dtypes and shardings of all its arrays. Those that have `NOT_READ` in their place stay on the
        disk, and have it in the result as well.
    """
    arguments = ocp.args.PyTreeRestore(abstract, ocp.checkpoint_utils.construct_restore_args(abstract))
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore((workdir / "checkpoints" / str(step) / name).absolute(), arguments)


def chosen_step(workdir: Path, step: int | None) -> int:
    """The step of a checkpoint to read, None being the last; FileNotFoundError where there is none."""
    saved = steps(workdir)
    if not saved:
        raise FileNotFoundError(f"{workdir} holds no checkpoint: train it first")
    if step not in [None, *saved]:
        raise FileNotFoundError(f"{workdir} holds the checkpoints {saved}, not {step}")
    return saved[-1] if step is None else step


def load_model(workdir: Path, step: int, model: dict[str, Arrays], weights: Weights) -> Arrays:
    """The arrays that inference needs of a checkpoint's item `model`, each read once.

    Args:
      workdir: the run's folder.
      step: of the checkpoint.
      model: the item, of shapes and shardings; its part `ema` holds averages of some arrays of the other parts.
      weights: `ema` for the average of what has one, `raw` for the arrays as they were trained.

    Raises:
      ValueError: other `weights`.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be {' or '.join(get_args(Weights))}, not {weights!r}")
    averaged = model["ema"].keys() if weights == "ema" else ()
    needed = {part: {path: array if (path in averaged) == (part == "ema") else NOT_READ
                     for path, array in arrays.items()} for part, arrays in model.items()}
    parts = load_item(workdir, step, "model", needed)
    return {path: array for arrays in parts.values() for path, array in arrays.items() if array is not NOT_READ}


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background, `wait` and `close` wait for it.

    When one is saved, of the older ones the last and the best are kept.

    Args:
      workdir: the run's folder.
      items: names of what the task saves; see `Task.items`.
      best_step: which of given steps is the best one, or None.
    """

    def __init__(self, workdir: Path, items: Iterable[str],
                 best_step: Callable[[list[int]], int | None] = lambda steps: None):
        self.workdir = workdir
        if distributed.is_first():
            # Orbax can do this in a thread, which a process that fails early does not wait for.
            for unfinished in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished)
        distributed.wait_for_all("checkpoints")
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            item_names=(*items, "data"),
            options=ocp.CheckpointManagerOptions(preservation_policy=_LastAndBest(best_step), create=True))

    def save(self, step: int, items: dict[str, Any], data_state: dict[str, int]) -> None:
        """Saves in the background.

        Args:
          step: of the state.
          items: by name, trees of arrays.
          data_state: the position in the data.
        """
        if step in self._manager.all_steps():
            return
        with disk_errors(self.workdir):
            self._manager.save(
                step,
                args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                                        data=ocp.args.JsonSave(data_state)))

    def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """The items and the data position of a step; `abstract` gives shapes, dtypes and shardings."""
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments, data=ocp.args.JsonRestore()))
        log.info("continuing at step %d", step)
        return {name: restored[name] for name in abstract}, restored["data"]

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        with disk_errors(self.workdir):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """The same; afterwards nothing can be saved."""
        self.wait()
        self._manager.close()


class _LastAndBest(NamedTuple):
    """Orbax's question which checkpoints to keep, asked when another one is saved."""

    best_step: Callable[[list[int]], int | None]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*steps[-2:], self.best_step(steps)}
        return [step in kept for step in steps]


def save_frozen(workdir: Path, frozen: Any) -> None:
    """Writes a run's frozen arrays, a NamedTuple; replaces those of an earlier start that left no checkpoint."""
    with disk_errors(workdir), ocp.StandardCheckpointer() as checkpointer:
        for name, arrays in frozen._asdict().items():
            if arrays:  # Orbax refuses to save nothing
                checkpointer.save((workdir / "frozen" / name).absolute(), arrays, force=True)


def load_frozen(workdir: Path, abstract: Any) -> Any:
    """Reads what `save_frozen` wrote; `abstract` gives shapes, dtypes and shardings."""
    return abstract._replace(**{name: load_frozen_item(workdir, name, arrays)
                                for name, arrays in abstract._asdict().items()})


def load_frozen_item(workdir: Path, name: str, abstract: Arrays) -> Arrays:
    """One field, by its name, of the frozen arrays that `save_frozen` wrote."""
    if not abstract:
        return {}
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((workdir / "frozen" / name).absolute(), abstract)
