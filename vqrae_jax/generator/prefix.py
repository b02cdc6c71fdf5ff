"""Captions as the tokens that stand before an image."""

import numpy as np

from vqrae_jax.weights.text import Tokenize


def caption(text: str, *, tokenize: Tokenize, longest: int) -> dict[str, np.ndarray | np.generic]:
    """What a batch has of a caption; see `loss.predict`.

    Args:
      text: of an image; an empty one is no caption.
      tokenize: of the text model.
      longest: tokens that are kept.

    Returns:
      `caption` int32 `[longest]`, the text's first tokens at its right end, and `pads` int32, how many places before
      them are none.
    """
    kept = tokenize(text)[:longest]
    tokens, pads = np.zeros(longest, np.int32), longest - len(kept)
    tokens[pads:] = kept
    return {"caption": tokens, "pads": np.int32(pads)}
