"""Language models from and to the folders of Qwen3ForCausalLM: config.json and safetensors, one file or shards."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import huggingface_hub
import numpy as np
from flax import nnx

from vqrae_jax.foreign import Options
from vqrae_jax.models import flat
from vqrae_jax.models.lm import LanguageModel, LMSpec
from vqrae_jax.weights import huggingface
from vqrae_jax.weights.huggingface import Params
from vqrae_jax.weights.tensors import local_folder, save_file

Init = Literal["mean", "normal"]
SHARD_BYTES = 5 * 10**9  # of the largest file of weights, as huggingface_hub has it

_ARCHITECTURE = "Qwen3ForCausalLM"
# What `transformers` assumes where config.json says nothing; of rope_theta and rope_scaling, which are the older form
# of rope_parameters, the same holds.
_DEFAULTS = {"model_type": None, "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
             "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
             "tie_word_embeddings": False, "attention_bias": False, "use_sliding_window": False, "layer_types": None,
             "rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0}
_REQUIRED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}

_KEYS: dict[str, str | tuple[str, ...]] = {
    "token_embedding": "model.embed_tokens.weight",
    "blocks/norm1": "model.layers.{}.input_layernorm",
    "blocks/attention/query": "model.layers.{}.self_attn.q_proj",
    "blocks/attention/key_value": ("model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.v_proj"),
    "blocks/attention/query_norm": "model.layers.{}.self_attn.q_norm",
    "blocks/attention/key_norm": "model.layers.{}.self_attn.k_norm",
    "blocks/attention/out": "model.layers.{}.self_attn.o_proj",
    "blocks/norm2": "model.layers.{}.post_attention_layernorm",
    "blocks/mlp/gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "blocks/mlp/down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def read_lm_spec(path_or_id: str | Path) -> LMSpec:
    """Reads the shape of a language model; no weights are read or downloaded.

    Args:
      path_or_id: a Hugging Face folder, or the id of a model on the hub.

    Raises:
      OSError: there is no such folder or hub model, or it has no config.json.
      ValueError: another architecture, or an option that is not supported; the message names it.
    """
    config = Options.read(local_folder(path_or_id, ["config.json"]) / "config.json").with_defaults(_DEFAULTS)
    config.one_of("model_type", ["qwen3"])
    for option, value in _REQUIRED.items():
        config.require(option, value)
    depth, heads = config.whole("num_hidden_layers", 1, 2**10), config.whole("num_attention_heads", 1, 2**10)
    if config.values["layer_types"] not in (None, ["full_attention"] * depth):
        raise ValueError(f"{config.where}layer_types is not supported, only full_attention in all {depth} layers")
    grouped = config.values["num_key_value_heads"] is not None
    try:
        return LMSpec(
            vocabulary=config.whole("vocab_size", 1, 2**24), width=config.whole("hidden_size", 1, 2**16), depth=depth,
            heads=heads, kv_heads=config.whole("num_key_value_heads", 1, 2**10) if grouped else heads,
            head_dim=config.whole("head_dim", 1, 2**12), mlp_dim=config.whole("intermediate_size", 1, 2**18),
            rope_theta=_rope_theta(config), norm_eps=config.number("rms_norm_eps", 0, 1),
            tied=config.boolean("tie_word_embeddings"), max_positions=config.whole("max_position_embeddings", 1, 2**24))
    except ValueError as error:
        raise error if config.where in str(error) else ValueError(
            f"{config.where}num_attention_heads, num_key_value_heads and head_dim: {error}") from None


def _rope_theta(config: Options) -> float:
    rope = config.section("rope_scaling" if config.values["rope_scaling"] else "rope_parameters")
    rope = rope.with_defaults({"rope_type": "default", "rope_theta": config.values["rope_theta"]})
    rope.require("rope_type", "default")
    if unknown := sorted(rope.values.keys() - {"rope_type", "rope_theta"}):
        raise ValueError(f"{rope.where}{unknown[0]} is not supported, only rope_theta")
    return rope.number("rope_theta", 1, 1e12)


def load_lm_params(path_or_id: str | Path, spec: LMSpec) -> Params:
    """Reads a language model's weights.

    Args:
      path_or_id: see `read_lm_spec`.
      spec: what that function says of it.

    Returns:
      {path: float32 array}, with the paths of `flat.split(LanguageModel(spec, ...))`.

    Raises:
      OSError: a file is missing or damaged.
      ValueError: a tensor is missing, has another shape than `spec` implies, or has no known use.
    """
    folder = local_folder(path_or_id, ["config.json", "model.safetensors", "model.safetensors.index.json",
                                       "model-*-of-*.safetensors"])
    found = {name: (f"{file}: tensor {name}", tensor) for file, name, tensor in huggingface.folder_tensors(folder)}
    shapes = _shapes(spec)
    empty = {path: np.broadcast_to(np.float32(0), shape) for path, shape in shapes.items()}
    expected = {key: view.shape for key, view in huggingface.foreign_views(_KEYS, empty).items()}
    # Of a tied model some folders hold the copy as well; transformers does not read it either.
    huggingface.check_tensors(found, expected, unused=r"lm_head\.weight" if spec.tied else "", optional=set(),
                              architecture=_ARCHITECTURE, origin=f"{folder}: tensor ")
    params = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    for key, view in huggingface.foreign_views(_KEYS, params).items():
        view[...] = huggingface.read_tensor(*found[key])
    return params


def save_lm(folder: str | Path, spec: LMSpec, params: Mapping[str, Any], dtype: Any) -> None:
    """Writes a folder that `transformers` and this module read: config.json and model.safetensors, or shards of that.

    Args:
      folder: created where absent; files of the same name are replaced, and it should hold no other weights.
      spec: the shape.
      params: arrays with the paths and shapes of those that `load_lm_params` returns.
      dtype: of the tensors in the file, a type that NumPy or ml_dtypes has.

    Raises:
      OSError: the folder cannot be written.
      ValueError: a parameter is missing, unknown or has another shape than `spec` implies.
    """
    folder, shapes = Path(folder), _shapes(spec)
    for path in sorted(shapes.keys() | params.keys()):
        if path not in params or path not in shapes:
            raise ValueError(f"parameter {path} is {'missing' if path in shapes else 'unknown'}: "
                             f"cannot save a {_ARCHITECTURE}")
        if np.shape(params[path]) != shapes[path]:
            raise ValueError(f"parameter {path} has shape {np.shape(params[path])}, but spec implies {shapes[path]}")
    # With rope_theta where older and newer `transformers` understand it.
    config = {"architectures": [_ARCHITECTURE], "model_type": "qwen3", "dtype": np.dtype(dtype).name,
              "vocab_size": spec.vocabulary, "hidden_size": spec.width, "num_hidden_layers": spec.depth,
              "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_dim,
              "intermediate_size": spec.mlp_dim, "rope_theta": spec.rope_theta, "rms_norm_eps": spec.norm_eps,
              "tie_word_embeddings": spec.tied, "max_position_embeddings": spec.max_positions, **_REQUIRED}
    views = huggingface.foreign_views(_KEYS, {path: np.asarray(value) for path, value in params.items()})
    split = huggingface_hub.split_state_dict_into_shards_factory(
        views, get_storage_size=lambda view: view.size * np.dtype(dtype).itemsize,
        filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, keys in split.filename_to_tensors.items():
        save_file({key: np.ascontiguousarray(views[key], dtype) for key in keys}, folder / name)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_generation(folder: Path, *, among: range, vocabulary: int, length: int) -> None:
    """Writes generation_config.json, by which `generate` of `transformers` draws from some tokens only, so many times.

    Args:
      folder: of the model.
      among: tokens that may be drawn.
      vocabulary: number of all tokens.
      length: tokens that are drawn, always as many: none of them is an end.
    """
    config = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": length,
              "suppress_tokens": [token for token in range(vocabulary) if token not in among]}
    (folder / "generation_config.json").write_text(json.dumps(config) + "\n")


def extend_vocabulary(params: Params, spec: LMSpec, extra: int, *, init: Init, seed: int) -> tuple[Params, LMSpec]:
    """Adds tokens behind those of a language model.

    Args:
      params: as `load_lm_params` returns them.
      spec: their shape.
      extra: number of tokens.
      init: the embeddings of the new tokens, and, where these are not tied, their columns of the last layer's kernel:
        `mean` is the mean of those of the old tokens, so that all start as likely as an average one; `normal` is
        N(0, 0.02), as at the start of training.
      seed: of `normal`.

    Returns:
      The parameters, of which only those that grow are new, and their shape.

    Raises:
      ValueError: an unknown `init`.
    """
    if init not in get_args(Init):
        raise ValueError(f"init {init!r} is unknown: use {' or '.join(get_args(Init))}")
    rng = np.random.default_rng(seed)

    def grown(array: np.ndarray, axis: int) -> np.ndarray:
        shape = tuple(extra if i == axis else size for i, size in enumerate(array.shape))
        new = rng.normal(0, 0.02, shape) if init == "normal" else np.broadcast_to(
            np.mean(array, axis=axis, dtype=np.float64, keepdims=True), shape)
        return np.concatenate([array, new.astype(array.dtype)], axis=axis)

    new = {"token_embedding": grown(params["token_embedding"], 0)}
    if not spec.tied:
        new["head/kernel"] = grown(params["head/kernel"], 1)
    return {**params, **new}, dataclasses.replace(spec, vocabulary=spec.vocabulary + extra)


def _shapes(spec: LMSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its path."""
    _, shapes, _ = flat.split(nnx.eval_shape(lambda: LanguageModel(spec, dropout=0.0, rngs=nnx.Rngs(0))))
    return {path: value.shape for path, value in shapes.items()}
