"""Writes tests/reference/inception/outputs.npz: what torch-fidelity's Inception computes with drawn weights.

    python tests/make_inception_references.py

Needs torch and torch-fidelity; the tests that read the result do not: they draw the same weights by name and shape.
"""

import importlib
import importlib.util
import sys
import types
import zlib
from pathlib import Path
from unittest import mock

import numpy as np

REFERENCE = Path(__file__).parent / "reference" / "inception" / "outputs.npz"
SIZES = ((32, 32), (299, 299), (256, 340), (400, 512))  # height and width: upscaled, untouched, both, downscaled


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A random tensor of torch-fidelity's Inception, float32; features keep their magnitude."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    noise = rng.standard_normal(shape, np.float32)
    if name.endswith("bn.weight"):
        return 1 + np.float32(0.3) * noise
    if len(shape) == 1:
        return np.float32(0.1) * noise
    return noise * np.float32((1.9 / np.prod(shape[1:])) ** 0.5)


def images(height: int, width: int, *, count: int = 1, seed: int = 0) -> np.ndarray:
    """`[count, H, W, 3]` uint8: smooth colours, edges and noise."""
    rng = np.random.default_rng((height, width, seed))
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j][..., None]
    waves, across, down, phase, centre = rng.random((5, count, 1, 1, 3))
    smooth = 127 + 100 * waves * np.sin(9 * across * x + 7 * down * y + 6 * phase)
    edges = 60 * (np.abs(x - centre) + np.abs(y - 0.4) < 0.3)
    noise = 20 * rng.standard_normal((count, height, width, 3))
    return np.clip(smooth + edges + noise, 0, 255).astype(np.uint8)


def torch_fidelity(module: str) -> types.ModuleType:
    """A module of torch-fidelity. The package imports torchvision for networks that we do not compare with."""
    missing = [] if importlib.util.find_spec("torchvision") else [
        "torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"]
    sys.modules.update({name: mock.MagicMock(__spec__=None) for name in missing})
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    finally:
        for name in missing:
            del sys.modules[name]


def torch_inception(folder: Path):
    """torch-fidelity's network with the drawn weights: uint8 `[B, 3, H, W]` -> (features, logits)."""
    import torch

    extractor = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    with mock.patch.object(extractor, "load_state_dict"):  # the constructor loads a file
        torch.save({}, folder / "empty.pth")
        network = extractor("inception", ["2048", "logits_unbiased"], str(folder / "empty.pth"))
    network.load_state_dict({name: torch.from_numpy(draw(name, tuple(value.shape))) if value.ndim else value
                             for name, value in network.state_dict().items()})
    return network


def main() -> None:
    import tempfile

    import torch

    resize = torch_fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    with tempfile.TemporaryDirectory() as folder:
        network = torch_inception(Path(folder))
    found = {"features": [], "logits": [], "rows": [], "columns": []}
    for size in SIZES:
        image = torch.from_numpy(images(*size).transpose(0, 3, 1, 2))
        features, logits = network(image)
        resized = resize(image.float(), size=(299, 299), align_corners=False)[0].double().numpy()
        for name, value in zip(found, (features[0].numpy(), logits[0].numpy(), resized.mean(2).T, resized.mean(1).T),
                               strict=True):
            found[name].append(value.astype(np.float32))
        print(f"{size}: features mean {features.mean():.3f} std {features.std():.3f}, "
              f"logits mean {logits.mean():+.3f} std {logits.std():.3f}")
    REFERENCE.parent.mkdir(exist_ok=True)
    np.savez_compressed(REFERENCE, **{name: np.stack(values) for name, values in found.items()})


if __name__ == "__main__":
    main()
