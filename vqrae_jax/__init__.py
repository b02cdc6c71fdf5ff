"""VQRAE in JAX: a pretrained vision transformer as a tokenizer for understanding and generation."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from vqrae_jax.config import Config, GeneratorConfig, load_config
from vqrae_jax.generator import init as generator_init
from vqrae_jax.generator.inference import Generator, load_generator
from vqrae_jax.models.lm import LanguageModel
from vqrae_jax.models.quantizers import Quantizer
from vqrae_jax.models.vqrae import VQRAE
from vqrae_jax.tokenizer import init as tokenizer_init
from vqrae_jax.tokenizer.inference import Tokenizer, load, load_encoder, read_images
from vqrae_jax.tokenizer.loss import loss_function

if TYPE_CHECKING:
    from vqrae_jax.data import Source  # with the data comes Grain, which defines flags

__all__ = ["Generator", "Tokenizer", "create", "load", "load_config", "load_encoder", "load_generator", "loss_function",
           "read_images", "train"]


@overload
def create(config: Config) -> VQRAE: ...
@overload
def create(config: GeneratorConfig) -> LanguageModel: ...


def create(config: Config | GeneratorConfig) -> VQRAE | LanguageModel:
    """An untrained model of a config; see `tokenizer.init.create` and `generator.init.create`."""
    if isinstance(config, GeneratorConfig):
        return generator_init.create(config)
    return tokenizer_init.create(config)


def train(config: Config | GeneratorConfig, workdir: str | os.PathLike, source: "Source | Sequence[Any] | None" = None,
          quantizer: Quantizer | None = None) -> dict[str, float]:
    """Trains what a config is of; see `tokenizer.task.train` and `generator.task.train`.

    Raises:
      ValueError: a generator was given a source or a quantizer, which only a tokenizer takes.
    """
    if isinstance(config, GeneratorConfig):
        from vqrae_jax.generator import task as generator

        if source is not None or quantizer is not None:
            raise ValueError("a generator takes no source and no quantizer: it learns the codes of data.source")
        return generator.train(config, workdir)
    from vqrae_jax.tokenizer import task as tokenizer

    return tokenizer.train(config, workdir, source, quantizer)
