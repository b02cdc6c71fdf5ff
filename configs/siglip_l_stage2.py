"""SigLIP-L at 224, stage 2: everything learns from a stage-1 run; distillation holds the encoder's features.

    python -m vqrae_jax.main --config=configs/siglip_l_stage2.py --workdir=runs/siglip_l_stage2 \
        --config.init_from=runs/siglip_l_stage1 --config.data.source=folder:/data/images

Hardware: as stage 1, with about twice the memory for the encoder's optimizer and its teacher. Result: not yet measured.
The PyTorch recipe: LPIPS at half its weight, no discriminator.
"""

from ml_collections import ConfigDict

from configs import siglip_l_stage1
from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = siglip_l_stage1.get_config()
    config.init_from = "runs/siglip_l_stage1"
    config.train.update(steps=50_000, checkpoint_every=2500)
    config.loss.update(perceptual_weight=0.5, distill_weight=2.0)
    config.gan = config_lib.default().gan
    config.optim.update(lr=1e-5, end_lr=1e-6, warmup_steps=1000, lr_multipliers=())
    return config
