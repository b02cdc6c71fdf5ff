"""Nano, stage 1 with a PatchGAN that begins to learn mid-run and is used 100 steps later.

    python -m vqrae_jax.main --config=configs/nano_gan.py --workdir=runs/nano_gan

On CIFAR-10: 19.24 dB when it is first used, 19.62 dB at the end, as without it (docs/measurements.md).
"""

from ml_collections import ConfigDict

from configs import nano_stage1


def get_config() -> ConfigDict:
    config = nano_stage1.get_config()
    config.train.update(steps=900, eval_every=100)
    config.gan.update(discriminator="patchgan", channels=32, weight=0.1, adaptive=True, max_adaptive_weight=100.0,
                      discriminator_start_step=350, start_step=450, ramp_steps=50, lecam_weight=0.001,
                      lr=1e-3, end_lr=1e-4, b1=0.5, clip_norm=1.0)
    return config
