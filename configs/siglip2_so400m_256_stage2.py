"""The paper's SigLIP2-so400m at 256, stage 2 (VQRAE, Table 7): the encoder learns, self-distilled; a PatchGAN joins.

    python -m vqrae_jax.main --config=configs/siglip2_so400m_256_stage2.py --workdir=runs/so400m_256_stage2 \
        --config.init_from=runs/so400m_256_stage1 --config.data.source=array_record:/data/shards/*.array_record

Hardware: as stage 1. Result: not yet measured; the paper's is rFID 1.31, 22.23 dB, SSIM 0.762 on ImageNet.
The weight of the discriminator rises with its learning rate, over 2000 steps: an untrained one teaches nothing good.
The table gives the encoder 1e-5 and one end of the cosine, 1e-5: so the encoder's rate stays, the decoder's comes down.
"""

from ml_collections import ConfigDict

from configs import siglip2_so400m_256_stage1


def get_config() -> ConfigDict:
    config = siglip2_so400m_256_stage1.get_config()
    config.init_from = "runs/so400m_256_stage1"
    config.train.update(steps=70_000)
    config.loss.distill_weight = 1.0
    config.gan.update(discriminator="patchgan", weight=0.1, discriminator_start_step=50_000, start_step=50_000,
                      ramp_steps=2000, lr=4e-5, end_lr=4e-5, warmup_steps=2000, weight_decay=1e-4, clip_norm=1.0)
    config.optim.update(lr=1e-4, end_lr=1e-5)
    config.optim.lr_multipliers = (("encoder/.*", 0.1),)
    config.optim.end_lr_multipliers = (("encoder/.*", 1.0),)
    return config
