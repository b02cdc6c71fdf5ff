"""ImageNet's classes as codes of SigLIP2-so400m at 256: LlamaGen-L's size and recipe (arXiv 2406.06525, Table 2).

    python -m vqrae_jax.tokenize --workdir=runs/so400m_256_stage2 --data=folder:/data/imagenet/train \
        --out=/data/codes/train --views=10
    python -m vqrae_jax.main --config=configs/generator_l.py --workdir=runs/generator_l \
        --config.data.source=codes:/data/codes/train --config.eval.source=codes:/data/codes/val

Size: 24 layers, 1024 wide, 16 heads, 344 million parameters, 343 of LlamaGen-L, which has no norms of queries and keys,
and whose last layer has codes only. Recipe: 300 epochs of ten crops in batches of 256, a learning rate of 1e-4
throughout, no moving average. Rotary positions are Qwen3's, of one dimension; LlamaGen's are of two, and it lets
embeddings decay, too.
Hardware: a TPU v5e slice of 16 chips or more. Result: not yet measured.
"""

from ml_collections import ConfigDict

from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.generator()
    epoch = 1_281_167 // 256
    config.train.update(steps=300 * epoch, batch_size=256, log_every=100, checkpoint_every=5000, eval_every=5 * epoch)
    config.data.update(source="codes:codes/imagenet", grid=16, size=16384, classes=1000, holdout=0.0)
    config.eval.update(batch_size=256, limit=5000)
    config.mesh.update(data=-1, fsdp=1)
    config.model.update(width=1024, depth=24, heads=16, kv_heads=16, head_dim=64, mlp_dim=2816, dropout=0.1,
                        dtype="bfloat16")
    config.prefix.update(kind="class", drop=0.1)
    config.optim.update(lr=1e-4, end_lr=1e-4, warmup_steps=0, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=1.0,
                        ema_decay=0.0)
    return config
