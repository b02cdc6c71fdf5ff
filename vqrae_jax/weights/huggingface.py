"""Vision encoders from and to Hugging Face folders.

A folder holds `config.json`, `preprocessor_config.json` (mean and std) and `model.safetensors`, or several shards
listed in `model.safetensors.index.json`. PyTorch pickles are not read.

A family is a value: how its config describes a ViT, and which of its tensors is which of our parameters. The key
map is read in both directions, because `foreign_views` presents our arrays under the family's names and shapes:
loading writes into those views, saving reads from them.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from vqrae_jax.foreign import Options, one_line
from vqrae_jax.models.encoders import Combine, Encoder, interpolate_positions
from vqrae_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, Activation, FinalNorm, ViTSpec
from vqrae_jax.weights.tensors import local_folder, save_file

Params = dict[str, np.ndarray]

ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of `transformers`, or of the hub's own code.

    Attributes:
      architecture: the class that reads what we save.
      processor: the image processor's class.
      defaults: what `transformers` assumes where config.json says nothing.
      required: the only values of further options that our ViT implements.
      read: the part of ViTSpec that the families derive differently, from a config.
      write: the inverse of `read`.
      mean: what the family was trained with, for folders without preprocessor_config.json.
      std: likewise.
      antialias: whether `transformers` resamples its position embeddings with antialiasing.
      prefix: what some checkpoints put before every key.
      saved_prefix: what we put there; older and newer `transformers` must both understand it.
      unused: pattern of the tensors that a checkpoint may also hold and that features do not depend on.
      keys: our module, or parameter -> theirs; `{}` is the block's number; several names are concatenated.
    """

    architecture: str
    processor: str
    defaults: dict[str, Any]
    required: dict[str, Any]
    read: Callable[[Options], dict[str, Any]]
    write: Callable[[ViTSpec], dict[str, Any]]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    antialias: bool
    prefix: str
    saved_prefix: str
    unused: str
    keys: dict[str, str | tuple[str, ...]]


# The greatest values are far beyond any model, and small enough that no mistake asks for absurd amounts of memory.
def _width(config: Options) -> int:
    return config.whole("hidden_size", 1, 2**16)


def _mlp_dim(config: Options) -> int:
    return config.whole("intermediate_size", 1, 2**18)


def _registers(config: Options) -> int:
    return config.whole("num_register_tokens", 0, 2**10)


_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_channels": 3,
             "image_size": 224, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6}

SIGLIP = Family(
    architecture="SiglipVisionModel",
    processor="SiglipImageProcessor",
    defaults=_DEFAULTS | {"intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh"},
    required={"num_channels": 3},
    read=lambda config: {"mlp_dim": _mlp_dim(config)},
    write=lambda spec: {"intermediate_size": spec.mlp_dim, "vision_use_head": False},
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    antialias=False,
    prefix="vision_model.",
    saved_prefix="vision_model.",
    unused=r"text_model\..*|logit_scale|logit_bias|head\..*|embeddings\.position_ids|classifier\..*",
    keys={
        "patch_embedding": "embeddings.patch_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "transformer/blocks/norm1": "encoder.layers.{}.layer_norm1",
        "transformer/blocks/norm2": "encoder.layers.{}.layer_norm2",
        "transformer/blocks/attention/qkv": tuple(f"encoder.layers.{{}}.self_attn.{x}_proj" for x in "qkv"),
        "transformer/blocks/attention/out": "encoder.layers.{}.self_attn.out_proj",
        "transformer/blocks/mlp/fc1": "encoder.layers.{}.mlp.fc1",
        "transformer/blocks/mlp/fc2": "encoder.layers.{}.mlp.fc2",
        "transformer/norm": "post_layernorm",
    },
)

# What DINOv2 and MAE share, down to the names.
_BERT_STYLE_KEYS: dict[str, str | tuple[str, ...]] = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "position_embedding": "embeddings.position_embeddings",
    "cls": "embeddings.cls_token",
    "transformer/blocks/attention/qkv": tuple(
        f"encoder.layer.{{}}.attention.attention.{x}" for x in ("query", "key", "value")),
    "transformer/blocks/attention/out": "encoder.layer.{}.attention.output.dense",
    "transformer/norm": "layernorm",
}

DINOV2 = Family(
    architecture="Dinov2Model",
    processor="ViTImageProcessor",
    defaults=_DEFAULTS | {"patch_size": 14, "mlp_ratio": 4, "qkv_bias": True, "use_swiglu_ffn": False},
    required={"num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False},
    read=lambda config: {"mlp_dim": int(_width(config) * config.number("mlp_ratio", 1, 64)), "layer_scale": True,
                         "prefix_tokens": 1},
    write=lambda spec: {"mlp_ratio": _exact_ratio(spec), "use_mask_token": False},
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    antialias=False,
    prefix="dinov2.",
    saved_prefix="",
    unused=r"embeddings\.mask_token|classifier\..*",
    keys=_BERT_STYLE_KEYS | {
        "transformer/blocks/norm1": "encoder.layer.{}.norm1",
        "transformer/blocks/norm2": "encoder.layer.{}.norm2",
        "transformer/blocks/mlp/fc1": "encoder.layer.{}.mlp.fc1",
        "transformer/blocks/mlp/fc2": "encoder.layer.{}.mlp.fc2",
        "transformer/blocks/scale1": "encoder.layer.{}.layer_scale1.lambda1",
        "transformer/blocks/scale2": "encoder.layer.{}.layer_scale2.lambda1",
    },
)

DINOV2_WITH_REGISTERS = dataclasses.replace(
    DINOV2,
    architecture="Dinov2WithRegistersModel",
    # The number of registers has no default on purpose: it must come from the config.
    defaults=DINOV2.defaults | {"patch_size": 16},
    read=lambda config: DINOV2.read(config) | {"prefix_tokens": 1 + _registers(config)},
    write=lambda spec: {"mlp_ratio": _exact_ratio(spec), "num_register_tokens": spec.prefix_tokens - 1},
    antialias=True,
    prefix="dinov2_with_registers.",
    keys=DINOV2.keys | {"registers": "embeddings.register_tokens"},
)

# The publication has a bias everywhere but for keys; the gated variants (ViT-S+, H+ and 7B) are others.
_DINOV3_OPTIONS = {"num_channels": 3, "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True,
                   "mlp_bias": True, "use_gated_mlp": False}

DINOV3 = Family(
    architecture="DINOv3ViTModel",
    processor="ViTImageProcessor",
    # The number of registers has no default, as above.
    defaults=_DEFAULTS | _DINOV3_OPTIONS | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536,
                                            "layer_norm_eps": 1e-5, "rope_theta": 100.0},
    required=_DINOV3_OPTIONS,
    read=lambda config: {"mlp_dim": _mlp_dim(config), "layer_scale": True, "prefix_tokens": 1 + _registers(config),
                         "rope_theta": config.number("rope_theta", 1, 1e9)},
    write=lambda spec: {"intermediate_size": spec.mlp_dim, "num_register_tokens": spec.prefix_tokens - 1,
                        "rope_theta": spec.rope_theta},
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    antialias=False,
    prefix="model.",
    saved_prefix="",
    unused=r"embeddings\.mask_token",
    keys={
        "patch_embedding": "embeddings.patch_embeddings",
        "cls": "embeddings.cls_token",
        "registers": "embeddings.register_tokens",
        "transformer/blocks/norm1": "layer.{}.norm1",
        "transformer/blocks/norm2": "layer.{}.norm2",
        "transformer/blocks/attention/qkv": tuple(f"layer.{{}}.attention.{x}_proj" for x in "qkv"),
        "transformer/blocks/attention/query_value_bias": tuple(f"layer.{{}}.attention.{x}_proj.bias" for x in "qv"),
        "transformer/blocks/attention/out": "layer.{}.attention.o_proj",
        "transformer/blocks/mlp/fc1": "layer.{}.mlp.up_proj",
        "transformer/blocks/mlp/fc2": "layer.{}.mlp.down_proj",
        "transformer/blocks/scale1": "layer.{}.layer_scale1.lambda1",
        "transformer/blocks/scale2": "layer.{}.layer_scale2.lambda1",
        "transformer/norm": "norm",
    },
)

MAE = Family(
    architecture="ViTMAEModel",
    processor="ViTImageProcessor",
    defaults=_DEFAULTS | {"intermediate_size": 3072, "qkv_bias": True, "layer_norm_eps": 1e-12},
    required={"num_channels": 3, "qkv_bias": True},
    read=lambda config: {"mlp_dim": _mlp_dim(config), "prefix_tokens": 1},
    write=lambda spec: {"intermediate_size": spec.mlp_dim},
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    antialias=False,
    prefix="vit.",
    saved_prefix="",
    unused=r"decoder\..*|mask_token|classifier\..*",
    keys=_BERT_STYLE_KEYS | {
        "transformer/blocks/norm1": "encoder.layer.{}.layernorm_before",
        "transformer/blocks/norm2": "encoder.layer.{}.layernorm_after",
        "transformer/blocks/mlp/fc1": "encoder.layer.{}.intermediate.dense",
        "transformer/blocks/mlp/fc2": "encoder.layer.{}.output.dense",
    },
)

# The code of InternViT is not in `transformers` but next to its weights. It is not run here; transformers loads what we
# save with trust_remote_code=True, with the code of the hub's model.
_INTERN_VIT_CODE = "OpenGVLab/InternViT-300M-448px--"

INTERN_VIT = Family(
    architecture="InternVisionModel",
    processor="CLIPImageProcessor",
    # Those of the 6B model, which is another architecture: a config must say what it has.
    defaults=_DEFAULTS | {"hidden_size": 3200, "num_hidden_layers": 48, "num_attention_heads": 25, "patch_size": 14,
                          "intermediate_size": 12800, "qkv_bias": False, "qk_normalization": True,
                          "norm_type": "rms_norm"},
    required={"num_channels": 3, "qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"},
    read=lambda config: {"mlp_dim": _mlp_dim(config), "layer_scale": True, "prefix_tokens": 1,
                         "has_final_norm": False},
    write=lambda spec: {"intermediate_size": spec.mlp_dim, "use_flash_attn": False,  # which refuses float32
                        "auto_map": {"AutoConfig": _INTERN_VIT_CODE + "configuration_intern_vit.InternVisionConfig",
                                     "AutoModel": _INTERN_VIT_CODE + "modeling_intern_vit.InternVisionModel"}},
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    antialias=False,
    prefix="vision_model.",
    saved_prefix="",
    unused=r"language_model\..*|mlp1\..*",
    keys={
        "patch_embedding": "embeddings.patch_embedding",
        "position_embedding": "embeddings.position_embedding",
        "cls": "embeddings.class_embedding",
        "transformer/blocks/norm1": "encoder.layers.{}.norm1",
        "transformer/blocks/norm2": "encoder.layers.{}.norm2",
        "transformer/blocks/attention/qkv": "encoder.layers.{}.attn.qkv",
        "transformer/blocks/attention/out": "encoder.layers.{}.attn.proj",
        "transformer/blocks/mlp/fc1": "encoder.layers.{}.mlp.fc1",
        "transformer/blocks/mlp/fc2": "encoder.layers.{}.mlp.fc2",
        "transformer/blocks/scale1": "encoder.layers.{}.ls1",
        "transformer/blocks/scale2": "encoder.layers.{}.ls2",
    },
)

# SigLIP 2 at fixed resolution declares `siglip` as well; its NaFlex variant, `siglip2`, is another architecture.
FAMILIES = {"siglip_vision_model": SIGLIP, "dinov2": DINOV2, "dinov2_with_registers": DINOV2_WITH_REGISTERS,
            "dinov3_vit": DINOV3, "vit_mae": MAE, "intern_vit_6b": INTERN_VIT}
# Models of which the encoder is a part, described by `vision_config`.
_WHOLE_MODELS = {"siglip": "siglip_vision_model", "internvl_chat": "intern_vit_6b"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What a folder says about its encoder.

    Attributes:
      model_type: the family, a key of `FAMILIES`.
      vit: the shape of the ViT.
      image_size: native side of the image; its position embeddings form a square of image_size // patch_size.
      mean: per-channel mean of images in [0, 1].
      std: per-channel standard deviation.
    """

    model_type: str
    vit: ViTSpec
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_encoder_spec(path_or_id: str | Path) -> EncoderSpec:
    """Reads an encoder's shape, native size, mean and std; no weights are read or downloaded.

    Mean and std come from preprocessor_config.json; a folder without that file gets those its family was published
    with (SigLIP 0.5, the others ImageNet's).

    Raises:
      OSError: there is no such folder or hub model, or it has no config.json.
      ValueError: a family, or an option of it, that is not supported; the message names it.
    """
    return _read_spec(_local_folder(path_or_id, weights=False))


def weight_files(path_or_id: str | Path) -> list[Path]:
    """The files that an encoder's weights are read from; OSError as from `read_encoder_spec`."""
    return _weight_files(_local_folder(path_or_id, weights=True))


def copy_encoder_config(path_or_id: str | Path, out_dir: Path) -> None:
    """Copies what `read_encoder_spec` reads, so that the shape of a model is known without the original folder."""
    folder = _local_folder(path_or_id, weights=False)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            (out_dir / name).write_bytes((folder / name).read_bytes())


def load_encoder_params(path_or_id: str | Path, *, image_size: int | None = None,
                        final_norm: FinalNorm = "affine") -> Params:
    """Reads an encoder's weights for a run at `image_size`.

    Args:
      path_or_id: a Hugging Face folder, or the id of a model on the hub.
      image_size: side of the image the ViT will see, None for the native one; a multiple of the patch size, or the
        native size. Position embeddings are resampled as the family's `transformers` model does.
      final_norm: `plain` leaves out the last LayerNorm's scale and bias.

    Returns:
      {path: float32 array}, the paths being those of `nnx.split(Encoder(...))` joined by "/". The cls token's
      position embedding is folded into its row of `vit/prefix`.

    Raises:
      OSError: a file is missing or damaged.
      ValueError: a tensor is missing, has another shape than the config implies, or has no known use; an
        image size that does not fit; `plain` for an encoder without a last LayerNorm (InternViT).
    """
    folder = _local_folder(path_or_id, weights=True)
    spec = _read_spec(folder)
    prefix = FAMILIES[spec.model_type].prefix
    found = {name.removeprefix(prefix): (f"{file}: tensor {name}", tensor)
             for file, name, tensor in folder_tensors(folder)}
    return params_from_tensors(found, spec, image_size=image_size, final_norm=final_norm,
                               origin=f"{folder}: tensor ")


def params_from_tensors(found: Mapping[str, tuple[str, Any]], spec: EncoderSpec, *, image_size: int | None,
                        final_norm: FinalNorm, origin: str) -> Params:
    """An encoder's parameters from its tensors; result and errors are those of `load_encoder_params`.

    Args:
      found: {name in the family's files, without prefix: (how to call it in an error, array or lazy slice)}. With
        `final_norm="plain"` the last LayerNorm's tensors may be absent.
      spec: the encoder.
      image_size: see `load_encoder_params`.
      final_norm: likewise.
      origin: what an error puts before the name of a tensor that is missing.
    """
    family, run_size = FAMILIES[spec.model_type], _run_size(spec, image_size)
    paths = _shapes(spec, run_size, final_norm)
    # Names and shapes are compared before there is memory for them, which a wrong config.json may ask any amount of.
    expected = {key: view.shape for key, view in foreign_views(family.keys, _allocate(spec, empty=True)).items()}
    optional = set() if final_norm == "affine" else final_norm_tensors(spec)
    check_tensors(found, expected, unused=family.unused, optional=optional, architecture=family.architecture,
                  origin=origin)
    arrays = _allocate(spec)
    views = foreign_views(family.keys, arrays)
    for key in found.keys() & expected.keys():
        views[key][...] = read_tensor(*found[key])

    params = _fold_prefix(arrays)
    if (path := "vit/position_embedding") in params:
        grid = run_size // spec.vit.patch_size
        params[path] = np.asarray(interpolate_positions(params[path], grid, antialias=family.antialias))
    return {path: params[path] for path in paths}


def check_tensors(found: Mapping[str, tuple[str, Any]], expected: Mapping[str, tuple[int, ...]], *, unused: str,
                  optional: set[str], architecture: str, origin: str) -> None:
    """Compares tensors with the shapes that config.json implies.

    Args:
      found: as in `params_from_tensors`.
      expected: {name: shape}.
      unused: pattern of the tensors that may be there as well.
      optional: names of `expected` that may be absent.
      architecture: who has such tensors, for the error.
      origin: as in `params_from_tensors`.

    Raises:
      ValueError: a tensor is missing, has another shape, or is neither expected nor unused.
    """
    for key, (called, tensor) in found.items():
        if key not in expected:
            if not re.fullmatch(unused, key):
                raise ValueError(f"{called} is unexpected: {architecture} does not have it")
        elif (shape := _shape(tensor)) != expected[key]:
            raise ValueError(f"{called} has shape {shape}, but config.json implies {expected[key]}")
    if missing := sorted(expected.keys() - found.keys() - optional):
        raise ValueError(f"{origin}{missing[0]} is missing, which {architecture} has" +
                         (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))


def read_tensor(called: str, tensor: Any) -> np.ndarray:
    """The values of a tensor, an array or a lazy slice; OSError where NumPy has no such numbers or the file no more."""
    try:
        return tensor[:]
    except (AttributeError, KeyError, SafetensorError, TypeError) as error:
        raise OSError(f"{called} cannot be read ({one_line(error)}): save it as float32") from None


def final_norm_tensors(spec: EncoderSpec) -> set[str]:
    """Names of the last LayerNorm's tensors in the family's files, without prefix; none where it has no such norm."""
    keys = FAMILIES[spec.model_type].keys
    return {f"{keys['transformer/norm']}.{leaf}" for leaf in ("weight", "bias") if "transformer/norm" in keys}


def build_encoder(path_or_id: str | Path, *, image_size: int | None = None, final_norm: FinalNorm = "affine",
                  layers: tuple[int, ...] = (), combine: Combine = "sum", dtype=jnp.float32) -> Encoder:
    """An `Encoder` with the weights of a Hugging Face folder or hub model.

    Arguments and errors are those of `load_encoder_params` and of `Encoder`.
    """
    spec = read_encoder_spec(path_or_id)
    encoder = _abstract_encoder(spec, image_size=_run_size(spec, image_size), final_norm=final_norm, layers=layers,
                                combine=combine, dtype=dtype)
    graphdef, state = nnx.split(encoder)
    params = load_encoder_params(path_or_id, image_size=image_size, final_norm=final_norm)
    loaded = [(path, variable.replace(jnp.asarray(params["/".join(map(str, path))])))
              for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def save_encoder(params: Mapping[str, np.ndarray], *, spec: EncoderSpec, out_dir: str | Path,
                 dtype: type[np.floating] = np.float32) -> None:
    """Writes a folder that `transformers` and `load_encoder_params` read: config, preprocessor config, weights.

    InternViT is written in the layout of its remote code, without that code: config.json refers to the hub's, so that
    `AutoModel.from_pretrained(out_dir, trust_remote_code=True)` loads it where there is a network.

    Args:
      params: as `load_encoder_params` returns them, for images of `spec.image_size`. Where the last LayerNorm has no
        scale and bias, ones and zeros are written.
      spec: the encoder; its image_size is that of the run, which need not be the one it was loaded with.
      out_dir: created where absent; files of the same name are replaced.
      dtype: of the tensors in the file; `transformers` computes in float32 all the same.

    Raises:
      ValueError: a parameter is missing, has the wrong shape or has no place in the family.
    """
    family, vit, out_dir = FAMILIES[spec.model_type], spec.vit, Path(out_dir)
    arrays = _allocate(spec)
    expected = {path: array.shape for path, array in _fold_prefix(arrays).items()}
    norm = "vit/transformer/norm/"
    plain = {norm + "scale": np.ones(vit.width), norm + "bias": np.zeros(vit.width)} if vit.has_final_norm else {}
    params = {**plain, **params}
    for path in sorted(expected.keys() | params.keys()):
        if path not in params or path not in expected:
            raise ValueError(f"parameter {path} is {'missing' if path in expected else 'unknown'}: "
                             f"cannot save a {family.architecture}")
        if np.shape(params[path]) != expected[path]:
            raise ValueError(f"parameter {path} has shape {np.shape(params[path])}, but spec implies {expected[path]}")
    _unfold_prefix(params, into=arrays)

    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[vit.activation]
    config = {**family.defaults, **family.required, "model_type": spec.model_type,
              "architectures": [family.architecture], "dtype": "float32", "hidden_size": vit.width,
              "num_hidden_layers": vit.depth,
              "num_attention_heads": vit.heads, "patch_size": vit.patch_size, "image_size": spec.image_size,
              "hidden_act": activation, "layer_norm_eps": vit.norm_eps, **family.write(vit)}
    preprocessor = {"image_processor_type": family.processor, "do_center_crop": False,
                    "do_resize": True, "size": {"height": spec.image_size, "width": spec.image_size}, "resample": 3,
                    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                    "image_mean": list(spec.mean), "image_std": list(spec.std)}
    tensors = {family.saved_prefix + key: np.ascontiguousarray(view, dtype)
               for key, view in foreign_views(family.keys, arrays).items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out_dir / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    save_file(tensors, out_dir / "model.safetensors")


def _exact_ratio(spec: ViTSpec) -> int:
    if spec.mlp_dim % spec.width:
        raise ValueError(f"DINOv2 cannot express mlp_dim {spec.mlp_dim}: it must be a multiple of width {spec.width}")
    return spec.mlp_dim // spec.width


def _run_size(spec: EncoderSpec, image_size: int | None) -> int:
    size, patch = image_size or spec.image_size, spec.vit.patch_size
    if size % patch and size != spec.image_size:
        raise ValueError(f"image_size {size} is not a multiple of the encoder's patch size {patch}: "
                         f"use image_size={size // patch * patch} or {(size // patch + 1) * patch}")
    return size


def _local_folder(path_or_id: str | Path, *, weights: bool) -> Path:
    files = ["config.json", "preprocessor_config.json"]
    if weights:
        files += ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
    return local_folder(path_or_id, files)


def _read_spec(folder: Path) -> EncoderSpec:
    given = Options.read(folder / "config.json")
    model_type = given.with_defaults({"model_type": None}).one_of("model_type", [*_WHOLE_MODELS, *FAMILIES])
    if model_type in _WHOLE_MODELS:
        given = given.section("vision_config").with_defaults({"model_type": _WHOLE_MODELS[model_type]})
        model_type = given.one_of("model_type", FAMILIES)
    family = FAMILIES[model_type]
    config = given.with_defaults(family.defaults)
    for option, value in family.required.items():
        config.require(option, value)
    image_size, patch_size = config.side("image_size", 2**14), config.side("patch_size", 2**10)
    if patch_size > image_size:
        raise ValueError(f"{config.where}patch_size {patch_size} is larger than image_size {image_size}")
    sizes = {"width": _width(config), "depth": config.whole("num_hidden_layers", 1, 2**10),
             "heads": config.whole("num_attention_heads", 1, 2**10), "patch_size": patch_size,
             "activation": ACTIVATIONS[config.one_of("hidden_act", ACTIVATIONS)],
             "norm_eps": config.number("layer_norm_eps", 0, 1), **family.read(config)}
    try:
        vit = ViTSpec(**sizes)
    except ValueError as error:
        raise ValueError(f"{config.where}hidden_size and num_attention_heads: {error}") from None
    mean, std = family.mean, family.std
    if (file := folder / "preprocessor_config.json").exists():
        preprocessor = Options.read(file)
        mean, std = preprocessor.triple("image_mean", 0, 1), preprocessor.triple("image_std", 1e-3, 10)
    return EncoderSpec(model_type=model_type, vit=vit, image_size=image_size, mean=mean, std=std)


def _weight_files(folder: Path) -> list[Path]:
    if not (index := folder / "model.safetensors.index.json").exists():
        return [folder / "model.safetensors"]
    shards = Options.read(index).section("weight_map")
    return [folder / name for name in sorted({shards.text(tensor) for tensor in shards.values})]


def folder_tensors(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """(file, name, lazy tensor) of every tensor in the folder's weight files."""
    for file in _weight_files(folder):
        if not file.exists():
            hint = ""
            if (folder / "pytorch_model.bin").exists():
                hint = ("; pytorch_model.bin is a pickle and is not read: load it once with transformers and "
                        "save_pretrained() it, which writes safetensors")
            raise OSError(f"{file} does not exist{hint}")
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in sorted(opened.keys()):
                    yield file, name, opened.get_slice(name)
        except SafetensorError as error:
            raise OSError(f"{file} is damaged or truncated ({error}): download it again") from None


def _abstract_encoder(spec: EncoderSpec, **options: Any) -> Encoder:
    return nnx.eval_shape(lambda: Encoder(spec.vit, mean=spec.mean, std=spec.std, rngs=nnx.Rngs(0), **options))


def _shapes(spec: EncoderSpec, image_size: int, final_norm: FinalNorm) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the Encoder by its path."""
    state = nnx.state(_abstract_encoder(spec, image_size=image_size, final_norm=final_norm))
    return {"/".join(map(str, path)): variable.shape for path, variable in nnx.to_flat_state(state)}


def _shape(tensor: Any) -> tuple[int, ...]:
    """Of an array, or of a lazy slice."""
    return tensor.shape if isinstance(tensor, np.ndarray) else tuple(tensor.get_shape())


def _allocate(spec: EncoderSpec, *, empty: bool = False) -> Params:
    """Arrays for the encoder at its native size, with cls, registers and positions apart, as checkpoints have
    them: the keys are the paths of the Encoder's parameters, except that `vit/prefix` is `vit/cls` and
    `vit/registers`, and `vit/position_embedding` begins with the cls token's row where there is one. With `empty` they
    have their shapes only, and no memory."""
    shapes = _shapes(spec, spec.image_size, "affine")
    if spec.vit.prefix_tokens:
        prefix, width = shapes.pop("vit/prefix")
        shapes["vit/cls"] = (1, 1, width)
        if "vit/position_embedding" in shapes:
            positions, _ = shapes["vit/position_embedding"]
            shapes["vit/position_embedding"] = (1, 1 + positions, width)
        if "registers" in FAMILIES[spec.model_type].keys:
            shapes["vit/registers"] = (1, prefix - 1, width)
    zeros = lambda shape: np.broadcast_to(np.float32(0), shape) if empty else np.zeros(shape, np.float32)
    return {path: zeros(shape) for path, shape in shapes.items()}


def _fold_prefix(arrays: Params) -> Params:
    """The parameters of the Encoder from checkpoint-style arrays: registers have no position, cls has."""
    params = dict(arrays)
    if "vit/cls" in params:
        cls = params.pop("vit/cls")[0]
        if "vit/position_embedding" in params:
            positions = params["vit/position_embedding"][0]
            cls, params["vit/position_embedding"] = cls + positions[:1], positions[1:]
        registers = params.pop("vit/registers")[0] if "vit/registers" in params else cls[:0]
        params["vit/prefix"] = np.concatenate([cls, registers])
    return params


def _unfold_prefix(params: Mapping[str, np.ndarray], *, into: Params) -> None:
    """A right inverse of `_fold_prefix`: the cls token keeps the sum, its position embedding is zero."""
    for path in params.keys() & into.keys() - {"vit/position_embedding"}:
        into[path][...] = params[path]
    if "vit/position_embedding" in into:
        positions = into["vit/position_embedding"].reshape(-1, into["vit/position_embedding"].shape[-1])
        positions[...] = 0
        positions[-len(params["vit/position_embedding"]):] = params["vit/position_embedding"]
    if "vit/cls" in into:
        into["vit/cls"][0] = params["vit/prefix"][:1]
        if "vit/registers" in into:
            into["vit/registers"][0] = params["vit/prefix"][1:]


def foreign_views(keys: Mapping[str, str | tuple[str, ...]], arrays: Params) -> Params:
    """{their key: view into our array, in their shape}; `keys` as in `Family`."""
    views = {}
    for path, array in arrays.items():
        ours = path.removeprefix("vit/")
        module, _, leaf = ours.rpartition("/")
        if ours in keys:
            names, suffix = keys[ours], ""
        else:
            names, suffix = keys[module], ".bias" if leaf == "bias" else ".weight"
        names = (names,) if isinstance(names, str) else names
        for i, layer in enumerate(array if "blocks" in path else [array]):
            for name, view in zip(names, np.split(layer, len(names), axis=-1), strict=True):
                if ours == "patch_embedding/kernel":
                    patch_size = round((view.shape[0] // 3) ** 0.5)
                    view = view.reshape(patch_size, patch_size, 3, -1).transpose(3, 2, 0, 1)
                elif leaf == "kernel":
                    view = view.T
                views[name.format(i) + suffix] = view
    return views
