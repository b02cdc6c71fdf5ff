"""How certain a mean over images is."""

import numpy as np

RESAMPLES = 1000


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the mean of a sample: `[n] -> (low, high)`.

    The percentile bootstrap (Efron and Tibshirani 1993, chapter 13): the 2.5th and 97.5th percentiles of the means of
    `RESAMPLES` samples of n drawn with replacement, always the same ones. It says how much the number would move with
    other images of the same kind, and nothing of other seeds of training.
    """
    rng, values = np.random.default_rng(0), np.asarray(values, np.float64)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
