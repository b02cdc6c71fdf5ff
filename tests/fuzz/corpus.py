"""What was a fault once: a stack, a wait without end, or memory without end."""

import copy
import dataclasses
import gzip
import json
from typing import Any

from tests import conftest
from tests.fuzz import inputs
from tests.fuzz.inputs import Files
from vqrae_jax import config as config_lib

_RUN = dataclasses.asdict(config_lib.parse(conftest.tiny()))
_STUDY = "from vqrae_jax.tokenizer.study import Row, Study\ndef get_study():\n    return Study(title='', data='', {})\n"


def _with(key: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(_RUN)
    *sections, last = key.split(".")
    holder = values
    for section in sections:
        holder = holder[section]
    holder[last] = value
    return values


def _codes(**changes: Any) -> Files:
    values = json.loads(inputs.good_codes()["codes.json"])
    return inputs.good_codes() | {"codes.json": json.dumps(values | changes).encode()}


CORPUS = {
    "an image of 178 million rows of a pixel": ("image", ("decode", inputs.png(1, 178_000_000, 1, 0, b""))),
    "zeros without end behind a tar": (
        "tar",
        ("a.tar.gz", gzip.compress(inputs.tar_of([])) + gzip.compress(bytes(64 << 20)) * 4),
    ),
    "codes of more shards than there are names": ("codes_folder", _codes(source={"images": 10**11, "digests": []})),
    "codes with a text for a number": ("codes_folder", _codes(shard_size="3")),
    "codes of no size": ("codes_folder", _codes(grid=[4])),
    "a run's images that are a number": (
        "tokenizer_run",
        inputs.good_tokenizer_run() | {"images.json": b'{"images": 1}'},
    ),
    "a pipe in the place of an image": ("image_folder", [("a.jpg", "pipe")]),
    "a device in the place of an image": ("image_folder", [("a.jpg", "link:/dev/zero")]),
    "a config that is nothing": ("config", None),
    "a task that is a list": ("config", _with("task", [[]])),
    "a number without end": ("config", _with("optim.lr", 10**400)),
    "more than 32 bits": ("config", _with("seed", 2**40)),
    "the config of a run with such a task": ("tokenizer_run", {"config.json": json.dumps(_with("task", {})).encode()}),
    "a config file that fails": ("config_file", "def get_config():\n    return 1 / 0\n"),
    "a config file that fails in lines": ("config_file", "def get_config():\n    raise ValueError('a\\nb')\n"),
    "a config file that is no Python": ("config_file", "def get_config(:"),
    "a config file that gives a number": ("config_file", "def get_config():\n    return 3\n"),
    "a study without names of rows": ("study_file", _STUDY.format("rows=[Row(config='')], metrics=('psnr',)")),
    "a study with a list for a row": ("study_file", _STUDY.format("rows={'a': []}, metrics=('psnr',)")),
    "a study with one seed": ("study_file", _STUDY.format("rows={'a': Row(config='', seeds=3)}, metrics=('psnr',)")),
}
