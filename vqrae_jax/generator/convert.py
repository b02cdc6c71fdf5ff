"""A generator's run as a Hugging Face folder of Qwen3ForCausalLM, and back."""

import dataclasses
import logging
import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vqrae_jax import config as config_lib
from vqrae_jax.config import GeneratorConfig
from vqrae_jax.files import disk_errors
from vqrae_jax.generator import build, runs, train_state
from vqrae_jax.models.lm import LMSpec
from vqrae_jax.training import checkpoint, sharding
from vqrae_jax.training.checkpoint import Weights
from vqrae_jax.weights import qwen3, text

log = logging.getLogger(__name__)
RUN = "vqrae_jax"  # folder beside the weights: of a run's own files those that say what it is
BEGIN = "<begin_image>"


def to_hf(workdir: Path, out: Path, *, step: int | None = None, weights: Weights = "ema") -> None:
    """Writes a generator as a Hugging Face folder, which appears under its name when it is complete.

    It holds a Qwen3ForCausalLM with all tokens, float32, in files of at most 5 GB; a generation_config.json, with which
    `generate` draws the codes of an image; a tokenizer, in which codes are `<code_0>` and so on, classes `<class_0>`
    and so on, and `<begin_image>` is what begins an image of no class or behind a caption; and the folder `vqrae_jax`,
    of which `from_hf` makes a run again.

    Args:
      workdir: the run's folder.
      out: the folder to write.
      step, weights: see `runs.load_run`.

    Raises:
      OSError: not the folder of a run, its text tokenizer cannot be read, `tokenizers` is not installed, or `out`
        cannot be written.
      ValueError: `out` is not empty, or the text tokenizer has tokens of these names.
    """
    with disk_errors(out):
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty: choose another --out")
    config, codes, structure, params = runs.load_run(workdir, sharding.one_device(), step=step, weights=weights)
    vocabulary, tokens = structure.vocabulary, structure.codes.grid**2
    # The last code of an image is given to no model, but those who serve one count its position.
    longest = build.longest_caption(config) + 1 + tokens
    spec = dataclasses.replace(structure.spec, max_positions=max(structure.spec.max_positions, longest))
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as unfinished:
            folder = Path(unfinished) / "folder"  # with the permissions that folders have here
            folder.mkdir()
            text.save_tokenizer(
                folder, text=workdir / "text" if vocabulary.text else None, first=vocabulary.text,
                shown=[f"<code_{code}>" for code in range(vocabulary.codes)],
                special=[*(f"<class_{label}>" for label in range(vocabulary.classes)), BEGIN],
                longest=spec.max_positions)
            qwen3.save_generation(folder, among=range(vocabulary.size)[vocabulary.code], vocabulary=vocabulary.size,
                                  length=tokens)
            qwen3.save_lm(folder, spec, params, np.float32)
            (folder / RUN).mkdir()
            runs.write_files(folder / RUN, config, codes)
            shutil.copyfile(workdir / "config.json", folder / RUN / "config.json")
            folder.replace(out)
    log.info("wrote %s: Qwen3ForCausalLM, %s parameters, vocabulary of %s; an image is %d codes behind %s", out,
             f"{sum(value.size for value in params.values()):,}", f"{vocabulary.size:,}", tokens,
             "<class_0> and so on" if vocabulary.classes else f"its caption and {BEGIN}")


def from_hf(folder: Path, workdir: Path) -> None:
    """Makes a generator's run of a folder that `to_hf` wrote, at step 0; its weights may have changed since.

    Of a float32 folder they are the same bits. Those of another type become float32 with the values that they have.

    Args:
      folder: the Hugging Face folder.
      workdir: the run's folder to make.

    Raises:
      OSError: `folder` is incomplete, or was not written by `to_hf`; `workdir` cannot be written.
      ValueError: `workdir` holds a run already; `folder` is damaged, or holds another model than it says.
    """
    checkpoint.check_new(workdir)
    described = folder / RUN
    if not described.is_dir():
        raise FileNotFoundError(f"{described} does not exist: only a generator that to-hf wrote leads back; beside "
                                "weights that others changed, put the folder of that name that came with them")
    from vqrae_jax.data.codes import read_description  # with the data comes Grain, which defines flags

    config, codes = config_lib.load(described / "config.json", GeneratorConfig), read_description(described)
    self_contained = runs.self_contained(described, config)
    structure = build.structure(self_contained, build.known_codes(config, codes))
    found = qwen3.read_lm_spec(folder)
    if other := [field.name for field in dataclasses.fields(LMSpec) if field.name != "max_positions"
                 and getattr(found, field.name) != getattr(structure.spec, field.name)]:
        raise ValueError(f"{folder / 'config.json'} is not that of the generator in {described}: other "
                         f"{', '.join(other)}")
    params = {path: jnp.asarray(value) for path, value in qwen3.load_lm_params(folder, structure.spec).items()}
    state, frozen = train_state.init(config, params)
    checkpoint.write_run(workdir, config, lambda out: runs.write_files(out, self_contained, codes),
                         train_state.items(state), frozen)
    log.info("wrote %s; to look at it: python -m vqrae_jax.generate --workdir=%s --tokenizer=RUN --num=40 "
             "--out=samples.png", workdir, workdir)
