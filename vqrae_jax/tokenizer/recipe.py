"""What numbers were measured on: the part of `metrics.json` that makes them comparable."""

import importlib.metadata
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqrae_jax.config import Config


def recipe(config: Config, *, data: str, part: str, images: int, reference: str, weights: Mapping[str, str],
           configs: Mapping[str, str], run_weights: str) -> dict[str, Any]:
    """Everything that a number depends on beside the run.

    Args:
      config: of a run.
      data: SPEC of the images.
      part: which of them.
      images: how many were measured.
      reference: what distributions are compared with.
      weights: `{what was read: its sha256}`.
      configs: `{run: sha256 of its config.json}`.
      run_weights: which of a run's weights, `ema` or `raw`.
    """
    return {
        "data": data, "part": part, "images": images, "image_size": config.data.image_size, "crop": "centre",
        "resampling": "bicubic, antialiased, short side",
        "pixels": "float32 in [0, 1]; rounded to 8 bits for rfid and inception_score", "reference": reference,
        "run_weights": run_weights, "weights": dict(weights), "configs": dict(configs),
        "version": importlib.metadata.version("vqrae_jax"), "commit": commit()}


def commit() -> str:
    """The commit of the repository that the package lies in, with a plus where it was changed; empty outside of one."""
    git = lambda *arguments: subprocess.run(["git", "-C", str(Path(__file__).parents[2]), *arguments],
                                            capture_output=True, text=True, check=True).stdout.strip()
    try:
        if not (Path(__file__).parents[2] / ".git").exists():  # installed into somebody else's repository
            return ""
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def line(recipe: Mapping[str, Any]) -> str:
    """A recipe for people, in one line."""
    shown = [f"{recipe['data']} ({recipe['part']}, {recipe['images']} images)",
             f"{recipe['image_size']} px, {recipe['resampling']}, {recipe['crop']} crop", recipe["pixels"],
             f"reference: {recipe['reference']}", f"weights: {recipe['run_weights']}",
             *(f"{Path(file).name} {digest[:8]}" for file, digest in recipe["weights"].items()),
             f"vqrae_jax {recipe['version']}" + (f" at {recipe['commit'][:8]}" if recipe["commit"] else "")]
    return "; ".join(shown)
