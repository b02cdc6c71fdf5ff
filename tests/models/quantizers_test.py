"""The quantizers against brute force, and the promises their docstrings make."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import erf

from tests import exact_search
from vqrae_jax import metrics
from vqrae_jax.models import flat, quantizers
from vqrae_jax.models.flat import Buffer
from vqrae_jax.models.quantizers import (
    EMAVQ,
    FSQ,
    AdapterFSQ,
    Identity,
    RankedVQ,
    SimVQ,
    nearest_code,
    search,
    update_ema_codebook,
)

WIDTH = 16


def tokens(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def make(name, **options) -> Any:
    rngs = nnx.Rngs(0)
    if name == "fsq":
        return FSQ(width=WIDTH, levels=(8, 5, 5), rngs=rngs, **options)
    if name == "adapter_fsq":
        return AdapterFSQ(width=WIDTH, levels=(8, 5, 4), hidden_dim=24, frequencies=8, rngs=rngs, **options)
    if name == "ranked":
        return RankedVQ(width=WIDTH, size=64, dim=WIDTH, key_dim=12, rngs=rngs, **options)
    if name == "simvq_l2":
        options |= {"l2_normalize": True, "input_projection": True}
    cls = SimVQ if name.startswith("simvq") else EMAVQ
    dim = 8 if name.endswith("projected") else WIDTH
    return cls(width=WIDTH, size=64, dim=dim, rngs=rngs, **options)


NAMES = ["simvq", "simvq_projected", "simvq_l2", "ranked", "emavq", "emavq_projected", "fsq", "adapter_fsq"]
VARIANTS = [(name, {}) for name in NAMES] + [
    ("simvq", {"search": "cosine"}), ("simvq", {"input_projection": True}), ("simvq", {"project": True}),
    ("simvq", {"l2_normalize": True, "project": True}), ("ranked", {"block_tokens": 7}),
    ("ranked", {"gradient": "rotation"}), ("simvq", {"block_tokens": 7}),
    ("simvq_projected", {"gradient": "rotation"}), ("emavq", {"gradient": "rotation"})]


@functools.partial(jax.jit, static_argnames=("graphdef", "train"))
def forward(graphdef, state, z, *, train):
    return nnx.merge(graphdef, state)(z, train=train)


def run(module, z, *, train=True):
    """The forward pass as training calls it: merged inside a pure jitted function."""
    return forward(*nnx.split(module), z, train=train)


def brute_force(z, codes, metric="euclidean"):
    z, codes = np.asarray(z, np.float64), np.asarray(codes, np.float64)
    if metric == "cosine":
        z, codes = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (z, codes))
    return ((z[:, None] - codes[None]) ** 2).sum(-1).argmin(-1)


# What every quantizer promises.

@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_lookup_of_the_indices_is_the_forward_pass_bit_for_bit(name, options):
    module = make(name, **options)
    z = tokens(2, 60, WIDTH)
    out = run(module, z)
    assert out.z_q.shape == z.shape
    assert out.z_q.dtype == jnp.float32
    assert out.indices.shape == z.shape[:-1]
    assert out.indices.dtype == jnp.int32
    graphdef, state = nnx.split(module)
    looked_up = jax.jit(lambda state, indices: nnx.merge(graphdef, state).lookup(indices))(state, out.indices)
    np.testing.assert_array_equal(looked_up, out.z_q)
    assert int(out.indices.min()) >= 0
    assert int(out.indices.max()) < module.num_codes
    counts = np.bincount(np.ravel(out.indices), minlength=module.num_codes)
    np.testing.assert_array_equal(out.stats["counts"], counts)
    assert module.codes().shape[0] == module.num_codes


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_sees_what_training_sees(name):
    z = tokens(2, 60, WIDTH)
    evaluated, trained = (run(make(name), z, train=train) for train in (False, True))
    np.testing.assert_array_equal(evaluated.z_q, trained.z_q)
    np.testing.assert_array_equal(evaluated.stats["counts"], trained.stats["counts"])


@pytest.mark.parametrize("name", NAMES)
def test_calling_changes_nothing_in_the_module(name):
    module = make(name)
    before = jax.tree.map(np.array, nnx.state(module))
    module(tokens(20, WIDTH), train=True)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, nnx.state(module)))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_tokens_are_searched_in_float32(name):
    module = make(name)
    z = tokens(2, 60, WIDTH).astype(jnp.bfloat16)
    out, same = run(module, z), run(module, z.astype(jnp.float32))
    np.testing.assert_array_equal(out.indices, same.indices)
    assert out.z_q.dtype == jnp.float32
    assert all(loss.dtype == jnp.float32 and loss.shape == () for loss in out.losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_loss_has_a_weight_and_all_state_that_moves_is_named(name):
    module = make(name)
    out = run(module, tokens(30, WIDTH))
    assert out.losses.keys() == module.loss_weights.keys()
    assert module.next_buffers(out.stats, rng=jax.random.key(0)).keys() == set(module.moving_buffers)


EXPECTED_GRADIENTS = {
    "simvq": {"projection.kernel", "projection.bias"},
    "simvq_projected": {"projection.kernel", "projection.bias", "project_in.kernel", "project_in.bias",
                        "project_out.kernel", "project_out.bias"},
    "simvq_l2": {"projection.kernel", "projection.bias", "project_in.kernel", "project_in.bias"},
    "ranked": set(),
    "emavq": set(),
    "emavq_projected": {"project_in.kernel", "project_in.bias", "project_out.kernel", "project_out.bias"},
    "fsq": {"project_in.kernel", "project_in.bias", "project_out.kernel", "project_out.bias"},
    "adapter_fsq": {"project_in.gain", *(f"{path}.{leaf}" for path, leaf in itertools.product(
        ("project_in.fc1", "project_in.fc2", "project_in.fc3", "project_out.fc1", "project_out.fc2", "project_out.fc3"),
        ("kernel", "bias"))), *(f"{path}.{leaf}" for path, leaf in itertools.product(
            ("project_in.norm", "project_out.norm1", "project_out.norm2"), ("scale", "bias")))},
}


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_expected_variables_learn(name):
    graphdef, params, rest = nnx.split(make(name), nnx.Param, ...)

    def loss(params):
        out = nnx.merge(graphdef, params, rest)(tokens(50, WIDTH), train=True)
        return sum(out.losses.values()) + jnp.sum(out.z_q * tokens(50, WIDTH, seed=1))

    gradients = nnx.to_flat_state(jax.jit(jax.grad(loss))(params))
    learning = {".".join(map(str, path)) for path, g in gradients if np.abs(g[...]).max() > 0}
    assert learning == EXPECTED_GRADIENTS[name] == {".".join(map(str, path)) for path, _ in gradients}
    assert all(isinstance(v, Buffer) for _, v in nnx.to_flat_state(rest))


# Gradients.

def test_straight_through_copies_the_gradient():
    module, weight = make("simvq"), tokens(30, WIDTH, seed=1)
    gradient = jax.grad(lambda z: jnp.sum(module(z, train=True).z_q * weight))(tokens(30, WIDTH))
    np.testing.assert_array_equal(gradient, weight)


def test_rotation_matches_its_explicit_matrix_and_value():
    module, z, weight = make("emavq", gradient="rotation"), tokens(5, WIDTH), tokens(5, WIDTH, seed=1)
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(module(z, train=True).z_q * weight)))(z)
    q = np.asarray(module(z, train=True).z_q)
    np.testing.assert_allclose(quantizers.rotate_onto(z, jnp.asarray(q)), q, atol=1e-5)
    for i in range(len(z)):
        e, c = (v / np.linalg.norm(v) for v in (np.asarray(z[i]), q[i]))
        r = (e + c) / np.linalg.norm(e + c)
        matrix = np.linalg.norm(q[i]) / np.linalg.norm(z[i]) * (np.eye(WIDTH) - 2 * np.outer(r, r) + 2 * np.outer(c, e))
        np.testing.assert_allclose(gradient[i], matrix.T @ np.asarray(weight[i]), rtol=1e-4, atol=1e-5)


def test_rotation_gradient_stays_finite_at_zero_and_opposite_vectors():
    z = jnp.stack([jnp.zeros(4), jnp.ones(4), jnp.ones(4)])
    q = jnp.stack([jnp.ones(4), jnp.zeros(4), -jnp.ones(4)])
    assert np.isfinite(jax.jit(jax.grad(lambda z: quantizers.rotate_onto(z, q).sum()))(z)[1:]).all()
    np.testing.assert_allclose(quantizers.rotate_onto(z, q)[2], q[2], atol=1e-6)


def test_losses_are_plain_means_whatever_their_weights():
    z = tokens(30, WIDTH)
    for name in ("simvq", "emavq", "ranked"):
        module = make(name, commitment_weight=2.0)
        out = run(module, z)
        mean_square = np.mean((np.asarray(z) - np.asarray(out.z_q)) ** 2)
        for loss in out.losses.values():
            np.testing.assert_allclose(loss, mean_square, rtol=1e-5)
        assert module.loss_weights == {"commitment": 2.0} | ({"codebook": 1.0} if name == "simvq" else {})
    assert make("adapter_fsq").loss_weights == {"commitment": 1.0}
    assert make("fsq").loss_weights == {}


def test_the_commitment_loss_moves_tokens_and_the_codebook_loss_moves_codes():
    graphdef, params, rest = nnx.split(make("simvq"), nnx.Param, ...)
    loss = lambda name: lambda params, z: nnx.merge(graphdef, params, rest)(z, train=True).losses[name]
    largest = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    of_params, of_tokens = jax.jit(jax.grad(loss("commitment"), argnums=(0, 1)))(params, tokens(30, WIDTH))
    assert largest(of_params) == 0
    assert largest(of_tokens) > 0
    of_params, of_tokens = jax.jit(jax.grad(loss("codebook"), argnums=(0, 1)))(params, tokens(30, WIDTH))
    assert largest(of_params) > 0
    assert largest(of_tokens) == 0


def test_no_gradient_leaks_through_the_statistics():
    module = make("emavq_projected")
    statistic = lambda z: sum(jnp.sum(s) for s in module(z, train=True).stats.values() if s.dtype == jnp.float32)
    assert not jax.jit(jax.grad(statistic))(tokens(30, WIDTH)).any()


# The search.

@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("block_tokens", [None, 1, 7, 101])
def test_nearest_code_is_brute_force_in_every_blocking(metric, block_tokens):
    z, codes = 3 * tokens(101, 12), 2 * tokens(40, 12, seed=1)
    search = jax.jit(functools.partial(nearest_code, metric=metric, block_tokens=block_tokens))
    found = search(z, codes)
    np.testing.assert_array_equal(found, brute_force(z, codes, metric))


def test_the_first_code_wins_a_tie():
    codes = jnp.tile(tokens(10, 4), (3, 1))
    np.testing.assert_array_equal(nearest_code(codes, codes), np.tile(np.arange(10), 3))


def test_the_score_matrix_stays_below_the_limit(monkeypatch):
    monkeypatch.setattr(search, "MAX_SCORES", 1000)
    nearest = lambda z, codes: nearest_code(z, codes)
    program = jax.jit(nearest).lower(tokens(300, 4), tokens(50, 4)).as_text()
    assert "300x50" not in program
    assert "20x50" in program


exactly = jax.jit(search.search_exactly, static_argnames=("metric", "block_tokens"))


@pytest.mark.parametrize("kind", exact_search.KINDS)
@pytest.mark.parametrize(("metric", "block_tokens"), [("euclidean", None), ("euclidean", 37), ("cosine", 100)])
def test_the_search_of_accelerators_is_the_float64_search(kind, metric, block_tokens):
    z, codes = exact_search.draw(kind, 500, 12, 100, np.random.default_rng(0))
    found = np.asarray(exactly(z, codes, metric=metric, block_tokens=block_tokens))
    best = exact_search.float64_search(z, codes, metric)
    # Where they differ, both codes are equally near, or float64 is wrong.
    assert not [i for i in np.flatnonzero(found != best)
                if exact_search.farther(z[i], codes[found[i]], codes[best[i]], metric) > 0]
    assert (found == best).mean() > 0.97


def test_where_many_codes_are_left_the_search_of_accelerators_compares_them_all():
    """Two clusters so far from each other that in bfloat16, and in float32, each is one point."""
    rng = np.random.default_rng(0)
    z, codes = (1e5 * rng.choice([-1, 1], (n, 1)) + rng.standard_normal((n, 12)) for n in (500, 100))
    z, codes = z.astype(np.float32), codes.astype(np.float32)
    found = exactly(z, codes, metric="euclidean", block_tokens=None)
    np.testing.assert_array_equal(found, exact_search.float64_search(z, codes, "euclidean"))


@pytest.mark.parametrize("metric", exact_search.METRICS)
def test_what_is_not_finite_gets_an_index_on_accelerators_too(metric):
    z, codes = exact_search.draw("random", 500, 12, 100, np.random.default_rng(0))
    z[:4], z[4], codes[99] = [[np.nan], [np.inf], [-np.inf], [1e30]], 0, 1e30 if metric == "euclidean" else 1e15
    found = np.asarray(exactly(z, codes, metric=metric, block_tokens=None if metric == "euclidean" else 100))
    assert ((found >= 0) & (found < 100)).all()
    np.testing.assert_array_equal(found[5:], exact_search.float64_search(z[5:], codes, metric))


# SimVQ.

def test_simvq_returns_projected_codes_never_the_frozen_ones():
    module = make("simvq")
    codes = np.asarray(module.codebook[...] @ module.projection.kernel[...] + 0.5)
    module.projection.bias[...] = jnp.full(WIDTH, 0.5)
    np.testing.assert_allclose(module.codes(), codes, atol=1e-5)
    z = tokens(50, WIDTH)
    np.testing.assert_allclose(run(module, z).z_q, codes[brute_force(z, codes)], atol=1e-5)


def test_simvq_codebook_is_drawn_with_length_one():
    module = SimVQ(width=256, size=500, dim=256, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.linalg.norm(module.codebook[...], axis=-1).mean(), 1, atol=0.02)


def test_input_projection_starts_as_the_identity():
    z = tokens(50, WIDTH)
    with_it, without = make("simvq", input_projection=True), make("simvq")
    nnx.update(with_it, {"codebook": without.codebook[...], "projection": nnx.state(without.projection)})
    np.testing.assert_array_equal(run(with_it, z).indices, run(without, z).indices)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def float64(module):
    """The module's arrays by path, as NumPy float64."""
    _, params, rest = flat.split(module)
    return {path: np.asarray(value, np.float64) for path, value in (params | rest).items()}


def jittered(module):
    """The module with noise on every parameter, so that no bias, scale or gain is trivial."""
    graphdef, params, rest = flat.split(module)
    keys = jax.random.split(jax.random.key(5), max(1, len(params)))
    noisy = {path: value + 0.1 * jax.random.normal(key, value.shape)
             for key, (path, value) in zip(keys, params.items(), strict=False)}
    return flat.merge(graphdef, noisy, rest)


def test_l2_normalized_simvq_is_its_formula():
    module, z = jittered(make("simvq_l2")), 3 * tokens(50, WIDTH)
    p = float64(module)
    x = unit(np.asarray(z, np.float64) @ p["project_in/kernel"] + p["project_in/bias"])
    codes = unit(p["codebook"] @ p["projection/kernel"] + p["projection/bias"])
    indices = (x @ codes.T).argmax(-1)
    out = run(module, z)
    np.testing.assert_array_equal(out.indices, indices)
    np.testing.assert_allclose(out.z_q, codes[indices], atol=1e-6)
    np.testing.assert_allclose(module.codes(), codes, atol=1e-6)
    for loss in ("codebook", "commitment"):
        np.testing.assert_allclose(out.losses[loss], np.mean((x - codes[indices]) ** 2), rtol=1e-5)


def test_l2_normalized_straight_through_copies_the_gradient_of_the_normalised_token():
    module, weight = make("simvq_l2"), tokens(30, WIDTH, seed=1)  # the input projection is the identity
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(module(z, train=True).z_q * weight)))
    z = 3 * tokens(30, WIDTH)
    length, x, w = np.linalg.norm(z, axis=-1, keepdims=True), unit(np.asarray(z)), np.asarray(weight)
    np.testing.assert_allclose(gradient(z), (w - x * (w * x).sum(-1, keepdims=True)) / length, atol=1e-5)
    assert np.isfinite(gradient(z.at[0].set(0))).all()


def test_simvq_trains_to_full_usage():
    """Diffuse tokens from the published initialisation; clustered tokens from k-means, whose usage training keeps."""
    diffuse = tokens(1024, 32)
    centres = tokens(32, 32, seed=1)[jax.random.randint(jax.random.key(2), (1024,), 0, 32)]
    clustered = centres + 0.3 * tokens(1024, 32, seed=3)
    random, from_data = (SimVQ(width=32, size=128, dim=32, rngs=nnx.Rngs(0)) for _ in range(2))
    first, last = train(random, diffuse, steps=300)
    assert metrics.code_usage(last.stats["counts"]) > 0.95
    assert last.losses["codebook"] < 0.9 * first.losses["codebook"]
    nnx.update(from_data, from_data.init_from_data(clustered, rng=jax.random.key(0)))
    first, last = train(from_data, clustered, steps=100)
    assert metrics.code_usage(last.stats["counts"]) > 0.95
    assert last.losses["codebook"] < 1.01 * first.losses["codebook"]  # k-means' own optimum: nothing left to gain


def train(module, z, *, steps):
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            out = nnx.merge(graphdef, params, rest)(z, train=True)
            return sum(out.losses.values()), out
        gradients, out = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, out

    opt_state, outs = optimizer.init(params), []
    for _ in range(steps):
        params, opt_state, out = step(params, opt_state)
        outs.append(out)
    return outs[0], outs[-1]


# RankedVQ.

def test_ranked_vq_returns_the_raw_code_whose_key_has_the_highest_cosine():
    module, z = make("ranked"), tokens(50, WIDTH)
    module.keys[...] = module.keys[...] * jnp.linspace(0.1, 10, 64)[:, None]  # a key's length must not count
    p = float64(module)
    indices = (unit(np.asarray(z, np.float64) @ p["queries"]) @ unit(p["keys"]).T).argmax(-1)
    out = run(module, z)
    np.testing.assert_array_equal(out.indices, indices)
    np.testing.assert_array_equal(out.z_q, np.asarray(module.codebook[...])[indices])
    gradient = jax.grad(lambda z: module(z, train=True).losses["commitment"])(z)
    np.testing.assert_allclose(gradient, 2 * (np.asarray(z) - out.z_q) / z.size, rtol=1e-5, atol=1e-7)


def test_ranked_vq_starts_with_codes_of_rms_one_that_their_keys_speak_for():
    module = RankedVQ(width=64, size=500, dim=64, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.sqrt(np.mean(np.asarray(module.codes()) ** 2)), 1, atol=0.02)
    near = module.codes() + 0.1 * tokens(500, 64)
    np.testing.assert_array_equal(run(module, near).indices, np.arange(500))


# Initialisation from data.

@pytest.mark.parametrize("name", ["simvq", "simvq_projected", "simvq_l2", "emavq", "emavq_projected"])
def test_init_from_data_finds_the_clusters(name):
    module = make(name)
    centres = tokens(64, WIDTH)
    z = jnp.tile(centres, (20, 1)) + 1e-3 * tokens(1280, WIDTH, seed=1)
    nnx.update(module, module.init_from_data(z, rng=jax.random.key(0), iterations=20))
    out = run(module, z)
    assert metrics.code_usage(out.stats["counts"]) == 1
    assert out.losses["commitment"] < run(make(name), z).losses["commitment"] / 3
    if name.startswith("emavq"):
        np.testing.assert_array_equal(module.sums[...], module.codebook[...] * module.counts[...][:, None])


def test_kmeans_lowers_the_distance_and_revives_empty_clusters():
    z = 50 + jnp.concatenate([tokens(300, 6), 100 + tokens(5, 6, seed=1)])
    distance = lambda z, centres: np.linalg.norm(np.asarray(z)[:, None] - np.asarray(centres), axis=-1)
    start, end = (quantizers.kmeans(z, 30, iterations=n, rng=jax.random.key(0)) for n in (0, 15))
    assert (distance(z, end).min(-1) ** 2).mean() < 0.8 * (distance(z, start).min(-1) ** 2).mean()
    # More centres than distinct tokens: most clusters are empty at every iteration, and must still lie on tokens.
    duplicates = jnp.tile(z[:3], (20, 1))
    centres = quantizers.kmeans(duplicates, 10, iterations=15, rng=jax.random.key(0))
    assert distance(duplicates, centres).min(0).max() < 1e-3


def test_kmeans_names_the_missing_tokens():
    with pytest.raises(ValueError, match="at least 30 tokens"):
        quantizers.kmeans(tokens(10, 4), 30, rng=jax.random.key(0))


# EMA.

def ema_state(module):
    return {name: getattr(module, name)[...] for name in ("codebook", "counts", "sums")}


update = jax.jit(update_ema_codebook, static_argnames="restart_threshold")


def ema_step(module, z, **options):
    return update(ema_state(module), run(module, z).stats, rng=jax.random.key(0), **options)


def test_ema_update_matches_a_dense_one_hot_reference():
    module, z = make("emavq"), tokens(300, WIDTH)
    one_hot = np.eye(64)[brute_force(z, module.codes())]
    counts = 0.9 * 1 + 0.1 * one_hot.sum(0)
    sums = 0.9 * np.asarray(module.sums[...]) + 0.1 * one_hot.T @ np.asarray(z)
    smoothed = (counts + 1e-3) / (counts.sum() + 64 * 1e-3) * counts.sum()
    new = ema_step(module, z, decay=0.9, eps=1e-3)
    np.testing.assert_allclose(new["counts"], counts, rtol=1e-5)
    np.testing.assert_allclose(new["sums"], sums, atol=1e-5)
    np.testing.assert_allclose(new["codebook"], sums / smoothed[:, None], atol=1e-5)


def test_unused_codes_stay_where_they_are_at_the_first_updates():
    module, z = make("emavq"), tokens(4, WIDTH)
    unused = np.asarray(run(module, z).stats["counts"]) == 0
    np.testing.assert_allclose(ema_step(module, z)["codebook"][unused], module.codes()[unused], rtol=1e-3, atol=1e-4)


def test_ema_codes_move_to_the_tokens():
    module, z = make("emavq"), 3 + 0.1 * tokens(400, WIDTH)
    first = run(module, z).losses["commitment"]
    for _ in range(100):
        nnx.update(module, ema_step(module, z, decay=0.9, restart_threshold=0.5))
    assert run(module, z).losses["commitment"] < 0.02 * first
    assert metrics.code_usage(run(module, z).stats["counts"]) > 0.9


def test_restarted_codes_become_tokens_and_survive_the_next_step():
    module, z = make("emavq"), 5 + tokens(400, WIDTH)  # far from the codes: one or two codes take everything
    old = ema_state(module)
    new = ema_step(module, z, restart_threshold=0.995)
    restarted = np.flatnonzero(np.abs(new["codebook"] - old["codebook"]).max(-1) > 1)
    assert len(restarted) > 50
    distance = np.abs(np.asarray(new["codebook"])[restarted][:, None] - np.asarray(z)[None]).max(-1)
    assert (distance.min(-1) == 0).sum() >= len(restarted) - 5  # codes that were hit moved too, but not onto a token
    assert len(np.unique(new["codebook"], axis=0)) == 64
    np.testing.assert_allclose(new["sums"][restarted], new["codebook"][restarted] * new["counts"][restarted][:, None],
                               rtol=1e-3)
    assert (new["counts"] >= 0.995).all()
    nnx.update(module, new)
    again = ema_step(module, z, restart_threshold=0.995)
    assert (np.abs(again["codebook"] - new["codebook"]).max(-1)[restarted] < 1).all()


def test_more_dead_codes_than_tokens_restart_as_many_as_there_are():
    module, z = make("emavq"), 5 + tokens(10, WIDTH)
    new = ema_step(module, z, restart_threshold=0.995)
    assert len(np.unique(new["codebook"], axis=0)) == 64
    assert (np.abs(new["codebook"] - module.codes()).max(-1) > 1).sum() <= 12


def test_restart_is_off_at_threshold_zero():
    module, z = make("emavq"), 5 + tokens(400, WIDTH)
    untouched = np.asarray(run(module, z).stats["counts"]) == 0
    np.testing.assert_allclose(ema_step(module, z)["codebook"][untouched], module.codes()[untouched], atol=1e-3)


# FSQ.

def test_fsq_reaches_every_level_and_its_indices_name_the_codes():
    module = FSQ(width=3, levels=(8, 5, 2), rngs=nnx.Rngs(0))
    out = run(module, 3 * tokens(20000, 3))
    codes = np.asarray(module.codes())
    assert metrics.code_usage(out.stats["counts"]) == 1
    assert len(np.unique(codes, axis=0)) == 80 == module.num_codes
    np.testing.assert_array_equal(np.unique(codes[:, 0]), np.arange(-4, 4) / 4)
    np.testing.assert_array_equal(np.unique(codes[:, 1]), np.arange(-2, 3) / 2)
    np.testing.assert_array_equal(np.unique(codes[:, 2]), [-1, 0])
    np.testing.assert_array_equal(out.z_q, codes[out.indices])
    np.testing.assert_array_equal(module.codes()[1] - module.codes()[0], [1 / 4, 0, 0])  # the first changes fastest


def test_fsq_rounds_the_bounded_tanh_and_passes_its_gradient():
    module = FSQ(width=2, levels=(7, 5), rngs=nnx.Rngs(0))
    z, half = np.asarray(tokens(50, 2)), np.array([3, 2])
    bounded = np.tanh(z) * half * (1 - 1e-3)  # odd levels need no offset
    np.testing.assert_allclose(run(module, jnp.asarray(z)).z_q, np.round(bounded) / half, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda z: module(z, train=True).z_q.sum()))(jnp.asarray(z))
    np.testing.assert_allclose(gradient, (1 - 1e-3) * (1 - np.tanh(z) ** 2), atol=1e-5)


def layer_norm(x, p, path):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{path}/scale"] + p[f"{path}/bias"]


def linear(x, p, path):
    return x @ p[f"{path}/kernel"] + p[f"{path}/bias"]


def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def test_adapter_fsq_is_its_formula():
    module, z = jittered(make("adapter_fsq")), 2 + 3 * tokens(300, WIDTH)
    p, levels = float64(module), np.array(module.levels)
    x = layer_norm(np.asarray(z, np.float64), p, "project_in/norm")
    x = gelu(linear(gelu(linear(x, p, "project_in/fc1")), p, "project_in/fc2"))
    scaled = np.tanh(linear(x, p, "project_in/fc3")) * p["project_in/gain"] * (levels - 1) / 2
    digits = np.round(np.clip(scaled + (levels - 1) / 2, 0, levels - 1)).astype(int)
    codes = digits - (levels - 1) / 2
    phases = 2 * np.pi * codes @ p["project_out/frequencies"]
    x = linear(np.concatenate([np.sin(phases), np.cos(phases)], -1), p, "project_out/fc1")
    x = linear(gelu(layer_norm(x, p, "project_out/norm1")), p, "project_out/fc2")
    z_q = linear(gelu(layer_norm(x, p, "project_out/norm2")), p, "project_out/fc3")
    out = run(module, z)
    np.testing.assert_array_equal(out.indices, np.ravel_multi_index(tuple(digits.T), module.levels))
    np.testing.assert_allclose(out.z_q, z_q, atol=1e-4)
    np.testing.assert_allclose(out.losses["commitment"], np.mean((scaled - codes) ** 2), rtol=1e-5)
    assert (np.abs(scaled) > (levels - 1) / 2).any(axis=0).all()  # clipping took part


def test_adapter_fsq_codes_are_centred_and_the_last_coordinate_changes_fastest():
    module = make("adapter_fsq")
    grid = itertools.product(np.arange(-3.5, 4), np.arange(-2, 3), np.arange(-1.5, 2))
    np.testing.assert_array_equal(module.codes(), np.array(list(grid)))


def test_adapter_fsq_starts_as_published():
    module = AdapterFSQ(width=16, levels=(8, 8), rngs=nnx.Rngs(0))
    _, params, rest = flat.split(module)
    np.testing.assert_array_equal(params["project_in/gain"], [3, 3])
    assert params["project_in/fc2/kernel"].shape == (512, 512)
    assert params["project_out/fc1/kernel"].shape == (256, 16)
    assert rest.keys() == {"project_out/frequencies"}
    np.testing.assert_allclose(np.std(rest["project_out/frequencies"]), 10, rtol=0.1)


# Against torch, gradients included.

def torch_simvq(torch, p, z):
    normalize = torch.nn.functional.normalize
    x = normalize(z @ p["project_in/kernel"] + p["project_in/bias"], dim=-1)
    codes = normalize(p["codebook"] @ p["projection/kernel"] + p["projection/bias"], dim=-1)
    indices = (x @ codes.T).argmax(-1)
    q = codes[indices]
    losses = {"codebook": ((q - x.detach()) ** 2).mean(), "commitment": ((q.detach() - x) ** 2).mean()}
    return x + (q - x).detach(), indices, losses


def torch_ranked(torch, p, z):
    similarity = torch.nn.functional.cosine_similarity((z @ p["queries"])[:, None], p["keys"][None], dim=-1)
    indices = similarity.argmax(-1)
    q = p["codebook"][indices]
    return z + (q - z).detach(), indices, {"commitment": ((q - z) ** 2).mean()}


def torch_adapter_fsq(torch, p, z):
    f = torch.nn.functional
    linear = lambda x, path: f.linear(x, p[f"{path}/kernel"].T, p[f"{path}/bias"])
    norm = lambda x, path: f.layer_norm(x, x.shape[-1:], p[f"{path}/scale"], p[f"{path}/bias"])
    x = f.gelu(linear(norm(z, "project_in/norm"), "project_in/fc1"))
    x = linear(f.gelu(linear(x, "project_in/fc2")), "project_in/fc3")
    half = torch.tensor([3.5, 2.0, 1.5], dtype=z.dtype)
    scaled = x.tanh() * p["project_in/gain"] * half
    digits = (scaled.detach() + half).clamp(torch.zeros(3), 2 * half).round()
    code = scaled + (digits - half - scaled).detach()
    phases = 2 * torch.pi * code @ p["project_out/frequencies"]
    x = norm(linear(torch.cat([phases.sin(), phases.cos()], -1), "project_out/fc1"), "project_out/norm1")
    x = norm(linear(f.gelu(x), "project_out/fc2"), "project_out/norm2")
    indices = (digits * torch.tensor([20, 4, 1])).sum(-1).long()
    return linear(f.gelu(x), "project_out/fc3"), indices, {"commitment": ((digits - half - scaled) ** 2).mean()}


@pytest.mark.parametrize(("name", "reference"), [
    ("simvq_l2", torch_simvq), ("ranked", torch_ranked), ("adapter_fsq", torch_adapter_fsq)])
def test_outputs_losses_and_gradients_agree_with_torch(name, reference):
    torch = pytest.importorskip("torch", reason="torch is not installed: no reference to compare with")
    module, z, weight = jittered(make(name)), tokens(40, WIDTH), tokens(40, WIDTH, seed=1)
    graphdef, params, rest = flat.split(module)

    def objective(params, z):
        quantizer = flat.merge(graphdef, params, rest)
        out = quantizer(z, train=True)
        weights = quantizer.loss_weights
        return sum(weights[k] * loss for k, loss in out.losses.items()) + jnp.mean(out.z_q * weight), out

    (gradients, gradient), out = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, z)
    p = {path: torch.tensor(value, requires_grad=path in params) for path, value in float64(module).items()}
    torch_z = torch.tensor(np.asarray(z, np.float64), requires_grad=True)
    z_q, indices, losses = reference(torch, p, torch_z)
    weighted = sum(module.loss_weights[k] * loss for k, loss in losses.items())
    (weighted + (z_q * torch.tensor(np.asarray(weight))).mean()).backward()
    np.testing.assert_array_equal(out.indices, indices)
    np.testing.assert_allclose(out.z_q, z_q.detach(), atol=1e-4)
    assert out.losses.keys() == losses.keys()
    for key, loss in losses.items():
        np.testing.assert_allclose(out.losses[key], loss.item(), rtol=1e-5)
    for path, ours, theirs in [("tokens", gradient, torch_z), *((path, gradients[path], p[path]) for path in params)]:
        scale = float(theirs.grad.abs().max())
        np.testing.assert_allclose(ours, theirs.grad, atol=1e-4 * scale, err_msg=path)


# No quantization.

def test_identity_hands_the_tokens_on_as_uses_of_one_code():
    module, z = Identity(), tokens(2, 30, WIDTH).astype(jnp.bfloat16)
    out = run(module, z)
    np.testing.assert_array_equal(out.z_q, z.astype(jnp.float32))
    assert out.z_q.dtype == jnp.float32
    np.testing.assert_array_equal(out.indices, np.zeros((2, 30), np.int32))
    np.testing.assert_array_equal(out.stats["counts"], [60])
    assert metrics.code_usage(out.stats["counts"]) == metrics.perplexity(out.stats["counts"]) == 1
    assert (module.num_codes, out.losses, module.loss_weights, module.moving_buffers) == (1, {}, {}, ())
    assert module.next_buffers(out.stats, rng=jax.random.key(0)) == {}
    weight = tokens(2, 30, WIDTH, seed=1)
    gradient = jax.grad(lambda z: jnp.sum(module(z, train=True).z_q * weight))(z.astype(jnp.float32))
    np.testing.assert_array_equal(gradient, weight)
    with pytest.raises(ValueError, match="no codes"):
        module.lookup(out.indices)
    with pytest.raises(ValueError, match="no codes"):
        module.codes()


# Numbers about usage, and errors.

def test_usage_and_perplexity():
    counts = jnp.array([4, 4, 0, 0], jnp.int32)
    assert metrics.code_usage(counts) == 0.5
    np.testing.assert_allclose(metrics.perplexity(counts), 2, rtol=1e-6)
    np.testing.assert_allclose(metrics.perplexity(jnp.full(10, 3)), 10, rtol=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    ({"search": "manhattan"}, "manhattan"), ({"gradient": "reinforce"}, "reinforce"),
    ({"l2_normalize": True, "search": "cosine"}, "l2_normalize"), ({"dim": 8, "project": False}, "width 16.*dim 8"),
    ({"dim": 8, "input_projection": True}, "input_projection")])
def test_impossible_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        SimVQ(**{"width": WIDTH, "size": 4, "dim": WIDTH, "rngs": nnx.Rngs(0), **options})


def test_ranked_vq_refuses_codes_of_another_width():
    with pytest.raises(ValueError, match="dim 8.*width 16"):
        RankedVQ(width=WIDTH, size=4, dim=8, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("cls", [FSQ, AdapterFSQ])
@pytest.mark.parametrize("levels", [(), (8, 1), (2**16, 2**16)])
def test_impossible_levels_are_errors(cls, levels):
    with pytest.raises(ValueError, match="levels"):
        cls(width=4, levels=levels, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("size", [511, 513, 1300])
def test_codes_beyond_the_last_whole_block_are_found_too(size, metric):
    rng = np.random.default_rng(size)
    z, codes = rng.standard_normal((200, 8)), rng.standard_normal((size, 8))
    z[:2] = 2 * codes[[0, size - 1]]  # the first and the last one
    scores = z @ codes.T / np.linalg.norm(codes, axis=1) if metric == "cosine" else z @ codes.T - (codes**2).sum(1) / 2
    best = np.sort(scores, axis=1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > 1e-4  # by more than float32 rounds
    found = np.asarray(quantizers.nearest_code(jnp.asarray(z, jnp.float32), jnp.asarray(codes, jnp.float32),
                                               metric=metric))
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found[clear], scores.argmax(1)[clear])
    if metric == "cosine":
        assert found[0] == 0 and found[1] == size - 1
