"""Weights from and to other code bases, and data sets of theirs.

    python -m vqrae_jax.convert from-torch --checkpoint=FILE --encoder=HF_DIR --decoder-heads=N
        [--encoder-norm=plain|affine] [--latent-stats=FILE] [--[no]simvq-l2-norm] --workdir=OUT

makes a run's folder of a checkpoint of the PyTorch code base hugoycj/RAE: of a VQRAE or RAE model, or of an RAE decoder
alone. FILE is .safetensors, or a PyTorch file (which needs PyTorch, and is read without running anything in it). OUT
can be evaluated and used like any run, and started from (`init_from`).

    python -m vqrae_jax.convert to-hf --workdir=RUN --out=HF_DIR [--step=N] [--weights=ema|raw]

writes a tokenizer's encoder as a Hugging Face folder, at the run's input size: `transformers` and
`vqrae_jax.load_encoder` give the same tokens as the run's features. Of a generator it writes the whole language model,
a Qwen3ForCausalLM, with a tokenizer in which codes, classes and what begins an image are tokens.

    python -m vqrae_jax.convert from-hf --checkpoint=HF_DIR --workdir=OUT

makes a run's folder again of what to-hf wrote of a generator: with the same weights, or with what became of them there.

    python -m vqrae_jax.convert from-webdataset --tars='GLOB' --out=DIR [--threads=N]

makes of every tar shard of a WebDataset (plain or gzipped) DIR/NAME.array_record, the images as they are with labels
from .cls or .json and captions from .txt or .json, and DIR/NAME.jsonl, the members that were left out and why. The same
command continues after an interruption. Several machines can share DIR if each takes other tars.
"""

import glob
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax.data import webdataset
from vqrae_jax.files import disk_errors
from vqrae_jax.generator import convert as generator_convert
from vqrae_jax.tokenizer import convert
from vqrae_jax.training.checkpoint import Weights

log = logging.getLogger("vqrae_jax.convert")


def from_webdataset(pattern: str, out: Path, *, threads: int) -> None:
    """Makes ArrayRecord files of tars; `webdataset.convert` says how.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: there is no image in the tars; and as from `webdataset.convert`.
      OSError: as from `webdataset.convert`.
    """
    tars = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    if not tars:
        raise FileNotFoundError(f"no file matches {pattern}: give tar files, as --tars='/data/cc12m/*.tar'")
    images = labels = captions = bad = damaged = 0
    with disk_errors(out):
        for number, tar in enumerate(webdataset.convert(tars, out, threads=threads), 1):
            images, labels, captions, bad = (images + tar.images, labels + tar.labels, captions + tar.captions,
                                             bad + tar.bad)
            if tar.damage is not None:
                damaged += 1
                log.warning("%s is damaged, what comes before the damage is kept: %s", tar.tar, tar.damage)
            log.info("%d of %d tars, %s images, %s bad members", number, len(tars), f"{images:,}", f"{bad:,}")
    if not images:
        raise ValueError(f"there is no good image in {len(tars)} tars: {out}/*.jsonl say why")
    spec = f"array_record:{glob.escape(str(out))}/*.array_record"
    log.info("%s images (%s with a label, %s with a caption) in %d files, %s bad members and %d damaged tars (see "
             "%s/*.jsonl); to use them: --config.data.source=%s", f"{images:,}", f"{labels:,}", f"{captions:,}",
             len(tars), f"{bad:,}", damaged, out, shlex.quote(spec))


def to_hf(workdir: Path, out: Path, *, step: int | None, weights: Weights) -> None:
    """Writes what there is of a run of either task as a Hugging Face folder; `to_hf` of the task says what."""
    of_task = {"tokenizer": convert.to_hf, "generator": generator_convert.to_hf}
    of_task[config_lib.task_of(workdir / "config.json")](workdir, out, step=step, weights=weights)


def main(argv: Sequence[str]) -> None:
    verb = " ".join(argv[1:])
    if verb not in _VERBS:
        raise ValueError(f"say what to convert, {' or '.join(_VERBS)}, not {verb!r}; --help explains")
    run, required, optional = _VERBS[verb]
    for flag in _FLAGS:
        if flag.name in required and not flag.value:
            raise ValueError(f"{verb} needs --{flag.name}")
        if flag.name not in (*required, *optional) and flag.present:
            raise ValueError(f"--{flag.name} has no meaning for {verb}")
    run()


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string("checkpoint", "", "from-torch: the .safetensors or PyTorch file; from-hf: "
                                      "the folder that to-hf wrote")
    _ENCODER = flags.DEFINE_string("encoder", "", "from-torch: Hugging Face folder or hub id of the encoder it was "
                                   "trained with; its weights count only if FILE has none")
    _HEADS = flags.DEFINE_integer("decoder-heads", 0, "from-torch: attention heads of the decoder (RAE's ViT-B has "
                                  "12, ViT-L and ViT-XL 16)", lower_bound=0)
    _NORM = flags.DEFINE_enum("encoder-norm", None, ["plain", "affine"], "from-torch: whether the encoder's last "
                              "LayerNorm has scale and bias; by default what FILE says, and plain if it says nothing")
    _STATS = flags.DEFINE_string("latent-stats", "", "from-torch: PyTorch file with the latents' mean and var")
    _L2 = flags.DEFINE_bool("simvq-l2-norm", None, "from-torch: whether a SimVQ divides codes and tokens by their "
                            "lengths; by default yes, unless it has no l2_norm_scale")
    _WORKDIR = flags.DEFINE_string("workdir", "", "folder of the run: from-torch and from-hf create it, to-hf "
                                   "reads it")
    _OUT = flags.DEFINE_string("out", "", "to-hf: the Hugging Face folder to write; from-webdataset: the folder of "
                               "ArrayRecord files to write")
    _TARS = flags.DEFINE_string("tars", "", "from-webdataset: the tar files, with *, ? and ** for anything")
    _THREADS = flags.DEFINE_integer("threads", 0, "from-webdataset: tars that are read at once; 0 is one a core",
                                    lower_bound=0)
    _STEP = flags.DEFINE_integer("step", None, "to-hf: which checkpoint; the last if not given")
    _WEIGHTS = cli.weights()
    _FLAGS = (_CHECKPOINT, _ENCODER, _HEADS, _NORM, _STATS, _L2, _WORKDIR, _OUT, _STEP, _WEIGHTS, _TARS, _THREADS)
    _VERBS: dict[str, tuple[Callable[[], None], tuple[str, ...], tuple[str, ...]]] = {
        "from-torch": (lambda: convert.from_torch(
            Path(_CHECKPOINT.value), Path(_WORKDIR.value), encoder=_ENCODER.value, decoder_heads=_HEADS.value,
            encoder_norm=_NORM.value, latent_statistics=Path(_STATS.value) if _STATS.value else None,
            simvq_l2_norm=_L2.value),
            ("checkpoint", "encoder", "decoder-heads", "workdir"), ("encoder-norm", "latent-stats", "simvq-l2-norm")),
        "to-hf": (lambda: to_hf(Path(_WORKDIR.value), Path(_OUT.value), step=_STEP.value, weights=_WEIGHTS.value),
                  ("workdir", "out"), ("step", "weights")),
        "from-hf": (lambda: generator_convert.from_hf(Path(_CHECKPOINT.value), Path(_WORKDIR.value)),
                    ("checkpoint", "workdir"), ()),
        "from-webdataset": (lambda: from_webdataset(
            _TARS.value, Path(_OUT.value), threads=_THREADS.value or os.cpu_count() or 1), ("tars", "out"),
            ("threads",)),
    }
    # Names are documented with hyphens; underscores, as in other flags, do as well.
    sys.argv[1:] = [name.replace("_", "-") + sign + value if name.startswith("--") else name + sign + value
                    for name, sign, value in (argument.partition("=") for argument in sys.argv[1:])]
    cli.run(main, arguments=True)
