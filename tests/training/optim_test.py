"""Optimizers: what is clipped, what decays, what schedules do."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqrae_jax.training import optim


def constant(rate: float):
    return lambda path: optax.constant_schedule(rate)


def test_only_matrices_decay():
    params = {"a/kernel": jnp.ones((2, 2)), "a/bias": jnp.ones(2), "norm/scale": jnp.ones(2)}
    optimizer = optim.adamw(constant(0.1), b1=0.9, b2=0.999, weight_decay=0.5, clip_norm=0.0)
    gradient = {path: jnp.zeros_like(value) for path, value in params.items()}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a/kernel"], -0.05, rtol=1e-6)
    assert not np.any(updates["a/bias"]) and not np.any(updates["norm/scale"])


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, 10.0), (1.0, 1.0), (20.0, 10.0)])
def test_the_gradient_is_clipped_by_its_norm_over_all_parameters(clip_norm, expected):
    gradient = {"a/kernel": jnp.full((3, 3), 2.0), "b/bias": jnp.full(4, 4.0)}  # of norm 10
    optimizer = optim.adamw(constant(0.1), b1=0.5, b2=0.999, weight_decay=0.0, clip_norm=clip_norm)
    _, state = optimizer.update(gradient, optimizer.init(gradient), gradient)
    assert float(optax.tree.norm(state[1].mu)) == pytest.approx(0.5 * expected, rel=1e-6)


def test_the_schedule_warms_up_and_ends_at_the_end_rate():
    schedule = optim.warmup_cosine(lr=1.0, end_lr=0.1, warmup_steps=10, steps=110)
    assert [float(schedule(step)) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert float(schedule(60)) == pytest.approx(0.55)
    assert float(schedule(110)) == pytest.approx(0.1)


def test_the_moving_average_has_a_warm_up():
    """Its decay is min(decay, (1 + t) / (10 + t)), t updates having been made before."""
    average = {"x": jnp.float32(0)}
    for t, decay in ((0, 1 / 10), (1, 2 / 11), (90, 91 / 100), (1000, 0.99)):
        new = optim.moving_average(average, {"x": jnp.float32(1)}, decay=0.99, updates=jnp.int32(t))
        assert float(new["x"]) == pytest.approx(1 - decay, rel=1e-6)
        assert new["x"].dtype == jnp.float32 and not new["x"].weak_type
