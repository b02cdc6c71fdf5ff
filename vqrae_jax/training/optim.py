"""Optimizers, learning-rate schedules, freezing by path, and the moving average of the weights."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vqrae_jax.config import Optim
from vqrae_jax.models import flat

Multipliers = tuple[tuple[str, float], ...]


def multiplier(path: str, multipliers: Multipliers) -> float:
    """The learning-rate factor of a parameter: that of the first pattern that matches its whole path, else 1."""
    return next((factor for pattern, factor in multipliers if re.fullmatch(pattern, path)), 1.0)


def is_frozen(path: str, multipliers: Multipliers) -> bool:
    """Whether a parameter's factor is 0."""
    return multiplier(path, multipliers) == 0.0


def check_patterns(paths: Iterable[str], multipliers: Multipliers, *, key: str) -> None:
    """Raises ValueError for a pattern that matches no path: it would silently train what should be frozen."""
    paths = list(paths)
    for pattern, _ in multipliers:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise ValueError(f"config key {key}: {pattern!r} matches no parameter; paths look like {paths[0]}")


def rates(optim: Optim, *, steps: int) -> Callable[[str], optax.Schedule]:
    """The schedule of each parameter, by its path, in a run of so many steps."""

    def rate(path: str) -> optax.Schedule:
        factor = multiplier(path, optim.lr_multipliers)
        end_factor = multiplier(path, (*optim.end_lr_multipliers, (".*", factor)))
        return warmup_cosine(lr=factor * optim.lr, end_lr=end_factor * optim.end_lr, warmup_steps=optim.warmup_steps,
                             steps=steps)

    return rate


def from_config(optim: Optim, *, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps."""
    return adamw(rates(optim, steps=steps), b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay,
                 clip_norm=optim.clip_norm)


@functools.cache  # parameters of one rate share a schedule, which a step then computes once
def warmup_cosine(*, lr: float, end_lr: float, warmup_steps: int, steps: int) -> optax.Schedule:
    """Linear from 0 to `lr` over `warmup_steps`, then half a cosine down to `end_lr` at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0 if warmup_steps else lr, lr, warmup_steps, steps, end_lr)


def adamw(rates: Callable[[str], optax.Schedule], *, b1: float, b2: float, weight_decay: float,
          clip_norm: float) -> optax.GradientTransformation:
    """AdamW over `{path: array}`.

    Weight decay acts on matrices only (paths that end in `kernel`). The gradient is clipped by its global norm over
    all learned parameters when `clip_norm` > 0.

    Args:
      rates: the learning rate's schedule of each path.
      b1: decay of the gradient's moving average.
      b2: that of its square.
      weight_decay: times the learning rate.
      clip_norm: the largest global norm; 0 is off.
    """
    is_kernel = lambda params: {path: path.endswith("kernel") for path in params}

    def scale(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        values = _rates_at(state.count, rates, updates)
        scaled = {path: -values[path] * update for path, update in updates.items()}
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(b1=b1, b2=b2),
        optax.add_decayed_weights(weight_decay, mask=is_kernel),
        optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), scale),
    )


def rates_by_part(rates: Callable[[str], optax.Schedule], paths: Iterable[str],
                  opt_state: Any) -> dict[str, jax.Array]:
    """The learning rate of this step by part; where its parameters differ, that of the fastest.

    Args:
      rates: as `adamw` got them.
      paths: of the learned parameters.
      opt_state: of `adamw`, before the step.
    """
    by_path = _rates_at(updates_made(opt_state), rates, paths)
    of_part = lambda part: [value for path, value in by_path.items() if flat.part(path) == part]
    return {part: jnp.max(jnp.stack(of_part(part))) for part in flat.parts(by_path)}


def updates_made(opt_state: Any) -> jax.Array:
    """int32: how many updates `adamw` has made, by which it reads its schedules. Skipped steps made none."""
    return opt_state[-1].count


def _rates_at(count: jax.Array, rates: Callable[[str], optax.Schedule], paths: Iterable[str]) -> dict[str, jax.Array]:
    """The learning rate of each path after `count` updates."""
    schedules = {path: rates(path) for path in paths}
    values = {schedule: jnp.asarray(schedule(count), jnp.float32) for schedule in dict.fromkeys(schedules.values())}
    return {path: values[schedule] for path, schedule in schedules.items()}


def moving_average(average: Mapping[str, jax.Array], new: Mapping[str, jax.Array], *, decay: float,
                   updates: jax.Array) -> dict[str, jax.Array]:
    """`d * average + (1 - d) * new`, entry by entry, in float32, with d = min(decay, (1 + updates) / (10 + updates)).

    d grows from 0.1 to `decay`: an average with one decay throughout would for the first 1 / (1 - decay) updates be
    made of the start above all. The formula is TensorFlow's, of `tf.train.ExponentialMovingAverage` with `num_updates`.

    Args:
      average: what has been averaged so far.
      new: the values that are to be added to it.
      decay: the d of a long run, in [0, 1).
      updates: int32, how many came before this one; see `updates_made`.
    """
    d = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return {path: d * old + (1 - d) * new[path].astype(jnp.float32) for path, old in average.items()}
