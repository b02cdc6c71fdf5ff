"""The paper's SigLIP2-so400m at 512, stage 1 (VQRAE, Table 7): 32x32 tokens, all else as at 256.

    python -m vqrae_jax.main --config=configs/siglip2_so400m_512_stage1.py --workdir=runs/so400m_512_stage1

Hardware: a TPU v5e slice of 64 chips or more. Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import siglip2_so400m_256_stage1


def get_config() -> ConfigDict:
    config = siglip2_so400m_256_stage1.get_config()
    config.data.image_size = 512
    config.model.encoder.path = "google/siglip2-so400m-patch16-512"
    return config
