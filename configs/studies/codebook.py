"""Width, start, size and kind of the codebook at one budget (VQRAE's Table 5); the nano encoder is 192 wide.

    python -m vqrae_jax.study --study=configs/studies/codebook.py --out=runs/codebook --data=tfds:cifar10@DATA_DIR

Each run is 300 steps of 32. The rows of 2048 codes that decide about the width have three seeds.
"""

from vqrae_jax.tokenizer.comparison import Options
from vqrae_jax.tokenizer.study import Row, Study

WIDTHS, DECIDING = (8, 16, 64, 192, 384), (8, 16, 64, 384)  # the latter of 2048 codes have three seeds
LEVELS = {512: (8, 8, 8), 2048: (8, 8, 8, 4), 8192: (8, 8, 8, 4, 4)}  # of FSQ
SEEDS = (0, 1, 2)
METRICS = ("psnr", "fd_encoder", "code_usage", "code_perplexity", "code_bits_by_position", "probe_linear_latents",
           "probe_knn_latents", "probe_linear_reconstructions")


def _row(seeds: tuple[int, ...] = (0,), **quantizer) -> Row:
    # Linear layers lead into code space and out of it at every width, also at the encoder's own.
    quantizer = {"projection": True, **quantizer} if quantizer["kind"] != "fsq" else quantizer
    return Row(config="configs/nano_stage1.py", seeds=seeds,
               changes={"train.steps": 300, **{f"model.quantizer.{key}": value for key, value in quantizer.items()}})


def get_study() -> Study:
    rows = {}
    for size in (2048, 512, 8192):
        for width in WIDTHS:
            for start in ("random", "kmeans"):
                seeds = SEEDS if size == 2048 and width in DECIDING else (0,)
                rows[f"simvq_{size}x{width}_{start}"] = _row(seeds, kind="simvq", size=size, dim=width, init=start)
    for width in WIDTHS:
        rows[f"ema_2048x{width}_kmeans"] = _row(kind="ema", size=2048, dim=width, init="kmeans")
    rows["ema_2048x64_random"] = _row(kind="ema", size=2048, dim=64, init="random")
    for size, levels in LEVELS.items():
        rows[f"fsq_{size}"] = _row(kind="fsq", size=size, dim=len(levels), levels=levels, init="random")
    return Study(title="Codebooks of the nano tokenizer, 300 steps of 32 on CIFAR-10", rows=rows, data="tfds:cifar10",
                 metrics=METRICS, probe=True, options=Options(limit=2000, probe_limit=5000, robustness=False))
