"""Trains and measures the runs of a study that are missing, and writes their table.

    python -m vqrae_jax.study --study=configs/studies/codebook.py --out=DIR [--data=SPEC] [--only=N]

A study is a grid of configs and seeds. DIR gets the runs, `table.md`, `table.json`, `study.png` and `report.html`. It
may be stopped at any moment: the same command goes on. On a cluster --only=N trains and measures the N-th run alone,
from 0; when all are done, the command without it writes the table.
"""

import dataclasses
from pathlib import Path

from absl import flags

from vqrae_jax import cli, config
from vqrae_jax.tokenizer import study
from vqrae_jax.training import distributed, sharding


def main(_) -> None:
    _DETERMINISTIC()
    _JOIN_PROCESSES()
    given = study.read(_STUDY.value)
    if _DATA.value:
        given = dataclasses.replace(given, data=_DATA.value)
    out = Path(_OUT.value)
    study.run(given, out, sharding.make_mesh(config.Mesh()), _ONLY.value)
    if distributed.is_first() and _ONLY.value is None:
        print(f"wrote table.md, table.json, study.png and report.html into {out}")


if __name__ == "__main__":
    _STUDY = flags.DEFINE_string("study", None, "a file that defines get_study()", required=True)
    _OUT = flags.DEFINE_string("out", None, "folder of the study", required=True)
    _DATA = flags.DEFINE_string("data", "", "SPEC of the images to train on; empty is the study's own")
    _ONLY = flags.DEFINE_integer("only", None, "the number of the one run to train and measure", lower_bound=0)
    _DETERMINISTIC = cli.deterministic()
    _JOIN_PROCESSES = cli.join_processes()
    cli.run(main)
