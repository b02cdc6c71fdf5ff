"""Metrics of reconstructions and of features: arrays in, numbers out."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
MAX_SIMILARITIES = 2**25  # entries of the [queries, references] matrix that exist at once: 128 MiB


def psnr(x: Array, y: Array) -> jax.Array:
    """Peak signal-to-noise ratio per image, -10 log10(mean squared difference): `[B, H, W, C] x2 -> [B]` float32 dB.

    Images are float in [0, 1]. Equal images give inf.

    Raises:
      ValueError: the images differ in shape or are not float.
    """
    x, y = _image_pair(x, y)
    return -10 * jnp.log10(jnp.mean((x - y) ** 2, axis=(1, 2, 3)))


def ssim(x: Array, y: Array) -> jax.Array:
    """Structural similarity per image (Wang et al. 2004): `[B, H, W, C] x2 -> [B]` float32 in [-1, 1].

    The mean over channels and over all 11x11 Gaussian windows (sigma 1.5) that lie inside the image. Equals
    scikit-image's `structural_similarity(x, y, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)`, which crops the windows that reach over the border. Images are float in [0, 1].

    Raises:
      ValueError: the images differ in shape, are not float, or have a side below 11.
    """
    x, y = _image_pair(x, y)
    height, width = x.shape[1:3]
    if min(height, width) < 11:
        raise ValueError(f"SSIM needs images of at least 11x11 pixels, not {height}x{width}")
    rows, columns = _gaussian_windows(height), _gaussian_windows(width)
    mean = lambda image: jnp.einsum("ih,bhwc,jw->bijc", rows, image, columns, precision=jax.lax.Precision.HIGHEST)
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return jnp.mean(similarity, axis=(1, 2, 3))


def _image_pair(x: Array, y: Array) -> tuple[jax.Array, jax.Array]:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"images must be two arrays [B, H, W, C] of one shape, not {x.shape} and {y.shape}")
    if not (jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(y.dtype, jnp.floating)):
        raise ValueError(f"images must be float in [0, 1], not {x.dtype} and {y.dtype}: divide uint8 by 255")
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def _gaussian_windows(size: int) -> np.ndarray:
    """A matrix `[size - 10, size]` whose row i holds the 11 Gaussian weights of the window that starts at pixel i."""
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    windows = np.zeros((size - 10, size), np.float32)
    for i in range(size - 10):
        windows[i, i:i + 11] = weights / weights.sum()
    return windows


def knn_top1(features: np.ndarray, labels: np.ndarray, *, reference: tuple[np.ndarray, np.ndarray] | None = None,
             k: int = 20, temperature: float = 0.07) -> float:
    """Accuracy of the weighted k-nearest-neighbour classifier on cosine similarity, in [0, 1].

    Each of the k most similar references votes for its label with weight exp(similarity / temperature), as in DINO's
    evaluation (Caron et al. 2021, arXiv 2104.14294; Wu et al. 2018, arXiv 1805.01978). k is cut to the references
    there are.

    Args:
      features: `[N, d]` float.
      labels: `[N]` integers >= 0.
      reference: (features `[M, d]`, labels `[M]`) that vote; None is leave-one-out: all `features` but the one asked.
      k: number of voters.
      temperature: of the votes.

    Raises:
      ValueError: features and labels do not fit each other, or nothing is there to vote.
    """
    leave_one_out = reference is None
    voters, voter_labels = (features, labels) if reference is None else reference
    _check_labelled("features", features, labels)
    _check_labelled("reference", voters, voter_labels)
    k = min(k, len(voters) - leave_one_out)
    if k < 1:
        raise ValueError(f"kNN has no reference to compare with: {len(voters)} references, k = {k}")
    classes = int(np.max(voter_labels)) + 1
    voters, voter_labels = _unit(voters), jnp.asarray(voter_labels, jnp.int32)

    @jax.jit
    def predict(queries, own):
        similarity = jnp.matmul(queries, voters.T, precision=jax.lax.Precision.HIGHEST)
        if leave_one_out:
            similarity = jnp.where(jnp.arange(len(voters))[None] == own[:, None], -jnp.inf, similarity)
        nearest, at = jax.lax.top_k(similarity, k)
        # Weights relative to the nearest voter's: the same winner, and nothing overflows at a low temperature.
        weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
        votes = jnp.zeros((len(queries), classes)).at[jnp.arange(len(queries))[:, None], voter_labels[at]].add(weights)
        return jnp.argmax(votes, axis=-1)

    block = max(1, MAX_SIMILARITIES // len(voters))
    correct = 0
    for start in range(0, len(features), block):
        part = slice(start, start + block)
        predicted = predict(_unit(features[part]), jnp.arange(start, start + len(features[part])))
        correct += int(np.sum(np.asarray(predicted) == np.asarray(labels[part])))
    return correct / len(features)


def linear_probe_top1(train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray,
                      test_labels: np.ndarray, *, l2: float = 1e-3) -> float:
    """Test accuracy of a linear classifier fitted by ridge regression to one-hot labels, in [0, 1].

    Minimises mean |x W + b - onehot|^2 + l2 |W|^2 in closed form, float64, with every feature scaled to zero mean and
    unit variance over the training set.

    Args:
      train_features: `[N, d]` float.
      train_labels: `[N]` integers >= 0.
      test_features: `[M, d]` float.
      test_labels: `[M]` integers >= 0.
      l2: weight of the penalty.

    Raises:
      ValueError: features and labels do not fit each other.
    """
    _check_labelled("train", train_features, train_labels)
    _check_labelled("test", test_features, test_labels)
    x = np.asarray(train_features, np.float64)
    mean, std = x.mean(0), np.maximum(x.std(0), 1e-6)
    x = (x - mean) / std
    share = np.bincount(train_labels) / len(x)
    class_sums = np.zeros((len(share), x.shape[1]))
    np.add.at(class_sums, train_labels, x)
    # x is centred, so the bias is the mean one-hot label and drops out of the normal equations.
    weights = np.linalg.solve(x.T @ x / len(x) + l2 * np.eye(x.shape[1]), class_sums.T / len(x))
    scores = (np.asarray(test_features, np.float64) - mean) / std @ weights + share
    return float(np.mean(scores.argmax(-1) == np.asarray(test_labels)))


def _unit(features: np.ndarray) -> jax.Array:
    x = jnp.asarray(features, jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _check_labelled(name: str, features: np.ndarray, labels: np.ndarray) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(features):
        raise ValueError(f"{name}: features must be [N, d] and labels [N] with N > 0, "
                         f"not {features.shape} and {labels.shape}")
