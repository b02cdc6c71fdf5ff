"""A run's folder on disk, of any task: its config, its checkpoints, and the arrays that do not change.

    config.json    the resolved config
    checkpoints/   one folder a step, see verified.py: the items that the task names; `data`, the position in the data;
                   and `log`, the lines of metrics.jsonl until then. The last two and the best one are kept
    frozen/        likewise, written once: what does not learn, so that the run needs nothing but its folder
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, get_args

import orbax.checkpoint as ocp

from vqrae_jax import config as config_lib
from vqrae_jax.files import disk_errors, wait_for
from vqrae_jax.models.flat import Arrays
from vqrae_jax.training import distributed, lock, verified

log = logging.getLogger(__name__)
NOT_READ = ocp.PLACEHOLDER
_DAMAGED = ".damaged"  # what a damaged checkpoint is called that a run went back from
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
    wait_for([file])
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
        with closing(Checkpoints(workdir)) as checkpoints:
            checkpoints.save(0, items, {"next_batch": 0}, [])


def check_new(workdir: Path) -> None:
    """Raises ValueError where a folder holds a run already."""
    if has_checkpoint(workdir):
        raise ValueError(f"{workdir} holds a run already: choose another --workdir")


def has_checkpoint(workdir: Path) -> bool:
    """Whether a folder holds at least one complete checkpoint."""
    return bool(steps(workdir))


def steps(workdir: Path) -> list[int]:
    """The steps of all complete checkpoints, in order."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())


def newest_whole(workdir: Path) -> int | None:
    """The step of a run's last checkpoint that is whole, None where there is none; all processes call this together.

    Damaged ones after it are named, and moved aside to be made again. What is older is not looked at.

    Raises:
      ValueError: all are damaged.
      OSError: one cannot be read.
    """
    saved, damaged = steps(workdir)[::-1], {}
    for turn in range(distributed.agreed(len(saved))):
        step = distributed.agreed(saved[turn] if turn < len(saved) else 0)
        found = verified.damage(_folder(workdir, step), shared=True)
        if not found:
            if distributed.is_first():
                for of, how in damaged.items():
                    _move_aside(workdir, of, how)
            distributed.wait_for_all("newest_whole")
            return step
        damaged[step] = found
    if damaged:
        found = "; ".join(f"{step}: {how}" for step, how in damaged.items())
        raise ValueError(f"no checkpoint of {workdir} is whole ({found}): restore one from a copy, or choose another "
                         "--workdir")
    return None


def chosen_step(workdir: Path, step: int | None) -> int:
    """The step of a checkpoint whose model is to be read, None being the last.

    Raises:
      FileNotFoundError: there is none.
      ValueError: its model is damaged; the message names a checkpoint that is whole.
    """
    saved = steps(workdir)
    if not saved:
        raise FileNotFoundError(f"{workdir} holds no checkpoint: train it first")
    if step not in [None, *saved]:
        raise FileNotFoundError(f"{workdir} holds the checkpoints {saved}, not {step}")
    step = saved[-1] if step is None else step
    if how := verified.damage(_folder(workdir, step), ["model"]):
        others = (other for other in saved[::-1] if other != step and not verified.damage(_folder(workdir, other)))
        whole = next(others, None)
        raise ValueError(f"checkpoint {step} of {workdir} is damaged ({how}): " + (
            "no other one is whole, restore it from a copy" if whole is None else
            f"choose step {whole}, which is whole, or move {_folder(workdir, step)} away to have it taken by itself"))
    return step


def load_item(workdir: Path, step: int, name: str, abstract: Any) -> Any:
    """One item of a checkpoint of a run, which may be going on; see `verified.read_arrays`."""
    return verified.read_arrays(_folder(workdir, step), name, abstract)


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
      best_step: which of given steps is the best one, or None.
    """

    def __init__(self, workdir: Path, best_step: Callable[[list[int]], int | None] = lambda steps: None):
        self.workdir, self._best_step = workdir, best_step
        self._best = None
        if distributed.is_first():
            # What one that was killed left.
            for unfinished in (workdir / "checkpoints").glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(unfinished)
        distributed.wait_for_all("checkpoints")
        self._checkpointer = verified.checkpointer(self._remove_older)

    def save(self, step: int, items: dict[str, Any], data_state: dict[str, int], lines: list[str]) -> None:
        """Saves in the background.

        Args:
          step: of the state.
          items: by name, trees of arrays.
          data_state: the position in the data.
          lines: of metrics.jsonl.
        """
        with disk_errors(self.workdir):
            self._checkpointer.wait_until_finished()
            self._best = self._best_step(steps(self.workdir))
            self._checkpointer.save(_folder(self.workdir, step).absolute(),
                                    verified.arguments(items, {"data": data_state, "log": {"lines": lines}}))

    def _remove_older(self, saved: Path) -> None:
        """Called in the background when a checkpoint is complete."""
        newest = int(saved.name.partition(ocp.utils.TMP_DIR_SUFFIX)[0])
        # The last of these is whole: it was saved by this process, or is the one that the run goes on from.
        for step in [step for step in steps(self.workdir) if step != newest][:-1]:
            if step != self._best:
                shutil.rmtree(_folder(self.workdir, step))

    def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int], list[str] | None]:
        """What was saved of a step that `newest_whole` found.

        Args:
          step: of the checkpoint.
          abstract: the items' shapes, dtypes and shardings.

        Returns:
          the items, the position in the data, and the lines of metrics.jsonl, None where an earlier version saved none.
        """
        folder = _folder(self.workdir, step)
        data, log_item = verified.read_json(folder, "data"), verified.read_json(folder, "log")
        if data is None:
            raise ValueError(f"{folder} is damaged: it lacks the position in the data")
        items = {name: verified.read_arrays(folder, name, tree) for name, tree in abstract.items()}
        log.info("continuing at step %d", step)
        return items, data, log_item["lines"] if log_item else None

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        with disk_errors(self.workdir):
            self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """The same; afterwards nothing can be saved."""
        self.wait()
        self._checkpointer.close()


def _folder(workdir: Path, step: int) -> Path:
    return workdir / "checkpoints" / str(step)


def _move_aside(workdir: Path, step: int, how: str) -> None:
    """Takes a damaged checkpoint out of the way of one of the same step."""
    aside = _folder(workdir, step).with_name(f"{step}{_DAMAGED}")
    if aside.exists():
        shutil.rmtree(aside)
    _folder(workdir, step).rename(aside)
    log.warning("checkpoint %d of %s is damaged (%s): it is now %s, and may be removed", step, workdir, how, aside.name)


def save_frozen(workdir: Path, frozen: Any) -> None:
    """Writes a run's frozen arrays, a NamedTuple; replaces those of an earlier start that left no checkpoint."""
    items = {name: arrays for name, arrays in frozen._asdict().items() if arrays}  # Orbax refuses to save nothing
    if items:
        with disk_errors(workdir), closing(verified.checkpointer()) as checkpointer:
            checkpointer.save((workdir / "frozen").absolute(), verified.arguments(items, {}), force=True)
            checkpointer.wait_until_finished()


def load_frozen(workdir: Path, abstract: Any) -> Any:
    """Reads what `save_frozen` wrote, all processes together.

    `abstract` gives shapes, types and shardings. Arrays of another type are cast on the host, shard by shard.
    """
    if any(abstract):
        _check_frozen(workdir, None, shared=True)
    read = lambda name, arrays: verified.read_arrays(workdir / "frozen", name, arrays) if arrays else {}
    return abstract._replace(**{name: read(name, arrays) for name, arrays in abstract._asdict().items()})


def load_frozen_item(workdir: Path, name: str, abstract: Arrays) -> Arrays:
    """One field, by its name, of the frozen arrays that `save_frozen` wrote."""
    if not abstract:
        return {}
    _check_frozen(workdir, [name], shared=False)
    return verified.read_arrays(workdir / "frozen", name, abstract)


def _check_frozen(workdir: Path, items: list[str] | None, *, shared: bool) -> None:
    if how := verified.damage(workdir / "frozen", items, shared=shared):
        raise ValueError(f"{workdir / 'frozen'} is damaged ({how}), which all checkpoints of the run need: restore it "
                         "from a copy, or choose another --workdir")
