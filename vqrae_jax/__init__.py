"""VQRAE in JAX: a pretrained vision transformer as a tokenizer for understanding and generation."""

from typing import TYPE_CHECKING, Any

from vqrae_jax.config import load_config
from vqrae_jax.tokenizer.inference import Tokenizer, load, load_encoder, read_images
from vqrae_jax.tokenizer.init import create
from vqrae_jax.tokenizer.loss import loss_function

if TYPE_CHECKING:
    from vqrae_jax.tokenizer.task import train

__all__ = ["Tokenizer", "create", "load", "load_config", "load_encoder", "loss_function", "read_images", "train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vqrae_jax.tokenizer.task import train  # when it is needed: with the data comes Grain, which defines flags

    return train
