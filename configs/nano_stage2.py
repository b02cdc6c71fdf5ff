"""Nano, stage 2: from a stage-1 run, the encoder learns too, held to its former features by distillation.

    python -m vqrae_jax.main --config=configs/nano_stage2.py --workdir=runs/nano_stage2
"""

from ml_collections import ConfigDict

from configs import nano_stage1


def get_config() -> ConfigDict:
    config = nano_stage1.get_config()
    config.init_from = "runs/nano_stage1"
    config.train.update(steps=250, eval_every=250)
    config.loss.distill_weight = 2.0
    config.optim.lr_multipliers = (("encoder/.*", 0.3),)
    return config
