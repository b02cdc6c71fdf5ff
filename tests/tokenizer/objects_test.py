"""Runs from Python whose images or quantizer are objects."""

import json
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vqrae_jax
from tests.conftest import killed_in_step
from tests.verbs import command
from vqrae_jax import config as config_lib
from vqrae_jax.data import ArraySource, hold_out
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Buffer
from vqrae_jax.models.quantizers import Quantized, Quantizer, with_gradient_of
from vqrae_jax.tokenizer.task import TokenizerTask
from vqrae_jax.training import sharding


class Table(Quantizer):
    """Learned codes, and a buffer that counts their uses."""

    moving_buffers = ("uses",)

    def __init__(self, width: int, size: int):
        self.num_codes = size
        self.table = nnx.Param(jax.random.normal(jax.random.key(1), (size, width)))
        self.uses = Buffer(jnp.zeros(size))

    @property
    def loss_weights(self):
        return {"codebook": 0.5}

    def codes(self):
        return self.table[...]

    def lookup(self, indices):
        return self.table[...][indices]

    def __call__(self, z, *, train):
        indices = jnp.argmax(z @ self.table[...].T, axis=-1).astype(jnp.int32)
        chosen = self.lookup(indices)
        counts = jnp.zeros(self.num_codes, jnp.int32).at[indices.reshape(-1)].add(1)
        losses = {"codebook": jnp.mean((jax.lax.stop_gradient(z) - chosen) ** 2)}
        return Quantized(with_gradient_of(jax.lax.stop_gradient(chosen), z), indices, losses, {"counts": counts})

    def next_buffers(self, stats, *, rng):
        return {"uses": self.uses[...] + stats["counts"]}


class BareArray(Table):
    def __init__(self, width: int, size: int):
        super().__init__(width, size)
        self.scale = jnp.ones(width)


class OtherLosses(Table):
    @property
    def loss_weights(self):
        return {"commitment": 1.0}


class FewerTokens(Table):
    def __call__(self, z, *, train):
        return super().__call__(z[:, 1:], train=train)


def pictures(count: int = 12) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), np.uint8) for i in range(count)]


def metrics_file(workdir) -> bytes:
    return (workdir / "metrics.jsonl").read_bytes()


def test_a_list_of_arrays_is_trained_on_and_partly_held_out(tiny_config, tmp_path):
    tiny_config.data.update(threads=2, holdout=0.4)
    tiny_config.train.steps = 3
    config = config_lib.parse(tiny_config)
    labelled = [(image, index % 3) for index, image in enumerate(pictures())]
    result = vqrae_jax.train(config, str(tmp_path / "run"), source=labelled)
    _, held_out = hold_out(ArraySource(labelled), 0.4)
    assert result["num_images"] == len(held_out) > 1 and "knn_top1" in result
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["source"] == "own"
    first, *_ = (json.loads(line) for line in metrics_file(tmp_path / "run").splitlines())
    assert first["step"] == 1
    assert vqrae_jax.load(str(tmp_path / "run")).reconstruct(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 32, 32, 3)
    # A source with its own methods is the same source.
    vqrae_jax.train(config, tmp_path / "again", source=ArraySource(labelled))
    assert metrics_file(tmp_path / "again") == metrics_file(tmp_path / "run")
    assert vqrae_jax.train(config, tmp_path / "again", source=labelled) == result  # nothing is left to do

    with pytest.raises(ValueError, match="the images of the run in .* are an object: to continue it, give it"):
        vqrae_jax.train(config, tmp_path / "run")
    evaluated = command("vqrae_jax.evaluate", f"--workdir={tmp_path / 'run'}")
    assert evaluated.returncode == 1
    assert evaluated.stderr.splitlines()[-1].startswith("error: the images of this run are an object")
    assert "give --data=SPEC to evaluate it on others" in evaluated.stderr


def test_an_own_quantizer_is_trained_continued_exactly_and_loaded(tiny_config, tmp_path):
    config, quantizer = config_lib.parse(tiny_config), Table(32, 16)
    started, _ = TokenizerTask(
        config_lib.parse(changed_kind(tiny_config)), tmp_path / "no", quantizer=quantizer).init(sharding.one_device())
    chex.assert_trees_all_equal(flat.under("quantizer/", started.params), {"table": quantizer.table[...]})
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(quantizer)))
    whole = vqrae_jax.train(config, tmp_path / "whole", quantizer=quantizer)
    assert whole["code_usage"] > 0

    with killed_in_step(5):
        vqrae_jax.train(config, tmp_path / "killed", quantizer=quantizer)
    assert vqrae_jax.train(config, tmp_path / "killed", quantizer=quantizer) == whole
    assert metrics_file(tmp_path / "killed") == metrics_file(tmp_path / "whole")
    # The object is as it was.
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(quantizer))))

    section = json.loads((tmp_path / "whole/config.json").read_text())["model"]["quantizer"]
    assert (section["kind"], section["size"], section["dim"]) == ("own", 16, 32)
    model = vqrae_jax.load(tmp_path / "whole", quantizer=Table(32, 16))
    images = np.stack([picture[:32, :32] for picture in pictures(3)])
    np.testing.assert_array_equal(model.decode_from_indices(model.encode_to_indices(images)), model.reconstruct(images))
    with pytest.raises(ValueError, match=r"give it to vqrae_jax.train or vqrae_jax.load as quantizer="):
        vqrae_jax.load(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"another config: model.quantizer.size: 16 -> 8"):
        vqrae_jax.train(config, tmp_path / "whole", quantizer=Table(32, 8))

    # A second stage takes it over.
    tiny_config.init_from = str(tmp_path / "whole")
    tiny_config.train.update(steps=2)
    tiny_config.optim.warmup_steps = 1
    vqrae_jax.train(config_lib.parse(tiny_config), tmp_path / "stage2", quantizer=Table(32, 16))
    assert (vqrae_jax.load(tmp_path / "stage2", quantizer=Table(32, 16)).encode_to_indices(images) >= 0).all()


def changed_kind(values):
    values = values.copy_and_resolve_references()
    values.model.quantizer.update(kind="own", size=16, dim=32)
    return values


@pytest.mark.parametrize(("quantizer", "says"), [
    (lambda: Table(30, 16), r"Table cannot take the encoder's tokens, whose width is 32: .*30"),
    (lambda: Table(32, 1), r"num_codes, which is 1, at least 2"),
    (lambda: BareArray(32, 16), r"BareArray.scale is a bare array: make it an nnx.Param, which learns, or a .*Buffer"),
    (lambda: OtherLosses(32, 16), r"makes the losses \['codebook'\], but its loss_weights are of \['commitment'\]"),
    (lambda: FewerTokens(32, 16), r"makes z_q of shape \[2, 2, 32\] from tokens \[2, 3, 32\]: it must be \[2, 3, 32\]"),
    (lambda: nnx.Linear(32, 32, rngs=nnx.Rngs(0)), r"Linear is no vqrae_jax.models.quantizers.Quantizer"),
], ids=["width", "one code", "bare array", "losses", "shape", "other module"])
def test_a_quantizer_that_does_not_fit_is_one_line_and_leaves_no_folder(quantizer, says, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        vqrae_jax.train(config_lib.parse(tiny_config), tmp_path / "run", quantizer=quantizer())
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("source", "says"), [
    ([], "source has no images"),
    ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8)], r"image 1 must be .*: it is uint8 \[4, 4\]"),
    ([np.zeros((4, 4, 3))], r"image 0 must be an uint8 array \[H, W, 3\].*: it is float64 \[4, 4, 3\]"),
    (["cat.jpg"], "image 0 must be .*: it is str"),
    ([(np.zeros((4, 4, 3), np.uint8), "cat")], "image 0 must be .*: it is tuple"),
    ([np.zeros((4, 4, 3), np.uint8), (np.zeros((4, 4, 3), np.uint8), 1)], "images 0 and 1: only one of them has"),
])
def test_images_that_do_not_fit_are_one_line_and_leave_no_folder(source, says, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        vqrae_jax.train(config_lib.parse(tiny_config), tmp_path / "run", source=source)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("section", ["data.source", "model.quantizer.kind"])
def test_a_config_alone_cannot_ask_for_an_object(section, tiny_config, tmp_path):
    tiny_config.update_from_flattened_dict({section: "own"})
    with pytest.raises(ValueError, match=r"which no config can name: .* to vqrae_jax.train"):
        vqrae_jax.train(config_lib.parse(tiny_config), tmp_path / "run")


def test_progress_is_shown_where_nobody_has_set_up_logging(tiny_config, tmp_path, monkeypatch, capsys):
    """As in a notebook, where libraries may have given the root logger a handler, at its level WARNING."""
    logger, root = logging.getLogger("vqrae_jax"), logging.getLogger()
    tiny_config.train.steps = 3
    config = config_lib.parse(tiny_config)
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(logger, "handlers", [])
    vqrae_jax.train(config, tmp_path / "shown", source=pictures())
    shown = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("step 3/3  ") for line in shown) == 1
    assert not logger.handlers and logger.level == logging.NOTSET and logger.propagate
    # Whoever has set a level has said what to see.
    monkeypatch.setattr(logger, "level", logging.WARNING)
    vqrae_jax.train(config, tmp_path / "quiet", source=pictures())
    assert "step 3/3" not in capsys.readouterr().err
