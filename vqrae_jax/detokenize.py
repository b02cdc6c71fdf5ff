"""Codes become images again: `python -m vqrae_jax.detokenize --workdir=RUN --codes=DIR --out=DIR`.

A PNG file for every view of every record of a folder that `tokenize` made with the same run. The same command continues
after an interruption.
"""

from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax.tokenizer import codes


def main(_) -> None:
    images = codes.detokenize(Path(_WORKDIR.value), Path(_CODES.value), Path(_OUT.value), batch_size=_BATCH_SIZE.value)
    print(f"{images:,} images in {_OUT.value}")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of the tokenizer's run, or nano", required=True)
    _CODES = flags.DEFINE_string("codes", None, "folder of codes, which tokenize made", required=True)
    _OUT = flags.DEFINE_string("out", None, "folder for the images", required=True)
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "images that a device decodes at once; 0 is as many as it "
                                       "encoded at once, 1 is what reconstruct does", lower_bound=0)
    cli.run(main)
