"""Nano's generator: the classes and codes of a nano tokenizer, 64 tokens of 2048 codes. For two CPU cores.

    python -m vqrae_jax.tokenize --workdir=nano --data=embedded --out=codes/nano --views=10
    python -m vqrae_jax.main --config=configs/nano_generator.py --workdir=runs/nano_generator

`nano_cifar10_generator.py` is the one that ships with the package.
"""

from ml_collections import ConfigDict

from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.generator()
    config.train.update(steps=3000, batch_size=64, log_every=50, checkpoint_every=500, eval_every=500)
    config.data.update(source="codes:codes/nano", grid=8, size=2048, holdout=0.1)
    config.eval.update(batch_size=64, limit=512)
    config.model.update(width=192, depth=5, heads=3, kv_heads=3, head_dim=64, mlp_dim=512, dropout=0.1)
    config.optim.update(lr=2e-3, end_lr=2e-5, warmup_steps=100, b2=0.95, weight_decay=0.05, ema_decay=0.99)
    return config
