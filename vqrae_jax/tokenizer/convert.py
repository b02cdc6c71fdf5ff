"""Tokenizers of other code bases as runs, and a run's encoder as a Hugging Face folder."""

import dataclasses
import logging
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vqrae_jax import config as config_lib
from vqrae_jax.config import Config, Data, Decoder, Encoder, Model, Optim, Quantizer
from vqrae_jax.files import disk_errors
from vqrae_jax.models import flat
from vqrae_jax.models.decoder import DECODER_SHAPES
from vqrae_jax.tokenizer import build, runs
from vqrae_jax.training import checkpoint, sharding
from vqrae_jax.training.checkpoint import Weights
from vqrae_jax.weights import huggingface, pytorch

log = logging.getLogger(__name__)
_SHAPE = ("width", "depth", "heads", "mlp_dim")


def from_torch(file: Path, workdir: Path, *, encoder: str, **options: Any) -> None:
    """Makes a run's folder of a PyTorch checkpoint; arguments and errors are those of `pytorch.read_model`."""
    checkpoint.check_new(workdir)
    model = pytorch.read_model(file, encoder=encoder, **options)
    config = config_of(model, encoder=encoder)
    structure = build.structure(config)
    _check_fits(model.params, structure.params, file)
    _check_fits(model.buffers, structure.buffers, file)
    for note in model.notes:
        log.info("%s", note)
    counts = Counter()
    for path, value in model.params.items():
        counts[flat.part(path)] += value.size
    log.info("parameters: %s", ", ".join(f"{part} {count:,}" for part, count in counts.items()))
    runs.write_run(workdir, config, {path: jnp.asarray(value) for path, value in model.params.items()},
                   {path: jnp.asarray(value) for path, value in model.buffers.items()})
    log.info("wrote %s; to look at it: python -m vqrae_jax.reconstruct --workdir=%s --out=reconstructions.png IMAGE...",
             workdir, workdir)
    log.info("to train on from it: any config with %s", " ".join(_flags(config, workdir)))


def config_of(model: pytorch.Imported, *, encoder: str) -> Config:
    """The config of an imported model: a first stage without moving average of the weights, the rest as by default."""
    decoder: dict[str, Any] = model.decoder
    for shape, spec in DECODER_SHAPES.items():
        if {name: getattr(spec, name) for name in _SHAPE} == {name: decoder[name] for name in _SHAPE}:
            decoder = {name: decoder[name] for name in decoder if name not in _SHAPE} | {"shape": shape}
    config = Config(
        data=Data(image_size=model.image_size),
        model=Model(encoder=Encoder(path=encoder, input_size=model.input_size, final_norm=model.final_norm),
                    quantizer=Quantizer(**model.quantizer), decoder=Decoder(**decoder),
                    latent_statistics=model.latent_statistics),
        optim=Optim(lr_multipliers=(("encoder/.*", 0.0),), ema_decay=0.0))
    return config_lib.parse(dataclasses.asdict(config), Config)


def _flags(config: Config, workdir: Path) -> list[str]:
    """What to give to another config so that its model is this one."""
    model = config.model
    shape = _SHAPE if model.decoder.shape == "custom" else ()
    values = {"init_from": str(workdir), "data.image_size": config.data.image_size,
              "model.latent_statistics": model.latent_statistics}
    for section, names in (("encoder", ("path", "input_size", "final_norm", "layers", "combine")),
                           ("quantizer", ("kind", "size", "dim", "levels", "projection", "input_projection",
                                          "l2_normalize", "search")),
                           ("decoder", ("shape", *shape, "patch_size", "cls_token", "learned_positions"))):
        values |= {f"model.{section}.{name}": getattr(getattr(model, section), name) for name in names}
    return [f"--config.{key}={shlex.quote(str(value))}" for key, value in values.items()]


def _check_fits(arrays: pytorch.Params, shapes, file: Path) -> None:
    for path in sorted(arrays.keys() | shapes.keys()):
        ours, theirs = (np.shape(x[path]) if path in x else None for x in (shapes, arrays))
        if ours != theirs:
            raise ValueError(f"{file}: parameter {path} would have the shape {theirs}, but the model needs {ours}")


def to_hf(workdir: Path, out: Path, *, step: int | None = None, weights: Weights = "ema") -> None:
    """Writes a run's encoder as a Hugging Face folder.

    Args:
      workdir: the run's folder.
      out: the folder to write.
      step, weights: see `runs.load_run`.

    Raises:
      OSError: not the folder of a run, or `out` cannot be written.
      ValueError: `out` holds a model already.
    """
    if (out / "model.safetensors").exists():
        raise ValueError(f"{out} holds a model already: choose another --out")
    config, _, arrays = runs.load_run(workdir, sharding.one_device(), step=step, weights=weights)
    spec = dataclasses.replace(huggingface.read_encoder_spec(workdir / "encoder"),
                               image_size=build.encoder_input_size(config))
    params = {path.removeprefix("encoder/"): np.asarray(value) for path, value in arrays.items()
              if path.startswith("encoder/")}
    with disk_errors(out):
        huggingface.save_encoder(params, spec=spec, out_dir=out)
    if config.model.encoder.layers:
        log.info("the run's features are those of layers %s, not the folder's last_hidden_state",
                 config.model.encoder.layers)
    log.info("wrote %s: %s, %d pixels, %s parameters", out, spec.model_type, spec.image_size,
             f"{sum(value.size for value in params.values()):,}")
