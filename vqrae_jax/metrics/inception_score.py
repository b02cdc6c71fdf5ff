"""The Inception Score (Salimans et al. 2016, arXiv 1606.03498): exp of the mean KL(p(y|x) || p(y)).

p(y|x) is the softmax of an image's logits, p(y) its mean over a split of the set; the score is the mean over splits.
ADM's evaluator, and the gFID tables that use it, take 5,000 images a split in their order, the last one smaller;
torch-fidelity shuffles the set into 10.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.metrics import accumulate
from vqrae_jax.metrics.accumulate import Sums

SPLIT = 5000


def init(splits: int, classes: int) -> Sums:
    """Of no images: numbers of images `[splits]`, sums of p `[splits, classes]` and of the sum over y of p log p
    `[splits]`."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    return accumulate.init((shape(splits), shape(splits, classes), shape(splits)))


def update(acc: Sums, logits: jax.Array, split: jax.Array, valid: jax.Array) -> Sums:
    """`acc` with a batch added: pure, and made to be called under `jax.jit`, also of a batch over many devices.

    Args:
      acc: what there is so far.
      logits: `[B, classes]` float.
      split: `[B]` int32 in [0, splits), which split each image is in: its position in the set // `SPLIT`, so that the
        score does not depend on the batch size. An image of any other split is in none.
      valid: `[B]` bool; other rows may hold anything.
    """
    log_p = jax.nn.log_softmax(jnp.where(valid[:, None], logits.astype(jnp.float32), 0))
    p = jnp.exp(log_p)
    splits = len(acc.high[0])
    # A matrix product rather than a scatter, whose order of additions on an accelerator is not fixed.
    member = jnp.where(valid[:, None], split[:, None] == jnp.arange(splits), 0).astype(jnp.float32)
    over_images = lambda values: jnp.matmul(member.T, values, precision=jax.lax.Precision.HIGHEST)
    return accumulate.add(acc, (jnp.sum(member, axis=0), over_images(p), over_images(jnp.sum(p * log_p, axis=-1))))


def finish(acc: Sums) -> tuple[float, float]:
    """Mean and standard deviation (`numpy.std`) of the score over the splits that have images; 1 to `classes`.

    Raises:
      ValueError: there are no images, or a logit was not finite.
    """
    counts, p, p_log_p = accumulate.total(acc)
    if not counts.any():
        raise ValueError("an Inception Score takes at least one image")
    if not (np.isfinite(p).all() and np.isfinite(p_log_p).all()):
        raise ValueError(f"logits of {int(counts.sum())} images are not all finite: they have no Inception Score")
    p, p_log_p, counts = p[counts > 0], p_log_p[counts > 0], counts[counts > 0]
    marginal = p / counts[:, None]
    entropy = -np.sum(marginal * np.log(np.maximum(marginal, np.finfo(np.float64).tiny)), axis=1)
    scores = np.exp(p_log_p / counts + entropy)
    return float(scores.mean()), float(scores.std())
