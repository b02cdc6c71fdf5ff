"""Tensors from other people's files: safetensors, and PyTorch's own format, of which nothing is ever executed."""

import contextlib
import hashlib
import logging
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub  # by its name: what is not used of it is not imported, which takes long
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from safetensors.numpy import save_file as _save_file

from vqrae_jax import files
from vqrae_jax.foreign import one_line
from vqrae_jax.models import flat

log = logging.getLogger(__name__)
Tensors = dict[str, np.ndarray]


def read(file: Path) -> Tensors:
    """All tensors of a file by name, as NumPy arrays; bfloat16 and float16 become float32.

    A `.safetensors` file needs nothing else. Any other is taken for one that `torch.save` wrote; it is read by
    `torch.load(weights_only=True)`, which refuses whatever is not a tensor or a plain container. Names of nested
    dictionaries are joined by ".": `{"ema": {"decoder.cls": ...}}` gives `ema.decoder.cls`. What is no tensor is left
    out.

    Raises:
      OSError: the file is missing, damaged, or holds something other than data; or PyTorch is not installed.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    if file.suffix == ".safetensors":
        try:
            return {name: _float32(value) for name, value in load_file(file).items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise OSError(f"{file} holds a kind of number that NumPy does not have ({error}): save it as float32") \
                from None
        except SafetensorError as error:
            raise OSError(f"{file} is damaged or truncated ({error}): copy or download it again") from None
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise OSError(f"{file} is a PyTorch file, and PyTorch is not installed: install torch, or save the tensors "
                      "with safetensors.torch.save_file where it is") from None
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if what := re.search(r"GLOBAL (\S+)", str(error)):
            raise OSError(f"{file} holds more than tensors ({what[1]}) and was not read, for that could run code: "
                          "save only the state_dict") from None
        raise OSError(f"{file} is damaged, or no PyTorch file") from None
    except Exception as error:  # what it raises on a damaged file is anything
        raise OSError(f"{file} is damaged, or no PyTorch file ({one_line(error)})") from None
    tensors = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            try:
                tensors[name] = (value.float() if value.is_floating_point() else value).numpy()
            except (RuntimeError, TypeError) as error:
                raise OSError(f"{file}: tensor {name} is of a kind that NumPy does not have ({one_line(error)}): "
                              "save it as a dense one of float32") from None
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                collect(entry, f"{name}.{key}" if name else str(key))

    try:
        collect(content, "")
    except RecursionError:
        raise OSError(f"{file} holds dictionaries inside each other without end: save only the state_dict") from None
    return tensors


def save_file(arrays: Mapping[str, np.ndarray], file: Path) -> None:
    """Writes a `.safetensors` file that PyTorch and `transformers` read.

    Raises:
      OSError: it cannot be written.
    """
    try:
        _save_file(dict(arrays), file, metadata={"format": "pt"})
    except SafetensorError as error:  # so it says that a disk is full
        raise OSError(f"{file} cannot be written: {error}") from error


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def cached(file: Path, convert: Callable[[Path], Tensors], *, name: str) -> Tensors:
    """`convert(file)`, which runs only once for a content of the file.

    The result is kept in `$XDG_CACHE_HOME/vqrae_jax`, or `~/.cache/vqrae_jax`. A damaged cache is replaced, and one
    that cannot be written is done without.

    Args:
      file: an existing file.
      convert: makes {path: array} of it. It should depend on nothing but the content and what `name` says; what it
        raises is not kept.
      name: says what `convert` makes, in characters that a file name may have; another one if that changes.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vqrae_jax"
    kept = folder / f"{name}-{sha256(file)[:32]}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):
        return load_file(kept)
    params = convert(file)
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with files.whole(kept) as unfinished:
            unfinished.write_bytes(save({path: np.asarray(value, order="C") for path, value in params.items()}))
    return params


def zeros(make: Callable[[], nnx.Module]) -> Tensors:
    """{path: float32 zeros} of the shapes of a module's parameters and buffers."""
    _, params, buffers = flat.split(nnx.eval_shape(make))
    return {path: np.zeros(array.shape, np.float32) for path, array in {**params, **buffers}.items()}


def fill(views: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], file: Path, *, unused: str = "") -> None:
    """Writes the tensors of a file into views of our arrays, which have their names and shapes.

    Args:
      views: {their name: what to write into}.
      found: {their name: tensor}.
      file: where `found` is from, for messages.
      unused: pattern of the names that are left out.

    Raises:
      ValueError: a tensor is missing, has another shape, or has no known use; the message names it.
    """
    for name, value in found.items():
        if name in views:
            if value.shape != views[name].shape:
                raise ValueError(f"{file}: tensor {name} has shape {value.shape}, but {views[name].shape} is needed")
            views[name][...] = value
        elif not re.fullmatch(unused, name):
            raise ValueError(f"{file}: unexpected tensor {name}, which this network does not have")
    if missing := sorted(views.keys() - found.keys()):
        raise ValueError(f"{file}: tensor {missing[0]} is missing" +
                         (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))


def local_folder(path_or_id: str | Path, patterns: list[str], *, download: bool = True) -> Path:
    """The folder itself, or the hub's snapshot of that id with the files that match `patterns`.

    Args:
      path_or_id: a folder, or the id of a model on the hub.
      patterns: of the files that are needed.
      download: whether the hub may be asked for what is not on this machine.

    Raises:
      OSError: neither a folder, nor can it be fetched.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if download:
        log.info("%s comes from the Hugging Face hub, unless this machine has it already", path_or_id)
    try:
        return Path(huggingface_hub.snapshot_download(str(path_or_id), allow_patterns=patterns,
                                                      local_files_only=not download))
    except Exception as error:  # the hub's client raises what its network stack raises
        if not download:
            raise FileNotFoundError(f"{path_or_id} is neither a folder nor in the Hugging Face hub's cache") from error
        raise OSError(f"{path_or_id} is not a folder, and could not be fetched from the Hugging Face hub "
                      f"({type(error).__name__}); download it where there is a network and give the local folder") \
            from error


def local_file(path_or_id: str | Path, *, download: bool = True) -> Path:
    """A weights file: the file itself, or the one in a folder or in the hub's snapshot of that id.

    Args:
      path_or_id: a file, a folder, or the id of a model on the hub.
      download: see `local_folder`.

    Raises:
      OSError: none of these.
    """
    file = Path(path_or_id).expanduser()
    if file.is_file():
        return file
    names = ["model.safetensors", "pytorch_model.bin"]
    folder = local_folder(path_or_id, names, download=download)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds neither {' nor '.join(names)}")


def _float32(value: np.ndarray) -> np.ndarray:
    return value if value.dtype.kind in "iub" else value.astype(np.float32, copy=False)
