"""Bootstrap intervals of samples whose spread is known."""

import numpy as np
import pytest

from vqrae_jax.metrics.intervals import bootstrap


@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_an_interval_covers_the_mean_and_narrows_with_the_root_of_images(spread):
    values = np.random.default_rng(3).normal(20, spread, 1600)
    low, high = bootstrap(values)
    assert low < values.mean() < high and bootstrap(values) == (low, high)
    assert high - low == pytest.approx(2 * 1.96 * spread / 40, rel=0.15)
    low, high = bootstrap(values[:100])
    assert high - low == pytest.approx(2 * 1.96 * values[:100].std() / 10, rel=0.15)
    assert bootstrap(values[:1]) == (values[0], values[0])
