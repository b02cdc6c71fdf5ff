"""A run's folder on disk: its config, its checkpoints, and the arrays that do not change.

    config.json    the resolved config
    encoder/       the encoder's Hugging Face config, which says what shape the model has
    checkpoints/   Orbax, one folder a step: `model` (weights, EMA, codebook), `training` (optimizer, discriminator,
                   counters) and `data` (the position in the data); the last two and the best one are kept
    frozen/        Orbax, written once: frozen parameters, teacher and the losses' networks, so that the run needs
                   nothing but its folder
"""

import dataclasses
import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from vqrae_jax import build, distributed, sharding
from vqrae_jax import config as config_lib
from vqrae_jax.config import Config
from vqrae_jax.convert import huggingface
from vqrae_jax.models.flat import Arrays
from vqrae_jax.step import Frozen, Parts, TrainState, init_state

log = logging.getLogger(__name__)
# May change between two starts of a run: they alter neither the parameters nor the metrics of a step (but for the
# rounding of sums that another mesh makes in another order).
_FREE_KEYS = ("train.log_every", "train.checkpoint_every", "train.eval_every", "train.max_skipped", "data.threads",
              "data.workers", "eval.", "log.", "mesh.")
_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT)
BEST_METRIC = "psnr"


def open_run(workdir: Path, config: Config) -> None:
    """Creates a run's folder, or checks that an existing one belongs to this config.

    Raises:
      OSError: the folder cannot be written.
      ValueError: it belongs to another config; the message names the first key that differs.
    """
    file = workdir / "config.json"
    existing = config_lib.load(file) if file.exists() else None  # refuses a file that is not ours
    if existing and has_checkpoint(workdir):
        changed = [line for line in config_lib.differences(existing, config)
                   if not line.startswith(_FREE_KEYS)]
        if changed:
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
                huggingface.copy_encoder_config(build.encoder_path(config), workdir / "encoder")
            if existing != config:
                config_lib.save(config, file)
    distributed.wait_for_all("open_run")
    if not file.exists():
        raise OSError(f"{workdir} is not the same folder for all processes of the run: put it on a file system that "
                      "they share")


def structure(workdir: Path, config: Config) -> tuple[nnx.GraphDef, Arrays, Arrays]:
    """`build.structure`, with the encoder's shape from the run's folder once the run has begun."""
    return build.structure(self_contained(workdir, config) if has_checkpoint(workdir) else config)


def self_contained(workdir: Path, config: Config) -> Config:
    """A run's config with the copy of the encoder's config that is in the run's folder."""
    encoder = dataclasses.replace(config.model.encoder, path=str(workdir / "encoder"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))


def has_checkpoint(workdir: Path) -> bool:
    """Whether a folder holds at least one complete checkpoint."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


@contextmanager
def disk_errors(workdir: Path) -> Iterator[None]:
    """Turns a failed write into one line that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore reports a full disk inside a ValueError.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(f"the disk is full: {workdir} could not be written; the last complete checkpoint is kept, "
                          "free some space and start again to continue from it") from error
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            raise OSError(f"cannot write to {workdir}: {error.strerror}; choose a folder you may write to") from error
        raise


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background, `close` waits for it."""

    def __init__(self, workdir: Path, *, read_only: bool = False):
        self.workdir = workdir
        policy = AnyPreservationPolicy([
            LatestN(2),
            BestN(get_metric_fn=_best_metric, n=1, keep_checkpoints_without_metrics=False),
        ])
        if not read_only and distributed.is_first():
            # Orbax can do this in a thread, which a process that fails early does not wait for.
            for unfinished in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished)
        distributed.wait_for_all("checkpoints")
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            item_names=("model", "training", "data"),
            # Without best_fn Orbax keeps metrics in memory only, and a restart would forget which step was best.
            options=ocp.CheckpointManagerOptions(preservation_policy=policy, best_fn=_best_metric, create=not read_only,
                                                 read_only=read_only))

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, data_state: dict[str, int], *, psnr: float | None) -> None:
        """Saves in the background; `psnr` is that of an evaluation of this very step, if there was one."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        model, training = _items(state)
        with disk_errors(self.workdir):
            self._manager.save(
                step,
                args=ocp.args.Composite(model=ocp.args.StandardSave(model), training=ocp.args.StandardSave(training),
                                        data=ocp.args.JsonSave(data_state)),
                metrics=None if psnr is None else {BEST_METRIC: psnr})

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
        """The state and the data position of a step; `abstract` gives shapes, dtypes and shardings."""
        model, training = _items(abstract)
        restored = self._manager.restore(step, args=ocp.args.Composite(
            model=ocp.args.StandardRestore(model), training=ocp.args.StandardRestore(training),
            data=ocp.args.JsonRestore()))
        log.info("continuing at step %d", step)
        return TrainState(**restored["model"], **restored["training"]), restored["data"]

    def restore_model(self, step: int, abstract: TrainState) -> dict[str, Any]:
        """`params`, `codebook` and `ema` of a step, without the optimizer."""
        model, _ = _items(abstract)
        return self._manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(model)))["model"]

    def close(self) -> None:
        """Returns when everything that was saved is on disk."""
        with disk_errors(self.workdir):
            self._manager.wait_until_finished()
        self._manager.close()


def _best_metric(metrics: dict[str, float]) -> float:
    return metrics[BEST_METRIC]


def _items(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    fields = state._asdict()
    model = {name: fields.pop(name) for name in ("params", "codebook", "ema")}
    return model, fields


def save_frozen(workdir: Path, frozen: Frozen) -> None:
    """Writes a run's frozen arrays; replaces those of an earlier start that left no checkpoint."""
    with disk_errors(workdir), ocp.StandardCheckpointer() as checkpointer:
        for name, arrays in frozen._asdict().items():
            if arrays:  # Orbax refuses to save nothing
                checkpointer.save((workdir / "frozen" / name).absolute(), arrays, force=True)


def load_frozen(workdir: Path, abstract: Frozen) -> Frozen:
    """Reads what `save_frozen` wrote."""
    return Frozen(**{name: _load_frozen(workdir, name, arrays) for name, arrays in abstract._asdict().items()})


def _load_frozen(workdir: Path, name: str, abstract: Arrays) -> Arrays:
    if not abstract:
        return {}
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((workdir / "frozen" / name).absolute(), abstract)


def write_run(workdir: Path, config: Config, params: Arrays, codebook: Arrays) -> None:
    """Makes a run's folder of a model from elsewhere: one checkpoint, at step 0, that can be loaded and started from.

    Raises:
      ValueError: the folder holds a run already.
      OSError: it cannot be written.
    """
    if has_checkpoint(workdir):
        raise ValueError(f"{workdir} holds a run already: choose another --workdir")
    graphdef, _, _ = structure(workdir, config)
    open_run(workdir, config)
    state, frozen = init_state(config, build.parts(config, graphdef), params, codebook, {}, {})
    save_frozen(workdir, frozen)
    with closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(state, {"next_batch": 0}, psnr=None)


def abstract_state(config: Config, parts: Parts, params: Arrays, codebook: Arrays,
                   mesh: Mesh) -> tuple[TrainState, Frozen]:
    """Shapes of a run's state and its place on a mesh, from the shapes of its model; nothing is allocated."""
    _, networks, network_state = build.networks(config)
    shapes = jax.eval_shape(lambda *arrays: init_state(config, parts, *arrays), params, codebook, networks,
                            network_state)
    # Said explicitly, or Orbax would look for the devices that the checkpoint was saved from.
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes,
                        sharding.of(mesh, shapes))


def load_run(workdir: Path, mesh: Mesh, *, step: int | None = None) -> tuple[Config, nnx.GraphDef, Arrays]:
    """A run's config, its model's structure, and all parameters and codebook state: their moving averages, if any.

    Args:
      workdir: the run's folder.
      mesh: where the arrays are to be; it need not be the mesh that the run was trained on.
      step: which checkpoint; None is the last.

    Raises:
      OSError: not the folder of a run, or it has no checkpoint, or not that one.
    """
    config = config_lib.load(workdir / "config.json")
    if not has_checkpoint(workdir):
        raise FileNotFoundError(f"{workdir} holds no checkpoint: train it first")
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    if step not in [None, *steps]:
        raise FileNotFoundError(f"{workdir} holds the checkpoints {steps}, not {step}")
    graphdef, params, codebook = structure(workdir, config)
    state, frozen = abstract_state(config, build.parts(config, graphdef), params, codebook, mesh)
    model = checkpoints.restore_model(steps[-1] if step is None else step, state)
    checkpoints.close()
    return config, graphdef, {**_load_frozen(workdir, "params", frozen.params), **model["params"], **model["codebook"],
                              **model["ema"]}
