"""The parameters that a generator starts from: a text model's, whose vocabulary grows, or random ones."""

import dataclasses

from flax import nnx
from jax.sharding import Mesh

from vqrae_jax import config as config_lib
from vqrae_jax.config import GeneratorConfig
from vqrae_jax.generator import build
from vqrae_jax.generator.build import Structure
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.lm import LanguageModel
from vqrae_jax.training import sharding
from vqrae_jax.weights import qwen3


def create(config: GeneratorConfig) -> LanguageModel:
    """An untrained model of a config, as an NNX module: what a run of it starts from.

    Nothing is read of codes: `data.grid`, `data.size` and, of a class-conditional one, `data.classes` must say what
    they are. `create(config).hidden(tokens)` and `logits` take it from tokens `[B, N]` int32 to logits `[B, N, V]`;
    `build.Vocabulary` says what they mean.

    Raises:
      ValueError: one of these keys is 0, or sizes do not fit each other; the message names the key.
      OSError: the weights of `model.path` cannot be read.
    """
    structure = build.structure(config, build.planned_codes(config))
    return flat.merge(structure.graphdef, sharding.off_mesh(params(config, structure, sharding.one_device())))


def params(config: GeneratorConfig, structure: Structure, mesh: Mesh) -> Arrays:
    """All parameters of a new model.

    Args:
      config: of the run.
      structure: its model's.
      mesh: where they are to be.

    Raises:
      OSError, ValueError: the weights of `model.path` cannot be read.
    """
    if config.model.path and not config.model.random_weights:
        text, extra = structure.vocabulary.text, structure.vocabulary.size - structure.vocabulary.text
        spec = dataclasses.replace(structure.spec, vocabulary=text)
        with config_lib.says_where("model.path"):
            pretrained = qwen3.load_lm_params(build.model_path(config), spec)
        extended, _ = qwen3.extend_vocabulary(pretrained, spec, extra, init=config.model.new_rows, seed=config.seed)
        return sharding.put(mesh, extended, sharding.RULES)
    make = lambda: flat.split(build.language_model(config, structure.spec, nnx.Rngs(config.seed)))[1]
    return sharding.made(make, mesh, sharding.RULES)
