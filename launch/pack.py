"""Packs a trained run, of a tokenizer or a generator, into the small folder of `vqrae_jax.weights.packed`.

    python launch/pack.py --workdir=runs/nano_cifar10_stage2 --out=vqrae_jax/assets/models/nano/tokenizer

The folder holds the model card already, README.md: it is written by hand, and the only copy of it. What takes a run's
folder takes the packed one as well, but nothing trains on in it. Under `vqrae_jax/assets/models/NAME/` it ships with
the package, and is then called NAME.
"""

import shutil
from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax.files import disk_errors
from vqrae_jax.generator import runs as generator_runs
from vqrae_jax.tokenizer import runs as tokenizer_runs
from vqrae_jax.training import sharding
from vqrae_jax.weights import packed


def pack(workdir: Path, out: Path) -> None:
    """Completes a folder that holds a model card; until all is done there are no weights in it.

    Args:
      workdir: the run's folder; the averaged weights of the last checkpoint are taken.
      out: the folder.

    Raises:
      OSError: there is no such run or no card, or the folder cannot be written.
      ValueError: it holds a model, or float16 cannot hold the weights.
    """
    if not (out / "README.md").is_file():
        raise FileNotFoundError(f"{out} holds no README.md: write the model card first")
    if (out / packed.WEIGHTS).exists():
        raise ValueError(f"{out} holds a model already: choose another --out")
    mesh = sharding.one_device()
    if config_lib.task_of(workdir / "config.json") == "generator":
        params, buffers = generator_runs.load_run(workdir, mesh).params, {}
    else:
        config, _, params = tokenizer_runs.load_run(workdir, mesh)
        buffers = {path: params.pop(path) for path in tokenizer_runs.structure(workdir, config).buffers}
    with disk_errors(out):
        for name in ("config.json", "codes.json"):
            if (workdir / name).exists():
                shutil.copy(workdir / name, out)
        for name in ("encoder", "text"):
            if (workdir / name).exists():
                shutil.copytree(workdir / name, out / name, dirs_exist_ok=True)
        packed.write(out, params, buffers)


def main(_) -> None:
    out = Path(_OUT.value)
    pack(Path(_WORKDIR.value), out)
    print(f"wrote {out}: {sum(file.stat().st_size for file in out.rglob('*') if file.is_file()) / 1e6:.2f} MB")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run", required=True)
    _OUT = flags.DEFINE_string("out", None, "folder for the packed model, which holds its card, README.md",
                               required=True)
    cli.run(main)
