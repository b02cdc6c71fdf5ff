"""The generator as a task that the training loop trains."""

import dataclasses
import functools
import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vqrae_jax import config as config_lib
from vqrae_jax.config import GeneratorConfig
from vqrae_jax.data import (
    BadImages,
    CodesSource,
    Source,
    TrainIterator,
    codes_eval_batches,
    codes_train_batches,
    hold_out,
    open_source,
)
from vqrae_jax.data.codes import Description, read_description
from vqrae_jax.generator import build, evaluate, init, prefix, runs, train_state
from vqrae_jax.generator.loss import make_train_step
from vqrae_jax.generator.train_state import Frozen, TrainState
from vqrae_jax.training import checkpoint, loop, optim, sharding
from vqrae_jax.training.reporting import progress_shown
from vqrae_jax.training.task import Best, Evaluator, TrainStep
from vqrae_jax.weights.text import load_text_tokenizer

log = logging.getLogger(__name__)
RULER_IMAGES = 2**17  # of which codes are counted; more change nothing, and reading them takes time
_OF_TOKENIZER = ("tokenizer", "weights", "codebook_size", "grid", "image_size")
# In what codes must agree with those a run began with: all but where their images lie, and words.
_OF_CODES = tuple(field.name for field in dataclasses.fields(Description) if field.name not in ("data", "recipe"))


def train(config: GeneratorConfig, workdir: str | os.PathLike) -> dict[str, float]:
    """Trains a generator, or goes on with it where the folder holds a checkpoint.

    Progress is shown as by `tokenizer.task.train`.

    Args:
      config: of the run, from `load_config`.
      workdir: the run's folder.

    Returns:
      the metrics of the evaluation at the end, also where no step was left.

    Raises:
      ValueError, OSError: a config, codes or a folder that cannot work, before training starts.
      KeyboardInterrupt: a signal stopped the run, after it was saved.
      FloatingPointError: `train.max_skipped` steps in a row had a loss or gradient that was not finite.
    """
    workdir = Path(workdir)
    with progress_shown():
        task = GeneratorTask(config, workdir)
        result = loop.run(task, workdir)
        if bad := task.bad_images.summary():
            log.warning("%s", bad)
    return result


class GeneratorTask:
    """See `training.task.Task`.

    Args:
      config: of the run.
      workdir: its folder, which need not exist yet; nothing is written before training starts.

    Raises:
      ValueError, OSError: a config or codes that cannot work.
    """

    best, unit = Best("nats", higher=False), "images"

    def __init__(self, config: GeneratorConfig, workdir: Path):
        self.config = config
        codes = _open(config.data.source, "data.source")
        self._codes = codes.description
        if checkpoint.has_checkpoint(workdir):
            self._check_codes(read_description(workdir), workdir)
        self.structure = runs.structure(workdir, config, self._codes)
        for key in ("lr_multipliers", "end_lr_multipliers"):
            optim.check_patterns(self.structure.params, getattr(config.optim, key), key=f"optim.{key}")
        self._source, held_out = hold_out(codes, config.data.holdout)
        self._eval_source = self._choose_eval_source(held_out)
        self.bad_images = BadImages(workdir / "bad_images.jsonl")
        self._read_caption = None
        if config.prefix.kind == "caption":
            path = runs.self_contained(workdir, config) if checkpoint.has_checkpoint(workdir) else config
            tokenize = load_text_tokenizer(build.model_path(path), self.structure.vocabulary.text)
            self._read_caption = functools.partial(prefix.caption, tokenize=tokenize, longest=config.prefix.longest)

    def _check_codes(self, before: Description, workdir: Path) -> None:
        """Codes that moved must be the same codes."""
        if changed := _differing(before, self._codes, _OF_CODES):
            raise ValueError(f"config key data.source: {self.config.data.source} does not hold the codes that the run "
                             f"in {workdir} was trained on: other {', '.join(changed)}; choose another --workdir, or "
                             "the same codes")

    def _choose_eval_source(self, held_out: Source) -> Source:
        """The codes of `eval.source`, or else those that are held out, or where these are none those of training."""
        config = self.config
        if config.eval.source:
            source = _open(config.eval.source, "eval.source")
            if changed := _differing(self._codes, source.description, _OF_TOKENIZER):
                raise ValueError(f"config key eval.source: {config.eval.source} are not codes of the tokenizer that "
                                 f"made those of {config.data.source}: other {', '.join(changed)}")
            return source
        if len(held_out):
            return held_out
        log.warning("of %s no image is held out (data.holdout is %g of %d images): evaluation shows images that were "
                    "trained on", config.data.source, config.data.holdout, len(self._source))
        return self._source

    def write_files(self, workdir: Path) -> None:
        """What the codes are of, and the text model's config and tokenizer."""
        runs.write_files(workdir, self.config, self._codes)

    def abstract(self, mesh: Mesh) -> tuple[TrainState, Frozen, dict[str, Any]]:
        """Shapes and shardings of state, frozen arrays and a batch."""
        return (*train_state.in_training(self.config, self.structure, mesh),
                abstract_batch(self.config, self.structure, mesh))

    def init(self, mesh: Mesh) -> tuple[TrainState, Frozen]:
        """State and frozen arrays at the start of a run."""
        return train_state.made(self.config, mesh, init.params(self.config, self.structure, mesh))

    def items(self, state: TrainState) -> dict[str, Any]:
        """What a checkpoint holds."""
        return train_state.items(state)

    def state(self, items: dict[str, Any]) -> TrainState:
        """The inverse of `items`."""
        return train_state.from_items(items)

    def batches(self) -> "CheckedBatches":
        """Training batches from the beginning."""
        data, processes = self.config.data, jax.process_count()
        return CheckedBatches(self.structure.codes, codes_train_batches(
            self._source, batch_size=self.config.train.batch_size // processes, seed=self.config.seed,
            threads=data.threads, workers=0, bad_images=self.bad_images, max_bad=data.max_bad,
            read_caption=self._read_caption, shard_index=jax.process_index(), shard_count=processes))

    def phase(self, step: int) -> str:
        """There is but one."""
        del step
        return ""

    def train_step(self, phase: str) -> TrainStep:
        """The training step."""
        del phase
        return make_train_step(self.config, self.structure)

    def evaluator(self, mesh: Mesh) -> Evaluator:
        """How well the averaged weights, if there are any, predict codes that were trained on and others."""
        evaluator, limit = evaluate.Evaluator(self.structure, mesh), self.config.eval.limit
        # Once for all evaluations of a run, when the first is due.
        rulers = functools.cache(lambda: evaluate.rulers(
            evaluator.counts(self._eval_batches(self._source, mesh, RULER_IMAGES)),
            evaluator.counts(self._eval_batches(self._eval_source, mesh, limit))))

        def evaluate_state(state: TrainState, frozen: Frozen) -> tuple[dict[str, float], dict[str, np.ndarray]]:
            params = {**frozen.params, **state.params, **state.ema}
            held_out, trained_on = (evaluator(params, self._eval_batches(source, mesh, limit))
                                    for source in (self._eval_source, self._source))
            return evaluate.metrics(held_out, trained_on, rulers(), pixels=self._codes.image_size**2), evaluate.picture(
                {"nats, validation": held_out, "nats, training": trained_on}, grid=self.structure.codes.grid,
                size=self._codes.image_size, most=math.log(self.structure.codes.size))

        return evaluate_state

    def _eval_batches(self, source: Source, mesh: Mesh, limit: int) -> "evaluate.Batches":
        """This process's share of the first views of images of a source; a limit of 0 is all."""
        data, codes = self.config.data, self.structure.codes
        batch_size = math.ceil(self.config.eval.batch_size / mesh.size) * mesh.size
        for batch in codes_eval_batches(
                source, grid=(codes.grid, codes.grid), batch_size=batch_size // jax.process_count(),
                bad_images=self.bad_images, max_bad=data.max_bad, threads=data.threads,
                read_caption=self._read_caption, shard_index=jax.process_index(), shard_count=jax.process_count(),
                limit=limit or None):
            yield _checked(codes, batch)

    def shown(self, metrics: dict[str, float]) -> str:
        """The loss, and how often it was right."""
        return f"loss {metrics['loss']:.4f}  top-1 {100 * metrics['top1']:.1f} %"

    def describe(self) -> list[str]:
        """The number of parameters, how many of them learn, and of what the tokens are."""
        learned = sum(array.size for path, array in self.structure.params.items()
                      if not optim.is_frozen(path, self.config.optim.lr_multipliers))
        vocabulary, codes = self.structure.vocabulary, self.structure.codes
        return [f"language model {sum(array.size for array in self.structure.params.values()):,} parameters, "
                f"{learned:,} of them learn",
                f"vocabulary     {vocabulary.size:,} tokens: {vocabulary.text:,} of text, {vocabulary.codes:,} codes, "
                f"{vocabulary.classes:,} classes; {codes.grid**2} tokens an image"]


class CheckedBatches:
    """Training batches whose classes exist; see `training.task.Batches`."""

    def __init__(self, codes: build.Codes, batches: TrainIterator):
        self._codes, self._batches = codes, batches

    def __next__(self) -> dict[str, np.ndarray]:
        return _checked(self._codes, next(self._batches))

    def get_state(self) -> dict[str, int]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        self._batches.set_state(state)

    def close(self) -> None:
        self._batches.close()


def _checked(codes: build.Codes, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch without labels where the prefix is a caption, or one in which all labels are classes."""
    if not codes.classes:
        return batch | {"label": np.full_like(batch["label"], -1)}
    if (highest := batch["label"].max()) >= codes.classes:
        raise ValueError(f"an image has the label {highest}, but there are {codes.classes} classes, of which the first "
                         "is 0: config key data.classes says how many")
    return batch


def abstract_batch(config: GeneratorConfig, structure: build.Structure, mesh: Mesh) -> dict[str, Any]:
    """Shape and sharding of a training batch."""
    shapes = {"codes": (structure.codes.grid,) * 2, "label": ()}
    if config.prefix.kind == "caption":
        shapes |= {"caption": (config.prefix.longest,), "pads": ()}
    place = sharding.batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((config.train.batch_size, *shape), jnp.int32, sharding=place)
            for name, shape in shapes.items()}


def _open(spec: str, key: str) -> CodesSource:
    with config_lib.says_where(key):
        source: Any = open_source(spec, training=True, of="codes")
    return source


def _differing(first: Description, second: Description, names: tuple[str, ...]) -> list[str]:
    """Those of some fields that differ."""
    return [name for name in names if getattr(first, name) != getattr(second, name)]
