"""The metrics against scikit-image and brute force."""

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


@pytest.mark.parametrize("metric", [
    lambda train, test: metrics.knn_top1(*test, reference=train),
    lambda train, test: metrics.linear_probe_top1(*train, *test)], ids=["knn", "probe"])
class TestLabels:

    def test_of_one_class_teach_nothing(self, metric):
        features, labels = labelled(30)
        with pytest.raises(ValueError, match="needs images of at least two classes, but all labels are 3$"):
            metric((features, np.full(30, 3)), (features, labels))

    def test_that_training_lacks_count_as_wrong(self, metric):
        (train, train_labels), (test, test_labels) = labelled(300), labelled(200, seed=1)
        known = train_labels != 2
        accuracy = metric((train[known], train_labels[known]), (test, test_labels))
        of_known = metric((train[known], train_labels[known]), (test[test_labels != 2], test_labels[test_labels != 2]))
        assert accuracy == pytest.approx(of_known * np.mean(test_labels != 2))
        assert 0 < metric((train, train_labels), (test, np.where(test_labels == 2, 7, test_labels))) < 1

    def test_are_names_and_no_sizes(self, metric):
        """Labels of millions need no memory of millions, and any numbers do."""
        (train, train_labels), (test, test_labels) = labelled(300), labelled(200, seed=1)
        strange = np.array([10**9, -5, 7, 10**12, 0])
        assert metric((train, strange[train_labels]), (test, strange[test_labels])) == \
            metric((train, train_labels), (test, test_labels))

    def test_of_features_that_are_not_finite_are_errors(self, metric):
        good, bad = labelled(30), labelled(30)
        bad[0][3, 2], bad[0][5, 0] = np.nan, np.inf
        for train, test in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match=r"^\w+: 2 of 30 rows of features are not finite: look for images"):
                metric(train, test)


def test_linear_probe_does_not_depend_on_its_blocks(monkeypatch):
    train, test = labelled(300), labelled(200, seed=1)
    whole = metrics.linear_probe_top1(*train, *test)
    monkeypatch.setattr(feature_metrics, "_PROBE_ROWS", 7)
    assert metrics.linear_probe_top1(*train, *test) == whole


@pytest.mark.parametrize("limit", [2**25, 30])
def test_zero_shot_takes_the_most_similar_class(monkeypatch, limit):
    monkeypatch.setattr(feature_metrics, "MAX_SIMILARITIES", limit)
    rng = np.random.default_rng(0)
    classes, labels = rng.normal(size=(5, 8)), rng.integers(0, 5, 101)
    images = classes[labels] * rng.uniform(0.1, 9, (101, 1)) + rng.normal(size=(101, 8))
    unit = lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True)
    expected = np.mean((unit(images) @ unit(classes).T).argmax(-1) == labels)
    assert 0.4 < expected < 1
    assert feature_metrics.zero_shot_top1(images, classes, labels) == pytest.approx(expected)
    with pytest.raises(ValueError, match="labels are between 0 and 4, but there are 4 classes: give a name"):
        feature_metrics.zero_shot_top1(images, classes[:4], labels)
    with pytest.raises(ValueError, match=r"must be \[N, e\] and \[C, e\], not \(101, 8\) and \(5, 7\)"):
        feature_metrics.zero_shot_top1(images, classes[:, :7], labels)
    with pytest.raises(ValueError, match="images: 1 of 101 rows of features are not finite"):
        feature_metrics.zero_shot_top1(np.where(np.arange(101)[:, None] == 3, np.nan, images), classes, labels)


def test_linear_cka_is_what_the_grams_say_and_ignores_rotation_and_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 6)) + 3
    y = np.c_[x[:, :3] @ rng.normal(size=(3, 4)), rng.normal(size=50)] - 5
    centre = np.eye(50) - 1 / 50
    gram_x, gram_y = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre  # HSIC of Kornblith et al., equation 3
    expected = np.trace(gram_x @ gram_y) / np.sqrt(np.trace(gram_x @ gram_x) * np.trace(gram_y @ gram_y))
    assert 0.2 < expected < 0.95
    assert feature_metrics.linear_cka(x, y) == pytest.approx(expected, rel=1e-12)
    assert feature_metrics.linear_cka(y, x) == pytest.approx(expected, rel=1e-12)
    covariance = np.cov(np.c_[x, y], rowvar=False)
    assert feature_metrics.cka_from_scatter(covariance, 6) == pytest.approx(expected, rel=1e-12)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert feature_metrics.linear_cka(x, 7 * x @ rotation + 2) == pytest.approx(1, rel=1e-12)


def test_linear_cka_that_does_not_exist_is_an_error():
    x = np.random.default_rng(0).normal(size=(50, 6))
    with pytest.raises(ValueError, match="one of the two is the same for all"):
        feature_metrics.linear_cka(x, np.full((50, 2), 0.5))
    with pytest.raises(ValueError, match=r"features \[N, d1\] and \[N, d2\]"):
        feature_metrics.linear_cka(x, x[:49])
    with pytest.raises(ValueError, match="square scatter matrix wider than d1"):
        feature_metrics.cka_from_scatter(np.eye(6), 6)
    with pytest.raises(ValueError, match="linear CKA: .* not finite"):
        feature_metrics.linear_cka(x, np.where(x == x[3, 2], np.nan, x))
