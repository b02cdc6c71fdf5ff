"""The tokenizer of text that lies beside a language model's weights, through Hugging Face's `tokenizers`."""

from collections.abc import Callable
from pathlib import Path

from vqrae_jax.weights.tensors import local_folder

Tokenize = Callable[[str], list[int]]

_TOKENIZER = "tokenizer.json"
# What transformers reads besides, to make the same tokens: they go wherever the model goes.
_FILES = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
          "generation_config.json")


def load_text_tokenizer(path_or_id: str | Path, vocabulary: int) -> Tokenize:
    """What makes tokens of a text, without any that marks beginning or end; threads may share it.

    Args:
      path_or_id: a Hugging Face folder with a tokenizer.json, or the id of a model on the hub.
      vocabulary: of the language model: tokens are in [0, vocabulary).

    Raises:
      OSError: no such file, a damaged one, or `tokenizers` is not installed.
      ValueError: it has more tokens than the language model.
    """
    folder = local_folder(path_or_id, list(_FILES))
    if not (folder / _TOKENIZER).exists():
        raise FileNotFoundError(f"{folder} has no {_TOKENIZER}: captions need it, so download it into the same folder")
    try:
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise OSError("captions need tokenizers: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
    except Exception as error:  # it raises nothing more special
        raise OSError(f"{folder / _TOKENIZER} cannot be read ({' '.join(str(error).split())[:200]}): download it "
                      "again") from None
    if (size := tokenizer.get_vocab_size(with_added_tokens=True)) > vocabulary:
        raise ValueError(f"{folder / _TOKENIZER} has {size:,} tokens, the language model beside it only {vocabulary:,}")
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def copy_text_model(path_or_id: str | Path, out: Path) -> None:
    """Copies a language model's config.json and what its tokenizer consists of, but no weights."""
    names = ("config.json", *_FILES)
    folder = local_folder(path_or_id, list(names))
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).exists():
            (out / name).write_bytes((folder / name).read_bytes())
