"""One training step and one evaluation step, as pure functions of their arguments.

    train_step(state, frozen, images, gan=...) -> (state, metrics)

What learns is in `TrainState`; what does not is in `Frozen`, an argument of its own that is neither donated nor saved
with every checkpoint. Which parameters are frozen is decided by their paths (`optim.lr_multipliers`), so the two stages
are two configs and nothing here asks for the stage.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vqrae_jax import losses, metrics, optim
from vqrae_jax.config import Config
from vqrae_jax.models import flat
from vqrae_jax.models.discriminators import round_to_8_bits
from vqrae_jax.models.flat import Arrays
from vqrae_jax.models.placement import split_batch
from vqrae_jax.models.quantizers import add_stats, code_usage, perplexity

Metrics = dict[str, jax.Array]
Augment = Callable[[jax.Array, jax.Array], jax.Array]
BACKBONE = "discriminator/backbone/"


class Gan(NamedTuple):
    """The adversarial part of a step.

    Attributes:
      graphdef: the discriminator's structure; what is under its `backbone` is frozen.
      optimizer: of the discriminator.
      schedule: its learning rate over the steps in which it learns.
      augment: `(images, rng) -> images`, what it sees of real and fake images.
      discriminator_loss: `(real logits, fake logits) -> scalar`.
      generator_loss: `fake logits -> scalar`.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    augment: Augment
    discriminator_loss: Callable[[jax.Array, jax.Array], jax.Array]
    generator_loss: Callable[[jax.Array], jax.Array]


class Parts(NamedTuple):
    """What a training step is made of besides arrays; `build.parts` makes it from a config.

    Attributes:
      graphdef: the model's structure.
      optimizer: of everything but the discriminator.
      learning_rate: a parameter's path -> its schedule.
      pixel_loss: `(images, images) -> scalar`.
      perceptual: by name, a network's structure and its share of the perceptual loss; shares sum to 1.
      gan: None without a discriminator.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[str], optax.Schedule]
    pixel_loss: Callable[[jax.Array, jax.Array], jax.Array]
    perceptual: dict[str, tuple[nnx.GraphDef, float]]
    gan: Gan | None


class GanState(NamedTuple):
    """What of the discriminator changes; empty without one.

    Attributes:
      params: its learned parameters, under `discriminator/`.
      state: the vectors of its spectral normalisation, likewise.
      opt_state: of its optimizer.
      mean_logits: [2], moving averages of its mean logits of real and of fake images.
    """

    params: Arrays
    state: Arrays
    opt_state: optax.OptState
    mean_logits: jax.Array


class TrainState(NamedTuple):
    """Everything that changes during training.

    Attributes:
      step: int32, batches seen, skipped ones included.
      params: the learned parameters.
      codebook: frozen codes and statistics: saved, but not learned by gradient.
      opt_state: of the optimizer.
      ema: moving average of `params` and of the codebook state that moves; empty when it is off.
      gan: of the discriminator.
      code_counts: [K] int32, uses of each code since the last multiple of `train.log_every` steps.
      skipped: int32, steps whose loss or gradient was not finite, and which changed nothing.
      skipped_in_a_row: int32, how many of those came last.
    """

    step: jax.Array
    params: Arrays
    codebook: Arrays
    opt_state: optax.OptState
    ema: Arrays
    gan: GanState
    code_counts: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


class Frozen(NamedTuple):
    """Everything that does not change.

    Attributes:
      params: the model's frozen parameters.
      teacher: the encoder as it was at the start, under the paths it has in the model, for distillation; empty when
        the distillation loss is off.
      networks: those of the perceptual loss and the discriminator's backbone, under their names.
    """

    params: Arrays
    teacher: Arrays
    networks: Arrays


class TrainStep(Protocol):
    """See `make_train_step`."""

    def __call__(self, state: TrainState, frozen: Frozen, images: Any, *, gan: bool) -> tuple[TrainState, Metrics]: ...


EvalStep = Callable[[Arrays, jax.Array, jax.Array], Metrics]


def init_state(config: Config, parts: Parts, params: Mapping[str, jax.Array], codebook: Mapping[str, jax.Array],
               networks: Mapping[str, jax.Array], network_state: Mapping[str, jax.Array]) -> tuple[TrainState, Frozen]:
    """Splits arrays into what learns and what is frozen, and starts optimizers, EMA and teacher.

    Args:
      config: of the run.
      parts: from `build.parts`.
      params: all the model's parameters.
      codebook: its codebook state.
      networks: parameters of the losses' networks, discriminator included.
      network_state: what else they keep.

    Raises:
      ValueError: distillation of an encoder that is frozen.
    """
    multipliers = config.optim.lr_multipliers
    learned = {path: value for path, value in params.items() if not optim.is_frozen(path, multipliers)}
    frozen = {path: value for path, value in params.items() if path not in learned}
    # Copies: an array that stands in two places cannot be donated.
    copy = lambda arrays: jax.tree.map(jnp.copy, arrays)
    quantizer = flat.merge(parts.graphdef, params, codebook).quantizer
    moving = {f"quantizer/{name}" for name in quantizer.moving_state}
    averaged = {**learned, **{path: codebook[path] for path in moving}}
    ema = copy(averaged) if config.optim.ema_decay else {}
    encoder = {path: value for path, value in params.items() if path.startswith("encoder/")}
    if config.loss.distill_weight and not encoder.keys() & learned.keys():
        raise ValueError("config key loss.distill_weight has no effect on an encoder that is frozen: "
                         "set it to 0, or let optim.lr_multipliers give the encoder a rate")
    teacher = copy(encoder) if config.loss.distill_weight else {}
    discriminator = {path: value for path, value in networks.items()
                     if path.startswith("discriminator/") and not path.startswith(BACKBONE)}
    zero = lambda shape=(), dtype=jnp.int32: jnp.zeros(shape, dtype)
    gan = GanState(params=discriminator, state=dict(network_state),
                   opt_state=parts.gan.optimizer.init(discriminator) if parts.gan else (),
                   mean_logits=zero((2,), jnp.float32))
    state = TrainState(step=zero(), params=learned, codebook=dict(codebook), opt_state=parts.optimizer.init(learned),
                       ema=ema, gan=gan, code_counts=zero((quantizer.num_codes,)), skipped=zero(),
                       skipped_in_a_row=zero())
    networks = {path: value for path, value in networks.items() if path not in discriminator}
    return state, Frozen(frozen, teacher, networks)


def codebook_from_data(config: Config, graphdef: nnx.GraphDef, arrays: Arrays,
                       images: Sequence[jax.Array]) -> Arrays:
    """New values for the quantizer's arrays that make its codes the k-means centres of the encoder's features.

    Args:
      config: of the run, whose batches are split into `train.accumulate` micro-batches.
      graphdef: the model's structure.
      arrays: all its parameters and codebook state.
      images: batches of uint8 `[B, H, W, 3]` whose features are clustered.
    """

    @jax.jit
    def features(arrays, images):
        model, micro = flat.merge(graphdef, arrays), _micro_batches(images, config.train.accumulate)
        tokens = jax.lax.map(lambda part: model.features(split_batch(part)), micro)
        return tokens.swapaxes(0, 1).reshape(-1, tokens.shape[-1])

    tokens = jnp.concatenate([features(arrays, batch) for batch in images])
    cluster = jax.jit(lambda arrays, tokens: flat.merge(graphdef, arrays).quantizer.init_from_data(
        tokens, rng=jax.random.key(config.seed)))
    return flat.prefixed("quantizer/", cluster(arrays, tokens))


def _micro_batches(images: jax.Array, count: int) -> jax.Array:
    """`[B, ...] -> [count, B / count, ...]`; each takes every count-th image, a share of every device's images."""
    return images.reshape(-1, count, *images.shape[1:]).swapaxes(0, 1)


def make_train_step(config: Config, parts: Parts) -> TrainStep:
    """The training step of a config.

    Returns:
      `train_step(state, frozen, images, gan=...) -> (state, metrics)`, to be jitted with `state` donated and `gan`
      static. `images` is uint8 `[B, H, W, 3]`, the global batch; `gan` says whether the discriminator learns in this
      step, and without it the step holds nothing of the discriminator. A step whose loss or gradient is not finite
      changes nothing but the counters.

      Metrics are float32 scalars: `loss/x` the raw losses, `weight/x` their weights, `weighted/x` the products, whose
      sum is `loss/total` (without `discriminator` and `lecam`, which are the discriminator's own), all of them means
      over micro-batches; `grad_norm`, also by part; `lr/part`; usage and perplexity of codes, in the batch and since
      the last multiple of `train.log_every` steps; and the discriminator's under `gan/`.
    """

    def train_step(state: TrainState, frozen: Frozen, images: jax.Array, *, gan: bool) -> tuple[TrainState, Metrics]:
        rng, restart_rng = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        grads, gan_grads, scalars, stats = _gradients(config, parts, state, frozen, images, rng=rng, gan=gan)
        norms = [optax.tree.norm(tree) for tree in (grads, gan_grads)]
        finite = jnp.all(jnp.isfinite(jnp.stack([*scalars.values(), *norms])))

        def update() -> TrainState:
            updates, opt_state = parts.optimizer.update(grads, state.opt_state, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            quantizer = flat.merge(parts.graphdef, params, frozen.params, state.codebook).quantizer
            codebook = state.codebook | flat.prefixed("quantizer/", quantizer.next_state(stats, rng=restart_rng))
            ema = optim.moving_average(state.ema, {**params, **codebook}, config.optim.ema_decay)
            new_gan = _update_discriminator(config, parts, state, frozen, gan_grads, scalars) if gan else state.gan
            return state._replace(params=params, codebook=codebook, opt_state=opt_state, ema=ema, gan=new_gan)

        # One pass over the state: choosing afterwards, array by array, would be a second one.
        new = jax.lax.cond(finite, update, lambda: state)
        skipped = state.skipped + ~finite
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        code_counts = jnp.where(state.step % config.train.log_every == 0, 0, state.code_counts) + stats["counts"]
        all_grads, rates = grads | gan_grads, _rates(parts.learning_rate, grads, state.opt_state)
        if parts.gan and gan:
            schedule = parts.gan.schedule
            rates |= _rates(lambda path: schedule, gan_grads, state.gan.opt_state)
        return new._replace(step=state.step + 1, code_counts=code_counts, skipped=skipped,
                            skipped_in_a_row=in_a_row), {
            **scalars,
            "code_usage_batch": code_usage(stats["counts"]),
            "code_perplexity_batch": perplexity(stats["counts"]),
            "code_usage_window": code_usage(code_counts),
            "code_perplexity_window": perplexity(code_counts),
            "grad_norm": norms[0],
            **{f"grad_norm/{part}": optax.tree.norm(flat.under(f"{part}/", all_grads)) for part in _parts(all_grads)},
            **{f"lr/{part}": rate for part, rate in rates.items()},
            "skipped_steps": skipped,
            "skipped_in_a_row": in_a_row,
        }

    return train_step


def _gradients(config: Config, parts: Parts, state: TrainState, frozen: Frozen, images: jax.Array, *, rng: jax.Array,
               gan: bool) -> tuple[Arrays, Arrays, Metrics, dict[str, jax.Array]]:
    """Means over micro-batches of gradients and metrics, sums of the codes' statistics."""

    def one(part: jax.Array, rng: jax.Array):
        """Gradients of the model and of the discriminator, metrics, and statistics of one micro-batch."""
        part = split_batch(part).astype(jnp.float32) / 255
        noise_rng, generator_rng, real_rng, fake_rng = jax.random.split(rng, 4)
        loss = lambda params: _model_loss(config, parts, params, state, frozen, part, gan=gan, noise_rng=noise_rng,
                                          augment_rng=generator_rng)
        grads, (scalars, stats, fakes) = jax.grad(loss, has_aux=True)(state.params)
        if not gan:
            return (grads, {}, scalars), stats
        gan_loss = lambda params: _discriminator_loss(config, parts, params, state.gan, frozen, part, fakes,
                                                      rngs=(real_rng, fake_rng))
        gan_grads, gan_scalars = jax.grad(gan_loss, has_aux=True)(state.gan.params)
        return (grads, gan_grads, scalars | gan_scalars), stats

    count = config.train.accumulate
    if count == 1:
        (grads, gan_grads, scalars), stats = one(images, rng)
        return grads, gan_grads, scalars, stats
    micro = (_micro_batches(images, count), jax.random.split(rng, count))

    def add(total, part):
        means, stats = one(*part)
        total_means, total_stats = total
        return (jax.tree.map(jnp.add, total_means, means), add_stats(total_stats, stats)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, micro[0][0], micro[1][0]))
    (sums, stats), _ = jax.lax.scan(add, zeros, micro)
    return *jax.tree.map(lambda x: x / count, sums), stats


def _model_loss(config: Config, parts: Parts, params: Arrays, state: TrainState, frozen: Frozen, images: jax.Array, *,
                gan: bool, noise_rng: jax.Array, augment_rng: jax.Array):
    """A scalar with the gradient of the model's whole loss; metrics, statistics of the codes, and the reconstruction.

    Losses of the reconstruction are differentiated with respect to its pixels; what is pulled back through the decoder
    is the sum of these cotangents. So the adaptive GAN weight, which needs the gradients of two losses at the decoder's
    last layer (VQGAN, arXiv 2012.09841, equation 7), costs two small matmuls and no second pass.
    """
    weights = config.loss
    model = flat.merge(parts.graphdef, params, frozen.params, state.codebook)
    output = model(images, train=True, rng=noise_rng)
    fakes = jax.lax.stop_gradient(output.images)

    cotangent, raw = jax.grad(lambda fakes: _reconstruction_loss(config, parts, frozen, images, fakes),
                              has_aux=True)(fakes)
    applied = {"pixel": jnp.asarray(weights.pixel_weight)}
    if parts.perceptual:
        applied["perceptual"] = jnp.asarray(weights.perceptual_weight)
    other = {name: weights.vq_weight * model.quantizer.loss_weights[name] for name in output.quantized.losses}
    raw |= output.quantized.losses
    if weights.distill_weight:
        teacher = flat.merge(parts.graphdef, params, frozen.params, state.codebook, frozen.teacher)
        target = jax.lax.stop_gradient(teacher.features(images))
        raw["distill"] = losses.l2(output.features, target)
        other["distill"] = weights.distill_weight
    surrogate = sum((weight * raw[name] for name, weight in other.items()), jnp.zeros(()))
    extra = {}
    if gan:
        ramp = _ramp(config, state.step)
        generator_loss = jax.value_and_grad(
            lambda fakes: _generator_loss(parts, state.gan, frozen, fakes, rng=augment_rng))
        # While only the discriminator learns, the decoder's pass through it is left out.
        raw["gan"], gan_cotangent = jax.lax.cond(
            ramp > 0, generator_loss, lambda fakes: (jnp.zeros(()), jnp.zeros_like(fakes)), fakes)
        applied["gan"] = config.gan.weight * ramp
        if config.gan.adaptive:
            adaptive = _adaptive_weight(model.decoder, output.hidden, cotangent, gan_cotangent,
                                        largest=config.gan.max_adaptive_weight)
            applied["gan"], extra["gan/adaptive_weight"] = applied["gan"] * adaptive, adaptive
        cotangent = cotangent + applied["gan"] * gan_cotangent
    surrogate += jnp.sum(jax.lax.stop_gradient(cotangent) * output.images)

    applied |= {name: jnp.asarray(weight) for name, weight in other.items()}
    weighted = {name: weight * raw[name] for name, weight in applied.items()}
    total = jnp.sum(jnp.stack(list(weighted.values())))
    scalars = {**_named("loss", raw), "loss/total": total, **_named("weight", applied), **_named("weighted", weighted),
               **extra}
    return surrogate, (jax.lax.stop_gradient(scalars), output.quantized.stats, fakes)


def _reconstruction_loss(config: Config, parts: Parts, frozen: Frozen, images: jax.Array,
                         fakes: jax.Array) -> tuple[jax.Array, Metrics]:
    """The weighted sum of pixel and perceptual loss, and both raw."""
    raw = {"pixel": parts.pixel_loss(fakes, images)}
    total = config.loss.pixel_weight * raw["pixel"]
    if not parts.perceptual:
        return total, raw
    shared = []
    for name, (graphdef, share) in parts.perceptual.items():
        network = flat.merge(graphdef, flat.under(f"{name}/", frozen.networks))
        features = jax.checkpoint(network) if config.loss.perceptual.remat else network
        raw[name] = jnp.mean(network.distance(features(fakes), jax.lax.stop_gradient(network(images))))
        shared.append(share * raw[name])
    raw["perceptual"] = jnp.sum(jnp.stack(shared))
    return total + config.loss.perceptual_weight * raw["perceptual"], raw


def _adaptive_weight(decoder: Any, hidden: jax.Array, reconstruction: jax.Array, adversarial: jax.Array, *,
                     largest: float) -> jax.Array:
    """|d reconstruction / d w| / (|d adversarial / d w| + 1e-6) in [0, largest], w the decoder's last matrix.

    Args:
      decoder: whose `to_images` is that layer.
      hidden: what it saw.
      reconstruction: gradient of the one loss with respect to the pixels.
      adversarial: that of the other.
      largest: the clamp.
    """
    graphdef, arrays, _ = flat.split(decoder)
    last_layer = lambda kernel: flat.merge(graphdef, arrays, {"pixels/kernel": kernel}).to_images(hidden)
    _, pull_back = jax.vjp(last_layer, arrays["pixels/kernel"])
    norms = [jnp.linalg.norm(pull_back(cotangent)[0]) for cotangent in (reconstruction, adversarial)]
    return jnp.clip(norms[0] / (norms[1] + 1e-6), 0.0, largest)


def _ramp(config: Config, step: jax.Array) -> jax.Array:
    """The share of the GAN's weight at a step: 0 before `gan.start_step`, then rising to 1 over `gan.ramp_steps`."""
    since = step - config.gan.start_step
    return jnp.where(since < 0, 0.0, jnp.clip((since + 1) / (config.gan.ramp_steps + 1), 0.0, 1.0))


def _discriminator(parts: Parts, params: Arrays, state: GanState, frozen: Frozen) -> Any:
    assert parts.gan, "a step with gan=True needs a discriminator"
    return flat.merge(parts.gan.graphdef, flat.under("discriminator/", {**frozen.networks, **params, **state.state}))


def _generator_loss(parts: Parts, state: GanState, frozen: Frozen, fakes: jax.Array, *, rng: jax.Array) -> jax.Array:
    """What the decoder gains from being taken for real."""
    assert parts.gan
    discriminator = _discriminator(parts, state.params, state, frozen)
    return parts.gan.generator_loss(discriminator(parts.gan.augment(fakes, rng)))


def _discriminator_loss(config: Config, parts: Parts, params: Arrays, state: GanState, frozen: Frozen,
                        images: jax.Array, fakes: jax.Array, *, rngs: tuple[jax.Array, jax.Array]):
    """The discriminator's loss on real images and on reconstructions, rounded to 8 bits like real ones; metrics."""
    assert parts.gan
    discriminator = _discriminator(parts, params, state, frozen)
    # One pass, a real image beside each reconstruction: every image is normalised by itself.
    both = jnp.stack([parts.gan.augment(images, rngs[0]), parts.gan.augment(round_to_8_bits(fakes), rngs[1])], axis=1)
    logits = discriminator(split_batch(both.reshape(-1, *both.shape[2:])))
    real, fake = jnp.moveaxis(logits.reshape(len(images), 2, *logits.shape[1:]), 1, 0)
    raw, applied = {"discriminator": parts.gan.discriminator_loss(real, fake)}, {"discriminator": jnp.ones(())}
    if config.gan.lecam_weight:
        raw["lecam"] = losses.lecam(jnp.mean(real), jnp.mean(fake), *state.mean_logits)
        applied["lecam"] = jnp.asarray(config.gan.lecam_weight)
    weighted = {name: weight * raw[name] for name, weight in applied.items()}
    return jnp.sum(jnp.stack(list(weighted.values()))), {
        **_named("loss", raw), **_named("weight", applied), **_named("weighted", weighted),
        "gan/logits_real": jnp.mean(real), "gan/logits_fake": jnp.mean(fake)}


def _update_discriminator(config: Config, parts: Parts, state: TrainState, frozen: Frozen, grads: Arrays,
                          scalars: Metrics) -> GanState:
    """The discriminator's state after the step."""
    assert parts.gan
    old = state.gan
    updates, opt_state = parts.gan.optimizer.update(grads, old.opt_state, old.params)
    params: Any = optax.apply_updates(old.params, updates)
    discriminator = _discriminator(parts, params, old, frozen)
    mean_logits = jnp.stack([scalars["gan/logits_real"], scalars["gan/logits_fake"]])
    decay = config.gan.lecam_decay
    return GanState(params=params, state=old.state | flat.prefixed("discriminator/", discriminator.next_state()),
                    opt_state=opt_state, mean_logits=decay * old.mean_logits + (1 - decay) * mean_logits)


def _named(prefix: str, values: Mapping[str, jax.Array]) -> Metrics:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _parts(paths: Mapping[str, Any]) -> list[str]:
    return sorted({path.split("/")[0] for path in paths})


def _rates(learning_rate: Callable[[str], optax.Schedule], paths: Mapping[str, Any],
           opt_state: Any) -> dict[str, jax.Array]:
    """The learning rate of this step by part; where its parameters differ, that of the fastest."""
    count = opt_state[-1].count  # of updates made, by which the optimizer reads its schedules
    rates = {path: jnp.asarray(learning_rate(path)(count), jnp.float32) for path in paths}
    return {part: jnp.max(jnp.stack(list(flat.under(f"{part}/", rates).values()))) for part in _parts(paths)}


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
