"""DINOv3-L at 224, 64000 SimVQ codes of length 1, RAE's ViT-XL decoder: 14x14 tokens, encoder frozen.

    python -m vqrae_jax.main --config=configs/dinov3_l.py --workdir=runs/dinov3_l \
        --config.data.source=folder:/data/images

Hardware: 8 GPUs of 80 GB (estimated, not measured). Result: not yet measured.
The last LayerNorm keeps its scale and bias: the PyTorch system meant to remove them, and did not.
`--config.data.image_size=512` is the PyTorch system's larger variant. For stage 2 give `--config.init_from`,
`--config.loss.distill_weight=1.0` and `--config.optim.lr_multipliers="(('encoder/.*', 0.1),)"`.
"""

from ml_collections import ConfigDict

from configs import dinov2_b_decxl


def get_config() -> ConfigDict:
    config = dinov2_b_decxl.get_config()
    config.data.image_size = 224
    config.model.encoder.update(path="facebook/dinov3-vitl16-pretrain-lvd1689m", input_size=0, final_norm="affine")
    config.model.quantizer.update(kind="simvq", size=64000, dim=1024, l2_normalize=True, input_projection=True,
                                  restart_threshold=0.0)
    config.gan.update(lr=4e-4, end_lr=1e-4)
    return config
