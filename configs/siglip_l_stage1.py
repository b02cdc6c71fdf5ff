"""SigLIP-L at 224, stage 1: 14x14 tokens, 16384 SimVQ codes, encoder frozen; codebook and decoder learn.

    python -m vqrae_jax.main --config=configs/siglip_l_stage1.py --workdir=runs/siglip_l_stage1 \
        --config.data.source=folder:/data/images

Hardware: a batch of 4096 (512 x 8 in the PyTorch system) wants a pod slice. Result: not yet measured.
The PyTorch recipe: L2, LPIPS and a DINO discriminator from step 10,000, over 30 epochs of DataComp-1B; 100,000 steps of
4096 images are 410 million of them. It names no optimizer for the discriminator: that is of `dinov2_b_decxl.py`, and
warm-up and weight rise over 1000 steps. Codes start at k-means centres: a random start collapses on clustered features.
"""

from ml_collections import ConfigDict

from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.train.update(steps=100_000, batch_size=4096, log_every=100, checkpoint_every=5000, eval_every=5000)
    config.data.update(source="folder:data/images", image_size=224)
    config.model.dtype = "bfloat16"
    config.model.encoder.update(path="google/siglip-large-patch16-384", final_norm="plain")
    config.model.quantizer.update(kind="simvq", size=16384, dim=1024, init="kmeans", commitment_weight=0.25)
    config.model.decoder.update(shape="vit_l", cls_token=True)
    config.loss.update(pixel="l2", pixel_weight=1.0, perceptual_weight=1.0, vq_weight=1.0)
    config.loss.perceptual.lpips = 1.0
    config.gan.update(discriminator="dino_s8", weight=0.8, adaptive=True, discriminator_start_step=10_000,
                      start_step=10_000, ramp_steps=1000, augment=True, lr=2e-4, end_lr=2e-5, warmup_steps=1000,
                      b2=0.95)
    config.optim.update(lr=1e-3, end_lr=1e-4, warmup_steps=5000, b1=0.9, b2=0.95, weight_decay=0.05, clip_norm=0.0,
                        ema_decay=0.9999)
    config.optim.lr_multipliers = (("encoder/.*", 0.0),)
    return config
