"""The paper's ablations on ImageNet, 20 epochs (VQRAE, Tables 5 and 6): width and number of codes, training strategy.

    python -m vqrae_jax.main --config=configs/ablation.py:dim=1536,size=16384 --workdir=runs/dim1536_size16384 \
        --config.data.source=folder:/data/imagenet/train

Arguments: `dim` (384, 768, 1152, 1536, 1920), `size` (4096, 8192, 16384, 32768) and `strategy`: `frozen` (stage 1),
`joint` (no stages, no distillation), `distilled` (no stages). Both stages are `frozen` and then stage 2.
Hardware: as `siglip2_so400m_256_stage1.py`. Result: not yet measured; the paper's at 1536 x 16384: rFID 2.65, all
codes used.
"""

from ml_collections import ConfigDict

from configs import siglip2_so400m_256_stage1

STRATEGIES = {"frozen": (0.0, 0.0), "joint": (0.1, 0.0), "distilled": (0.1, 1.0)}  # encoder's rate, distill weight


def get_config(arguments: str = "") -> ConfigDict:
    values = {"dim": "1536", "size": "16384", "strategy": "frozen"}
    for argument in filter(None, arguments.split(",")):
        name, _, value = argument.partition("=")
        if name not in values or not (value in STRATEGIES if name == "strategy" else value.isdigit()):
            raise ValueError(f"{argument!r}: give dim=N, size=N or strategy={'|'.join(STRATEGIES)}")
        values[name] = value
    config = siglip2_so400m_256_stage1.get_config()
    config.train.steps = 20 * 1251  # epochs of ImageNet in batches of 1024
    config.model.quantizer.update(dim=int(values["dim"]), size=int(values["size"]))
    multiplier, config.loss.distill_weight = STRATEGIES[values["strategy"]]
    config.optim.lr_multipliers = (("encoder/.*", multiplier),)
    return config
