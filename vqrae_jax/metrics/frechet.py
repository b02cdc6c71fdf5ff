"""The Frechet distance of two sets of images: their features' means and covariances, and how far these are apart.

With features of `models.inception` it is the FID (Heusel et al. 2017, arXiv 1706.08500). A set's features are never
kept: `init`, `update` and `moments` add them up batch by batch, on the devices.
"""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vqrae_jax.metrics import accumulate
from vqrae_jax.metrics.accumulate import Sums


class Moments(NamedTuple):
    """Count, mean and scatter of a set of feature vectors.

    Attributes:
      count: how many there are.
      mean: `[d]` float64.
      scatter: `[d, d]` float64, the sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets together (Chan, Golub and LeVeque 1983, equation 2.1)."""
    count = a.count + b.count
    if count == 0:
        return a
    apart = b.mean - a.mean
    return Moments(count, a.mean + apart * (b.count / count),
                   a.scatter + b.scatter + np.outer(apart, apart) * (a.count * b.count / count))


def covariance(moments: Moments) -> np.ndarray:
    """`[d, d]` float64, divided by count - 1, as `numpy.cov` and the papers have it.

    Raises:
      ValueError: there are fewer than two vectors.
    """
    if moments.count < 2:
        raise ValueError(f"a covariance takes at least 2 images, not {moments.count}")
    return moments.scatter / (moments.count - 1)


def statistics(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance, of which the distance is taken; ValueError as from `covariance`."""
    return moments.mean, covariance(moments)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), >= 0 (Dowson and Landau 1982; Heusel et al. 2017).

    The trace of the root is the sum of the singular values of C1^(1/2) C2^(1/2): two symmetric eigen-decompositions and
    a singular value decomposition, O(d^3), in float64. So it is exact, and never complex, for covariances of any rank,
    also of fewer images than dimensions, where implementations that take the root of the product itself add to the
    diagonal. Equal arguments give 0 up to 1e-8 of the trace. At d = 2048 it takes half a minute of a CPU core's time.

    Args:
      mean1: `[d]`.
      cov1: `[d, d]`, symmetric and without negative eigenvalues but for rounding.
      mean2: like mean1.
      cov2: like cov1.

    Raises:
      ValueError: shapes do not fit, or something is not finite.
    """
    arrays = [np.asarray(array, np.float64) for array in (mean1, cov1, mean2, cov2)]
    width = arrays[0].shape
    if len(width) != 1 or [array.shape for array in arrays] != [width, 2 * width, width, 2 * width]:
        raise ValueError("a Frechet distance takes means [d] and covariances [d, d], not "
                         + ", ".join(str(array.shape) for array in arrays))
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueError("a Frechet distance takes means and covariances that are finite")
    mean1, cov1, mean2, cov2 = arrays
    (scale1, vectors1), (scale2, vectors2) = _root(cov1), _root(cov2)
    product = scale1[:, None] * (vectors1.T @ vectors2) * scale2
    root_trace = np.linalg.svd(product, compute_uv=False).sum() if product.size else 0.0
    distance = np.sum((mean1 - mean2)**2) + np.trace(cov1) + np.trace(cov2) - 2 * root_trace
    return max(float(distance), 0.0)


def _root(cov: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues `[r]` and eigenvectors `[d, r]` of the root of a matrix of rank r.

    What float64 cannot tell from 0 is left out, by the rule of `numpy.linalg.matrix_rank`.
    """
    values, vectors = np.linalg.eigh(cov)
    keep = values > values.max(initial=0) * len(values) * np.finfo(np.float64).eps
    return np.sqrt(values[keep]), vectors[:, keep]


class MomentSums(NamedTuple):
    """Moments in the making, on the devices.

    Attributes:
      count: `[]` int32.
      origin: `[d]` float32, the mean of the first batch. Products are taken of vectors less it, so that they are not
        much larger than the covariance.
      sums: of vectors less the origin, `[d]`, and of their outer products, `[d, d]`.
    """

    count: jax.Array
    origin: jax.Array
    sums: Sums


def init(width: int) -> MomentSums:
    """Of no vectors of `width` features."""
    shapes = (jax.ShapeDtypeStruct((width,), jnp.float32), jax.ShapeDtypeStruct((width, width), jnp.float32))
    return MomentSums(jnp.int32(0), jnp.zeros(width, jnp.float32), accumulate.init(shapes))


def update(acc: MomentSums, features: jax.Array, valid: jax.Array) -> MomentSums:
    """`acc` with a batch added: pure, and made to be called under `jax.jit`, also of a batch over many devices.

    Args:
      acc: what there is so far.
      features: `[B, d]` float.
      valid: `[B]` bool; other rows may hold anything.
    """
    features = features.astype(jnp.float32)
    count = jnp.sum(valid, dtype=jnp.int32)
    less = lambda origin: jnp.where(valid[:, None], features - origin, 0)
    mean = jnp.sum(less(0.0), axis=0) / jnp.maximum(count, 1)
    origin = jnp.where(acc.count > 0, acc.origin, mean)
    centred = less(origin)
    products = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
    return MomentSums(acc.count + count, origin, accumulate.add(acc.sums, (jnp.sum(centred, axis=0), products)))


def moments(acc: MomentSums) -> Moments:
    """On the host, in float64.

    Raises:
      ValueError: a feature was not finite.
    """
    count, origin = int(acc.count), np.asarray(acc.origin, np.float64)
    first, products = accumulate.total(acc.sums)
    if not (np.isfinite(origin).all() and np.isfinite(first).all() and np.isfinite(products).all()):
        raise ValueError(f"features of {count} images are not all finite: no Frechet distance can be taken of them")
    if count == 0:
        return Moments(0, origin, products)
    scatter = products - np.outer(first, first) / count
    return Moments(count, origin + first / count, _of_rank(count - 1, scatter) if count <= len(scatter) else scatter)


def _of_rank(rank: int, scatter: np.ndarray) -> np.ndarray:
    """The matrix with all but its `rank` largest eigenvalues set to 0.

    The others are rounding errors of float32 products, the root of which a Frechet distance would take: 1e-4 of it.
    """
    values, vectors = np.linalg.eigh(scatter)
    largest = slice(len(values) - rank, None)
    return vectors[:, largest] * values[largest] @ vectors[:, largest].T


def read_statistics(file: str | Path, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[width]` and covariance `[width, width]`, float64, of a reference set's features from a file.

    Args:
      file: `.npz` with `mu` and `sigma`, as ADM publishes them (VIRTUAL_imagenet256_labeled.npz) and as torch-fidelity
        and pytorch-fid write them. Other arrays in it are not read.
      width: number of features of the network that they are compared with.

    Raises:
      OSError: there is no such file, or it is damaged.
      ValueError: it holds something else, or statistics of another network.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give an .npz file with the arrays mu and sigma")
    try:
        with np.load(file, allow_pickle=False) as found:
            if missing := {"mu", "sigma"} - set(found):
                raise KeyError(min(missing))
            mean, cov = (np.asarray(found[name], np.float64) for name in ("mu", "sigma"))
    except KeyError as error:
        raise ValueError(f"{file} has no array {error.args[0]}: statistics are an .npz file with the arrays mu and "
                         "sigma") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise OSError(f"{file} is damaged ({error}): copy or download it again") from None
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{file} holds no statistics: they are an .npz file with the arrays mu and sigma") from None
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(f"{file}: mu must be [d] and sigma [d, d], not {mean.shape} and {cov.shape}")
    if len(mean) != width:
        raise ValueError(f"{file} holds statistics of {len(mean)} features, but {width} are needed: they are of "
                         "another network")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{file} holds statistics that are not finite")
    return mean, cov
