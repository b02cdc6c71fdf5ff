"""Frechet distance and Inception Score against torch-fidelity and plain NumPy, whatever the batches and devices."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.conftest import REPOSITORY
from vqrae_jax.metrics import frechet, inception_score
from vqrae_jax.metrics.frechet import Moments

WIDTH, CLASSES = 48, 20
update, update_score = jax.jit(frechet.update), jax.jit(inception_score.update)
COUNTS = {"many": 130, "fewer than dimensions": 30}


def drawn(count: int, *, width: int = WIDTH, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Features like Inception's: >= 0, of few directions that matter, far from 0 next to their spread."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(width, width)) * np.exp(-np.arange(width) / (width / 8))[:, None]
    return np.maximum(0, 2 + shift + 0.3 * rng.normal(size=(count, width)) @ mix).astype(np.float32)


def exact(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = features.astype(np.float64)
    return x.mean(0), np.cov(x, rowvar=False)


def distance(one: Moments, other: Moments) -> float:
    return frechet.frechet_distance(one.mean, frechet.covariance(one), other.mean, frechet.covariance(other))


def padded(x: np.ndarray, size: int, *, first: int = 0):
    """`x` in batches of `size` with the rows that are valid, and each row's position. Padding is NaN."""
    for start in range(0, len(x), size):
        batch = x[start:start + size]
        rows = np.full((size, *x.shape[1:]), np.nan, np.float32)
        rows[:len(batch)] = batch
        yield rows, first + start + np.arange(size), np.arange(size) < len(batch)


def everything(batch_size: int, devices: int) -> dict:
    """All numbers that batches and devices must not change."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    size = -(-batch_size // devices) * devices
    put = lambda *arrays: jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("data")))
    everywhere = NamedSharding(mesh, PartitionSpec())
    found = {}
    for name, count in COUNTS.items():
        moments = []
        for seed in (1, 2):
            acc = jax.device_put(frechet.init(WIDTH), everywhere)
            for rows, _, valid in padded(drawn(count, seed=seed, shift=0.1 * seed), size):
                acc = jax.block_until_ready(update(acc, *put(rows, valid)))  # or busy devices wait for one another
            moments.append(frechet.moments(acc))
        found[name] = {"mean": moments[0].mean.tolist(), "distance": distance(*moments)}
    acc = jax.device_put(inception_score.init(4, CLASSES), everywhere)
    for rows, position, valid in padded(logits(100), size):
        acc = jax.block_until_ready(update_score(acc, *put(rows, (position // 30).astype(np.int32), valid)))
    found["score"] = inception_score.finish(acc)
    return found


def logits(count: int) -> np.ndarray:
    return 3 * np.random.default_rng(5).normal(size=(count, CLASSES)).astype(np.float32)


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory) -> dict:
    """`everything` with every batch size on every number of devices, from a process that has eight."""
    out = tmp_path_factory.mktemp("frechet") / "found.json"
    subprocess.run([sys.executable, "-m", "tests.metrics.frechet_test", str(out)], check=True, cwd=REPOSITORY,
                   env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", COUNTS)
def test_distances_depend_on_neither_batches_nor_padding_nor_devices(name, on_eight_devices):
    one, other = (drawn(COUNTS[name], seed=seed, shift=0.1 * seed) for seed in (1, 2))
    expected = frechet.frechet_distance(*exact(one), *exact(other))
    errors = {run: abs(found[name]["distance"] / expected - 1) for run, found in on_eight_devices.items()}
    print(f"\n{name}: {expected:.6f}, relative errors {errors}")
    assert len(errors) == 9 and max(errors.values()) < 1e-4
    for found in on_eight_devices.values():
        np.testing.assert_allclose(found[name]["mean"], exact(one)[0], rtol=1e-6)


def test_scores_depend_on_neither_batches_nor_padding_nor_devices(on_eight_devices):
    for found in on_eight_devices.values():
        np.testing.assert_allclose(found["score"], numpy_score(logits(100), 30), rtol=1e-5)


def numpy_score(x: np.ndarray, split: int) -> tuple[float, float]:
    """As ADM's evaluator has it, in float64."""
    x = x.astype(np.float64)
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    scores = [np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), axis=1)))
              for part in (p[start:start + split] for start in range(0, len(p), split))]
    return np.mean(scores), np.std(scores)


def moments_of(x: np.ndarray, *, batch_size: int = 64) -> Moments:
    acc = frechet.init(x.shape[1])
    for rows, _, valid in padded(x, batch_size):
        acc = update(acc, rows, valid)
    return frechet.moments(acc)


@pytest.mark.parametrize("pair", ["others", "equal", "fewer images than dimensions"])
def test_the_distance_matches_torch_fidelity(pair, torch_fidelity):
    import torch

    metric = torch_fidelity("metric_fid")
    count = 100 if pair.startswith("fewer") else 2000
    one = drawn(count, width=256, seed=1)
    other = one if pair == "equal" else drawn(count, width=256, seed=2, shift=0.02)
    statistics = [metric.fid_features_to_statistics(torch.from_numpy(x)) for x in (one, other)]
    expected = metric.fid_statistics_to_metric(*statistics, False)[metric.KEY_METRIC_FID]
    actual = distance(moments_of(one), moments_of(other))
    print(f"\n{pair}: {actual:.6f}, torch-fidelity's {expected:.6f}, difference {abs(actual - expected):.1e}")
    assert actual == (pytest.approx(0, abs=1e-3) if pair == "equal" else pytest.approx(expected, rel=1e-3))


def test_the_score_matches_torch_fidelity(torch_fidelity):
    import torch

    metric, x = torch_fidelity("metric_isc"), logits(2000)
    expected = metric.isc_features_to_metric(torch.from_numpy(x), splits=4, shuffle=False)
    acc = inception_score.init(4, CLASSES)
    for rows, position, valid in padded(x, 64):
        acc = update_score(acc, rows, (position // 500).astype(np.int32), valid)
    actual = inception_score.finish(acc)
    np.testing.assert_allclose(actual, list(expected.values()), rtol=1e-5)


def test_the_distance_of_gaussians_is_its_formula():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    one, other = rng.uniform(0, 4, (2, WIDTH))
    one[:20] = other[30:] = 0  # of different ranks
    shift = rng.normal(size=WIDTH)
    expected = np.sum(shift**2) + np.sum((one**0.5 - other**0.5)**2)
    cov = lambda values: (basis * values) @ basis.T
    assert frechet.frechet_distance(shift, cov(one), 0 * shift, cov(other)) == pytest.approx(expected, rel=1e-12)
    # Of any matrices of rank 1, u u^T and v v^T, the root of the product has trace |u v|.
    u, v = rng.normal(size=(2, WIDTH))
    actual = frechet.frechet_distance(shift, np.outer(u, u), shift, np.outer(v, v))
    assert actual == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-12)


@pytest.mark.parametrize("count", [2, 30, 300])
def test_equal_sets_have_no_distance(count):
    mean, cov = exact(drawn(count))
    assert frechet.frechet_distance(mean, cov, mean, cov) <= 1e-8 * np.trace(cov)
    assert distance(moments_of(drawn(count)), moments_of(drawn(count))) <= 1e-8 * np.trace(cov)
    assert distance(moments_of(drawn(count)), moments_of(drawn(count), batch_size=7)) <= 1e-6 * np.trace(cov)


def test_features_far_from_0_keep_their_covariance():
    x = drawn(1000) + np.float32(1000)
    moments = moments_of(x)
    assert moments.number == 1000
    np.testing.assert_allclose(moments.mean, exact(x)[0], rtol=1e-9)
    np.testing.assert_allclose(frechet.covariance(moments), exact(x)[1], rtol=1e-4, atol=1e-6 * np.trace(exact(x)[1]))


def test_merged_moments_are_those_of_all():
    x = drawn(300)
    parts = [moments_of(x[:100]), frechet.moments(frechet.init(WIDTH)), moments_of(x[100:])]
    merged = frechet.merge(frechet.merge(parts[0], parts[1]), parts[2])
    assert merged.number == 300
    np.testing.assert_allclose(merged.mean, exact(x)[0], rtol=1e-6)
    np.testing.assert_allclose(frechet.covariance(merged), exact(x)[1], rtol=1e-5, atol=1e-6)
    empty = frechet.merge(parts[1], parts[1])
    assert empty.number == 0 and not empty.scatter.any()


def test_batches_without_a_valid_row_change_nothing():
    x, nothing = drawn(20), np.full((8, WIDTH), np.nan, np.float32)
    acc = update(frechet.init(WIDTH), nothing, np.zeros(8, bool))
    acc = update(acc, x, np.ones(20, bool))
    acc = update(acc, nothing, np.zeros(8, bool))
    np.testing.assert_allclose(frechet.moments(acc).mean, exact(x)[0], rtol=1e-6)
    score = update_score(inception_score.init(1, WIDTH), nothing, np.zeros(8, np.int32), np.zeros(8, bool))
    with pytest.raises(ValueError, match="at least one image"):
        inception_score.finish(score)


@pytest.mark.parametrize("at", [3, 70])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_one_line(at, value):
    x = drawn(100)
    x[at, 5] = value
    with pytest.raises(ValueError, match="^features of 100 images are not all finite.*$"):
        moments_of(x)
    score = update_score(inception_score.init(1, WIDTH), x, np.zeros(100, np.int32), np.ones(100, bool))
    with pytest.raises(ValueError, match="^logits of 100 images are not all finite.*$"):
        inception_score.finish(score)
    mean, cov = exact(drawn(100))
    with pytest.raises(ValueError, match="^a Frechet distance takes means and covariances that are finite$"):
        frechet.frechet_distance(mean, np.where(cov == cov[0, 0], value, cov), mean, cov)


def test_a_single_image_and_covariances_that_do_not_fit_are_one_line():
    with pytest.raises(ValueError, match="^a covariance takes at least 2 images, not 1$"):
        frechet.covariance(moments_of(drawn(1)))
    mean, cov = exact(drawn(100))
    with pytest.raises(ValueError, match=r"not \(48,\), \(48, 48\), \(47,\), \(48, 48\)$"):
        frechet.frechet_distance(mean, cov, mean[1:], cov)


def test_one_class_for_all_scores_1_and_a_class_for_each_scores_their_number():
    for x, expected in ((np.ones((20, CLASSES)), 1), (1000 * np.eye(CLASSES), CLASSES)):
        acc = update_score(inception_score.init(1, CLASSES), x, np.zeros(20, np.int32), np.ones(20, bool))
        assert inception_score.finish(acc) == pytest.approx((expected, 0), rel=1e-6)


def write(file: Path, **arrays) -> Path:
    np.savez(file, **arrays)
    return file


def test_statistics_are_read_as_adm_writes_them(tmp_path):
    mean, cov = exact(drawn(100))
    file = write(tmp_path / "reference.npz", arr_0=np.zeros(3, np.uint8), mu=mean.astype(np.float32), sigma=cov,
                 mu_s=np.zeros(7), sigma_s=np.zeros((7, 7)))
    ours = frechet.read_statistics(file, WIDTH)
    assert [array.dtype for array in ours] == [np.float64, np.float64]
    np.testing.assert_allclose(ours[0], mean, rtol=1e-6)
    np.testing.assert_array_equal(ours[1], cov)


def test_statistics_that_do_not_fit_are_one_line(tmp_path):
    mean, cov = exact(drawn(100))

    def message(file, error=ValueError, width=WIDTH):
        with pytest.raises(error) as caught:
            frechet.read_statistics(file, width)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    good = write(tmp_path / "good.npz", mu=mean, sigma=cov)
    assert "holds statistics of 48 features, but 2048 are needed" in message(good, width=2048)
    assert "has no array sigma" in message(write(tmp_path / "half.npz", mu=mean))
    assert "sigma [d, d], not (48,) and (47, 48)" in message(write(tmp_path / "odd.npz", mu=mean, sigma=cov[1:]))
    assert "not finite" in message(write(tmp_path / "nan.npz", mu=mean * np.nan, sigma=cov))
    assert "holds no statistics" in message(write(tmp_path / "text.npz", mu=np.full(WIDTH, "a"), sigma=cov))
    np.save(tmp_path / "array.npy", mean)
    assert "holds no statistics" in message(tmp_path / "array.npy")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"mu": mean, "sigma": cov}))
    assert "holds no statistics" in message(tmp_path / "pickle.npz")
    content = good.read_bytes()
    (tmp_path / "short.npz").write_bytes(content[:len(content) // 2])
    assert "is damaged" in message(tmp_path / "short.npz", OSError)
    (tmp_path / "flipped.npz").write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    assert "is damaged" in message(tmp_path / "flipped.npz", OSError)
    (tmp_path / "empty.npz").touch()
    assert "is damaged" in message(tmp_path / "empty.npz", OSError)
    assert "does not exist" in message(tmp_path / "absent.npz", OSError)


if __name__ == "__main__":
    runs = {f"batches of {size} on {devices}": everything(size, devices)
            for size in (1, 7, 64) for devices in (1, 2, 8)}
    Path(sys.argv[1]).write_text(json.dumps(runs))
