"""The nano tokenizer that ships with the package, stage 1: CIFAR-10, with the encoder as a perceptual network.

    python -m vqrae_jax.main --config=configs/nano_cifar10_stage1.py --workdir=runs/nano_cifar10_stage1

`launch/ship_nano.sh` runs it, the second stage, and the generator of its codes.
"""

from ml_collections import ConfigDict

from configs import nano_stage1


def get_config() -> ConfigDict:
    config = nano_stage1.get_config()
    config.data.source = "tfds:cifar10"
    config.train.update(steps=400, eval_every=400)
    config.eval.limit = 512
    config.loss.perceptual_weight = 1.0
    config.loss.perceptual.encoder = 1.0
    return config
