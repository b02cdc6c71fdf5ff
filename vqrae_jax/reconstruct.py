"""Originals over reconstructions: `python -m vqrae_jax.reconstruct --workdir=DIR --out=FILE.png IMAGE...`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from vqrae_jax import cli
from vqrae_jax.files import disk_errors
from vqrae_jax.metrics import psnr
from vqrae_jax.tokenizer import inference
from vqrae_jax.training import reporting


def main(argv: Sequence[str]) -> None:
    files = [Path(name) for name in argv[1:]]
    if not files:
        raise ValueError("no images given: name them after the flags")
    out = Path(_OUT.value)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, not {out.name}")
    model = inference.load(_WORKDIR.value, weights=_WEIGHTS.value)
    images = inference.read_images(files, model.image_size).astype(np.float32) / 255
    # One image a pass: any number of images fits in memory and compiles once.
    reconstructions = np.concatenate([model.reconstruct(image[None]) for image in images])
    for file, value in zip(files, np.asarray(psnr(images, reconstructions)), strict=True):
        print(f"{file}  {value:.2f} dB")
    with disk_errors(out.parent):
        reporting.save_png(out, reporting.image_rows({"original": images, "reconstruction": reconstructions}))
    print(f"wrote {out}")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run, or nano", required=True)
    _OUT = flags.DEFINE_string("out", None, "the picture to write", required=True)
    _WEIGHTS = cli.weights()
    cli.run(main, arguments=True)
