"""The folder of a generator's run: what `training.checkpoint` keeps there, as a model.

Besides that it holds `codes.json`, which says what codes it learned, of which tokenizer, and, of a run that began with
a text model, `text/`: that model's config and its tokenizer.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jax.sharding import Mesh

from vqrae_jax import config as config_lib
from vqrae_jax import files
from vqrae_jax.config import GeneratorConfig
from vqrae_jax.generator import build, train_state
from vqrae_jax.generator.build import Structure
from vqrae_jax.models.flat import Arrays
from vqrae_jax.training import checkpoint, sharding
from vqrae_jax.training.checkpoint import Weights
from vqrae_jax.weights import packed, text

if TYPE_CHECKING:
    from vqrae_jax.data.codes import Description


class Loaded(NamedTuple):
    """A run.

    Attributes:
      config: of the run, with the text model's files in the run's folder.
      codes: what it learned; `tokenizer` is the hash of the weights that read them.
      structure: of its model.
      params: all parameters.
    """

    config: GeneratorConfig
    codes: "Description"
    structure: Structure
    params: Arrays


def folder(workdir: Path) -> Path:
    """The folder itself, or that of the generator which ships with the package under this name; see `packed.find`."""
    return packed.find(workdir, GeneratorConfig.task)


def structure(workdir: Path, config: GeneratorConfig, codes: "Description") -> Structure:
    """`build.structure`, with the text model's shape from the run's folder once the run has begun."""
    if checkpoint.has_checkpoint(workdir):
        config = self_contained(workdir, config)
    with config_lib.says_where("model.path"):
        return build.structure(config, build.known_codes(config, codes))


def self_contained(workdir: Path, config: GeneratorConfig) -> GeneratorConfig:
    """A run's config with the copy of the text model's files in the run's folder; ValueError where that is damaged."""
    if not config.model.path:
        return config
    files.check(workdir / "text")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(workdir / "text")))


def write_files(workdir: Path, config: GeneratorConfig, codes: "Description") -> None:
    """What a generator adds to a new run's folder."""
    from vqrae_jax.data.codes import write_description

    write_description(workdir, codes)
    if config.model.path:
        text.copy_text_model(build.model_path(config), workdir / "text")
        files.add_checksums(workdir / "text")


def load_run(workdir: Path, mesh: Mesh, *, step: int | None = None, weights: Weights = "ema") -> Loaded:
    """A run as a model; what only training needs is not read.

    Args:
      workdir: the run's folder, that of a packed model, or `nano`, the one that ships with this package.
      mesh: where the parameters are to be; it need not be the mesh that the run was trained on.
      step: which checkpoint; None is the last.
      weights: `ema` for the moving average of what has one, `raw` for the parameters as they were trained. In a run
        without averages (`optim.ema_decay` 0) both are the same.

    Raises:
      OSError: not the folder of a run, or it has no checkpoint, or not that one.
      ValueError: the run of a tokenizer; other `weights`.
    """
    from vqrae_jax.data.codes import read_description  # with the data comes Grain, which defines flags

    workdir = folder(workdir)
    config = self_contained(workdir, config_lib.load(workdir / "config.json", GeneratorConfig))
    codes = read_description(workdir)
    of_model = build.structure(config, build.known_codes(config, codes))
    if packed.is_packed(workdir):
        read = packed.read(workdir, of_model.params, step=step, weights=weights)
        return Loaded(config, codes, of_model, sharding.put(mesh, read, sharding.RULES))
    step = checkpoint.chosen_step(workdir, step)
    abstract, frozen = train_state.abstract(config, of_model, mesh)
    params = checkpoint.load_model(workdir, step, train_state.items(abstract)["model"], weights)
    return Loaded(config, codes, of_model, params | checkpoint.load_frozen_item(workdir, "params", frozen.params))
