"""The folder of a tokenizer's run: what `training.checkpoint` keeps there, as a model.

Besides that it holds `encoder/`, the encoder's Hugging Face config, which says what shape the model has.
"""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from vqrae_jax import config as config_lib
from vqrae_jax import files
from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.quantizers import Quantizer
from vqrae_jax.tokenizer import build, train_state
from vqrae_jax.training import checkpoint, distributed, sharding
from vqrae_jax.training.checkpoint import Weights
from vqrae_jax.weights import huggingface, packed


def folder(workdir: Path) -> Path:
    """The folder itself, or that of the tokenizer which ships with the package under this name; see `packed.find`."""
    return packed.find(workdir, Config.task)


def structure(workdir: Path, config: Config, quantizer: Quantizer | None = None) -> build.Structure:
    """`build.structure`, with the encoder's shape from the run's folder once the run has begun."""
    if checkpoint.has_checkpoint(workdir):
        return build.structure(self_contained(workdir, config), quantizer)
    with config_lib.says_where("model.encoder.path"):
        return build.structure(config, quantizer)


def self_contained(workdir: Path, config: Config) -> Config:
    """A run's config with the copy of the encoder's config in the run's folder; ValueError where that is damaged."""
    files.check(workdir / "encoder")
    encoder = dataclasses.replace(config.model.encoder, path=str(workdir / "encoder"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))


def write_files(workdir: Path, config: Config) -> None:
    """What a tokenizer adds to a new run's folder."""
    huggingface.copy_encoder_config(build.encoder_path(config), workdir / "encoder")
    files.add_checksums(workdir / "encoder")


def load_run(workdir: Path, mesh: Mesh, *, step: int | None = None, weights: Weights = "ema",
             quantizer: Quantizer | None = None) -> tuple[Config, nnx.GraphDef, Arrays]:
    """A run's config, its model's structure, and all parameters and buffers; nothing else is read.

    Args:
      workdir: the run's folder, that of a packed model, or `nano`, the one that ships with this package.
      mesh: where the arrays are to be; it need not be the mesh that the run was trained on.
      step: which checkpoint; None is the last.
      weights: `ema` for the moving average of what has one, `raw` for the arrays as they were trained. In a run
        without averages (`optim.ema_decay` 0) both are the same.
      quantizer: of a run that was trained with one given as an object: that object, or one like it.

    Raises:
      OSError: not the folder of a run, or it has no checkpoint, or not that one.
      ValueError: other `weights`; the run needs `quantizer`, or takes none.
    """
    workdir = folder(workdir)
    config = config_lib.load(workdir / "config.json")
    if packed.is_packed(workdir):
        model_structure = build.structure(self_contained(workdir, config), quantizer)
        shapes = {**model_structure.params, **model_structure.buffers}
        read = packed.read(workdir, shapes, step=step, weights=weights)
        return config, model_structure.graphdef, sharding.put(mesh, read, train_state.rules(config))
    step = checkpoint.chosen_step(workdir, step)
    model_structure = structure(workdir, config, quantizer)
    abstract, frozen = train_state.abstract(config, model_structure, mesh)
    arrays = checkpoint.load_model(workdir, step, train_state.items(abstract)["model"], weights)
    return config, model_structure.graphdef, arrays | checkpoint.load_frozen_item(workdir, "params", frozen.params)


def pretrained_encoder(workdir: Path, config: Config, arrays: Arrays, mesh: Mesh) -> Arrays:
    """The parameters of a run's encoder as they were when it started, `{path inside the encoder: array}`.

    They are those of the model where its encoder is frozen, the teacher's where there is one, and else read from where
    the run read them.

    Args:
      workdir: the run's folder.
      config: of the run.
      arrays: of its model.
      mesh: where the encoder is to be.

    Raises:
      OSError, ValueError: they cannot be read, or were random.
    """
    if not build.encoder_learns(config, arrays):
        return flat.under("encoder/", arrays)
    workdir = folder(workdir)
    if build.has_teacher(config, arrays) and not packed.is_packed(workdir):
        _, frozen = train_state.abstract(config, structure(workdir, config), mesh)
        return flat.under("encoder/", checkpoint.load_frozen_item(workdir, "teacher", frozen.teacher))
    if config.model.encoder.random_weights:
        raise ValueError("the run's encoder began with random weights, of which it kept no copy")
    loaded = huggingface.load_encoder_params(
        build.encoder_path(config), image_size=build.encoder_input_size(config),
        final_norm=config.model.encoder.final_norm)
    return sharding.put(mesh, loaded, train_state.rules(config))


def digest(arrays: Arrays) -> str:
    """The sha256 of arrays, of their names and shapes too; all processes of a run call it together."""
    found = hashlib.sha256()
    for path in sorted(arrays):
        array = np.asarray(distributed.gather(arrays[path]))
        found.update(f"{path} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def write_run(workdir: Path, config: Config, params: Arrays, buffers: Arrays) -> None:
    """Makes a run's folder of a model from elsewhere: one checkpoint, at step 0, that can be loaded and started from.

    Raises:
      ValueError: the folder holds a run already.
      OSError: it cannot be written.
    """
    started, frozen = train_state.init(config, build.structure(config), params, buffers, {}, {})
    checkpoint.write_run(workdir, config, lambda folder: write_files(folder, config), train_state.items(started),
                         frozen)
