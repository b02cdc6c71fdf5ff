"""A data set becomes codes, for a generator to learn.

    python -m vqrae_jax.tokenize --workdir=RUN --data=SPEC --out=DIR [--views=10]

DIR gets ArrayRecord files of the codes of every image with its label, caption and name; `codes.json`, which says what
they are of; and a .jsonl file beside each, which names the images that could not be read. DIR is then data for a
generator, `codes:DIR`. With --views=10 every image is there ten times: the centre and the corners of a somewhat larger
one, and their mirror images.

The same command continues after an interruption, and ends with the same bytes. Several processes may share the work.
"""

import signal
from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax.tokenizer import codes
from vqrae_jax.training import distributed


def main(_) -> None:
    _DETERMINISTIC()
    _JOIN_PROCESSES()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # each process by itself: nothing is lost
    out = Path(_OUT.value)
    made = codes.tokenize(Path(_WORKDIR.value), _DATA.value, out, views=int(_VIEWS.value), weights=_WEIGHTS.value,
                          batch_size=_BATCH_SIZE.value, shard_size=_SHARD_SIZE.value, max_bad=_MAX_BAD.value)
    if not distributed.is_first():
        return
    if made.bad_images:
        print(f"left out: {made.bad_images:,} images that cannot be read, which {out}/*.jsonl name")
    print(f"{made.records:,} images ({made.labels:,} with a label, {made.captions:,} with a caption) as "
          f"{made.grid[0]} x {made.grid[1]} codes; to use them: codes:{out}")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of a tokenizer's run, or nano", required=True)
    _DATA = flags.DEFINE_string("data", None, "SPEC of the images; where it names no split, those to train on",
                                required=True)
    _OUT = flags.DEFINE_string("out", None, "folder for the codes", required=True)
    _VIEWS = flags.DEFINE_enum("views", "1", ["1", "2", "10"], "of each image: the centre, it and its mirror "
                                "image, or ten crops and mirror images")
    _WEIGHTS = cli.weights()
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "views that a device encodes at once; 0 is the run's "
                                       "eval.batch_size", lower_bound=0)
    _SHARD_SIZE = flags.DEFINE_integer("shard_size", 4096, "images of a file, rounded up to whole batches",
                                       lower_bound=1)
    _MAX_BAD = flags.DEFINE_float("max_bad", None, "share of the images that may be unreadable; the run's data.max_bad "
                                  "if not given", lower_bound=0.0, upper_bound=1.0)
    _DETERMINISTIC = cli.deterministic()
    _JOIN_PROCESSES = cli.join_processes()
    cli.run(main)
