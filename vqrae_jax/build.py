"""From a config to the things it names: the only place where a name becomes a module, an optimizer or a data source."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vqrae_jax import losses, optim, step
from vqrae_jax.config import Config
from vqrae_jax.convert import discriminators as convert_discriminators
from vqrae_jax.convert import huggingface
from vqrae_jax.convert import perceptual as convert_perceptual
from vqrae_jax.data import sources
from vqrae_jax.models import flat
from vqrae_jax.models.decoder import VIT_B, VIT_L, VIT_XL, Decoder
from vqrae_jax.models.discriminators import (
    DINO_S8,
    DINO_S16,
    DinoDiscriminator,
    PatchGAN,
    diff_augment,
    random_crop,
)
from vqrae_jax.models.encoders import Encoder
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.perceptual import CONVNEXT_SMALL, LPIPS, ConvNeXt
from vqrae_jax.models.quantizers import EMAVQ, FSQ, AdapterFSQ, Identity, Quantizer, RankedVQ, SimVQ
from vqrae_jax.models.vit import SAVE_MATMULS, TransformerSpec
from vqrae_jax.models.vqrae import VQRAE

ASSETS = Path(__file__).parent / "assets"
Shardings = Callable[[Any], Any]
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "minimal": SAVE_MATMULS,
    "full": jax.checkpoint_policies.nothing_saveable,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DECODER_SHAPES = {"vit_b": VIT_B, "vit_l": VIT_L, "vit_xl": VIT_XL}
PIXEL_LOSSES = {"l1": losses.l1, "l2": losses.l2}
DINO_SPECS = {"dino_s8": DINO_S8, "dino_s16": DINO_S16}
DINO_IMAGE_SIZE = 224
DISCRIMINATOR_LOSSES = {"hinge": losses.hinge_discriminator, "vanilla": losses.vanilla_discriminator}
GENERATOR_LOSSES = {"linear": losses.linear_generator, "non_saturating": losses.non_saturating_generator}


def encoder_path(config: Config) -> str:
    """The folder or hub id of the encoder; `nano` is the one that ships with the package.

    For random weights the shape is enough, and those of the encoders that the shipped configs name ship too.
    """
    encoder = config.model.encoder
    if encoder.path == "nano":
        return str(ASSETS / "nano")
    shape = ASSETS / "encoders" / encoder.path.replace("/", "--")
    return str(shape) if encoder.random_weights and shape.is_dir() else encoder.path


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


def initial_arrays(config: Config, shardings: Shardings | None = None) -> tuple[Arrays, Arrays]:
    """Parameters and codebook state at the start of a run: pretrained encoder, everything else from `seed`.

    Args:
      config: of the run.
      shardings: where arrays are to be, from their shapes; None is the first device. No array is whole elsewhere.
    """
    spec = huggingface.read_encoder_spec(encoder_path(config))
    pretrained = {}
    if not config.model.encoder.random_weights:
        loaded = huggingface.load_encoder_params(
            encoder_path(config), image_size=encoder_input_size(config), final_norm=config.model.encoder.final_norm)
        pretrained = flat.prefixed("encoder/", loaded)

    def init():
        _, params, codebook = flat.split(_model(config, spec, nnx.Rngs(config.seed)))
        return {path: value for path, value in params.items() if path not in pretrained}, codebook

    params, codebook = initialised(init, shardings)
    return {**params, **_placed(pretrained, shardings)}, codebook


def initialised(init: Callable[..., Any], shardings: Shardings | None, *arrays: Any) -> Any:
    """What `init(*arrays)` makes, every device making its own part; `shardings` as in `initial_arrays`."""
    return jax.jit(init, out_shardings=shardings(jax.eval_shape(init, *arrays)) if shardings else None)(*arrays)


def _placed(arrays: Mapping[str, Any], shardings: Shardings | None) -> Arrays:
    """The host's arrays, the same in every process, on the devices."""
    if shardings is None:
        return {path: jnp.asarray(value) for path, value in arrays.items()}
    place = lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.tree.map(place, dict(arrays), shardings(dict(arrays)))


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
    dtype, remat = DTYPES[config.model.dtype], REMAT_POLICIES[config.model.remat]
    encoder = Encoder(spec.vit, image_size=input_size, mean=spec.mean, std=spec.std,
                      final_norm=config.model.encoder.final_norm, layers=config.model.encoder.layers,
                      combine=config.model.encoder.combine, remat=remat, dtype=dtype, rngs=rngs)
    decoder = Decoder(decoder_spec(config, spec), latent_width=encoder.width, grid=grid, patch_size=output_patch,
                      mean=spec.mean, std=spec.std, cls_token=config.model.decoder.cls_token,
                      learned_positions=config.model.decoder.learned_positions, remat=remat, dtype=dtype, rngs=rngs)
    return VQRAE(encoder=encoder, quantizer=_quantizer(config, width=encoder.width, rngs=rngs), decoder=decoder,
                 noise_tau=config.model.noise_tau, latent_statistics=config.model.latent_statistics)


def decoder_spec(config: Config, encoder: huggingface.EncoderSpec) -> TransformerSpec:
    """The shape of the decoder's transformer."""
    d = config.model.decoder
    if d.shape == "symmetric":
        return symmetric(encoder.vit)
    if d.shape == "custom":
        return dataclasses.replace(VIT_B, width=d.width, depth=d.depth, heads=d.heads, mlp_dim=d.mlp_dim)
    return DECODER_SHAPES[d.shape]


def meaning(config: Config) -> dict[str, dict[str, Any]]:
    """By part, what its arrays mean beyond their shapes: two models that differ in it compute different things."""
    encoder, quantizer = config.model.encoder, config.model.quantizer
    spec = huggingface.read_encoder_spec(encoder_path(config))
    decoder = decoder_spec(config, spec)
    return {
        "encoder": {"model.encoder.final_norm": encoder.final_norm, "model.encoder.layers": encoder.layers,
                    "model.encoder.combine": encoder.combine, "the encoder's mean and std": (spec.mean, spec.std)},
        "quantizer": {f"model.quantizer.{name}": getattr(quantizer, name)
                      for name in ("kind", "search", "l2_normalize", "levels")},
        "decoder": {"the decoder's heads": decoder.heads, "the decoder's activation": decoder.activation,
                    "the decoder's norm_eps": decoder.norm_eps},
    }


def symmetric(encoder: TransformerSpec) -> TransformerSpec:
    """The decoder's shape that mirrors an encoder: its width, depth, heads and MLP, without layer scale."""
    fields = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(TransformerSpec)}
    return TransformerSpec(**{**fields, "layer_scale": False})


def _quantizer(config: Config, *, width: int, rngs: nnx.Rngs) -> Quantizer:
    q = config.model.quantizer
    if q.kind == "none":
        return Identity()
    if q.kind in ("fsq", "adapter_fsq"):
        quantizer = (FSQ if q.kind == "fsq" else AdapterFSQ)(width=width, levels=q.levels, rngs=rngs)
        if (q.size, q.dim) != (quantizer.num_codes, len(q.levels)):
            raise ValueError(f"config keys model.quantizer.size {q.size} and dim {q.dim} must be the product and the "
                             f"number of model.quantizer.levels {q.levels}: {quantizer.num_codes} and {len(q.levels)}")
        return quantizer
    common: dict[str, Any] = dict(
        width=width, size=q.size, dim=q.dim, commitment_weight=q.commitment_weight, gradient=q.gradient, rngs=rngs)
    if q.kind == "ranked":
        return RankedVQ(**common)
    common |= dict(project=True if q.projection else None, search=q.search)
    if q.kind == "ema":
        return EMAVQ(**common, decay=q.decay, restart_threshold=q.restart_threshold)
    return SimVQ(**common, input_projection=q.input_projection, l2_normalize=q.l2_normalize)


def networks(config: Config) -> tuple[dict[str, nnx.GraphDef], Arrays, Arrays]:
    """The networks of the losses by name, and the shapes of their parameters and state under `name/`.

    Names are `lpips`, `convnext_s` and `discriminator`, as far as the config has them; nothing is allocated.
    """
    return _split(nnx.eval_shape(lambda: _networks(config, nnx.Rngs(config.seed))))


def network_arrays(config: Config, shardings: Shardings | None = None) -> tuple[Arrays, Arrays]:
    """Parameters and state of `networks` at the start of a run: pretrained weights, everything else from `seed`.

    Args: as `initial_arrays`.

    Raises:
      OSError: weights that are not there; the message says how to get them.
      ValueError: weights of another network.
    """
    params, state = initialised(lambda: _split(_networks(config, nnx.Rngs(config.seed)))[1:], shardings)
    perceptual, gan = config.loss.perceptual, config.gan
    pretrained, pretrained_state = {}, {}
    if perceptual.lpips and not perceptual.random_weights:
        pretrained |= flat.prefixed("lpips/", convert_perceptual.load_lpips(
            perceptual.lpips_vgg16, perceptual.lpips_linear))
    if perceptual.convnext_s and not perceptual.random_weights:
        pretrained |= flat.prefixed("convnext_s/", convert_perceptual.load_convnext_small(
            perceptual.convnext_s_weights, spec=CONVNEXT_SMALL))
    if gan.discriminator in DINO_SPECS and not gan.random_weights:
        spec = DINO_SPECS[gan.discriminator]
        pretrained |= flat.prefixed("discriminator/", convert_discriminators.load_dino_backbone(
            gan.backbone or f"facebook/dino-vits{spec.patch_size}", spec=spec, image_size=DINO_IMAGE_SIZE))
    if gan.heads:
        loaded_heads = convert_discriminators.load_dino_heads(gan.heads)
        for ours, theirs, loaded in zip((params, state), (pretrained, pretrained_state), loaded_heads, strict=True):
            loaded = flat.prefixed("discriminator/", loaded)
            expected = {path: value.shape for path, value in ours.items() if path.startswith("discriminator/heads/")}
            for path in sorted(expected.keys() | loaded.keys()):
                if path not in expected or path not in loaded or loaded[path].shape != expected[path]:
                    raise ValueError(f"config key gan.heads: {gan.heads} does not fit this discriminator at {path}")
            theirs |= loaded
    return params | _placed(pretrained, shardings), state | _placed(pretrained_state, shardings)


def _networks(config: Config, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    dtype, modules = DTYPES[config.model.dtype], {}
    if config.loss.perceptual.lpips:
        modules["lpips"] = LPIPS(dtype=dtype, rngs=rngs)
    if config.loss.perceptual.convnext_s:
        modules["convnext_s"] = ConvNeXt(CONVNEXT_SMALL, dtype=dtype, rngs=rngs)
    if config.gan.discriminator == "patchgan":
        modules["discriminator"] = PatchGAN(channels=config.gan.channels, dtype=dtype, rngs=rngs)
    elif config.gan.discriminator != "none":
        modules["discriminator"] = DinoDiscriminator(DINO_SPECS[config.gan.discriminator], image_size=DINO_IMAGE_SIZE,
                                                     dtype=dtype, rngs=rngs)
    return modules


def _split(modules: dict[str, nnx.Module]) -> tuple[dict[str, nnx.GraphDef], Arrays, Arrays]:
    graphdefs, params, state = {}, {}, {}
    for name, module in modules.items():
        graphdefs[name], module_params, module_state = flat.split(module)
        params |= flat.prefixed(f"{name}/", module_params)
        state |= flat.prefixed(f"{name}/", module_state)
    return graphdefs, params, state


def parts(config: Config, graphdef: nnx.GraphDef) -> step.Parts:
    """What a training step is made of besides arrays.

    Args:
      config: of the run.
      graphdef: its model's structure.
    """
    graphdefs, _, _ = networks(config)
    shares = {name: getattr(config.loss.perceptual, name) for name in ("lpips", "convnext_s") if name in graphdefs}
    o, g = config.optim, config.gan
    rates = functools.partial(_learning_rate, config)
    gan = None
    if g.discriminator != "none":
        schedule = optim.warmup_cosine(lr=g.lr, end_lr=g.end_lr, warmup_steps=g.warmup_steps,
                                       steps=config.train.steps - g.discriminator_start_step)

        def augment(images: jax.Array, rng: jax.Array) -> jax.Array:
            crop_rng, augment_rng = jax.random.split(rng)
            if g.discriminator in DINO_SPECS:
                images = random_crop(images, DINO_IMAGE_SIZE, crop_rng)
            return diff_augment(images, augment_rng, cutout=g.cutout) if g.augment else images

        gan = step.Gan(
            graphdef=graphdefs["discriminator"], schedule=schedule, augment=augment,
            optimizer=optim.adamw(lambda path: schedule, b1=g.b1, b2=g.b2, weight_decay=g.weight_decay,
                                  clip_norm=g.clip_norm),
            discriminator_loss=DISCRIMINATOR_LOSSES[g.discriminator_loss],
            generator_loss=GENERATOR_LOSSES[g.generator_loss])
    return step.Parts(
        graphdef=graphdef, learning_rate=rates,
        optimizer=optim.adamw(rates, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, clip_norm=o.clip_norm),
        pixel_loss=PIXEL_LOSSES[config.loss.pixel],
        perceptual={name: (graphdefs[name], share / sum(shares.values())) for name, share in shares.items()}, gan=gan)


def _learning_rate(config: Config, path: str) -> optax.Schedule:
    o = config.optim
    factor = optim.multiplier(path, o.lr_multipliers)
    end_factor = optim.multiplier(path, (*o.end_lr_multipliers, (".*", factor)))
    return optim.warmup_cosine(lr=factor * o.lr, end_lr=end_factor * o.end_lr, warmup_steps=o.warmup_steps,
                               steps=config.train.steps)


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
