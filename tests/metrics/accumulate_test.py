"""Sums of many batches against exact ones."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import optimizations
from vqrae_jax.metrics import accumulate


@pytest.fixture(params=[False, True], ids=["without optimizations", "with all optimizations"])
def compiler(request):
    """A compiler that takes a + (b - a) for b would undo the sums."""
    with optimizations(on=request.param):
        yield


def summed(values: np.ndarray) -> accumulate.Sums:
    """The sum of the rows, one after the other."""
    step = lambda acc, row: (accumulate.add(acc, {"x": row}), None)
    return jax.jit(lambda values: jax.lax.scan(step, accumulate.init({"x": values[0]}), values)[0])(jnp.asarray(values))


def test_a_million_batches_lose_nothing(compiler):
    values = np.stack([np.full(10**6, 0.1), np.full(10**6, 1 / 3), np.tile([1e4, 1e-4], 5 * 10**5),
                       np.tile([1e7, 1 - 1e7], 5 * 10**5)], axis=1).astype(np.float32)
    expected = np.asarray([float(sum(map(Fraction, column[:2].tolist())) * len(column) / 2) for column in values.T])
    naive = jax.lax.scan(lambda acc, row: (acc + row, None), jnp.zeros(4), jnp.asarray(values))[0]
    assert np.abs(naive / expected - 1).max() > 1e-3
    np.testing.assert_allclose(accumulate.total(summed(values))["x"], expected, rtol=1e-9)


def test_whole_numbers_are_exact_beyond_what_float32_holds():
    values = np.random.default_rng(0).integers(2**22, 2**24, (1000, 5)).astype(np.int32)
    np.testing.assert_array_equal(accumulate.total(summed(values))["x"], values.sum(0, dtype=np.int64))


def test_merged_sums_are_the_sum_of_all():
    values = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32) * [1e6, 1, 1e-6]
    parts = accumulate.merge(summed(values[:700].astype(np.float32)), summed(values[700:].astype(np.float32)))
    np.testing.assert_allclose(accumulate.total(parts)["x"], values.astype(np.float32).sum(0, dtype=np.float64),
                               rtol=1e-9)


def test_what_is_not_finite_stays_so():
    values = np.asarray([[1, 1, 1], [np.inf, np.nan, 2], [3, 3, 3]], np.float32)
    np.testing.assert_array_equal(accumulate.total(summed(values))["x"], [np.inf, np.nan, 6])
