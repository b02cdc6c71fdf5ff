"""Reconstructions from replaced codes, of a toy model whose images are mosaics of its codes' colours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.tokenizer.evaluate_test import Output, Quantized
from vqrae_jax.data import ArraySource, BadImages, eval_batches
from vqrae_jax.models import flat
from vqrae_jax.models.flat import Buffer
from vqrae_jax.tokenizer import evaluate, robustness
from vqrae_jax.tokenizer.instruments import View
from vqrae_jax.training import sharding

GRID, PATCH, COLOURS = 8, 4, 12
SIDE, CODES = GRID * PATCH, 2 * COLOURS  # every colour has a twin that is nearly the same


class Quantizer(nnx.Module):
    num_codes = CODES

    def __init__(self):
        colours = np.random.default_rng(0).permutation(COLOURS * 3).reshape(-1, 3) / (COLOURS * 3)
        self.codebook = Buffer(jnp.asarray(np.concatenate([colours, colours + 0.01]), jnp.float32))

    def lookup(self, indices):
        return self.codebook[...][indices]


class Mosaic(nnx.Module):
    """Takes the mean colour of each patch for the nearest code's, and paints it."""

    def __init__(self):
        self.quantizer = Quantizer()

    def encode(self, images):
        patches = images.reshape(len(images), GRID, PATCH, GRID, PATCH, 3).mean((2, 4))
        distances = jnp.sum((patches[..., None, :] - self.quantizer.codebook[...])**2, -1)
        indices = distances.argmin(-1).astype(jnp.int32)
        return self.quantizer.lookup(indices), indices

    def lookup(self, indices):
        return self.quantizer.lookup(indices)

    def decode(self, z_q):
        return z_q.reshape(len(z_q), GRID, GRID, 3).repeat(PATCH, 1).repeat(PATCH, 2)

    def __call__(self, images, *, train):
        z_q, indices = self.encode(images)
        z_q, indices = z_q.reshape(len(images), -1, 3), indices.reshape(len(images), -1)
        return Output(self.decode(z_q), z_q, Quantized(z_q, indices))


VIEW = View(lambda images: images[:, ::PATCH, ::PATCH].mean((1, 2)), lambda embedding: embedding, {})


def source(count: int = 60) -> ArraySource:
    rng = np.random.default_rng(1)
    colours = np.asarray(Quantizer().codebook[...])[rng.integers(CODES, size=(count, GRID, GRID))]
    noisy = colours.repeat(PATCH, 1).repeat(PATCH, 2) + rng.normal(0, 0.02, (count, SIDE, SIDE, 3))
    return ArraySource(np.uint8(np.round(np.clip(noisy, 0, 1) * 255)))


def batches(batch_size: int):
    return eval_batches(source(), image_size=SIDE, batch_size=batch_size, bad_images=BadImages(None), max_bad=0.0,
                        threads=0)


def perturbed(batch_size: int = 16) -> dict[tuple[str, float], dict]:
    graphdef, params, buffers = flat.split(Mosaic())
    found = robustness.robustness(graphdef, {**params, **buffers}, sharding.one_device(), batches(batch_size), VIEW)
    return {(cell["kind"], cell["share"]): cell for cell in found}


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, float], dict]:
    return perturbed()


def test_untouched_codes_are_the_reconstruction(cells):
    graphdef, params, buffers = flat.split(Mosaic())
    plain = evaluate.Evaluator(graphdef, sharding.one_device())({**params, **buffers}, batches(16), images=60,
                                                                 labelled=False, samples=1)
    assert cells["none", 0.0]["psnr"] == pytest.approx(plain.metrics["psnr"], rel=1e-6)
    assert {kind for kind, share in cells if not share} == {"none"} and len(cells) == 1 + 2 * len(robustness.SHARES)


def test_more_replaced_codes_are_worse_and_near_ones_hurt_less(cells):
    shares = (0.01, 0.05, 0.1, 0.2)
    untouched = cells["none", 0.0]
    for kind in ("random", "nearest"):
        psnr = [untouched["psnr"], *(cells[kind, share]["psnr"] for share in shares)]
        assert psnr == sorted(psnr, reverse=True) and psnr[-1] < psnr[0]
    for share in shares:
        assert cells["random", share]["psnr"] < cells["nearest", share]["psnr"] - 1
    # Replaced by random ones, a share of the patches is off by the mean squared distance of two colours.
    codebook = np.asarray(Quantizer().codebook[...])
    apart = np.mean((codebook[:, None] - codebook)**2) * CODES / (CODES - 1)
    noise = 10**(-untouched["psnr"] / 10)
    assert cells["random", 0.2]["psnr"] == pytest.approx(-10 * np.log10(0.2 * apart + noise), abs=0.5)
    assert cells["random", 0.2]["fd_encoder"] > 10 * cells["nearest", 0.2]["fd_encoder"]


def test_images_meet_the_same_mistakes_in_batches_of_any_size(cells):
    for batch_size in (1, 7):
        for cell, found in perturbed(batch_size).items():
            assert found["psnr"] == pytest.approx(cells[cell]["psnr"], rel=1e-6)
            assert found["fd_encoder"] == pytest.approx(cells[cell]["fd_encoder"], rel=1e-4, abs=1e-9)


def test_the_nearest_other_code_is_the_twin():
    graphdef, params, buffers = flat.split(Mosaic())
    near = robustness._nearest_others(graphdef, {**params, **buffers})
    np.testing.assert_array_equal(near, np.roll(np.arange(CODES), COLOURS))


def replaced(codes: np.ndarray, share: float, nearest: bool = False) -> np.ndarray:
    near = jnp.roll(jnp.arange(CODES), COLOURS)
    one = lambda codes, position: robustness._replaced(codes, position, share=share, nearest=nearest, near=near)
    return np.asarray(jax.vmap(one)(codes, jnp.arange(len(codes))))


def test_a_share_of_the_codes_is_replaced_by_others():
    codes = np.random.default_rng(0).integers(CODES, size=(300, 64))
    np.testing.assert_array_equal(replaced(codes, 0.0), codes)
    changed = {share: replaced(codes, share) != codes for share in robustness.SHARES}
    for share, where in changed.items():  # by 4 standard deviations
        assert where.mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / codes.size))
        assert (changed[0.2] | ~where).all()  # among those of a greater share
        np.testing.assert_array_equal(replaced(codes, share, nearest=True) != codes, where)
    all_other = replaced(codes, 1.1)
    assert (all_other != codes).all()  # an untouched code is no mistake
    steps = np.bincount(((all_other - codes) % CODES).ravel(), minlength=CODES)
    assert steps[0] == 0 and steps[1:].min() > 0.8 * steps[1:].mean()
    np.testing.assert_array_equal(replaced(codes, 1.1, nearest=True), (codes + COLOURS) % CODES)
    assert (changed[0.2][0] != changed[0.2][1]).any()  # another image, other places


@pytest.mark.parametrize("codes", [1, robustness.MAX_CODES + 1])
def test_a_model_without_codes_or_with_too_many_is_said(codes, monkeypatch):
    monkeypatch.setattr(Quantizer, "num_codes", codes)
    with pytest.raises(ValueError, match=f"needs a model with 2 to 65536 codes, and this one has {codes}"):
        perturbed()
