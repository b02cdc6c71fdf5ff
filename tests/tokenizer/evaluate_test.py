"""What an evaluation keeps of images, and of which of them, with a toy model; `comparison_test` has real ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vqrae_jax import metrics
from vqrae_jax.data import ArraySource, BadImages, eval_batches
from vqrae_jax.metrics import METRICS
from vqrae_jax.models import flat
from vqrae_jax.tokenizer import evaluate
from vqrae_jax.training import sharding

SIDE = 16


class Quantized(NamedTuple):
    z_q: jax.Array
    indices: jax.Array


class Output(NamedTuple):
    images: jax.Array
    features: jax.Array
    quantized: Quantized


class Quantizer(nnx.Module):
    num_codes = 4


class Toy(nnx.Module):
    """Darkens images. Its features are their four quarters, its codes say how bright these are."""

    def __init__(self):
        self.factor, self.quantizer = nnx.Param(jnp.float32(0.9)), Quantizer()

    def __call__(self, images, *, train):
        features = images.reshape(len(images), 4, -1) * self.factor[...] / 0.9
        indices = jnp.minimum(4 * features.mean(-1), 3).astype(jnp.int32)
        return Output(images * self.factor[...], features, Quantized(features, indices))


def source_of(count: int, *, classes: int = 4, sort: bool = False, seed: int = 0) -> ArraySource:
    """Images of as many colours as classes, and noise; without labels if there are no classes."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(max(classes, 1), size=count)
    labels = np.sort(labels) if sort else labels
    colours = np.random.default_rng(99).integers(60, 190, (max(classes, 1), 1, 1, 3))
    images = np.uint8(colours[labels] + rng.integers(-60, 60, (count, SIDE, SIDE, 3)))
    return ArraySource([(image, int(label)) if classes else image for image, label in zip(images, labels, strict=True)])


def evaluated(source, *, batch_size=7, table=METRICS, factor=0.9, **options) -> evaluate.Evaluation:
    """All images of a source."""
    graphdef, params, buffers = flat.split(Toy())
    mesh = sharding.one_device()
    batches = eval_batches(source, image_size=SIDE, batch_size=batch_size, bad_images=BadImages(None), max_bad=1.0,
                           threads=0)
    arrays = {**params, **buffers, "factor": jnp.float32(factor)}
    return evaluate.Evaluator(graphdef, mesh, table)(arrays, batches, **{
        "images": len(source), "labelled": source.num_classes is not None, "samples": 2, **options})


def features_of(source) -> tuple[np.ndarray, np.ndarray]:
    images, labels, *_ = zip(*(source[i] for i in range(len(source))), strict=True)
    return np.reshape(images, (len(source), 4, -1)).mean(1) / np.float32(255), np.array(labels)


def test_knn_of_many_images_is_that_of_a_random_choice_and_says_so(monkeypatch):
    source = source_of(400, sort=True)  # as in a folder of classes
    features, labels = features_of(source)
    knn = lambda most, batch_size=7: {name: value for name, value in evaluated(
        source, batch_size=batch_size, table={"knn": METRICS["knn"]._replace(most_rows=most)}).metrics.items()
        if name.startswith("knn")}
    whole = {"knn_top1": metrics.knn_top1(features, labels)}
    assert knn(metrics.KNN_IMAGES) == whole == knn(400)
    assert METRICS["knn"].most_rows == metrics.KNN_IMAGES
    asked = []
    monkeypatch.setattr(metrics, "knn_top1", lambda *arguments: asked.append(arguments) or 0.5)
    for batch_size in (7, 64):
        assert knn(100, batch_size) == {"knn_top1": 0.5, "knn_images": 100}
    (chosen, chosen_labels), (again, _) = asked
    np.testing.assert_array_equal(chosen, again)
    assert np.bincount(chosen_labels).min() > 10  # not the first classes
    places = [int(np.abs(features - row).max(1).argmin()) for row in chosen]
    assert len(set(places)) == 100 and sorted(places) == places
    np.testing.assert_allclose(chosen, features[places], atol=1e-6)
    np.testing.assert_array_equal(chosen_labels, labels[places])


@pytest.fixture
def kept(monkeypatch) -> list[int]:
    """Bytes of rows that each evaluation held on the host when it had seen all images."""
    found, finished = [], evaluate._finished

    def recorded(table, sums, rows, finite):
        found.append(sum(array.nbytes for array in jax.tree.leaves((rows, finite))))
        return finished(table, sums, rows, finite)

    monkeypatch.setattr(evaluate, "_finished", recorded)
    return found


def test_without_labels_a_few_numbers_an_image_are_kept_and_no_features(kept):
    for count in (100, 300):
        assert not {"knn_top1"} & evaluated(source_of(count, classes=0)).metrics.keys()
        assert "knn_top1" in evaluated(source_of(count)).metrics
    few, labelled_few, many, labelled_many = kept
    features = SIDE * SIDE * 3 // 4 * 4  # bytes, of an image
    assert many == 3 * few <= 300 * 16
    assert labelled_many == 3 * labelled_few > 300 * features


def test_images_that_cannot_be_read_count_nowhere():
    source = source_of(30, classes=3)
    whole = evaluated(source)
    damaged = ArraySource([source[i][:2] for i in range(30)] + [(np.zeros((SIDE, SIDE, 3), np.uint8), 0)] * 5)
    read = ArraySource.__getitem__

    class Damaged:
        num_classes = 3
        name = damaged.name

        def __len__(self):
            return 35

        def __getitem__(self, index):
            if index >= 30:
                raise ValueError("damaged")
            return read(damaged, index)

    found = evaluated(Damaged())
    assert found.metrics == whole.metrics and found.metrics["num_images"] == 30
    np.testing.assert_array_equal(found.places, np.arange(30))


def test_what_is_no_number_is_named_and_the_rest_is_measured():
    found = evaluated(source_of(20), factor=np.nan)
    assert found.failed == {name: f"{reason}: 20 of 20 reconstructions are not finite" for name, reason in {
        "psnr": "is not a number", "ssim": "is not a number",
        "knn": "features: 20 of 20 rows of features are not finite: look for images or weights that are not"}.items()}
    assert found.metrics["num_images"] == 20 and found.metrics["code_usage"] == 0.25
    assert np.isnan(found.metrics["psnr"])


def test_labels_of_one_class_have_no_nearest_neighbours():
    found = evaluated(source_of(20, classes=1))
    assert not found.failed and "knn_top1" not in found.metrics
    each_its_own = ArraySource([(np.zeros((SIDE, SIDE, 3), np.uint8), i) for i in range(5)])
    assert "knn_top1" not in evaluated(each_its_own).metrics
