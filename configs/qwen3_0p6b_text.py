"""Images from text, as in the paper: Qwen3-0.6B learns the codes of SigLIP2-so400m behind their captions.

    python -m vqrae_jax.tokenize --workdir=runs/so400m_256_stage2 --data=array_record:/data/shards/*.array_record \
        --out=/data/codes --views=1
    python -m vqrae_jax.main --config=configs/qwen3_0p6b_text.py --workdir=runs/qwen3_0p6b_text \
        --config.model.path=/models/Qwen3-0.6B --config.data.source=codes:/data/codes

An image is 256 tokens, or, of a tokenizer at 512 pixels and with `--config.data.grid=32`, 1024. The paper says which
language model it trains, but not how: batch, rates and the length of captions are ours.
Hardware: a TPU v5e slice of 16 chips or more. Result: not yet measured.
"""

from ml_collections import ConfigDict

from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.generator()
    config.train.update(steps=100_000, batch_size=256, log_every=100, checkpoint_every=5000, eval_every=5000)
    config.data.update(source="codes:codes/captioned", grid=16, size=16384, holdout=0.001)
    config.eval.update(batch_size=256, limit=5000)
    config.mesh.update(data=1, fsdp=-1)
    config.model.update(path="Qwen/Qwen3-0.6B", new_rows="mean", dtype="bfloat16", remat="full")
    config.prefix.update(kind="caption", longest=128, drop=0.1)
    config.optim.update(lr=1e-4, end_lr=1e-5, warmup_steps=2000, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0)
    return config
