"""The training step: which parameters learn, in every shipped config, and what a step does to the rest."""

import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqrae_jax import build, optim
from vqrae_jax import config as config_lib
from vqrae_jax import step as step_lib

from .config_test import SHIPPED
from .conftest import REFERENCE

TINY_ENCODERS = {"nano": "siglip_vision", "google/siglip-large-patch16-384": "siglip",
                 "facebook/dinov2-with-registers-base": "dinov2_with_registers"}


def reduced(name: str) -> config_lib.Config:
    """A shipped config at toy size: a tiny encoder of the same family, few codes; everything else as shipped."""
    config = importlib.import_module(f"configs.{name}").get_config()
    tiny = TINY_ENCODERS[config.model.encoder.path]
    config.model.encoder.path = str(REFERENCE / tiny)
    config.model.quantizer.update(size=16, dim=32)
    config.data.image_size = 32
    if config.model.encoder.input_size:
        config.model.encoder.input_size = 32
    config.model.decoder.update(shape="symmetric", patch_size=0)
    config.model.dtype = "float32"
    config.train.update(steps=100, batch_size=4)
    config.optim.warmup_steps = 1
    config.init_from = ""
    return config_lib.parse(config)


class Run:
    """A config, its step and its state."""

    def __init__(self, config: config_lib.Config):
        self.config = config
        self.graphdef, _, _ = build.structure(config)
        self.optimizer, schedule = build.optimizer(config)
        self.params, self.codebook = build.initial_arrays(config)
        self.state, self.frozen = step_lib.init_state(config, self.graphdef, self.params, self.codebook,
                                                        self.optimizer)
        self.step = step_lib.make_train_step(config, self.graphdef, optimizer=self.optimizer, schedule=schedule,
                                             pixel_loss=build.PIXEL_LOSSES[config.loss.pixel])
        self.jitted = jax.jit(self.step)

    def images(self, seed=0, batch=4):
        size = self.config.data.image_size
        return np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), np.uint8)

    def train(self, steps):
        for i in range(steps):
            self.state, metrics = self.jitted(self.state, self.frozen, self.images(i))
        return {name: float(value) for name, value in metrics.items()}


# Per config: patterns of what changes in ten steps; everything else must stay as it is, bit for bit.
LEARNS = {
    "nano_stage1": ("quantizer/projection/.*", "decoder/.*"),
    "nano_stage2": ("quantizer/projection/.*", "decoder/.*", "encoder/.*"),
    "siglip_l_stage1": ("quantizer/projection/.*", "decoder/.*"),
    "siglip_l_stage2": ("quantizer/projection/.*", "decoder/.*", "encoder/.*"),
    "dinov2_b": ("quantizer/(codebook|counts|sums)", "decoder/.*"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_exactly_the_promised_parameters_learn(name):
    run = Run(reduced(name))
    learns = lambda path: optim.is_frozen(path, tuple((pattern, 0.0) for pattern in LEARNS[name]))
    before = {**run.params, **run.codebook}
    run.train(10)
    after = {**run.frozen.params, **run.state.params, **run.state.codebook}
    assert after.keys() == before.keys()
    for path in sorted(before):
        same = np.array_equal(before[path], after[path])
        assert same != learns(path), f"{path} {'did not learn' if same else 'changed'} in {name}"
    for path, value in run.frozen.teacher.items():
        np.testing.assert_array_equal(value, before[path])
    assert bool(run.frozen.teacher) == ("stage2" in name)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_learned_parameter_has_a_gradient_and_no_other_is_in_the_optimizer(name):
    run = Run(reduced(name))
    params, frozen = run.state.params, run.frozen
    # An optimizer that hands the gradient through: the step then adds it to the parameters.
    keep = optax.GradientTransformation(lambda params: (), lambda grads, state, params: (grads, state))
    step = step_lib.make_train_step(run.config, run.graphdef, optimizer=keep, schedule=lambda step: 0.0,
                                    pixel_loss=build.PIXEL_LOSSES[run.config.loss.pixel])
    new, _ = jax.jit(step)(run.state._replace(opt_state=()), frozen, run.images())
    for path in params:
        assert np.any(new.params[path] != params[path]), f"{path} has no gradient"
    assert all(optim.is_frozen(path, run.config.optim.lr_multipliers) for path in frozen.params)
    assert run.state.opt_state[1][0].mu.keys() == params.keys() == run.params.keys() - frozen.params.keys()


def test_the_step_is_traced_once(tiny_config):
    chex.clear_trace_counter()
    run = Run(config_lib.parse(tiny_config))
    step = jax.jit(chex.assert_max_traces(run.step, n=1))
    for i in range(3):
        run.state, _ = step(run.state, run.frozen, run.images(i))
    assert int(run.state.step) == 3


@pytest.mark.parametrize("kind", ["simvq", "ema"])
def test_accumulated_micro_batches_equal_one_batch(kind, tiny_config):
    tiny_config.model.quantizer.kind = kind
    tiny_config.optim.update(weight_decay=0.0, clip_norm=0.0, warmup_steps=0)
    whole = Run(config_lib.parse(tiny_config))
    tiny_config.train.accumulate = 2
    parts = Run(config_lib.parse(tiny_config))
    metrics, parted = whole.train(1), parts.train(1)
    for name in metrics:
        assert metrics[name] == pytest.approx(parted[name], rel=1e-4), name
    # Adam's first step is lr * sign of the gradient, which rounding may turn where it is almost zero.
    for path, value in whole.state.codebook.items():
        np.testing.assert_allclose(value, parts.state.codebook[path], rtol=1e-5, atol=1e-6)


def test_losses_are_reported_as_they_are_optimised(tiny_config):
    tiny_config.loss.update(pixel_weight=2.0, vq_weight=0.5, distill_weight=3.0)
    tiny_config.optim.lr_multipliers = ()
    run = Run(config_lib.parse(tiny_config))
    metrics = run.train(3)
    terms = [value for name, value in metrics.items() if name.startswith("loss/") and name != "loss/total"]
    assert metrics["loss/total"] == pytest.approx(sum(terms), rel=1e-5)
    assert set(metrics) >= {"loss/pixel", "loss/codebook", "loss/commitment", "loss/distill", "grad_norm", "lr"}
    assert metrics["loss/commitment"] == pytest.approx(0.25 * metrics["loss/codebook"], rel=1e-5)


def test_distillation_compares_the_student_with_its_teacher(tiny_config):
    """Zero where they are the same, and a step of distillation alone brings the student closer."""
    tiny_config.loss.update(pixel_weight=0.0, vq_weight=0.0, distill_weight=1.0)
    tiny_config.optim.update(lr_multipliers=(), weight_decay=0.0, warmup_steps=0, lr=1e-4, end_lr=1e-4)
    run = Run(config_lib.parse(tiny_config))
    _, metrics = run.jitted(run.state, run.frozen, run.images())
    assert float(metrics["loss/distill"]) == 0.0
    moved = {path: value * 1.05 if path.startswith("encoder/") else value for path, value in run.state.params.items()}
    state = run.state._replace(params=moved)
    distances = []
    for _ in range(5):
        state, metrics = run.jitted(state, run.frozen, run.images())
        distances.append(float(metrics["loss/distill"]))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > distances[-1] > 0


def test_distilling_a_frozen_encoder_is_refused(tiny_config):
    tiny_config.loss.distill_weight = 1.0
    with pytest.raises(ValueError, match=r"loss.distill_weight has no effect on an encoder that is frozen"):
        Run(config_lib.parse(tiny_config))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tiny_config):
    tiny_config.model.quantizer.kind = "ema"
    run = Run(config_lib.parse(tiny_config))
    run.train(2)
    broken = dict(run.state.params)
    broken["decoder/pixels/bias"] = broken["decoder/pixels/bias"].at[0].set(jnp.nan)
    state, metrics = run.jitted(run.state._replace(params=broken), run.frozen, run.images())
    chex.assert_trees_all_equal(state.params, broken)
    for name in ("codebook", "ema", "opt_state"):
        chex.assert_trees_all_equal(getattr(state, name), getattr(run.state, name))
    assert int(state.step) == 3
    assert (float(metrics["skipped_steps"]), float(metrics["skipped_in_a_row"])) == (1, 1)
    state, metrics = run.jitted(state._replace(params=run.state.params), run.frozen, run.images())
    assert (float(metrics["skipped_steps"]), float(metrics["skipped_in_a_row"])) == (1, 0)
    assert np.isfinite(float(metrics["loss/total"]))


def test_the_weight_average_starts_at_the_weights_and_includes_the_codebook(tiny_config):
    tiny_config.model.quantizer.kind = "ema"
    run = Run(config_lib.parse(tiny_config))
    averaged = lambda state: {**state.params, **state.codebook}
    before = averaged(run.state)
    chex.assert_trees_all_equal(run.state.ema, before)
    run.train(1)
    run.train(1)
    first = run.state
    run.train(1)
    for path, value in averaged(run.state).items():
        expected = 0.9 * first.ema[path] + 0.1 * value
        np.testing.assert_allclose(run.state.ema[path], expected, rtol=1e-5, atol=1e-7)
    assert np.any(run.state.ema["quantizer/codebook"] != before["quantizer/codebook"])
    tiny_config.model.quantizer.kind = "simvq"
    run = Run(config_lib.parse(tiny_config))
    assert run.state.ema.keys() == run.state.params.keys()  # frozen codes need no average


def test_learning_rates_differ_by_path(tiny_config):
    tiny_config.optim.update(lr=1e-3, end_lr=1e-3, warmup_steps=0, weight_decay=0.0, clip_norm=0.0,
                             lr_multipliers=(("encoder/.*/norm.*", 0.0), ("encoder/.*", 0.1)))
    run = Run(config_lib.parse(tiny_config))
    run.train(1)
    # Adam's first step moves every entry with a gradient by the learning rate.
    moved = lambda path: float(np.max(np.abs(run.state.params[path] - run.params[path])))
    assert moved("decoder/pixels/kernel") == pytest.approx(1e-3, rel=1e-2)
    assert moved("encoder/vit/patch_embedding/kernel") == pytest.approx(1e-4, rel=1e-2)
    assert "encoder/vit/transformer/blocks/norm1/scale" in run.frozen.params
    with pytest.raises(ValueError, match=r"'encodr/\.\*' matches no parameter"):
        optim.check_patterns(run.params, (("encodr/.*", 0.0),))


def test_the_schedule_warms_up_and_ends_at_the_end_rate():
    schedule = optim.warmup_cosine(lr=1.0, end_lr=0.1, warmup_steps=10, steps=110)
    assert [float(schedule(step)) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert float(schedule(60)) == pytest.approx(0.55)
    assert float(schedule(110)) == pytest.approx(0.1)


def test_codebook_from_data_is_a_codebook_of_the_encoders_tokens(tiny_config):
    tiny_config.model.quantizer.kind = "ema"
    run = Run(config_lib.parse(tiny_config))
    arrays = {**run.params, **run.codebook}
    images = [run.images(seed, batch=8) for seed in range(4)]
    values = step_lib.codebook_from_data(run.graphdef, arrays, images, seed=0)
    assert values.keys() == {"quantizer/codebook", "quantizer/counts", "quantizer/sums"}
    loss = lambda arrays: step_lib.flat.merge(run.graphdef, arrays)(images[0], train=False).quantized.losses
    assert loss({**arrays, **values})["commitment"] < 0.7 * loss(arrays)["commitment"]
