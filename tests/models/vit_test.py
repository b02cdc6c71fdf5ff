"""Attention's own backward pass, what the backward pass keeps, and cuDNN where it belongs."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

from vqrae_jax.models import flat, vit
from vqrae_jax.models.vit import Transformer, TransformerSpec, attend
from vqrae_jax.training import sharding

SPEC = TransformerSpec(width=16, depth=3, heads=2, mlp_dim=32)


def reference(q, k, v, causal=False):
    logits = jnp.einsum("bqd,bkd->bqk", q, k) * q.shape[-1]**-0.5
    seen = jnp.tri(q.shape[1], k.shape[1], dtype=bool) | (not causal)
    return jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)) @ v


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_gradient(causal):
    q, k, v, dy = (3 * jax.random.normal(key, (4, 7, 8)) for key in jax.random.split(jax.random.key(0), 4))
    ours, pull_back = jax.vjp(functools.partial(attend, causal=causal), q, k, v)
    theirs, their_pull_back = jax.vjp(functools.partial(reference, causal=causal), q, k, v)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for a, b in zip(pull_back(dy), their_pull_back(dy), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_attention_in_bfloat16_keeps_its_type():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8), jnp.bfloat16)
    y, pull_back = jax.vjp(attend, x, x, x)
    assert [a.dtype for a in (y, *pull_back(y))] == [jnp.bfloat16] * 4


def loss_of(remat):
    graphdef, params, _ = flat.split(Transformer(SPEC, remat=remat, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    return (lambda params: jnp.sum(jnp.sin(3 * flat.merge(graphdef, params)(x)))), params


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable", "dots_with_no_batch_dims_saveable"])
def test_what_is_kept_changes_no_gradient(policy):
    loss, params = loss_of(vit.SAVE_MATMULS)
    other, _ = loss_of(getattr(jax.checkpoint_policies, policy))
    for a, b in zip(*(jax.tree.leaves(jax.grad(f)(params)) for f in (loss, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def residual_bytes(remat) -> int:
    loss, params = loss_of(remat)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(jax.vjp(loss, params)[1]))


def test_by_default_nothing_elementwise_is_kept():
    least, default, most = (residual_bytes(remat) for remat in (
        jax.checkpoint_policies.nothing_saveable, vit.SAVE_MATMULS, jax.checkpoint_policies.everything_saveable))
    assert least < default < 0.6 * most


def test_a_cpu_program_holds_nothing_of_cudnn(monkeypatch):
    x = jnp.ones((4, 16, 64), jnp.bfloat16)
    assert "cudnn" not in jax.jit(attend).lower(x, x, x).as_text()
    # Beside a GPU as well: the choice is made when the program is lowered.
    monkeypatch.setattr(vit, "_has_cudnn", lambda: True)
    monkeypatch.setattr(vit, "_cudnn", lambda *arguments, causal: jnp.sin(reference(*arguments, causal)))
    assert "sine" not in jax.jit(lambda x: attend(x, x, x)).lower(x).as_text()
    exported = jax.export.export(jax.jit(lambda x: attend(x, x, x)), platforms=["cuda"])(x)
    assert "sine" in exported.mlir_module()


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_of_tpus_is_the_same_attention(causal, monkeypatch):
    """In an interpreter, split over a mesh, with a length and a head width that are no multiple of 128."""
    q, k, v, dy = (jax.random.normal(key, (2, 130, 24)) for key in jax.random.split(jax.random.key(0), 4))
    on_mesh = sharding.on(sharding.one_device(), functools.partial(vit._splash, causal=causal))
    make = functools.partial(splash_attention_kernel.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(splash_attention_kernel, "make_splash_mha_single_device", make)
    ours, pull_back = jax.vjp(jax.jit(on_mesh), q, k, v)
    theirs, their_pull_back = jax.vjp(functools.partial(reference, causal=causal), q, k, v)
    for a, b in zip((ours, *pull_back(dy)), (theirs, *their_pull_back(dy)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_only_a_tpu_attends_by_its_kernel_and_only_to_many_tokens():
    attended = jax.jit(sharding.on(sharding.one_device(), lambda x: attend(x, x, x)))
    module = lambda tokens, platform: jax.export.export(attended, platforms=[platform])(
        jax.ShapeDtypeStruct((4, tokens, 72), jnp.bfloat16)).mlir_module()
    assert "tpu_custom_call" in module(vit.LONG, "tpu")
    assert "tpu_custom_call" not in module(vit.LONG, "cpu") + module(vit.LONG - 1, "tpu")


def test_cudnn_can_be_left_out(monkeypatch):
    device = SimpleNamespace(client=SimpleNamespace(platform_version="cuda 12"), compute_capability="9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert vit._has_cudnn()
    with vit.without_cudnn():
        assert not vit._has_cudnn()
    assert vit._has_cudnn()
