"""A generator's config that trains in seconds, and batches for it."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from vqrae_jax import config as config_lib
from vqrae_jax.generator import build
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.lm import LanguageModel, LMSpec
from vqrae_jax.weights import qwen3

CODES = build.Codes(grid=4, size=24, classes=3)
TEXT = LMSpec(vocabulary=20, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48, rope_theta=1e4,
              norm_eps=1e-6, tied=True, max_positions=64)
WORDS = ("a", "the", "red", "blue", "green", "cat", "dog", "bird", "on", "under", "table", "chair")


def text_model(folder: Path) -> Path:
    """A folder as Qwen3 comes in: config, random weights, and a tokenizer, whose tokens are words."""
    _, params, _ = flat.split(LanguageModel(TEXT, dropout=0.0, rngs=nnx.Rngs(7)))
    qwen3.save_lm(folder, TEXT, {path: np.asarray(value) for path, value in params.items()}, np.float32)
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": None, "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(("?", *WORDS))}, "unk_token": "?"}}))
    return folder


def tiny(*, captions: Path | None = None, drop: float = 0.1):
    """A config of a model of two layers, to be changed; with captions that of `text_model`."""
    config = config_lib.generator()
    config.train.update(steps=6, batch_size=8, log_every=1, checkpoint_every=2, eval_every=100)
    config.data.threads = 1
    config.eval.update(batch_size=8, limit=16)
    config.prefix.drop = drop
    if captions:
        config.model.path = str(captions)
        config.prefix.update(kind="caption", longest=5)
    else:
        config.model.update(width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp_dim=48)
    config.optim.update(lr=3e-3, end_lr=1e-4, warmup_steps=2, ema_decay=0.9)
    config.log.update(tensorboard=False, compilation_cache="")
    return config


def parsed(config) -> config_lib.GeneratorConfig:
    return config_lib.parse(config, config_lib.GeneratorConfig)


def random_arrays(shapes: Arrays) -> Arrays:
    """N(0, 0.3) in shapes: parameters of a model in which every token makes a difference."""
    rng = np.random.default_rng(1)
    return {path: jnp.asarray(rng.normal(0, 0.3, shape.shape), shape.dtype) for path, shape in shapes.items()}


def batch(size: int, *, captions: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Random codes; some have no label, some no caption."""
    rng = np.random.default_rng(seed)
    made = {"codes": rng.integers(0, CODES.size, (size, CODES.grid, CODES.grid), np.int32),
            "label": rng.integers(-1, CODES.classes, size, np.int32)}
    if captions:
        made |= {"label": np.full(size, -1, np.int32), "caption": rng.integers(0, 20, (size, 5), np.int32),
                 "pads": np.resize(np.int32([2, 5]), size)}
    return made
