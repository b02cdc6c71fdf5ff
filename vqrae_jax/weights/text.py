"""The tokenizer of text that lies beside a language model's weights, through Hugging Face's `tokenizers`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vqrae_jax.foreign import Options, one_line
from vqrae_jax.weights.tensors import local_folder

Tokenize = Callable[[str], list[int]]

_TOKENIZER, _CONFIG = "tokenizer.json", "tokenizer_config.json"
# What transformers reads besides, to make the same tokens: they go wherever the model goes.
_FILES = (_TOKENIZER, _CONFIG, "special_tokens_map.json", "vocab.json", "merges.txt",
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
    tokenizer = _open(local_folder(path_or_id, list(_FILES)), vocabulary)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def _open(folder: Path, vocabulary: int) -> Any:
    if not (folder / _TOKENIZER).exists():
        raise FileNotFoundError(f"{folder} has no {_TOKENIZER}: tokens of text need it, so download it into the same "
                                "folder")
    library = _library()
    try:
        tokenizer = library.Tokenizer.from_file(str(folder / _TOKENIZER))
    except Exception as error:  # it raises nothing more special
        raise OSError(f"{folder / _TOKENIZER} cannot be read ({one_line(error)}): download it "
                      "again") from None
    if (size := tokenizer.get_vocab_size(with_added_tokens=True)) > vocabulary:
        raise ValueError(f"{folder / _TOKENIZER} has {size:,} tokens, the language model beside it only {vocabulary:,}")
    return tokenizer


def _library() -> Any:
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise OSError("tokenizers is not installed, by which texts become tokens: pip install tokenizers") from None
    return tokenizers


def save_tokenizer(out: Path, *, text: Path | None, first: int, shown: Sequence[str], special: Sequence[str],
                   longest: int) -> None:
    """Writes a tokenizer with further tokens as `transformers` reads it, tokenizer.json and tokenizer_config.json.

    Every further token is one wherever it stands in a text, with or without space around it. Text between them has the
    tokens that it had.

    Args:
      out: an existing folder.
      text: folder with the tokenizer of text; None is without, and then a text that is no such token is an error.
      first: number of the first further token. A language model may have more tokens than its tokenizer; those that
        this leaves without a name are called `<unused_N>`.
      shown: further tokens, in order.
      special: those behind them, which `decode` with `skip_special_tokens` leaves out.
      longest: most tokens of a sequence.

    Raises:
      OSError: the tokenizer of text cannot be read, `tokenizers` is not installed, or the folder cannot be written.
      ValueError: the tokenizer of text has such a token already, or more than `first`.
    """
    library = _library()
    if text:
        tokenizer = _open(text, first)
        numbers = tokenizer.get_vocab(with_added_tokens=True).values()
        unused = [f"<unused_{number}>" for number in range(max(numbers) + 1, first)]
    else:
        names = {name: first + number for number, name in enumerate([*shown, *special])}
        tokenizer = library.Tokenizer(library.models.WordLevel(names, unk_token="<unknown>"))
        tokenizer.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = library.decoders.Fuse()
        unused = []
    added = lambda names, special: [library.AddedToken(name, special=special, normalized=False) for name in names]
    tokenizer.add_tokens(added(unused, True) + added(shown, False) + added(special, True))
    for number, name in enumerate([*shown, *special], first):
        if tokenizer.token_to_id(name) != number:
            raise ValueError(f"{text} has a token {name} already: it cannot be that of a code or of a class as well")
    config = Options.read(text / _CONFIG).values if text and (text / _CONFIG).exists() else {}
    # A class of its own would be made anew of vocabulary and merges, and not know the further tokens' numbers.
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left",
              "model_max_length": longest}
    (out / _TOKENIZER).write_text(tokenizer.to_str(pretty=True))
    (out / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def copy_text_model(path_or_id: str | Path, out: Path) -> None:
    """Copies a language model's config.json and what its tokenizer consists of, but no weights."""
    names = ("config.json", *_FILES)
    folder = local_folder(path_or_id, list(names))
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).exists():
            (out / name).write_bytes((folder / name).read_bytes())
