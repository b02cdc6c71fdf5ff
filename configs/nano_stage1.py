"""Nano, stage 1: the shipped encoder is frozen; codebook and decoder learn. 64-pixel images, 64 tokens each.

    python -m vqrae_jax.main --config=configs/nano_stage1.py --workdir=runs/nano_stage1
"""

from ml_collections import ConfigDict

from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.train.update(steps=450, batch_size=32, log_every=25, checkpoint_every=150, eval_every=450)
    config.data.update(source="embedded", image_size=64, crop_scale_min=0.6)
    config.eval.update(batch_size=64, limit=256)
    config.model.encoder.path = "nano"
    # Narrower than the encoder's 192: the layer into code space then learns to keep what the pixels need.
    config.model.quantizer.update(kind="simvq", size=2048, dim=64, init="kmeans")
    config.loss.update(pixel="l2", pixel_weight=20.0, vq_weight=1.0)
    config.optim.update(lr=2e-3, end_lr=1e-4, warmup_steps=50, weight_decay=0.01, b2=0.95, ema_decay=0.99)
    config.optim.lr_multipliers = (("encoder/.*", 0.0),)
    return config
