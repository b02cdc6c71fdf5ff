"""How far reconstructions are from their originals."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


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
