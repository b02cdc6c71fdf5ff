"""A run's folder on disk, of any task: its config, its checkpoints, and the arrays that do not change.

    config.json    the resolved config
    checkpoints/   Orbax, one folder a step: the items that the task names, and `data`, the position in the data; the
                   last two and the best one are kept
    frozen/        Orbax, written once: what does not learn, so that the run needs nothing but its folder
"""

import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from vqrae_jax import config as config_lib
from vqrae_jax.models.flat import Arrays
from vqrae_jax.training import distributed
from vqrae_jax.training.files import disk_errors
from vqrae_jax.training.task import Best

log = logging.getLogger(__name__)
NOT_READ = ocp.PLACEHOLDER


def open_run(workdir: Path, config: config_lib.Run, write_files: Callable[[Path], None]) -> None:
    """Creates a run's folder, or checks that an existing one belongs to this config.

    Args:
      workdir: the folder.
      config: of the run.
      write_files: writes a task's own files into a folder that has no checkpoint yet.

    Raises:
      OSError: the folder cannot be written.
      ValueError: it belongs to another config; the message names the first key that differs.
    """
    file = workdir / "config.json"
    existing = config_lib.load(file, type(config)) if file.exists() else None  # refuses a file that is not ours
    if existing and has_checkpoint(workdir):
        if changed := config_lib.differences(existing, config):
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise ValueError(f"{workdir} holds a run with another config: {changed[0]}{more}; choose another "
                             "--workdir, or the same config to continue that run")
    if distributed.is_first():
        with disk_errors(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            probe = workdir / ".write_test"
            probe.touch()
            probe.unlink()
            if not has_checkpoint(workdir):
                write_files(workdir)
            if existing != config:
                config_lib.save(config, file)
    distributed.wait_for_all("open_run")
    if not file.exists():
        raise OSError(f"{workdir} is not the same folder for all processes of the run: put it on a file system that "
                      "they share")


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


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background, `close` waits for it.

    Args:
      workdir: the run's folder.
      items: names of what the task saves; see `Task.items`.
      best: by what the best one is kept.
    """

    def __init__(self, workdir: Path, items: Iterable[str], best: Best):
        self.workdir, self._best = workdir, best
        sign = 1 if best.higher else -1
        value = lambda metrics: sign * metrics[best.metric]
        policy = AnyPreservationPolicy([
            LatestN(2),
            BestN(get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False),
        ])
        if distributed.is_first():
            # Orbax can do this in a thread, which a process that fails early does not wait for.
            for unfinished in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished)
        distributed.wait_for_all("checkpoints")
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            item_names=(*items, "data"),
            # Without best_fn Orbax keeps metrics in memory only, and a restart would forget which step was best.
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=value, create=True))

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: dict[str, Any], data_state: dict[str, int], metrics: dict[str, float]) -> None:
        """Saves in the background.

        Args:
          step: of the state.
          items: by name, trees of arrays.
          data_state: the position in the data.
          metrics: of an evaluation of this very step; empty if there was none.
        """
        if step in self._manager.all_steps():
            return
        with disk_errors(self.workdir):
            self._manager.save(
                step,
                args=ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                                        data=ocp.args.JsonSave(data_state)),
                metrics={self._best.metric: metrics[self._best.metric]} if metrics else None)

    def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """The items and the data position of a step; `abstract` gives shapes, dtypes and shardings."""
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**arguments, data=ocp.args.JsonRestore()))
        log.info("continuing at step %d", step)
        return {name: restored[name] for name in abstract}, restored["data"]

    def close(self) -> None:
        """Returns when everything that was saved is on disk."""
        with disk_errors(self.workdir):
            self._manager.wait_until_finished()
        self._manager.close()


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
