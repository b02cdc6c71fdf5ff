"""From a config to the things it names: the only place where a name becomes a module, an optimizer or a data source."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vqrae_jax import losses, optim
from vqrae_jax.config import Config
from vqrae_jax.convert import huggingface
from vqrae_jax.data import sources
from vqrae_jax.models import flat
from vqrae_jax.models.decoder import VIT_B, VIT_L, VIT_XL, Decoder
from vqrae_jax.models.encoders import Encoder
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.quantizers import EMAVQ, FSQ, SimVQ
from vqrae_jax.models.vit import TransformerSpec
from vqrae_jax.models.vqrae import VQRAE, Quantizer

NANO_ENCODER = Path(__file__).parent / "assets" / "nano"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DECODER_SHAPES = {"vit_b": VIT_B, "vit_l": VIT_L, "vit_xl": VIT_XL}
PIXEL_LOSSES = {"l1": losses.l1, "l2": losses.l2}


def encoder_path(config: Config) -> str:
    """The folder or hub id of the encoder; `nano` is the one that ships with the package."""
    return str(NANO_ENCODER) if config.model.encoder.path == "nano" else config.model.encoder.path


def encoder_input_size(config: Config) -> int:
    """Side of the image that the encoder sees."""
    return config.model.encoder.input_size or config.data.image_size


def tokens_per_image(config: Config) -> int:
    """N, the tokens that an image becomes."""
    patch_size = huggingface.read_encoder_spec(encoder_path(config)).vit.patch_size
    return (encoder_input_size(config) // patch_size) ** 2


def structure(config: Config) -> tuple[nnx.GraphDef, Arrays, Arrays]:
    """The model's structure and the shapes of its parameters and codebook state; nothing is allocated.

    Raises:
      ValueError: sizes that do not fit each other; the message names the config key.
      OSError: the encoder's config cannot be read.
    """
    spec = huggingface.read_encoder_spec(encoder_path(config))
    return flat.split(nnx.eval_shape(lambda: _model(config, spec, nnx.Rngs(config.seed))))


def initial_arrays(config: Config) -> tuple[Arrays, Arrays]:
    """Parameters and codebook state at the start of a run: pretrained encoder, everything else from `seed`."""
    spec = huggingface.read_encoder_spec(encoder_path(config))
    pretrained = {}
    if not config.model.encoder.random_weights:
        loaded = huggingface.load_encoder_params(
            encoder_path(config), image_size=encoder_input_size(config), final_norm=config.model.encoder.final_norm)
        pretrained = {f"encoder/{path}": jnp.asarray(value) for path, value in loaded.items()}

    @jax.jit
    def init():
        _, params, codebook = flat.split(_model(config, spec, nnx.Rngs(config.seed)))
        return {path: value for path, value in params.items() if path not in pretrained}, codebook

    params, codebook = init()
    return {**params, **pretrained}, codebook


def _model(config: Config, spec: huggingface.EncoderSpec, rngs: nnx.Rngs) -> VQRAE:
    size, input_size, patch_size = config.data.image_size, encoder_input_size(config), spec.vit.patch_size
    key = "model.encoder.input_size" if config.model.encoder.input_size else "data.image_size"
    if input_size % patch_size:
        raise ValueError(f"config key {key} {input_size} is not divisible by the encoder's patch size {patch_size}")
    grid = input_size // patch_size
    output_patch = config.model.decoder.patch_size or patch_size
    if grid * output_patch != size:
        raise ValueError(f"config key model.decoder.patch_size {output_patch} times {grid} tokens a side gives "
                         f"{grid * output_patch} pixels, but data.image_size is {size}")
    dtype = DTYPES[config.model.dtype]
    encoder = Encoder(spec.vit, image_size=input_size, mean=spec.mean, std=spec.std,
                      final_norm=config.model.encoder.final_norm, dtype=dtype, rngs=rngs)
    decoder_spec = DECODER_SHAPES.get(config.model.decoder.shape) or symmetric(spec.vit)
    decoder = Decoder(decoder_spec, latent_width=spec.vit.width, grid=grid, patch_size=output_patch, mean=spec.mean,
                      std=spec.std, cls_token=config.model.decoder.cls_token, dtype=dtype, rngs=rngs)
    return VQRAE(encoder=encoder, quantizer=_quantizer(config, width=spec.vit.width, rngs=rngs), decoder=decoder)


def symmetric(encoder: TransformerSpec) -> TransformerSpec:
    """The decoder's shape that mirrors an encoder: its width, depth, heads and MLP, without layer scale."""
    fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(TransformerSpec)}
    return TransformerSpec(**{**fields, "layer_scale": False})


def _quantizer(config: Config, *, width: int, rngs: nnx.Rngs) -> Quantizer:
    q = config.model.quantizer
    if q.kind == "fsq":
        quantizer = FSQ(width=width, levels=q.levels, rngs=rngs)
        if (quantizer.num_codes, len(q.levels)) != (q.size, q.dim):
            raise ValueError(f"config keys model.quantizer.size {q.size} and dim {q.dim} must be the product and the "
                             f"number of model.quantizer.levels {q.levels}: {quantizer.num_codes} and {len(q.levels)}")
        return quantizer
    common: dict[str, Any] = dict(
        width=width, size=q.size, dim=q.dim, project=True if q.projection else None, search=q.search,
        commitment_weight=q.commitment_weight, gradient=q.gradient, rngs=rngs)
    if q.kind == "ema":
        return EMAVQ(**common, decay=q.decay, restart_threshold=q.restart_threshold)
    return SimVQ(**common, input_projection=q.input_projection)


def optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW and its learning-rate schedule."""
    o = config.optim
    schedule = optim.warmup_cosine(lr=o.lr, end_lr=o.end_lr, warmup_steps=o.warmup_steps, steps=config.train.steps)
    return optim.adamw(schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, clip_norm=o.clip_norm,
                       multipliers=o.lr_multipliers), schedule


def data_source(spec: str, *, training: bool) -> sources.Source:
    """Opens `embedded`, `folder:PATH`, `tfds:NAME[:SPLIT][@DATA_DIR]` or `array_record:GLOB`.

    Where a SPEC names no split, training reads `train`, and evaluation what is held out: `validation` or else `test`.

    Raises:
      ValueError: not a SPEC, or no such split.
      OSError: the data is not there.
    """
    kind, _, rest = spec.partition(":")
    if kind == "embedded" and not rest:
        return sources.EmbeddedSource(split="train" if training else "validation")
    if kind == "folder" and rest:
        return sources.FolderSource(rest)
    if kind == "array_record" and rest:
        return sources.ArrayRecordSource(rest)
    if kind == "tfds" and rest:
        name_and_split, _, data_dir = rest.partition("@")
        name, _, split = name_and_split.partition(":")
        if not split:
            held_out = [s for s in ("validation", "test") if s in sources.tfds_splits(name, data_dir or None)]
            split = "train" if training or not held_out else held_out[0]
        return sources.TfdsSource(name, split=split, data_dir=data_dir or None)
    raise ValueError(f"unknown data {spec!r}: give embedded, folder:PATH, tfds:NAME[:SPLIT][@DATA_DIR] "
                     "or array_record:GLOB")
