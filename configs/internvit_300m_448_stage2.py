"""The paper's InternViT-300M at 448, stage 2 (VQRAE, Table 7): the encoder learns; the PatchGAN joins at 30k.

    python -m vqrae_jax.main --config=configs/internvit_300m_448_stage2.py --workdir=runs/internvit_stage2 \
        --config.init_from=runs/internvit_stage1

Hardware: as stage 1. Result: not yet measured; the paper's is rFID 1.39, 22.88 dB, SSIM 0.784 on ImageNet.
"""

from ml_collections import ConfigDict

from configs import siglip2_so400m_256_stage2


def get_config() -> ConfigDict:
    config = siglip2_so400m_256_stage2.get_config()
    config.init_from = "runs/internvit_stage1"
    config.train.update(steps=60_000, batch_size=768, accumulate=2)
    config.data.image_size = 448
    config.model.encoder.path = "OpenGVLab/InternViT-300M-448px"
    config.gan.update(discriminator_start_step=30_000, start_step=30_000)
    return config
