"""Weights of the Inception-v3 that the papers' FID is measured with, as torch-fidelity published them."""

from pathlib import Path

import numpy as np
from flax import nnx

from vqrae_jax.models.inception import WEIGHTS, InceptionV3
from vqrae_jax.weights import tensors

_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"

# Our names -> theirs. Logits are used without the bias of the last layer.
_LEAVES = {"kernel": "conv.weight", "scale": "bn.weight", "bias": "bn.bias", "mean": "bn.running_mean",
           "variance": "bn.running_var"}
_UNUSED = r"fc\.bias|.*\.num_batches_tracked"


def load_inception(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the weights of an `InceptionV3`.

    Args:
      path: torch-fidelity's file, which pytorch-fid publishes too, or a `.safetensors` file of the same tensors.

    Returns:
      {path: float32 array}, the paths being those of parameters and buffers of `flat.split(InceptionV3(...))`.

    Raises:
      OSError: there is no such file, and the message says how to get it; or it is no file of tensors.
      ValueError: a tensor is missing, has another shape, or has no known use, and the message names it; or the file has
        the published name and not its content.
    """
    file = Path(path).expanduser()
    command = f"curl -L -o {path if file.suffix == '.pth' else WEIGHTS} --create-dirs {_URL}"
    if not file.is_file():
        raise FileNotFoundError(f"no Inception weights at {path}: get them with `{command}`")
    if file.name.endswith("-6726825d.pth") and not tensors.sha256(file).startswith("6726825d"):
        raise ValueError(f"{file} is damaged, for its SHA-256 does not start with 6726825d: download it again with "
                         f"`{command}`")
    return tensors.cached(file, _read, name="inception")


def views(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{torch-fidelity's name: view in its layout} of arrays that have the paths of an `InceptionV3`."""
    found = {}
    for path, array in params.items():
        module, _, leaf = path.rpartition("/")
        name = f"{module[:1].upper()}{module[1:].replace('/', '.')}.{_LEAVES[leaf]}" if module else "fc.weight"
        found[name] = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return found


def _read(file: Path) -> dict[str, np.ndarray]:
    params = tensors.zeros(lambda: InceptionV3(rngs=nnx.Rngs(0)))
    tensors.fill(views(params), tensors.read(file), file, unused=_UNUSED)
    return params
