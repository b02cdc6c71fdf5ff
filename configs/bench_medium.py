"""A medium model for measurements: encoder and decoder 384 wide and 12 deep, 256 px, 16384 SimVQ codes of 384.

    python -m vqrae_jax.bench --config=configs/bench_medium.py --against=torch

Stage 1: the encoder is frozen. Weights are random; it is not meant to be trained. Results: docs/measurements.md.
"""

from ml_collections import ConfigDict

from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.train.update(steps=1000, batch_size=8)
    config.data.image_size = 256
    config.model.encoder.update(path="vit_s16_256", random_weights=True)
    config.model.quantizer.update(kind="simvq", size=16384, dim=384)
    config.optim.update(lr=1e-4, end_lr=1e-5, warmup_steps=100)
    config.optim.lr_multipliers = (("encoder/.*", 0.0),)
    return config
