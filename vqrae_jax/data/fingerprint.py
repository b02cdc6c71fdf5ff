"""Whether a source still holds the images it held, wherever it lies now."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from vqrae_jax import files
from vqrae_jax.data import faults
from vqrae_jax.data.sources import Source

SAMPLES = 16


def fingerprint(source: Source) -> dict[str, Any]:
    """The number of a source's images and digests of some of them, evenly spread, as JSON.

    Neither names nor the kind of source count, so that data may move, or change from a folder to records.

    Raises:
      OSError: the machine cannot read an image, in one line.
    """
    indices = np.linspace(0, len(source) - 1, min(SAMPLES, len(source))).round().astype(int)
    return {"images": len(source), "digests": [_digest(source, int(index)) for index in indices]}


def _digest(source: Source, index: int) -> str | None:
    """None for an image that cannot be read, about which nothing is known then; MachineError where it may be good."""
    try:
        image = faults.retried(lambda: source[index], source.name(index))[0]  # or its codes
    except faults.MachineError:
        raise
    except (OSError, ValueError):
        return None
    content = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes() + str(image.shape).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def read(file: Path) -> dict[str, Any]:
    """The fingerprint that a file holds; OSError or ValueError where there is none."""
    found = files.read_json(file)
    images, digests = found.get("images"), found.get("digests")
    if type(images) is not int or not isinstance(digests, list) or len(digests) != min(SAMPLES, images):
        raise ValueError(f"{file} is damaged: it does not say what images there are; remove it to go on without")
    return found


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two fingerprints differ in, in words; empty where the images are the same."""
    if old["images"] != new["images"]:
        return f"{new['images']:,} images instead of {old['images']:,}"
    unequal = [None not in pair and pair[0] != pair[1] for pair in zip(old["digests"], new["digests"], strict=True)]
    return f"{sum(unequal)} of {len(unequal)} images that were looked at are others" if any(unequal) else ""
