"""One training step and one evaluation step, as pure functions of their arguments.

    train_step(state, frozen, batch) -> (state, metrics)

What learns is in `TrainState`; what does not is in `Frozen`, an argument of its own that is neither donated nor saved
with every checkpoint. Which parameters are frozen is decided by their paths (`optim.lr_multipliers`), so the two stages
are two configs and nothing here asks for the stage.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vqrae_jax import losses, metrics, optim
from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.quantizers import add_stats, code_usage, perplexity

Metrics = dict[str, jax.Array]
PixelLoss = Callable[[jax.Array, jax.Array], jax.Array]


class TrainState(NamedTuple):
    """Everything that changes during training.

    Attributes:
      step: int32, batches seen, skipped ones included.
      params: the learned parameters.
      codebook: frozen codes and EMA statistics: saved, but not learned by gradient.
      opt_state: of the optimizer.
      ema: moving average of `params` and of the codebook state that moves; empty when it is off.
      skipped: int32, steps whose loss or gradient was not finite, and which changed nothing.
      skipped_in_a_row: int32, how many of those came last.
    """

    step: jax.Array
    params: Arrays
    codebook: Arrays
    opt_state: optax.OptState
    ema: Arrays
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Frozen(NamedTuple):
    """Everything that does not change.

    Attributes:
      params: the model's frozen parameters.
      teacher: the encoder as it was at the start, under the paths it has in the model, for distillation; empty when
        the distillation loss is off.
    """

    params: Arrays
    teacher: Arrays


TrainStep = Callable[[TrainState, Frozen, Any], tuple[TrainState, Metrics]]
EvalStep = Callable[[Arrays, jax.Array, jax.Array], Metrics]


def init_state(config: Config, graphdef: nnx.GraphDef, params: Mapping[str, jax.Array],
               codebook: Mapping[str, jax.Array], optimizer: optax.GradientTransformation) -> tuple[TrainState, Frozen]:
    """Splits a model's parameters into what learns and what is frozen, and starts optimizer, EMA and teacher.

    Raises:
      ValueError: distillation of an encoder that is frozen.
    """
    multipliers = config.optim.lr_multipliers
    learned = {path: value for path, value in params.items() if not optim.is_frozen(path, multipliers)}
    frozen = {path: value for path, value in params.items() if path not in learned}
    # Copies: an array that stands in two places cannot be donated.
    copy = lambda arrays: jax.tree.map(jnp.copy, arrays)
    moving = {f"quantizer/{name}" for name in flat.merge(graphdef, params, codebook).quantizer.moving_state}
    averaged = {**learned, **{path: codebook[path] for path in moving}}
    ema = copy(averaged) if config.optim.ema_decay else {}
    encoder = {path: value for path, value in params.items() if path.startswith("encoder/")}
    if config.loss.distill_weight and not encoder.keys() & learned.keys():
        raise ValueError("config key loss.distill_weight has no effect on an encoder that is frozen: "
                         "set it to 0, or let optim.lr_multipliers give the encoder a rate")
    teacher = copy(encoder) if config.loss.distill_weight else {}
    zero = lambda: jnp.zeros((), jnp.int32)
    state = TrainState(step=zero(), params=learned, codebook=dict(codebook), opt_state=optimizer.init(learned),
                       ema=ema, skipped=zero(), skipped_in_a_row=zero())
    return state, Frozen(frozen, teacher)


def codebook_from_data(graphdef: nnx.GraphDef, arrays: Arrays, images: Sequence[np.ndarray], *, seed: int) -> Arrays:
    """New values for the quantizer's arrays that make its codes the k-means centres of the encoder's features.

    Args:
      graphdef: the model's structure.
      arrays: all its parameters and codebook state.
      images: batches of uint8 `[B, H, W, 3]` whose features are clustered.
      seed: of the clustering.
    """
    features = jax.jit(lambda arrays, images: flat.merge(graphdef, arrays).features(images))
    tokens = jnp.concatenate([features(arrays, batch) for batch in images])
    tokens = tokens.reshape(-1, tokens.shape[-1])
    cluster = jax.jit(lambda arrays, tokens: flat.merge(graphdef, arrays).quantizer.init_from_data(
        tokens, rng=jax.random.key(seed)))
    return flat.prefixed("quantizer/", cluster(arrays, tokens))


def make_train_step(config: Config, graphdef: nnx.GraphDef, *, optimizer: optax.GradientTransformation,
                    schedule: optax.Schedule, pixel_loss: PixelLoss) -> TrainStep:
    """The training step for a config, its optimizer and its pixel loss.

    Returns:
      `train_step(state, frozen, images) -> (state, metrics)`, to be jitted with `state` donated. `images` is uint8
      `[B, H, W, 3]`, the global batch. Metrics are float32 scalars; `loss/*` are the weighted terms that add up to
      `loss/total`. A step whose loss, gradient or update is not finite changes nothing but the counters.
    """
    weights = config.loss

    def loss_fn(params: Arrays, codebook: Arrays, frozen: Frozen, images: jax.Array):
        images = images.astype(jnp.float32) / 255
        output = flat.merge(graphdef, params, frozen.params, codebook)(images, train=True)
        terms = {"pixel": weights.pixel_weight * pixel_loss(output.images, images)}
        terms |= {name: weights.vq_weight * value for name, value in output.quantized.losses.items()}
        if weights.distill_weight:
            teacher = flat.merge(graphdef, params, frozen.params, codebook, frozen.teacher)
            target = jax.lax.stop_gradient(teacher.features(images))
            terms["distill"] = weights.distill_weight * losses.l2(output.features, target)
        total = jnp.sum(jnp.stack(list(terms.values())))
        return total, (terms | {"total": total}, output.quantized.stats)

    def gradients(state: TrainState, frozen: Frozen, images: jax.Array):
        """Means over micro-batches of gradients and losses, sums of the codes' statistics."""
        grad_fn = jax.grad(loss_fn, has_aux=True)
        if config.train.accumulate == 1:
            grads, (terms, stats) = grad_fn(state.params, state.codebook, frozen, images)
            return grads, terms, stats
        # Each micro-batch takes every accumulate-th image: a share of every device's images.
        parts = images.reshape(-1, config.train.accumulate, *images.shape[1:]).swapaxes(0, 1)
        one = lambda part: grad_fn(state.params, state.codebook, frozen, part)

        def add(total, part):
            grads, (terms, stats) = one(part)
            total_means, total_stats = total
            return (jax.tree.map(jnp.add, total_means, (grads, terms)), add_stats(total_stats, stats)), None

        grads, (terms, stats) = jax.eval_shape(one, parts[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ((grads, terms), stats))
        (sums, stats), _ = jax.lax.scan(add, zeros, parts)
        grads, terms = jax.tree.map(lambda x: x / config.train.accumulate, sums)
        return grads, terms, stats

    def train_step(state: TrainState, frozen: Frozen, images: jax.Array) -> tuple[TrainState, Metrics]:
        grads, terms, stats = gradients(state, frozen, images)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        quantizer = flat.merge(graphdef, params, frozen.params, state.codebook).quantizer
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        codebook = state.codebook | flat.prefixed("quantizer/", quantizer.next_state(stats, rng=rng))
        ema = optim.moving_average(state.ema, {**params, **codebook}, config.optim.ema_decay)

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(terms["total"]) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
        new = (params, codebook, opt_state, ema)
        old = (state.params, state.codebook, state.opt_state, state.ema)
        params, codebook, opt_state, ema = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        skipped = state.skipped + ~finite
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        lr = schedule(state.step - state.skipped)  # a skipped step does not move the schedule
        state = TrainState(state.step + 1, params, codebook, opt_state, ema, skipped, in_a_row)
        return state, {
            **{f"loss/{name}": value for name, value in terms.items()},
            "code_usage_batch": code_usage(stats["counts"]),
            "code_perplexity_batch": perplexity(stats["counts"]),
            "grad_norm": grad_norm,
            "lr": jnp.asarray(lr, jnp.float32),
            "skipped_steps": skipped,
            "skipped_in_a_row": in_a_row,
        }

    return train_step


def make_eval_step(graphdef: nnx.GraphDef) -> EvalStep:
    """The evaluation step: `eval_step(arrays, images, valid) -> results`.

    `arrays` are all the model's parameters and codebook state, `images` uint8 `[B, H, W, 3]`, `valid` bool `[B]`.
    Results: `psnr` and `ssim` `[B]`, `features` `[B, d]` (the mean of the continuous tokens), `counts` [K] int32 (uses
    of each code by the valid images), `images` float32 `[B, H, W, 3]` in [0, 1]. Rows that are not valid mean nothing.
    """

    def eval_step(arrays: Arrays, images: jax.Array, valid: jax.Array) -> Metrics:
        images = images.astype(jnp.float32) / 255
        model = flat.merge(graphdef, arrays)
        output = model(images, train=False)
        decoded = jnp.clip(output.images, 0, 1)
        indices = output.quantized.indices
        uses = jnp.broadcast_to(valid[:, None], indices.shape).astype(jnp.int32)
        return {
            "psnr": metrics.psnr(images, decoded),
            "ssim": metrics.ssim(images, decoded),
            "features": output.features.mean(axis=1),
            "counts": jax.ops.segment_sum(uses.reshape(-1), indices.reshape(-1), model.quantizer.num_codes),
            "images": decoded,
        }

    return eval_step
