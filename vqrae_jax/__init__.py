"""VQRAE in JAX: a pretrained vision transformer as a tokenizer for understanding and generation."""

import importlib
from typing import TYPE_CHECKING, Any

from vqrae_jax.config import load_config
from vqrae_jax.tokenizer.inference import Tokenizer, load, load_encoder, read_images
from vqrae_jax.tokenizer.init import create
from vqrae_jax.tokenizer.loss import loss_function

if TYPE_CHECKING:
    from vqrae_jax.generator.inference import Generator, load_generator
    from vqrae_jax.tokenizer.task import train

__all__ = ["Generator", "Tokenizer", "create", "load", "load_config", "load_encoder", "load_generator", "loss_function",
           "read_images", "train"]

# Imported when they are needed: with the data comes Grain, which defines flags.
_LATER = {"train": "vqrae_jax.tokenizer.task", "Generator": "vqrae_jax.generator.inference",
          "load_generator": "vqrae_jax.generator.inference"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
