"""Sampling: from prefixes to the codes of images, one token after the other, with the keys and values of those before.

    sample(structure, params, batch, draw) -> codes

It is one compiled function without a shape that depends on what is drawn. Every image has a random key of its own, made
of the seed and its number, so that what becomes of it does not depend on what is sampled beside it.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.generator.build import Structure, Vocabulary
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.lm import Cache
from vqrae_jax.models.placement import split_batch

Batch = dict[str, jax.Array]
Schedule = Literal["constant", "linear", "power_cosine"]
_COLDEST = 1e-6  # what a probability is taken at where the temperature is lower
# A token reads the whole cache, so it begins small. Each size of it is a program of its own, which limits how many.
_LEAST_PLACES, _SIZES = 64, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How codes are drawn.

    Attributes:
      cfg: scale s of classifier-free guidance; 1 is none.
      schedule: how s is reached, see `guidance_scales`.
      power: of the schedule power_cosine.
      temperature: that logits are divided by; 0 takes the likeliest code.
      top_k: only so many of the likeliest codes are drawn from; 0 is all.
      top_p: only the likeliest codes that together have this probability are drawn from; 1 is all.
      seed: with the number of an image it decides what is drawn.

    Raises:
      ValueError: a number that means nothing; the message names it.
    """

    cfg: float = 1.0
    schedule: Schedule = "constant"
    power: float = 2.75
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        right = {"cfg": (self.cfg >= 0, "at least 0"), "power": (self.power > 0, "above 0"),
                 "schedule": (self.schedule in get_args(Schedule), " or ".join(get_args(Schedule))),
                 "temperature": (self.temperature >= 0, "at least 0"), "top_k": (self.top_k >= 0, "at least 0"),
                 "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
                 "seed": (0 <= self.seed < 2**32, "in [0, 2^32)")}
        for name, (fits, wanted) in right.items():
            if not fits:
                raise ValueError(f"{name} must be {wanted}, not {getattr(self, name)}")


class Draw(NamedTuple):
    """`Options` as the compiled function takes them: what is None costs nothing.

    Attributes:
      scales: `[N]` float32, of guidance at every position; None is without guidance.
      temperature: `[]` float32.
      top_p: `[]` float32; None is all codes.
      seed: `[]` uint32.
    """

    scales: Any
    temperature: Any
    top_p: Any
    seed: Any


def draw_of(options: Options, tokens: int) -> Draw:
    """The arrays of options for images of so many tokens."""
    return Draw(guidance_scales(options, tokens) if is_guided(options) else None, np.float32(options.temperature),
                None if options.top_p == 1 else np.float32(options.top_p), np.uint32(options.seed))


def is_guided(options: Options) -> bool:
    """Whether the empty prefix takes part."""
    return options.cfg != 1


def guidance_scales(options: Options, tokens: int) -> np.ndarray:
    """The scale of guidance at every position n of N, `[N]` float32.

    `constant` is s. `linear` is 1 + (s - 1)(n + 1) / N, as Muse has it (arXiv 2301.00704, section 2.7, with the form of
    MAR, arXiv 2406.11838, `sample_tokens`). `power_cosine` is 1 + (s - 1)(1 - cos(pi (n / N)^power)) / 2, MDTv2's
    (arXiv 2303.14389, `forward_with_cfg`, where 1 - t / T is the time that n / N is here) in the form of RAR (arXiv
    2411.00776, `RAR.generate`), whose s and power are 16 and 2.75 for its smallest model, 8 and 1.2 for its largest.
    """
    n = np.arange(tokens, dtype=np.float64)
    reached = {"constant": np.ones(tokens), "linear": (n + 1) / tokens,
               "power_cosine": (1 - np.cos(np.pi * (n / tokens) ** options.power)) / 2}[options.schedule]
    return (1 + (options.cfg - 1) * reached).astype(np.float32)


def cast(structure: Structure, params: Arrays) -> Arrays:
    """A model's parameters as sampling reads them, with the same result.

    What the model itself would cast for every token (see `flat.cast_types`) is cast once: the memory's speed is what
    limits sampling.
    """
    types = flat.cast_types(structure.graphdef, params)
    return {path: value.astype(types[path]) if path in types else value for path, value in params.items()}


def sample(structure: Structure, params: Arrays, batch: Batch, draw: Draw, *, top_k: int) -> jax.Array:
    """Draws images' codes, in raster order.

    With guidance every image is two rows of the model, one of which has the empty prefix, and logits are
    empty + s (conditional - empty) (Ho and Salimans, arXiv 2207.12598, equation 6, with s = 1 + w).

    Args:
      structure: of the model.
      params: all of the model, cast or not.
      batch: prefixes as `loss.predict` has them, `label` and perhaps `caption` and `pads`, and `number` `[B]` int32,
        the numbers of the images.
      draw: see there.
      top_k: see `Options`.

    Returns:
      `[B, N]` int32 in [0, codes).
    """
    model, vocabulary, tokens = flat.merge(structure.graphdef, params), structure.vocabulary, structure.codes.grid**2
    blocks = model.unstacked()
    begin, caption, pads = _prefix(vocabulary, batch)
    guided = draw.scales is not None
    if guided:
        # Both rows of an image beside each other: so they are on one device.
        begin, caption, pads = (jnp.stack(both, axis=1).reshape(2 * len(both[0]), *both[0].shape[1:]) for both in zip(
            (begin, caption, pads), _prefix(vocabulary, without(batch)), strict=True))
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(draw.seed), number))(batch["number"])

    def step(carry: tuple[jax.Array, Cache], position: jax.Array) -> tuple[tuple[jax.Array, Cache], jax.Array]:
        token, cache = carry
        hidden, cache = model.step(token[:, None], cache, blocks)
        logits = model.logits(hidden[:, 0], vocabulary.code)
        if guided:
            conditional, empty = logits.reshape(-1, 2, logits.shape[-1]).swapaxes(0, 1)
            logits = split_batch(empty + draw.scales[position] * (conditional - empty))
        at_position = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys)
        code = choose(logits, at_position, temperature=draw.temperature, top_k=top_k, top_p=draw.top_p)
        return (vocabulary.text + (jnp.repeat(code, 2) if guided else code), cache), code

    cache, codes = model.init_cache(len(begin), caption.shape[1], pads), []
    if caption.shape[1]:
        _, cache = model.step(caption, cache, blocks)
    places = max(_LEAST_PLACES, -(-tokens // _SIZES))
    for positions in np.split(np.arange(tokens), range(places, tokens, places)):
        cache = model.enlarge(cache, len(positions))
        (begin, cache), drawn = jax.lax.scan(step, (begin, cache), jnp.asarray(positions))
        codes.append(drawn)
    return jnp.concatenate(codes).T


def without(batch: Batch) -> Batch:
    """A batch whose images all begin with the empty prefix."""
    empty = {"label": jnp.full_like(batch["label"], -1)}
    return batch | (empty | {"pads": jnp.full_like(batch["pads"], batch["caption"].shape[1])} if "caption" in batch
                    else empty)


def _prefix(vocabulary: Vocabulary, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens that begin images, `[B]`, those before them, `[B, T]`, and how many of these are none, `[B]`."""
    begin = vocabulary.begin(batch["label"])
    if "caption" in batch:
        return begin, batch["caption"], batch["pads"]
    return begin, jnp.zeros((len(begin), 0), jnp.int32), jnp.zeros(len(begin), jnp.int32)


def choose(logits: jax.Array, keys: jax.Array, *, temperature: jax.Array, top_k: int,
           top_p: jax.Array | None) -> jax.Array:
    """Draws a code for each row.

    As in `transformers`, logits are divided by the temperature, of the codes `top_k` are kept, and then as many of the
    likeliest as have together at least the probability `top_p` (Holtzman et al., arXiv 1904.09751). Of those one is
    drawn by the Gumbel-max trick, which is the likeliest one at temperature 0.

    Args:
      logits: `[B, K]` float32.
      keys: `[B]`, of each row's own.
      temperature: at least 0.
      top_k: 0 is all; of equal logits those of lower codes are kept.
      top_p: above 0; None is all.

    Returns:
      `[B]` int32.
    """
    codes = None
    if top_k or top_p is not None:
        logits, codes = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p is not None:
        shares = jax.nn.softmax((logits - logits[:, :1]) / jnp.maximum(temperature, _COLDEST), axis=-1)
        likelier = jnp.cumsum(shares, axis=-1) - shares
        logits = jnp.where(likelier < top_p, logits, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    chosen = jnp.argmax(logits + temperature * noise, axis=-1)
    return chosen if codes is None else jnp.take_along_axis(codes, chosen[:, None], axis=-1)[:, 0]
