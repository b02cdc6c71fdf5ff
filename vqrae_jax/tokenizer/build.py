"""From a config to the modules it names, and to all that is known of them before there are arrays."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.decoder import DECODER_SHAPES, VIT_B, Decoder
from vqrae_jax.models.discriminators import DISCRIMINATORS
from vqrae_jax.models.encoders import Encoder
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.perceptual import ENCODER, NETWORKS, SHARES
from vqrae_jax.models.quantizers import QUANTIZERS, Quantizer, own
from vqrae_jax.models.vit import DTYPES, REMAT_POLICIES, TransformerSpec
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.training import optim
from vqrae_jax.weights import huggingface
from vqrae_jax.weights.huggingface import EncoderSpec

ASSETS = Path(__file__).parents[1] / "assets"
NANO = str(ASSETS / "nano")  # the encoder that ships with the package


class Networks(NamedTuple):
    """The networks of a config's losses, as far as it has them: `lpips`, `convnext_s` and `discriminator`.

    Attributes:
      graphdefs: by name.
      params: shapes of their parameters, or the parameters, under `name/`.
      buffers: of their buffers, likewise.
    """

    graphdefs: dict[str, nnx.GraphDef]
    params: Arrays
    buffers: Arrays


class Structure(NamedTuple):
    """What a config says of a model; shapes are `jax.ShapeDtypeStruct`s by path, and nothing is allocated.

    Attributes:
      encoder: shape and preprocessing of the encoder.
      decoder: shape of the decoder's transformer.
      input_size: side of the image that the encoder sees.
      tokens: N, the tokens that an image becomes.
      graphdef: of the model.
      params: shapes of its parameters.
      buffers: shapes of its buffers.
      networks: the same of the losses' networks.
    """

    encoder: EncoderSpec
    decoder: TransformerSpec
    input_size: int
    tokens: int
    graphdef: nnx.GraphDef
    params: Arrays
    buffers: Arrays
    networks: Networks


def structure(config: Config, quantizer: Quantizer | None = None) -> Structure:
    """The structure of a config's model; of the disk only the encoder's config is read.

    Args:
      config: of the run.
      quantizer: the object where `model.quantizer.kind` is "own", else None.

    Raises:
      ValueError: sizes that do not fit each other; the message names the config key.
      OSError: the encoder's config cannot be read.
    """
    encoder = huggingface.read_encoder_spec(encoder_path(config))
    input_size = encoder_input_size(config)
    graphdef, params, buffers = flat.split(
        nnx.eval_shape(lambda: model(config, encoder, nnx.Rngs(config.seed), quantizer)))
    networks = split(nnx.eval_shape(lambda: loss_networks(config, nnx.Rngs(config.seed))))
    return Structure(encoder, decoder_spec(config, encoder), input_size, (input_size // encoder.vit.patch_size) ** 2,
                     graphdef, params, buffers, networks)


def encoder_path(config: Config) -> str:
    """The folder or hub id of the encoder; `nano` is the one that ships with the package.

    For random weights the shape is enough, and those of the encoders that the shipped configs name ship too.
    """
    encoder = config.model.encoder
    if encoder.path == "nano":
        return NANO
    shape = ASSETS / "encoders" / encoder.path.replace("/", "--")
    return str(shape) if encoder.random_weights and shape.is_dir() else encoder.path


def encoder_input_size(config: Config) -> int:
    """Side of the image that the encoder sees."""
    return config.model.encoder.input_size or config.data.image_size


def model(config: Config, spec: EncoderSpec, rngs: nnx.Rngs, quantizer: Quantizer | None = None) -> VQRAE:
    """The model with random weights, those of `quantizer` excepted; arguments and errors as of `structure`."""
    size, input_size, patch_size = config.data.image_size, encoder_input_size(config), spec.vit.patch_size
    key = "model.encoder.input_size" if config.model.encoder.input_size else "data.image_size"
    if input_size % patch_size:
        raise ValueError(f"config key {key} {input_size} is not divisible by the encoder's patch size {patch_size}")
    grid = input_size // patch_size
    output_patch = config.model.decoder.patch_size or patch_size
    if grid * output_patch != size:
        raise ValueError(f"config key model.decoder.patch_size {output_patch} times {grid} tokens a side gives "
                         f"{grid * output_patch} pixels, but data.image_size is {size}")
    dtype, remat = DTYPES[config.model.dtype], REMAT_POLICIES[config.model.remat]
    encoder = Encoder(spec.vit, image_size=input_size, mean=spec.mean, std=spec.std,
                      final_norm=config.model.encoder.final_norm, layers=config.model.encoder.layers,
                      combine=config.model.encoder.combine, remat=remat, dtype=dtype, rngs=rngs)
    decoder = Decoder(decoder_spec(config, spec), latent_width=encoder.width, grid=grid, patch_size=output_patch,
                      mean=spec.mean, std=spec.std, cls_token=config.model.decoder.cls_token,
                      learned_positions=config.model.decoder.learned_positions, remat=remat, dtype=dtype, rngs=rngs)
    return VQRAE(encoder=encoder, quantizer=_quantizer(config, quantizer, width=encoder.width, rngs=rngs),
                 decoder=decoder, noise_tau=config.model.noise_tau, latent_statistics=config.model.latent_statistics)


def _quantizer(config: Config, given: Quantizer | None, *, width: int, rngs: nnx.Rngs) -> Quantizer:
    kind = config.model.quantizer.kind
    if given is None:
        return QUANTIZERS[kind].build(width=width, rngs=rngs, **quantizer_keys(config))
    if kind != "own":
        raise ValueError(f"quantizer: this run takes no object, for its config says model.quantizer.kind {kind!r}")
    own.check(given, width=width)
    return nnx.clone(given)  # of its structure and arrays: the caller's object stays as it is


def quantizer_keys(config: Config) -> dict[str, object]:
    """The keys of `model.quantizer` that the config's kind of quantizer reads, with their values."""
    quantizer = config.model.quantizer
    return {name: getattr(quantizer, name) for name in ("size", "dim", *QUANTIZERS[quantizer.kind].keys)}


def decoder_spec(config: Config, encoder: EncoderSpec) -> TransformerSpec:
    """The shape of the decoder's transformer."""
    d = config.model.decoder
    if d.shape == "symmetric":
        return symmetric(encoder.vit)
    if d.shape == "custom":
        return dataclasses.replace(VIT_B, width=d.width, depth=d.depth, heads=d.heads, mlp_dim=d.mlp_dim)
    return DECODER_SHAPES[d.shape]


def symmetric(encoder: TransformerSpec) -> TransformerSpec:
    """The decoder's shape that mirrors an encoder: its width, depth, heads and MLP, without layer scale."""
    fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(TransformerSpec)}
    return TransformerSpec(**{**fields, "layer_scale": False})


def loss_networks(config: Config, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """The networks that a config's losses need, with random weights, by name."""
    dtype = DTYPES[config.model.dtype]
    modules = {name: NETWORKS[name].build(dtype=dtype, rngs=rngs) for name in perceptual_networks(config)}
    if config.gan.discriminator != "none":
        modules["discriminator"] = DISCRIMINATORS[config.gan.discriminator].build(config.gan, dtype=dtype, rngs=rngs)
    return modules


def perceptual_shares(config: Config) -> dict[str, float]:
    """The networks of the perceptual loss, and what each counts in it; shares sum to 1."""
    given = {name: getattr(config.loss.perceptual, name) for name in SHARES}
    return {name: share / sum(given.values()) for name, share in given.items() if share}


def perceptual_networks(config: Config) -> list[str]:
    """Those of the perceptual loss's networks that have weights of their own: all but the run's encoder."""
    return [name for name in perceptual_shares(config) if name != ENCODER]


def encoder_learns(config: Config, paths: Iterable[str]) -> bool:
    """Whether a run trains any of its encoder's parameters, which are among the paths."""
    return any(not optim.is_frozen(path, config.optim.lr_multipliers)
               for path in paths if flat.part(path) == "encoder")


def has_teacher(config: Config, paths: Iterable[str]) -> bool:
    """Whether a loss needs a copy of the encoder as it began; without distillation one that is frozen serves itself."""
    return config.loss.distill_weight > 0 or (config.loss.perceptual.encoder > 0 and encoder_learns(config, paths))


def split(modules: dict[str, nnx.Module]) -> Networks:
    """Modules by name as what `Networks` holds."""
    graphdefs, params, buffers = {}, {}, {}
    for name, module in modules.items():
        graphdefs[name], module_params, module_buffers = flat.split(module)
        params |= flat.prefixed(f"{name}/", module_params)
        buffers |= flat.prefixed(f"{name}/", module_buffers)
    return Networks(graphdefs, params, buffers)
