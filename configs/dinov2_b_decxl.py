"""DINOv2-B, 8192 EMA VQ codes, and RAE's whole recipe for its ViT-XL decoder: L1, LPIPS, DINO discriminator, DiffAug.

    python -m vqrae_jax.main --config=configs/dinov2_b_decxl.py --workdir=runs/dinov2_b_decxl \
        --config.data.source=folder:/data/imagenet/train

Hardware: 8 GPUs of 80 GB (estimated, not measured). Result: not yet measured.
16 epochs of ImageNet in batches of 512, 2502 steps each: the discriminator learns from epoch 6, is used from epoch 8.
"""

from ml_collections import ConfigDict

from configs import dinov2_b

EPOCH = 2502


def get_config() -> ConfigDict:
    config = dinov2_b.get_config()
    config.train.update(steps=16 * EPOCH, batch_size=512)
    config.loss.perceptual_weight = 1.0
    config.loss.perceptual.lpips = 1.0
    config.gan.update(discriminator="dino_s8", weight=0.75, adaptive=True, max_adaptive_weight=1e4, augment=True,
                      discriminator_start_step=6 * EPOCH, start_step=8 * EPOCH, lr=2e-4, end_lr=2e-5,
                      warmup_steps=EPOCH, b2=0.95)
    config.optim.update(lr=2e-4, end_lr=2e-5, warmup_steps=EPOCH, clip_norm=0.0, ema_decay=0.9978)
    return config
