"""SigLIP-B at 224, finite scalar quantization to levels 8, 8, 8, 8, 4 between learned adapters: 16384 codes.

    python -m vqrae_jax.main --config=configs/siglip_fsq.py --workdir=runs/siglip_fsq \
        --config.data.source=folder:/data/images

Hardware: 8 GPUs of 80 GB (estimated, not measured). Result: not yet measured.
"""

from ml_collections import ConfigDict

from configs import dinov2_b_decxl
from vqrae_jax import config as config_lib


def get_config() -> ConfigDict:
    config = dinov2_b_decxl.get_config()
    config.data.image_size = 224
    config.model.encoder.update(path="google/siglip-base-patch16-224", input_size=0, final_norm="plain")
    config.model.quantizer = config_lib.default().model.quantizer
    config.model.quantizer.update(kind="adapter_fsq", size=16384, dim=5, levels=(8, 8, 8, 8, 4))
    config.optim.update(lr=2e-3, end_lr=2e-4)
    return config
