"""Trains: `python -m vqrae_jax.main --config=configs/x.py --workdir=DIR`.

Continues by itself where DIR holds a checkpoint. `--config.key=value` changes one key. At the end it evaluates.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vqrae_jax import cli, config
from vqrae_jax.tokenizer import evaluate, task
from vqrae_jax.training import distributed


def main(_) -> None:
    if "://" in _WORKDIR.value:
        raise ValueError(f"--workdir={_WORKDIR.value} is no folder: mount the bucket, or choose a file system that all "
                         "processes share")
    _JOIN_PROCESSES()
    result = task.train(config.parse(_CONFIG.value), Path(_WORKDIR.value))
    if result and distributed.is_first():
        print(evaluate.table({Path(_WORKDIR.value).resolve().name: result}))


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file("config", help_string="a file of configs/", lock_config=True)
    _WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder", required=True)
    _JOIN_PROCESSES = cli.join_processes()
    flags.mark_flag_as_required("config")
    cli.run(main)
