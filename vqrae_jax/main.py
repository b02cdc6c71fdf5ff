"""Trains a tokenizer or a generator, as the config says.

    python -m vqrae_jax.main --config=configs/x.py [--workdir=DIR] [--config.key=value ...]

Continues by itself where DIR holds a checkpoint. `--config.key=value` changes one key; with `--config=FILE --help` all
keys are listed. At the end it evaluates.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

import vqrae_jax
from vqrae_jax import cli, config
from vqrae_jax.tokenizer import evaluate
from vqrae_jax.training import distributed


def main(_) -> None:
    workdir = _WORKDIR.value or default_workdir(config_flags.get_config_filename(flags.FLAGS["config"]))
    if "://" in workdir:
        raise ValueError(f"--workdir={workdir} is no folder: mount the bucket, or choose a file system that all "
                         "processes share")
    _DETERMINISTIC()
    _JOIN_PROCESSES()
    result = vqrae_jax.train(config.parse(_CONFIG.value), workdir)
    if distributed.is_first():
        print(evaluate.table({Path(workdir).resolve().name: result}))


def default_workdir(config_file: str) -> str:
    """`configs/ablation.py:dim=384` -> `runs/ablation-dim=384`."""
    file, _, arguments = config_file.partition(":")
    return str(Path("runs") / "-".join(filter(None, (Path(file).stem, arguments.replace("/", "_")))))


if __name__ == "__main__":
    _CONFIG = cli.config_file()
    _WORKDIR = flags.DEFINE_string("workdir", None, "the run's folder; by default runs/NAME of configs/NAME.py")
    _DETERMINISTIC = cli.deterministic()
    _JOIN_PROCESSES = cli.join_processes()
    cli.run(main)
