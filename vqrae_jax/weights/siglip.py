"""SigLIP's pooling head, text tower and tokenizer, from the Hugging Face folder that holds its vision encoder."""

import re
import string
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax.foreign import Options, one_line
from vqrae_jax.models import flat
from vqrae_jax.models.siglip import SiglipHeads, TextSpec
from vqrae_jax.weights import huggingface
from vqrae_jax.weights.huggingface import ACTIVATIONS, SIGLIP
from vqrae_jax.weights.tensors import local_folder

# What `transformers` assumes where text_config says nothing; a projection_size of null is the hidden_size.
_TEXT_DEFAULTS = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                  "num_attention_heads": 12, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
                  "layer_norm_eps": 1e-6, "projection_size": None}

_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")

_KEYS: dict[str, str | tuple[str, ...]] = {
    "final_norm_scale": "vision_model.post_layernorm.weight",
    "final_norm_bias": "vision_model.post_layernorm.bias",
    "pooling/probe": "vision_model.head.probe",
    "pooling/qkv/kernel": "vision_model.head.attention.in_proj_weight",
    "pooling/qkv/bias": "vision_model.head.attention.in_proj_bias",
    "pooling/out": "vision_model.head.attention.out_proj",
    "pooling/norm": "vision_model.head.layernorm",
    "pooling/mlp/fc1": "vision_model.head.mlp.fc1",
    "pooling/mlp/fc2": "vision_model.head.mlp.fc2",
    "text/token_embedding": "text_model.embeddings.token_embedding.weight",
    "text/position_embedding": "text_model.embeddings.position_embedding.weight",
    "text/transformer/norm": "text_model.final_layer_norm",
    "text/head": "text_model.head",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
} | {"text/" + path.removeprefix("vit/"): tuple("text_model." + name for name in names) if isinstance(names, tuple)
     else "text_model." + names for path, names in SIGLIP.keys.items() if "blocks" in path}
_ENCODER = r"vision_model\.(embeddings|encoder)\..*|text_model\.embeddings\.position_ids"


def openai_templates() -> tuple[str, ...]:
    """The 80 templates with which CLIP was evaluated on ImageNet, `{}` standing for the name of a class.

    From the notebook Prompt_Engineering_for_ImageNet of github.com/openai/CLIP; SigLIP's evaluations use them too.
    """
    file = Path(__file__).parents[1] / "assets" / "openai_templates.txt"
    return tuple(file.read_text().splitlines())


def load_siglip_heads(path_or_id: str | Path) -> SiglipHeads:
    """The pooling head and the text tower of a whole SigLIP or SigLIP 2 model, with its weights.

    Args:
      path_or_id: the Hugging Face folder, or the id of a model on the hub, from which the encoder comes as well.

    Raises:
      OSError: a file is missing or damaged.
      ValueError: a model without text tower or pooling head, an option that is not supported, or a tensor that is
        missing or has another shape than config.json implies.
    """
    folder = _local_folder(path_or_id)
    config = Options.read(folder / "config.json")
    vision = huggingface.read_encoder_spec(folder)
    found = {name: (f"{file}: tensor {name}", tensor) for file, name, tensor in huggingface.folder_tensors(folder)}
    if config.values["model_type"] != "siglip" or not any(name.startswith("text_model.") for name in found):
        raise ValueError(f"{folder} has no text tower: zero-shot needs a whole SigLIP model (model_type siglip, with "
                         "text_model.* among its tensors)")
    if not any(name.startswith("vision_model.head.") for name in found):
        raise ValueError(f"{folder} has no pooling head (vision_model.head.*): zero-shot needs a whole SigLIP model")
    text = _read_text_spec(config.section("text_config").with_defaults(_TEXT_DEFAULTS))
    try:
        graphdef, shapes, _ = flat.split(nnx.eval_shape(lambda: SiglipHeads(vision.vit, text, rngs=nnx.Rngs(0))))
    except ValueError as error:
        raise ValueError(f"{config.where}text_config.projection_size and vision_config.hidden_size: {error}") from None
    empty = {path: np.broadcast_to(np.float32(0), value.shape) for path, value in shapes.items()}
    expected = {key: view.shape for key, view in huggingface.foreign_views(_KEYS, empty).items()}
    huggingface.check_tensors(found, expected, unused=_ENCODER, optional=set(), architecture="SiglipModel",
                              origin=f"{folder}: tensor ")
    arrays = {path: np.zeros(value.shape, np.float32) for path, value in shapes.items()}
    for key, view in huggingface.foreign_views(_KEYS, arrays).items():
        view[...] = huggingface.read_tensor(*found[key])
    return flat.merge(graphdef, {path: jnp.asarray(value) for path, value in arrays.items()})


def load_tokenizer(path_or_id: str | Path, length: int) -> Callable[[list[str]], np.ndarray]:
    """The model's tokenizer, through `transformers`: texts -> token ids `[T, length]` int32.

    Texts are made as SigLIP's evaluations make them (`prompt_engineering.py` of google-research/big_vision): in lower
    case, without punctuation, `_` being a space. Then come the text's tokens, cut to length - 1, the end-of-sequence
    token, and padding on the right. No token marks the beginning.

    Args:
      path_or_id: the Hugging Face folder, or the id of a model on the hub.
      length: of a text; `TextSpec.length`.

    Raises:
      OSError: no tokenizer files, damaged ones, or `transformers` or what it needs for them is not installed.
      ValueError: a tokenizer without end-of-sequence or padding token.
    """
    folder = _local_folder(path_or_id)
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise OSError(f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): zero-shot needs one, so download it "
                      "into the same folder")
    try:
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise OSError(f"the tokenizer of {folder} needs transformers and sentencepiece: pip install transformers "
                      f"sentencepiece protobuf ({one_line(error)})") from None
    except Exception as error:  # transformers and its tokenizers raise anything
        raise OSError(f"the tokenizer of {folder} cannot be read ({type(error).__name__}: {one_line(error)}): "
                      "download it again") from None
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    if end is None or padding is None:
        raise ValueError(f"the tokenizer of {folder} has no {'end-of-sequence' if end is None else 'padding'} token: "
                         "tokenizer_config.json must name it, as SigLIP's do")

    def tokenize(texts: list[str]) -> np.ndarray:
        ids = np.full((len(texts), length), padding, np.int32)
        for row, text in zip(ids, texts, strict=True):
            tokens = [*tokenizer(_canonical(text), add_special_tokens=False)["input_ids"][:length - 1], end]
            row[:len(tokens)] = tokens
        return ids

    return tokenize


def _canonical(text: str) -> str:
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower()
    return re.sub(r"\s+", " ", text).strip()


def _read_text_spec(config: Options) -> TextSpec:
    width = config.whole("hidden_size", 1, 2**16)
    projection = width if config.values["projection_size"] is None else config.whole("projection_size", 1, 2**16)
    sizes = {"width": width, "projection": projection,
             "mlp_dim": config.whole("intermediate_size", 1, 2**18),
             "depth": config.whole("num_hidden_layers", 1, 2**10),
             "heads": config.whole("num_attention_heads", 1, 2**10),
             "vocabulary": config.whole("vocab_size", 1, 2**24),
             "length": config.whole("max_position_embeddings", 1, 2**16),
             "activation": ACTIVATIONS[config.one_of("hidden_act", ACTIVATIONS)],
             "norm_eps": config.number("layer_norm_eps", 0, 1)}
    try:
        return TextSpec(**sizes)
    except ValueError as error:
        raise ValueError(f"{config.where}hidden_size and num_attention_heads: {error}") from None


def _local_folder(path_or_id: str | Path) -> Path:
    weights = ("config.json", "preprocessor_config.json", "model.safetensors", "model.safetensors.index.json",
               "model-*-of-*.safetensors")
    return local_folder(path_or_id, [*weights, *_TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json"])
