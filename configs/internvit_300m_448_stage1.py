"""The paper's InternViT-300M at 448, stage 1 (VQRAE, Table 7): patch 14, 32x32 tokens, encoder frozen.

    python -m vqrae_jax.main --config=configs/internvit_300m_448_stage1.py --workdir=runs/internvit_stage1

Hardware: a TPU v5e slice of 32 chips or more. Result: not yet measured; the paper's, after both stages, is rFID 1.39,
22.88 dB, SSIM 0.784 on ImageNet.
"""

from ml_collections import ConfigDict

from configs import siglip2_so400m_256_stage1


def get_config() -> ConfigDict:
    config = siglip2_so400m_256_stage1.get_config()
    config.train.update(steps=45_000, batch_size=768)
    config.data.image_size = 448
    config.model.encoder.path = "OpenGVLab/InternViT-300M-448px"
    return config
