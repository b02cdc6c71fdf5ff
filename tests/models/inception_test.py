"""Inception-v3 against torch-fidelity: committed outputs, and live where it is installed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests import make_inception_references as references
from vqrae_jax.metrics import frechet
from vqrae_jax.models import flat, inception
from vqrae_jax.models.inception import InceptionV3
from vqrae_jax.weights import inception as weights
from vqrae_jax.weights import tensors

BATCH = 4


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """The weights of the references, under torch-fidelity's names."""
    params = tensors.zeros(lambda: InceptionV3(rngs=nnx.Rngs(0)))
    return {name: references.draw(name, view.shape) for name, view in weights.views(params).items()}


@pytest.fixture(scope="module")
def file(drawn, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(drawn, file)
    return file


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(file):
    """The network on images of 299x299, which are not resized again; compiled once, for `BATCH` of them."""
    graphdef, *_ = flat.split(nnx.eval_shape(lambda: InceptionV3(rngs=nnx.Rngs(0))))
    params = jax.device_put(weights.load_inception(file))
    compiled = jax.jit(lambda params, images: flat.merge(graphdef, params)(images))

    def run(images) -> inception.InceptionOutput:
        assert images.shape == (BATCH, 299, 299, 3)
        return compiled(params, images)

    return run


resize = jax.jit(inception.resize_tf1, static_argnums=1)


def resized(images: np.ndarray) -> jax.Array:
    return resize(jnp.asarray(images), 299)


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return dict(np.load(references.REFERENCE))


def test_features_and_logits_match_the_committed_ones(run, reference):
    output = run(jnp.concatenate([resized(references.images(*size)) for size in references.SIZES]))
    for name, value in output._asdict().items():
        difference = np.abs(np.asarray(value) - reference[name]).max()
        print(f"\n{name}: difference {difference:.1e} of {np.abs(reference[name]).mean():.1f}")
        assert value.dtype == np.float32 and difference <= 1e-4
    assert reference["features"].std(axis=0).mean() > 0.1  # the images differ in them


def test_the_resize_matches_the_committed_one(reference):
    for i, size in enumerate(references.SIZES):
        image = np.asarray(resized(references.images(*size)), np.float64)[0]
        np.testing.assert_allclose(image.mean(1), reference["rows"][i], rtol=0, atol=255e-6)
        np.testing.assert_allclose(image.mean(0), reference["columns"][i], rtol=0, atol=255e-6)


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (299, 299), (299, 100), (300, 298), (512, 771), (1, 2)])
def test_the_resize_matches_torch_fidelity(size, torch_fidelity):
    import torch

    module = torch_fidelity("interpolate_compat_tensorflow")
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    expected = module.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(images.transpose(0, 3, 1, 2)).float(), size=(299, 299), align_corners=False)
    difference = np.abs(np.asarray(resized(images)) - expected.numpy().transpose(0, 2, 3, 1)).max() / 255
    print(f"\n{size}: difference {difference:.1e} of the range")
    assert difference <= 1e-6


def test_the_resize_has_no_half_pixel_centres():
    image = np.zeros((1, 2, 2, 1), np.uint8)
    image[0, 1], image[0, :, 1] = 100, 200
    np.testing.assert_allclose(inception.resize_tf1(jnp.asarray(image), 4)[0, :, :, 0],
                               [[0, 100, 200, 200], [50, 125, 200, 200], [100, 150, 200, 200], [100, 150, 200, 200]])


def test_features_and_logits_match_torch_fidelity(run, torch_fidelity, tmp_path):
    import torch

    network = references.torch_inception(tmp_path)
    images = references.images(64, 80, count=2 * BATCH, seed=1)
    expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    outputs = [run(resized(images[:BATCH])), run(resized(images[BATCH:]))]
    for name, theirs, *ours in zip(outputs[0]._fields, expected, *outputs, strict=True):
        difference = np.abs(np.concatenate(ours) - theirs.numpy()).max()
        print(f"\n{name}: difference {difference:.1e} of {theirs.abs().mean():.1f}")
        assert difference <= 1e-4


def test_features_are_float32_whatever_the_convolutions_compute_in():
    output = nnx.eval_shape(lambda images: InceptionV3(dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(images),
                            jax.ShapeDtypeStruct((2, 40, 50, 3), jnp.uint8))
    assert {leaf.dtype for leaf in output} == {jnp.dtype("float32")}
    assert [leaf.shape for leaf in output] == [(2, 2048), (2, 1008)]


def test_images_are_rounded_as_a_file_would():
    images = jnp.asarray([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 1.2])
    np.testing.assert_array_equal(inception.to_uint8_levels(images), [0, 0, 0, 1, 255, 255])


def test_the_weights_of_a_pytorch_file_are_the_same(drawn, file, tmp_path):
    torch = pytest.importorskip("torch", reason="a PyTorch file needs torch")
    found = {name: torch.from_numpy(value) for name, value in drawn.items()}
    torch.save(found | {"fc.bias": torch.zeros(1008), "Conv2d_1a_3x3.bn.num_batches_tracked": torch.tensor(3)},
               tmp_path / "inception.pth")
    expected = weights.load_inception(file)
    ours = weights.load_inception(tmp_path / "inception.pth")
    assert ours.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(ours[path], value, err_msg=path)


@pytest.mark.parametrize("changes, message", [
    ({"Mixed_6e.branch_pool.bn.running_var": None}, "tensor Mixed_6e.branch_pool.bn.running_var is missing$"),
    ({"fc.weight": np.zeros((1000, 2048), np.float32)},
     r"tensor fc.weight has shape \(1000, 2048\), but \(1008, 2048\) is needed"),
    ({"AuxLogits.fc.bias": np.zeros(1000, np.float32)}, "unexpected tensor AuxLogits.fc.bias, which this network"),
])
def test_tensors_that_do_not_fit_are_named(changes, message, drawn, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({name: value for name, value in (drawn | changes).items() if value is not None}, file)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {message}") as error:
        weights.load_inception(file)
    assert "\n" not in str(error.value)


def test_an_absent_or_damaged_file_is_one_line_with_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "weights-inception-2015-12-05-6726825d.pth"
    command = (f"`curl -L -o ~/.cache/vqrae_jax/{name} --create-dirs "
               f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{name}`")
    with pytest.raises(OSError, match=f"^no Inception weights at ~/.cache/vqrae_jax/{name}: .*{re.escape(command)}$"):
        weights.load_inception(weights.WEIGHTS)
    with pytest.raises(OSError, match=re.escape(command)):
        weights.load_inception(tmp_path / "mine.safetensors")
    file = tmp_path / ".cache" / "vqrae_jax" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half of it")
    with pytest.raises(ValueError, match=f"is damaged.*download it again with {re.escape(command)}$"):
        weights.load_inception(weights.WEIGHTS)


@pytest.mark.long
def test_the_fid_of_2000_images_against_2000_matches_torch_fidelity(run, torch_fidelity, tmp_path):
    import torch

    network = references.torch_inception(tmp_path)
    metric = torch_fidelity("metric_fid")
    sets = {}
    for seed, size in enumerate(((32, 32), (36, 36))):
        images = references.images(*size, count=2000, seed=seed)
        acc, few = frechet.init(inception.FEATURES), frechet.init(inception.FEATURES)
        update = jax.jit(frechet.update, donate_argnums=0)
        theirs = []
        for start in range(0, len(images), BATCH):
            batch = images[start:start + BATCH]
            features, valid = run(resized(batch)).features, np.ones(BATCH, bool)
            acc, few = update(acc, features, valid), update(few, features, valid) if start < 500 else few
            theirs.append(network(torch.from_numpy(batch.transpose(0, 3, 1, 2)))[0])
        theirs = torch.cat(theirs)
        sets[seed] = {"all": (frechet.moments(acc), metric.fid_features_to_statistics(theirs)),
                      "few": (frechet.moments(few), metric.fid_features_to_statistics(theirs[:500]))}

    for (one, other), which in ((0, 1), "all"), ((0, 0), "all"), ((0, 1), "few"):
        (ours1, theirs1), (ours2, theirs2) = sets[one][which], sets[other][which]
        expected = metric.fid_statistics_to_metric(theirs1, theirs2, False)[metric.KEY_METRIC_FID]
        actual = frechet.frechet_distance(ours1.mean, frechet.covariance(ours1), ours2.mean, frechet.covariance(ours2))
        print(f"\nFID of {ours1.number} images of set {one} and {ours2.number} of set {other}: {actual:.6f}, "
              f"torch-fidelity's {expected:.6f}, difference {abs(actual - expected):.1e}")
        assert actual <= 1e-3 if one == other else actual == pytest.approx(expected, rel=1e-3)
