"""The nano generator that ships with the package: the codes of CIFAR-10 by the nano tokenizer that ships.

    python -m vqrae_jax.tokenize --workdir=nano --data=tfds:cifar10:train --out=runs/nano_codes --views=2
    python -m vqrae_jax.tokenize --workdir=nano --data=tfds:cifar10:test --out=runs/nano_codes_test
    python -m vqrae_jax.main --config=configs/nano_cifar10_generator.py --workdir=runs/nano_cifar10_generator
"""

from ml_collections import ConfigDict

from configs import nano_generator


def get_config() -> ConfigDict:
    config = nano_generator.get_config()
    config.data.update(source="codes:runs/nano_codes", holdout=0.0)  # for there are test images
    config.eval.update(source="codes:runs/nano_codes_test", limit=2000)
    return config
