"""What numbers were measured on: the part of `metrics.json` that makes them comparable."""

import dataclasses
import importlib.metadata
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vqrae_jax.config import Config


def recipe(config: Config, *, data: str, part: str, images: int, reference: str, weights: Mapping[str, str],
           options: Mapping[str, Any], configs: Mapping[str, str], run_weights: str) -> dict[str, Any]:
    """Everything that a number depends on beside the run.

    Args:
      config: of a run.
      data: SPEC of the images.
      part: which of them.
      images: how many were measured.
      reference: what distributions are compared with.
      weights: `{what was read: its sha256}`.
      options: what else was asked for.
      configs: `{run: sha256 of its config.json}`.
      run_weights: which of a run's weights, `ema` or `raw`.
    """
    return {
        "data": data, "part": part, "images": images, "image_size": config.data.image_size, "crop": "centre",
        "resampling": "bicubic, antialiased, short side",
        "pixels": "float32 in [0, 1]; rounded to 8 bits for rfid, inception_score and encoders of --fd",
        "reference": reference,
        "run_weights": run_weights, "weights": dict(weights), "configs": dict(configs), "options": dict(options),
        "version": version(), "commit": commit()}


def plain(options: Any) -> dict[str, Any]:
    """A dataclass as it is after it was written as JSON and read again."""
    return json.loads(json.dumps(dataclasses.asdict(options)))


def version() -> str:
    """Of the package."""
    return importlib.metadata.version("vqrae_jax")


def commit() -> str:
    """The commit of the repository that the package lies in, with a plus where it was changed; empty outside of one."""
    git = lambda *arguments: subprocess.run(["git", "-C", str(Path(__file__).parents[2]), *arguments],
                                            capture_output=True, text=True, check=True).stdout.strip()
    try:
        if not (Path(__file__).parents[2] / ".git").exists():  # installed into somebody else's repository
            return ""
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (FileNotFoundError, PermissionError, subprocess.CalledProcessError):  # no git, or not for this user
        return ""


def line(recipe: Mapping[str, Any]) -> str:
    """A recipe for people, in one line."""
    commit, changed = recipe["commit"][:8], "+" if recipe["commit"].endswith("+") else ""
    shown = [f"data: {recipe['data']}, {recipe['part']}", f"weights: {recipe['run_weights']}",
             f"{recipe['images']} images of {recipe['image_size']} px", recipe["resampling"], f"{recipe['crop']} crop",
             recipe["pixels"], f"reference: {recipe['reference']}",
             *(f"{Path(file).name} {digest[:8]}" for file, digest in recipe["weights"].items()),
             f"vqrae_jax {recipe['version']}" + (f" at {commit}{changed}" if commit else "")]
    return "; ".join(shown)
