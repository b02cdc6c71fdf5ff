"""Packs a trained run, of a tokenizer or a generator, into the small folder of `vqrae_jax.weights.packed`.

    python launch/pack.py --workdir=runs/nano_cifar10_stage2 --out=vqrae_jax/assets/models/nano/tokenizer --card=CARD.md

Whatever takes a run's folder takes the packed one as well, except that nothing trains on in it. Under
`vqrae_jax/assets/models/NAME/` it ships with the package, and is then called NAME.
"""

import json
import shutil
from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax.generator import runs as generator_runs
from vqrae_jax.tokenizer import runs as tokenizer_runs
from vqrae_jax.training import sharding
from vqrae_jax.training.files import disk_errors
from vqrae_jax.weights import packed


def pack(workdir: Path, out: Path, card: Path) -> None:
    """Writes the folder, which appears when it is complete.

    Args:
      workdir: the run's folder; the last checkpoint is taken.
      out: the folder.
      card: the model card, a file of Markdown.

    Raises:
      OSError: there is no such run or card, or the folder cannot be written.
      ValueError: there is such a folder, or float16 cannot hold the weights.
    """
    if out.exists():
        raise ValueError(f"{out} exists: remove it, or choose another --out")
    if not card.is_file():
        raise FileNotFoundError(f"{card} does not exist: --card is the file that says what the model is")
    config_file, mesh = workdir / "config.json", sharding.one_device()
    if config_file.exists() and config_lib.type_of(json.loads(config_file.read_text())) is config_lib.GeneratorConfig:
        params, buffers = generator_runs.load_run(workdir, mesh).params, {}
    else:
        config, _, params = tokenizer_runs.load_run(workdir, mesh)
        buffers = {path: params.pop(path) for path in tokenizer_runs.structure(workdir, config).buffers}
    unfinished = out.with_name(f"{out.name}.part")
    with disk_errors(out):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name in ("config.json", "codes.json"):
            if (workdir / name).exists():
                shutil.copy(workdir / name, unfinished)
        for name in ("encoder", "text"):
            if (workdir / name).exists():
                shutil.copytree(workdir / name, unfinished / name)
        shutil.copy(card, unfinished / "README.md")
        packed.write(unfinished, params, buffers)
        unfinished.rename(out)


def main(_) -> None:
    out = Path(_OUT.value)
    pack(Path(_WORKDIR.value), out, Path(_CARD.value))
    print(f"wrote {out}: {sum(file.stat().st_size for file in out.rglob('*') if file.is_file()) / 1e6:.2f} MB")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run", required=True)
    _OUT = flags.DEFINE_string("out", None, "folder for the packed model, which must not exist", required=True)
    _CARD = flags.DEFINE_string("card", None, "the model card", required=True)
    cli.run(main)
