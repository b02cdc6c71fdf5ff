"""DINOv2-B with registers, 8192 EMA VQ codes, RAE's ViT-XL decoder: 224-pixel input, 16x16 tokens, 256-pixel output.

    python -m vqrae_jax.convert from-torch --checkpoint=model.pt --encoder=DINOV2_DIR --decoder-heads=16 \
        --workdir=runs/rae
    python -m vqrae_jax.main --config=configs/dinov2_b.py --workdir=runs/dinov2_b --config.init_from=runs/rae \
        --config.data.source=folder:/data/images

Hardware: one 80 GB GPU holds a batch of 64 (estimated, not measured). Result: not yet measured.
The PyTorch system put an untrained codebook between encoder and a pretrained RAE decoder. Here the codes start at
k-means centres of the encoder's features and the decoder gets used to them; without `init_from` it learns from scratch.
"""

from ml_collections import ConfigDict

from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = config_lib.default()
    config.train.update(steps=100_000, batch_size=64, log_every=100, checkpoint_every=5000, eval_every=5000)
    config.data.update(source="folder:data/images", image_size=256)
    config.model.dtype = "bfloat16"
    config.model.encoder.update(path="facebook/dinov2-with-registers-base", input_size=224, final_norm="plain")
    config.model.quantizer.update(kind="ema", size=8192, dim=768, init="kmeans", decay=0.99, commitment_weight=0.25,
                                  restart_threshold=0.01)
    config.model.decoder.update(shape="vit_xl", patch_size=16, cls_token=True)
    config.loss.update(pixel="l1", pixel_weight=1.0, vq_weight=1.0)
    config.optim.update(lr=1e-4, end_lr=1e-5, warmup_steps=5000, b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=1.0,
                        ema_decay=0.9999)
    config.optim.lr_multipliers = (("encoder/.*", 0.0),)
    return config
