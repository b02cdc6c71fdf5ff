"""The paper's SigLIP2-so400m at 512, stage 2 (VQRAE, Table 7): 32x32 tokens, all else as at 256.

    python -m vqrae_jax.main --config=configs/siglip2_so400m_512_stage2.py --workdir=runs/so400m_512_stage2 \
        --config.init_from=runs/so400m_512_stage1

Hardware: a TPU v5e slice of 64 chips or more. Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import siglip2_so400m_256_stage2


def get_config() -> ConfigDict:
    config = siglip2_so400m_256_stage2.get_config()
    config.train.accumulate = 2
    config.data.image_size = 512
    config.model.encoder.path = "google/siglip2-so400m-patch16-512"
    config.init_from = "runs/so400m_512_stage1"
    return config
