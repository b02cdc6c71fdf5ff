"""The tokenizer as a task that the training loop trains."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vqrae_jax import config as config_lib
from vqrae_jax import files
from vqrae_jax.config import Config
from vqrae_jax.data import (
    BadImages,
    Source,
    TrainIterator,
    as_source,
    difference,
    fingerprint,
    hold_out,
    open_parts,
    train_batches,
)
from vqrae_jax.data.fingerprint import read as read_fingerprint
from vqrae_jax.models import flat
from vqrae_jax.models.quantizers import Quantizer, own
from vqrae_jax.tokenizer import evaluate, init, runs, train_state
from vqrae_jax.tokenizer.gan import learns as discriminator_learns
from vqrae_jax.tokenizer.loss import make_train_step, phase_of
from vqrae_jax.tokenizer.train_state import Frozen, TrainState
from vqrae_jax.training import checkpoint, loop, optim, sharding
from vqrae_jax.training.reporting import progress_shown
from vqrae_jax.training.task import Best, Evaluator, TrainStep

log = logging.getLogger(__name__)
_IMAGES = "images.json"  # in the run's folder; see `data.fingerprint`


def train(config: Config, workdir: str | os.PathLike, source: Source | Sequence[Any] | None = None,
          quantizer: Quantizer | None = None) -> dict[str, float]:
    """Trains a tokenizer, or goes on with it where the folder holds a checkpoint.

    Progress goes to the logger `vqrae_jax`, at level INFO. Where neither this logger nor the root logger is set up to
    show it, as in a notebook, it goes to stderr as long as training lasts; a level of that logger changes this.

    Args:
      config: of the run, from `load_config`.
      workdir: the run's folder.
      source: the training images instead of those of `data.source`: an object with the methods of `data.Source`, or a
        sequence of uint8 arrays `[H, W, 3]`, or of (array, label). The run's config says `data.source` "own".
      quantizer: the model's quantizer instead of that of `model.quantizer`: an NNX module that follows
        `models.quantizers.Quantizer`, whose arrays the run starts from, and which stays as it is. The run's config says
        `model.quantizer.kind` "own". `load(workdir, quantizer=...)` needs one like it. The same call with the same
        objects continues the run.

    Returns:
      the metrics of the evaluation at the end, also where no step was left.

    Raises:
      ValueError, OSError: a config, data, a quantizer or a folder that cannot work, before training starts.
      KeyboardInterrupt: a signal stopped the run, after it was saved.
      FloatingPointError: `train.max_skipped` steps in a row had a loss or gradient that was not finite.
    """
    workdir = Path(workdir)
    with progress_shown():
        images = None if source is None else as_source(source)
        task = TokenizerTask(_with_objects(config, images, quantizer), workdir, images, quantizer)
        result = loop.run(task, workdir)
        if bad := task.bad_images.summary():
            log.warning("%s", bad)
    return result


def _with_objects(config: Config, source: Source | None, quantizer: Quantizer | None) -> Config:
    """The config with the kind `own` wherever an object takes the place of what it says."""
    if source is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="own"))
    if quantizer is not None:
        size, dim = own.size_and_dim(quantizer)
        section = config_lib.Quantizer(kind="own", size=size, dim=dim)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, quantizer=section))
    return config


class TokenizerTask:
    """See `training.task.Task`.

    Args:
      config: of the run.
      workdir: its folder, which need not exist yet; nothing is written before training starts.
      source: the training images where `data.source` is "own".
      quantizer: the object where `model.quantizer.kind` is "own".

    Raises:
      ValueError, OSError: a config or data that cannot work.
    """

    best, unit = Best("psnr", higher=True), "images"

    def __init__(self, config: Config, workdir: Path, source: Source | None = None,
                 quantizer: Quantizer | None = None):
        self.config, self._quantizer = config, quantizer
        self.structure = runs.structure(workdir, config, quantizer)
        for key in ("lr_multipliers", "end_lr_multipliers"):
            optim.check_patterns(self.structure.params, getattr(config.optim, key), key=f"optim.{key}")
        self.bad_images = BadImages(workdir / "bad_images.jsonl")
        before = config_lib.load(workdir / "config.json") if checkpoint.has_checkpoint(workdir) else None
        if before and before.data.source == "own" and source is None:
            raise ValueError(f"the images of the run in {workdir} are an object: to continue it, give it to "
                             "vqrae_jax.train as source=")
        with config_lib.says_where("data.source"):
            self._source, held_out = (open_parts(config.data.source, holdout=config.data.holdout) if source is None
                                      else hold_out(source, config.data.holdout))
        self._eval_source = evaluate.choose_source(config, self._source, held_out)
        self._images = fingerprint(self._source)
        if before and (workdir / _IMAGES).exists():  # version 0.3 kept none
            self._check_images(read_fingerprint(workdir / _IMAGES), before.data.source)

    def _check_images(self, before: dict[str, Any], source: str) -> None:
        """Data that moved must hold the same images; data that changed where they are cost only exact continuation."""
        now = self.config.data.source
        if not (changed := difference(before, self._images)):
            return
        if now != source:
            raise ValueError(f"config key data.source: {source} -> {now} does not hold the images that this run was "
                             f"trained on: {changed}; choose another --workdir, or the same images")
        log.warning("the images of %s changed since this run began (%s): it goes on with them, but not as if it had "
                    "never stopped", now, changed)

    def write_files(self, workdir: Path) -> None:
        """The encoder's config, and by what the images will be known."""
        runs.write_files(workdir, self.config)
        files.write_json(workdir / _IMAGES, self._images)

    def abstract(self, mesh: Mesh) -> tuple[TrainState, Frozen, dict[str, Any]]:
        """Shapes and shardings of state, frozen arrays and a batch."""
        return (*train_state.in_training(self.config, self.structure, mesh), abstract_batch(self.config, mesh))

    def init(self, mesh: Mesh) -> tuple[TrainState, Frozen]:
        """State and frozen arrays at the start of a run."""
        networks = init.network_arrays(self.config, mesh)
        arrays = init.initial_arrays(self.config, self.structure, self.batches, mesh, self._quantizer)
        return train_state.made(self.config, self.structure, mesh, *arrays, *networks)

    def items(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds."""
        return train_state.items(state)

    def state(self, items: dict[str, Any]) -> TrainState:
        """The inverse of `items`."""
        return train_state.from_items(items)

    def batches(self) -> TrainIterator:
        """Training batches from the beginning."""
        return open_train_batches(self.config, self._source, self.bad_images)

    def phase(self, step: int) -> str:
        """`gan` once the discriminator learns."""
        return phase_of(self.config, step)

    def train_step(self, phase: str) -> TrainStep:
        """The training step of a phase."""
        return make_train_step(self.config, self.structure, phase)

    def evaluator(self, mesh: Mesh) -> Evaluator:
        """Metrics and pictures of the averaged weights, if there are any, on the evaluation images."""
        evaluator = evaluate.Evaluator(self.structure.graphdef, mesh)
        source, limit = self._eval_source, self.config.eval.limit

        def evaluate_state(state: TrainState, frozen: Frozen) -> tuple[dict[str, float], dict[str, np.ndarray]]:
            arrays = {**frozen.params, **state.params, **state.buffers, **state.ema}
            batches = evaluate.open_batches(self.config, source, self.bad_images, mesh, limit=limit,
                                            max_bad=self.config.data.max_bad)
            evaluation = evaluator(arrays, batches, images=min(limit or len(source), len(source)),
                                   labelled=source.num_classes is not None, samples=self.config.eval.samples)
            for name, reason in evaluation.failed.items():
                log.warning("%s %s", name, reason)
            return evaluation.metrics, {"original": evaluation.originals, "reconstruction": evaluation.reconstructions}

        return evaluate_state

    def shown(self, metrics: dict[str, float]) -> str:
        """The losses, their sum first, and the share of codes in use."""
        names = sorted(filter(lambda name: name.startswith("loss/"), metrics), key=lambda name: name != "loss/total")
        losses = [f"{name.removeprefix('loss/')} {metrics[name]:.4f}" for name in names]
        return "  ".join([*losses, f"code usage {100 * metrics['code_usage_window']:.1f} %"])

    def describe(self) -> list[str]:
        """The number of parameters by part, and how many of them learn."""
        lines = []
        params, buffers, networks = self.structure.params, self.structure.buffers, self.structure.networks.params
        learns = lambda path: (not optim.is_frozen(path, self.config.optim.lr_multipliers) if path in params
                               else discriminator_learns(path))
        for part in dict.fromkeys(flat.part(path) for path in [*params, *buffers, *networks]):
            sizes = {path: array.size for path, array in {**params, **networks}.items() if flat.part(path) == part}
            learned = sum(size for path, size in sizes.items() if learns(path))
            kept = sum(array.size for path, array in buffers.items() if flat.part(path) == part)
            lines.append(f"{part:13s} {sum(sizes.values()):12,} parameters, {learned:12,} of them learn"
                         + (f"; {kept:,} numbers in buffers" if kept else ""))
        return lines


def open_train_batches(config: Config, source: Source, bad_images: BadImages) -> TrainIterator:
    """This process's share of the training batches of a source.

    Args:
      config: of the run.
      source: of the images.
      bad_images: collects the images that cannot be read.
    """
    data, processes = config.data, jax.process_count()
    return train_batches(
        source, image_size=data.image_size, batch_size=config.train.batch_size // processes, seed=config.seed,
        crop_scale_min=data.crop_scale_min, flip=data.flip, threads=data.threads, workers=data.workers,
        bad_images=bad_images, max_bad=data.max_bad, shard_index=jax.process_index(), shard_count=processes)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Shape and sharding of a training batch."""
    batch, size = config.train.batch_size, config.data.image_size
    place = sharding.batch_sharding(mesh)
    return {"image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8, sharding=place),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=place)}
