"""The run's own encoder as a perceptual network: what its distance buys, and what it costs in pixels.

    python -m vqrae_jax.study --study=configs/studies/encoder_loss.py --out=runs/encoder --data=tfds:cifar10@DATA_DIR

Each run is one distilled stage of 300 steps of 32; the weight is that of the loss beside 20 of the pixels'.
"""

from vqrae_jax.tokenizer.comparison import Options
from vqrae_jax.tokenizer.study import Row, Study

METRICS = ("psnr", "ssim", "fd_encoder", "code_perplexity", "probe_linear_features", "probe_linear_latents",
           "probe_linear_reconstructions")


def _row(weight: float) -> Row:
    changes = {"train.steps": 300, "init_from": "", "loss.perceptual_weight": weight,
               "loss.perceptual.encoder": 1.0 if weight else 0.0}
    return Row(config="configs/nano_stage2.py", changes=changes, seeds=(0,))


def get_study() -> Study:
    rows = {f"weight_{weight:g}": _row(weight) for weight in (2.0, 0.5, 0.0)}
    return Study(title="The encoder as a perceptual network of the nano tokenizer, 300 steps of 32 on CIFAR-10",
                 rows=rows, data="tfds:cifar10", metrics=METRICS, probe=True,
                 options=Options(limit=2000, probe_limit=5000, robustness=False))
