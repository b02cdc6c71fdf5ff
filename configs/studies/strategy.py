"""Training strategies at one budget (VQRAE's Table 6), with the nano encoder: 600 steps of 32 in one or in two stages.

    python -m vqrae_jax.study --study=configs/studies/strategy.py --out=runs/strategy --data=tfds:cifar10@DATA_DIR
"""

from vqrae_jax.tokenizer.comparison import Options
from vqrae_jax.tokenizer.study import Row, Study

STAGE1, STAGE2 = "configs/nano_stage1.py", "configs/nano_stage2.py"
SEEDS = (0, 1, 2)
METRICS = ("psnr", "ssim", "fd_encoder", "code_usage", "code_perplexity", "drift_cosine", "drift_cka",
           "probe_linear_features", "probe_knn_features", "probe_linear_latents", "probe_knn_latents",
           "probe_linear_reconstructions")


def get_study() -> Study:
    half, whole, undistilled = {"train.steps": 300}, {"train.steps": 600}, {"loss.distill_weight": 0.0}
    rows = {
        "frozen": Row(config=STAGE1, changes=whole, seeds=SEEDS),
        "joint": Row(config=STAGE2, changes={**whole, **undistilled, "init_from": ""}, seeds=SEEDS),
        "joint_distilled": Row(config=STAGE2, changes={**whole, "init_from": ""}, seeds=SEEDS),
        "stage1": Row(config=STAGE1, changes=half, seeds=SEEDS),
        "two_stages": Row(config=STAGE2, changes={**half, **undistilled}, seeds=SEEDS, init_from="stage1"),
        "two_stages_distilled": Row(config=STAGE2, changes=half, seeds=SEEDS, init_from="stage1"),
    }
    return Study(title="Training strategies of the nano tokenizer, 600 steps of 32 on CIFAR-10", rows=rows,
                 data="tfds:cifar10", metrics=METRICS, probe=True,
                 options=Options(limit=2000, probe_limit=5000, robustness=False))
