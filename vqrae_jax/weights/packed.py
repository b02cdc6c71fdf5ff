"""A trained model packed into a small folder: what loading needs of a run, and nothing that only training needs.

    config.json          of the run
    encoder/, text/      the shapes of what began pretrained, as in the run's folder
    codes.json           of a generator: what it learned
    model.safetensors    the averaged weights: parameters in float16, buffers as they are
    README.md            the model card
    checksums.json       of the weights; the other files that loading reads have their own

`launch/pack.py` makes one. Rounded weights are other weights, with another sha256: a generator that is to go with a
packed tokenizer learns the codes that this one makes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from vqrae_jax import files
from vqrae_jax.weights import tensors
from vqrae_jax.weights.tensors import Tensors

SHIPPED = Path(__file__).parents[1] / "assets" / "models"  # a folder a name, in it one a task
WEIGHTS = "model.safetensors"


def find(workdir: Path, task: str) -> Path:
    """The folder itself, or where it holds no run and is called as one that ships, that of the shipped model.

    Args:
      workdir: a folder, or `nano`.
      task: whose model it is to be, as the config key `task` says it.
    """
    shipped = SHIPPED / workdir / task
    is_name = str(workdir) == workdir.name
    return shipped if is_name and not (workdir / "config.json").exists() and shipped.is_dir() else workdir


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed model; one in which a run has begun since does not."""
    return (folder / WEIGHTS).exists() and not (folder / "checkpoints").exists()


def read(folder: Path, shapes: Mapping[str, Any], *, step: int | None, weights: str) -> Tensors:
    """All arrays of a packed model, parameters as float32 with values of float16.

    Args:
      folder: that of the model.
      shapes: {path: shape and dtype} of its parameters and buffers.
      step: None, for it has no checkpoints.
      weights: "ema", for it has no others.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, or holds other arrays; another step, or other weights.
    """
    if step is not None or weights != "ema":
        raise ValueError(f"{folder} is a packed model, which has no other checkpoints and only averaged weights: leave "
                         "out step, and weights")
    files.check(folder)
    arrays = {path: np.empty(shape.shape, shape.dtype) for path, shape in shapes.items()}
    tensors.fill(arrays, tensors.read(folder / WEIGHTS), folder / WEIGHTS)
    return arrays


def write(folder: Path, params: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
    """Writes model.safetensors and its checksum into an existing folder.

    Args:
      folder: for the model.
      params: its parameters, which are rounded to float16.
      buffers: its codes and statistics, which may lie beyond what float16 can say and are kept as they are.

    Raises:
      ValueError: so may a parameter; the message names it.
    """
    with np.errstate(over="ignore"):
        rounded = {path: np.asarray(array, np.float16) for path, array in params.items()}
    if beyond := [path for path, array in rounded.items() if not np.isfinite(array).all()]:
        raise ValueError(f"parameter {beyond[0]} has values that float16 cannot hold")
    arrays = {**rounded, **{path: np.asarray(array) for path, array in buffers.items()}}
    with files.whole(folder / WEIGHTS) as unfinished:
        unfinished.write_bytes(save({path: np.ascontiguousarray(array) for path, array in arrays.items()}))
    files.write_checksums(folder, files.checksums(folder, [folder / WEIGHTS]))
