"""The nano tokenizer that ships with the package, stage 2: the encoder learns too, and at last a PatchGAN.

    python -m vqrae_jax.main --config=configs/nano_cifar10_stage2.py --workdir=runs/nano_cifar10_stage2
"""

from ml_collections import ConfigDict

from configs import nano_cifar10_stage1, nano_gan


def get_config() -> ConfigDict:
    config = nano_cifar10_stage1.get_config()
    config.init_from = "runs/nano_cifar10_stage1"
    config.train.update(steps=1500, eval_every=500, checkpoint_every=250)
    config.loss.distill_weight = 2.0
    config.optim.lr_multipliers = (("encoder/.*", 0.3),)
    config.gan.update(nano_gan.get_config().gan)
    config.gan.update(discriminator_start_step=1150, start_step=1200, ramp_steps=50)
    return config
