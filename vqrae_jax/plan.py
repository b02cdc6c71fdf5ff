"""Compiles the training step for a TPU slice that need not be there, and says what fits.

    python -m vqrae_jax.plan --config=configs/x.py --topology=v5e:4x4 [--batch=N] [--search] [--json=FILE]

Needs the TPU compiler (`pip install 'vqrae_jax[tpu]'`), which runs on any Linux machine; no weights are read. For GPUs,
`--topology=h100:8`, memory is estimated. `cost/plan.py` says where the figures come from.
"""

import dataclasses
import functools
import json
from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax.cost import plan
from vqrae_jax.files import disk_errors


def main(_) -> None:
    values = _CONFIG.value
    pretrained = values.model.encoder if config_lib.type_of(values) is config_lib.Config else values.model
    pretrained.random_weights = True  # the shape is enough
    if _BATCH.value:
        values.train.batch_size = _BATCH.value
    config = config_lib.parse(values)
    if not (folder := Path(_JSON.value).parent).is_dir():  # before the work
        raise FileNotFoundError(f"--json={_JSON.value}: there is no folder {folder}")
    if _SEARCH.value:
        result = plan.search(config, _TOPOLOGY.value, report=functools.partial(print, flush=True))
    else:
        result = plan.plan(config, _TOPOLOGY.value)
    if result is None:
        raise ValueError(f"nothing fits {_TOPOLOGY.value} with a batch of {config.train.batch_size}")
    print(plan.table(result))
    if _JSON.value:
        with disk_errors(Path(_JSON.value).parent):
            Path(_JSON.value).write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")


if __name__ == "__main__":
    _CONFIG = cli.config_file()
    _TOPOLOGY = flags.DEFINE_string("topology", None, "a TPU slice or GPUs, such as v5e:4x4 or h100:8", required=True)
    _BATCH = flags.DEFINE_integer("batch", None, "images a step; the config's if not given", lower_bound=1)
    _SEARCH = flags.DEFINE_bool("search", False, "try meshes, rematerialisation and accumulation until something fits")
    _JSON = flags.DEFINE_string("json", "", "a file for the figures")
    cli.run(main)
