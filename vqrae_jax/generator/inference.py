"""Trained generators for use: classes or captions to codes."""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vqrae_jax.generator import prefix, runs, sampling
from vqrae_jax.generator.runs import Loaded
from vqrae_jax.generator.sampling import Options, Schedule
from vqrae_jax.training import distributed, sharding
from vqrae_jax.training.checkpoint import Weights
from vqrae_jax.weights.text import load_text_tokenizer


class Prefixes(NamedTuple):
    """What images begin with; the n-th image with the n-th of them, and when all had their turn again with the first.

    Attributes:
      arrays: `label` int32 `[P]`, and with captions `caption` and `pads`, as `loss.predict` has them.
      names: of each, for people.
    """

    arrays: dict[str, np.ndarray]
    names: list[str]

    def of(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Those of images by their numbers."""
        return {name: values[numbers % len(self.names)] for name, values in self.arrays.items()}


class Generator:
    """A trained generator.

    Attributes:
      config: of the run it comes from.
      codes: what it learned; `codes.tokenizer` is the sha256 of the tokenizer's weights that read them.
      structure: of its model.
      num_classes: classes are in [0, num_classes); 0 where it takes captions.
      num_codes: codes are in [0, num_codes).
      grid: tokens a side.
    """

    def __init__(self, run: Loaded, mesh: Mesh):
        self.config, self.codes, self.structure, self._mesh = run.config, run.codes, run.structure, mesh
        self.grid, self.num_codes, self.num_classes = run.structure.codes
        self._params = jax.jit(functools.partial(sampling.cast, run.structure))(run.params)
        self._sample = jax.jit(sharding.on(mesh, functools.partial(sampling.sample, run.structure)),
                               static_argnames="top_k")

    def sample(self, num: int, *, classes: Sequence[int] | None = None, prompts: Sequence[str] | None = None,
               cfg: float = Options.cfg, schedule: Schedule = Options.schedule, power: float = Options.power,
               temperature: float = Options.temperature, top_k: int = Options.top_k, top_p: float = Options.top_p,
               seed: int = Options.seed, batch_size: int = 64) -> jax.Array:
        """Codes of new images.

        Args:
          num: how many.
          classes: of the images; if these are more, they begin again with the first. None is all classes in turn.
          prompts: likewise, of a generator of captions; None is no caption.
          cfg, schedule, power, temperature, top_k, top_p, seed: see `sampling.Options`. What an image becomes depends
            on its number and on nothing beside it, up to the rounding of numbers that are added in another order.
          batch_size: images at once.

        Returns:
          `[num, h, w]` int32.

        Raises:
          ValueError: a class that does not exist, a prompt longer than what it learned, guidance of a model that never
            saw the empty prefix, or numbers that mean nothing.
        """
        options = Options(cfg=cfg, schedule=schedule, power=power, temperature=temperature, top_k=top_k, top_p=top_p,
                          seed=seed)
        prefixes = self.prefixes(classes, prompts)
        self.check(num, options)
        size = self.batch_size(min(batch_size, num))
        batches = [self.draw(prefixes, numbers, options) for numbers in self.batches(num, size)]
        return jnp.asarray(np.concatenate(batches)[:num])

    def check(self, num: int, options: Options) -> None:
        """Raises ValueError where no such images can be had of this model."""
        if num < 1:
            raise ValueError(f"num must be at least 1, not {num}")
        if sampling.is_guided(options) and not self.config.prefix.drop:
            raise ValueError(f"cfg is {options.cfg:g}, but guidance needs a generator that has learned the empty "
                             "prefix, and the config key prefix.drop of this one is 0: leave cfg at 1")

    def prefixes(self, classes: Sequence[int] | None, prompts: Sequence[str] | None) -> Prefixes:
        """What images begin with; see `sample`.

        Raises:
          ValueError: they are not those of this model, or too long.
          OSError: its text tokenizer cannot be read.
        """
        if not self.num_classes:
            return self._captions(classes, prompts)
        if prompts is not None:
            raise ValueError("this generator takes classes, not prompts")
        classes = range(self.num_classes) if classes is None else classes
        if not len(classes):
            raise ValueError("no classes given")
        for label in classes:
            if not 0 <= label < self.num_classes:
                raise ValueError(f"class {label} does not exist: this generator has the classes 0 to "
                                 f"{self.num_classes - 1}")
        return Prefixes({"label": np.array(classes, np.int32)}, [f"class {label}" for label in classes])

    def _captions(self, classes: Sequence[int] | None, prompts: Sequence[str] | None) -> Prefixes:
        if classes is not None:
            raise ValueError("this generator takes prompts, not classes")
        longest, pad = self.config.prefix.longest, self.structure.vocabulary.text
        if prompts is None:
            if not self.config.prefix.drop:
                raise ValueError("give prompts: this generator has not learned to do without, for its config key "
                                 "prefix.drop is 0")
            prompts = [""]
        if not len(prompts):
            raise ValueError("no prompts given")
        tokenize = load_text_tokenizer(self.config.model.path, pad)
        for prompt in prompts:
            if (length := len(tokenize(prompt))) > longest:
                raise ValueError(f"a prompt has {length} tokens, but this generator takes {longest}: {prompt[:60]!r}")
        rows = [prefix.caption(prompt, tokenize=tokenize, longest=longest) for prompt in prompts]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return Prefixes({"label": np.full(len(rows), -1, np.int32), **arrays}, list(prompts))

    def batch_size(self, size: int) -> int:
        """The least size of a batch that is no smaller, and which devices can share."""
        return -(-size // self._mesh.size) * self._mesh.size

    def batches(self, num: int, size: int) -> Iterator[np.ndarray]:
        """The numbers of images, `[size]` int32 each; the last ones are beyond `num`."""
        return (np.arange(first, first + size, dtype=np.int32) for first in range(0, num, size))

    def draw(self, prefixes: Prefixes, numbers: np.ndarray, options: Options) -> np.ndarray:
        """Codes of a batch, `[B, h, w]` int32, whole on every process.

        Args:
          prefixes: of all images.
          numbers: of the images, as `batches` gives them.
          options: see there.
        """
        share = len(numbers) // jax.process_count()
        mine = numbers[jax.process_index() * share:][:share]
        batch = sharding.put_batch(self._mesh, prefixes.of(mine) | {"number": mine})
        draw = sampling.draw_of(options, self.grid**2)
        codes = distributed.gather(self._sample(self._params, batch, draw, top_k=options.top_k))
        return codes.reshape(-1, self.grid, self.grid)


def load_generator(workdir: str | os.PathLike, *, step: int | None = None, weights: Weights = "ema") -> Generator:
    """The model of a generator's run.

    Args:
      workdir: the run's folder, or that of a packed model, or `nano`, the one that ships with this package and makes
        codes for `vqrae_jax.load("nano")`.
      step: which checkpoint; None is the last.
      weights: `ema` is the moving average of the weights, `raw` the weights as they were trained.

    Raises:
      OSError: not the folder of a run, or no checkpoint in it, or not that one; or files are damaged.
      ValueError: the run of a tokenizer; other `weights`.
    """
    mesh = sharding.one_device()
    return Generator(runs.load_run(Path(workdir), mesh, step=step, weights=weights), mesh)
