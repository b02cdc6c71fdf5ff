"""The metrics against scikit-image and brute force."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqrae_jax import metrics
from vqrae_jax.metrics import features as feature_metrics


def image_pairs(height=37, width=48, seed=0):
    """Smooth and noisy pairs, one of them constant: `[3, H, W, 3]` float32 in [0, 1], twice."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, height)[:, None, None] * np.linspace(0, 1, width)[None, :, None] * np.ones(3)
    x = np.stack([ramp, rng.random((height, width, 3)), np.full((height, width, 3), 0.9)])
    y = np.clip(x + rng.normal(0, 0.1, x.shape), 0, 1)
    return x.astype(np.float32), y.astype(np.float32)


def test_psnr_matches_its_formula():
    x, y = image_pairs()
    mse = ((x.astype(np.float64) - y) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(metrics.psnr(x, y), 10 * np.log10(1 / mse), rtol=1e-5)
    np.testing.assert_allclose(metrics.psnr(x, x + 0.1), 20, atol=1e-3)
    assert np.isinf(metrics.psnr(x, x)).all()


@pytest.mark.parametrize("size", [(37, 48), (11, 11), (64, 13)])
def test_ssim_matches_scikit_image(size):
    skimage_metrics = pytest.importorskip("skimage.metrics")
    x, y = image_pairs(*size)
    expected = [skimage_metrics.structural_similarity(
        a.astype(np.float64), b.astype(np.float64), data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(metrics.ssim(x, y), expected, atol=1e-4)
    np.testing.assert_allclose(metrics.ssim(x, x), 1, atol=1e-5)


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_images_that_do_not_fit_are_errors(metric):
    x, y = image_pairs()
    with pytest.raises(ValueError, match="one shape"):
        metric(x, y[:1])
    with pytest.raises(ValueError, match="divide uint8 by 255"):
        metric(x, (y * 255).astype(np.uint8))


def test_ssim_names_an_image_too_small():
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(jnp.zeros((1, 10, 32, 3)), jnp.zeros((1, 10, 32, 3)))


def labelled(count, *, classes=5, dim=8, noise=1.5, seed=0):
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return (centres[labels] + noise * rng.normal(size=(count, dim))).astype(np.float32), labels


def brute_force_knn(features, labels, voters, voter_labels, *, k, temperature, leave_one_out):
    unit = lambda v: v.astype(np.float64) / np.linalg.norm(v, axis=-1, keepdims=True)
    similarity = unit(features) @ unit(voters).T
    correct = 0
    for i, row in enumerate(similarity):
        others = [j for j in np.argsort(-row) if not (leave_one_out and j == i)][:k]
        votes = np.zeros(voter_labels.max() + 1)
        for j in others:
            votes[voter_labels[j]] += np.exp(row[j] / temperature)
        correct += votes.argmax() == labels[i]
    return correct / len(features)


@pytest.mark.parametrize("limit", [2**25, 1000])  # one block, and many with a shorter last one
@pytest.mark.parametrize("k", [1, 20])
def test_knn_matches_brute_force(monkeypatch, limit, k):
    monkeypatch.setattr(feature_metrics, "MAX_SIMILARITIES", limit)
    (features, labels), (voters, voter_labels) = labelled(101), labelled(150, seed=1)
    options = {"k": k, "temperature": 0.07}
    expected = brute_force_knn(features, labels, voters, voter_labels, **options, leave_one_out=False)
    assert metrics.knn_top1(features, labels, reference=(voters, voter_labels), **options) == pytest.approx(expected)
    assert 0.3 < expected < 1  # neither trivial nor chance
    expected = brute_force_knn(features, labels, features, labels, **options, leave_one_out=True)
    assert metrics.knn_top1(features, labels, **options) == pytest.approx(expected)


def test_knn_is_compiled_once_for_all_features_of_a_shape(caplog):
    features, labels = labelled(60)
    metrics.knn_top1(features, labels)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        metrics.knn_top1(features + 1, labels)
    assert not [message for message in caplog.messages if "ompil" in message]


def knn_of_batches(features, labels, batch_size=7):
    """The numbers of the table's row, and all features that it held at any time."""
    metric, kept, held = metrics.METRICS["knn"], None, 0
    for start in range(0, len(features), batch_size):
        rows = slice(start, start + batch_size)
        kept = metric.update(kept, (features[rows], labels[rows]), np.ones(len(labels[rows]), bool))
        held = max(held, len(pickle.dumps(kept)))
    return metric.finish(kept), held


def test_knn_of_many_images_is_that_of_a_random_choice_and_says_so(monkeypatch):
    features, labels = labelled(400, classes=4)
    order = np.argsort(labels, kind="stable")  # as in a folder of classes
    whole = {"knn_top1": metrics.knn_top1(features[order], labels[order])}
    assert knn_of_batches(features[order], labels[order])[0] == whole
    monkeypatch.setattr(metrics, "KNN_IMAGES", 400)
    assert knn_of_batches(features[order], labels[order])[0] == whole
    asked = []
    monkeypatch.setattr(metrics, "knn_top1", lambda *arguments: asked.append(arguments) or 0.5)
    monkeypatch.setattr(metrics, "KNN_IMAGES", 100)
    for _ in range(2):
        assert knn_of_batches(features[order], labels[order])[0] == {"knn_top1": 0.5, "knn_images": 100}
    (chosen, chosen_labels), (again, _) = asked
    np.testing.assert_array_equal(chosen, again)
    assert np.bincount(chosen_labels).min() > 10  # not the first classes
    places = [np.flatnonzero((features[order] == row).all(1))[0] for row in chosen]
    assert len(set(places)) == 100 and sorted(places) == places
    np.testing.assert_array_equal(chosen_labels, labels[order][places])


def test_features_without_labels_are_not_kept():
    features, labels = labelled(700, dim=64)
    assert knn_of_batches(features, labels)[1] > features.nbytes
    numbers, held = knn_of_batches(features, np.full(700, -1))
    assert numbers == {} and held < 3000
    labels[300] = -1
    assert knn_of_batches(features, labels)[0] == {}


def test_leave_one_out_does_not_ask_the_image_itself():
    features, labels = np.random.default_rng(0).normal(size=(200, 16)), np.arange(200) % 10
    assert metrics.knn_top1(features, labels, reference=(features, labels), k=1) == 1
    assert metrics.knn_top1(features, labels, k=1) < 0.3


def test_knn_with_fewer_references_than_k():
    features = np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    assert metrics.knn_top1(features, np.array([0, 0, 1, 1])) == 1
    with pytest.raises(ValueError, match="no reference"):
        metrics.knn_top1(features[:1], np.array([0]))


def test_linear_probe_matches_gradient_free_least_squares():
    (train, train_labels), (test, test_labels) = labelled(300), labelled(200, seed=1)
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    design = np.c_[(train - mean) / std, np.ones(300)]
    penalty = np.sqrt(0.1 * 300) * np.eye(8, 9)  # the bias is not penalised
    targets = np.r_[np.eye(5)[train_labels], np.zeros((8, 5))]
    solution = np.linalg.lstsq(np.r_[design, penalty], targets, rcond=None)[0]
    expected = np.mean((np.c_[(test - mean) / std, np.ones(200)] @ solution).argmax(-1) == test_labels)
    assert metrics.linear_probe_top1(train, train_labels, test, test_labels, l2=0.1) == pytest.approx(expected)
    assert 0.4 < expected < 1


def test_linear_probe_survives_constant_features_and_finds_separable_classes():
    train, train_labels = labelled(300, noise=0.1)
    test, test_labels = labelled(100, noise=0.1, seed=1)
    pad = lambda features: np.c_[features, np.ones((len(features), 3))]
    assert metrics.linear_probe_top1(pad(train), train_labels, pad(test), test_labels) == 1


@pytest.mark.parametrize("metric", [
    lambda features, labels: metrics.knn_top1(features, labels),
    lambda features, labels: metrics.linear_probe_top1(features, labels, features, labels)])
def test_labels_that_do_not_fit_are_errors(metric):
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        metric(np.zeros((4, 3)), np.zeros(5, int))
