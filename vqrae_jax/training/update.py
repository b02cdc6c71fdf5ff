"""What one training step of any task consists of: weighted losses, gradients of micro-batches, and a guarded update."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from vqrae_jax.models import flat

Metrics = dict[str, jax.Array]
# name -> (weight, value): what is optimised and what is reported both follow from it.
Losses = Mapping[str, tuple[Any, jax.Array]]
State = TypeVar("State", bound=Any)
Tree = TypeVar("Tree")


def total(losses: Losses) -> jax.Array:
    """The weighted sum, whose gradient trains."""
    weighted = [weight * value for weight, value in losses.values()]
    return jnp.sum(jnp.stack(weighted)) if weighted else jnp.zeros(())


def reported(losses: Losses) -> Metrics:
    """Of each loss `loss/x`, as it is, `weight/x`, what it counts, and their product `weighted/x`."""
    scalars = {}
    for name, (weight, value) in losses.items():
        scalars |= {f"loss/{name}": value, f"weight/{name}": jnp.asarray(weight, jnp.float32),
                    f"weighted/{name}": weight * value}
    return jax.lax.stop_gradient(scalars)


def micro_batches(batch: Any, count: int) -> Any:
    """`[B, ...] -> [count, B / count, ...]`; each takes every count-th row, a share of every device's rows."""
    return jax.tree.map(lambda rows: rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1), batch)


def whole_batch(micro: Any) -> Any:
    """The inverse of `micro_batches`."""
    return jax.tree.map(lambda rows: rows.swapaxes(0, 1).reshape(-1, *rows.shape[2:]), micro)


def accumulate(gradients: Callable[[Any, jax.Array], tuple[Any, Tree]], batch: Any, rng: jax.Array, *, count: int,
               add: Callable[[Tree, Tree], Tree]) -> tuple[Any, Tree]:
    """Gradients and metrics of a batch from those of its micro-batches, one after the other.

    Args:
      gradients: `(micro-batch, rng) -> (means, statistics)`; means are averaged over the micro-batches.
      batch: a tree of arrays `[B, ...]`.
      rng: a key, split over the micro-batches.
      count: their number.
      add: two micro-batches' statistics together.
    """
    if count == 1:
        return gradients(batch, rng)
    micro = (micro_batches(batch, count), jax.random.split(rng, count))

    def add_one(so_far, one):
        means, statistics = gradients(*one)
        sums, all_statistics = so_far
        return (jax.tree.map(jnp.add, sums, means), add(all_statistics, statistics)), None

    first = jax.tree.map(lambda rows: rows[0], micro)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, *first))
    (sums, statistics), _ = jax.lax.scan(add_one, zeros, micro)
    return jax.tree.map(lambda x: x / count, sums), statistics


def all_finite(scalars: Metrics, *gradients: Any) -> tuple[jax.Array, list[jax.Array]]:
    """Whether every metric and every gradient's norm is finite, and these norms."""
    norms = [optax.tree.norm(gradient) for gradient in gradients]
    return jnp.all(jnp.isfinite(jnp.stack([*scalars.values(), *norms]))), norms


def guarded(state: State, finite: jax.Array, update: Callable[[], State]) -> State:
    """`update()`, or the state as it is where the step is not finite; the counters go on either way.

    Args:
      state: a NamedTuple with `step`, `skipped` and `skipped_in_a_row`, int32.
      finite: bool.
      update: the new state; what it makes of the three counters does not count.
    """
    # One pass over the state: choosing afterwards, array by array, would be a second one.
    new = jax.lax.cond(finite, update, lambda: state)
    return new._replace(step=state.step + 1, skipped=state.skipped + ~finite,
                        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1))


def norms_by_part(gradients: flat.Arrays) -> Metrics:
    """`{part: norm}` of a gradient."""
    return {part: optax.tree.norm(flat.under(f"{part}/", gradients)) for part in flat.parts(gradients)}
