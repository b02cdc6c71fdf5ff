"""Shipped configs at toy size, and a training step of any config with its state."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import REFERENCE
from vqrae_jax import config as config_lib
from vqrae_jax.tokenizer import build, init, train_state
from vqrae_jax.tokenizer.loss import make_train_step, phase_of
from vqrae_jax.training import sharding
from vqrae_jax.weights import huggingface

TINY_ENCODERS = {
    "nano": "siglip_vision", "vit_s16_256": "siglip_vision",
    "google/siglip-large-patch16-384": "siglip_vision", "google/siglip-base-patch16-224": "siglip_vision",
    "google/siglip2-so400m-patch16-256": "siglip_vision", "google/siglip2-so400m-patch16-512": "siglip_vision",
    "facebook/dinov2-with-registers-base": "dinov2_with_registers",
    "facebook/dinov3-vitl16-pretrain-lvd1689m": "dinov3_vit", "OpenGVLab/InternViT-300M-448px": "intern_vit",
}


def reduced(name: str) -> config_lib.Config:
    """A shipped config at toy size: a tiny encoder of the same family, few codes; everything else as shipped.

    Networks of the losses are random (and tiny, see `tiny_networks`), and a discriminator is there from the start.
    """
    config = importlib.import_module(f"configs.{name}").get_config()
    tiny = TINY_ENCODERS[config.model.encoder.path]
    config.model.encoder.update(path=str(REFERENCE / tiny), random_weights=True)
    if config.model.quantizer.kind == "adapter_fsq":
        config.model.quantizer.update(levels=(4, 4, 2), size=32, dim=3)
    else:
        width = huggingface.read_encoder_spec(config.model.encoder.path).vit.width
        config.model.quantizer.update(size=16, dim=2 * width if config.model.quantizer.dim == 1536 else width,
                                      init="random")
    config.data.image_size = 32
    if config.model.encoder.input_size:
        config.model.encoder.input_size = 32
    if config.model.decoder.shape != "symmetric":
        config.model.decoder.update(shape="custom", width=16, depth=1, heads=2, mlp_dim=32)
    config.model.decoder.patch_size = 0
    config.model.dtype = "float32"
    config.loss.perceptual.random_weights = True
    config.gan.random_weights = config.gan.discriminator.startswith("dino")
    config.gan.update(discriminator_start_step=0, start_step=0, warmup_steps=0, ramp_steps=0)
    if config.gan.discriminator == "patchgan":
        config.gan.channels = 32
    config.train.update(steps=100, batch_size=4)
    config.optim.warmup_steps = 1
    config.init_from = ""
    return config_lib.parse(config)


class Run:
    """A config, its step and its state."""

    def __init__(self, config: config_lib.Config):
        self.config = config
        self.structure = build.structure(config)
        mesh = sharding.one_device()
        arrays = (*init.model_arrays(config, self.structure, mesh), *init.network_arrays(config, mesh))
        # Bound to no device, as what a bare step returns: another placement would compile it once more.
        self.params, self.buffers, self.networks, network_buffers = jax.tree.map(jnp.asarray, jax.device_get(arrays))
        self.state, self.frozen = train_state.init(config, self.structure, self.params, self.buffers, self.networks,
                                                   network_buffers)
        self.phase = phase_of(config, config.train.steps)
        self.step = make_train_step(config, self.structure, self.phase)
        self.jitted = jax.jit(self.step)

    def batch(self, seed=0, size=4):
        """A batch."""
        side = self.config.data.image_size
        return {"image": np.random.default_rng(seed).integers(0, 256, (size, side, side, 3), np.uint8)}

    def train(self, steps):
        for i in range(steps):
            self.state, metrics = self.jitted(self.state, self.frozen, self.batch(i))
        return {name: float(value) for name, value in metrics.items()}
