"""What does not learn is kept in the type it is computed in: the same bits from less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.generator.tiny import random_arrays
from tests.tiny import reduced
from vqrae_jax.models import flat, perceptual
from vqrae_jax.models.decoder import Decoder
from vqrae_jax.models.perceptual import ConvNeXt
from vqrae_jax.models.vit import ViT, ViTSpec
from vqrae_jax.tokenizer import build, train_state
from vqrae_jax.training import sharding

pytestmark = pytest.mark.usefixtures("tiny_networks")
IMAGES = np.random.default_rng(0).random((2, 32, 32, 3), np.float32)
SPEC = ViTSpec(width=16, depth=1, heads=2, mlp_dim=32, patch_size=8, prefix_tokens=2, layer_scale=True)
MODULES = {
    "learned positions": lambda **options: ViT(SPEC, image_size=32, **options),
    "rotary positions": lambda **options: ViT(dataclasses.replace(SPEC, rope_theta=100.0), image_size=32, **options),
    "lpips": lambda **options: perceptual.LPIPS(**options),
    "convnext": lambda **options: ConvNeXt(perceptual.CONVNEXT_SMALL, **options),
    "decoder": lambda **options: Decoder(SPEC, latent_width=192, grid=4, patch_size=8, mean=(0.5,) * 3, std=(0.5,) * 3,
                                         cls_token=True, learned_positions=True, **options),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_does_the_same_with_parameters_that_were_cast(name):
    graphdef, params, _ = flat.split(nnx.eval_shape(lambda: MODULES[name](dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    types, params = flat.cast_types(graphdef, params), random_arrays(params)
    inputs = IMAGES.reshape(2, 16, 192) if name == "decoder" else IMAGES
    run = jax.jit(lambda params: flat.merge(graphdef, params)(inputs))
    cast = {path: value.astype(types[path]) if path in types else value for path, value in params.items()}
    jax.tree.map(np.testing.assert_array_equal, run(params), run(cast))
    # All but what is used in float32.
    left = {path for path, value in cast.items() if value.dtype == jnp.float32}
    assert all("norm" in path or path.startswith(("weights/", "head/", "pixels/")) or "depthwise/kernel" in path
               for path in left), left


@pytest.mark.parametrize("name", ["siglip_l_stage1", "siglip2_so400m_256_stage2"])
def test_what_does_not_learn_takes_half_the_memory_in_training(name):
    """Encoder or teacher, networks, the discriminator's backbone; not what learns, and nothing in float32."""
    config, mesh = reduced(name), sharding.one_device()
    structure = build.structure(config)
    assert train_state.in_training(config, structure, mesh) == train_state.abstract(config, structure, mesh)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    structure = build.structure(config)
    state, frozen = train_state.in_training(config, structure, mesh)
    as_saved, frozen_as_saved = train_state.abstract(config, structure, mesh)
    assert state == as_saved
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen_as_saved)} == {jnp.dtype(jnp.float32)}
    types = {path: leaf.dtype for arrays in frozen for path, leaf in arrays.items()}
    for part in ("encoder/vit", *(("discriminator/backbone", "lpips") if "siglip_l" in name else ("convnext_s",))):
        kernels = {dtype for path, dtype in types.items() if path.startswith(part) and path.endswith("kernel")
                   and "depthwise" not in path and "head" not in path}
        assert kernels == {jnp.dtype(jnp.bfloat16)}, part
