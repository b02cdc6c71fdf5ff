"""Speed and memory of encode, decode, train steps, input pipeline, tokenize and generate, with random weights.

    python -m vqrae_jax.bench --config=configs/bench_medium.py [--batch=N] [--against=torch] [--json=FILE]

Every case runs in a process of its own, so that its peak memory is its own: of the device, where JAX knows it, else of
the whole process. Times are medians of `--repeats` runs after two that do not count. With --against=torch the same
model in plain PyTorch takes turns with it, run by run, on the same device and number of threads; the ratio is PyTorch's
time over ours. With --against=torch.compile it is compiled. It needs a SimVQ model without perceptual losses, and
PyTorch installed; the config of a generator, which has the cases generate and generate_one, must be float32 and needs
`transformers` as well. `launch/measure_gpu.sh` measures what matters on one GPU.
"""

import json
import sys
from pathlib import Path

import jax
from absl import flags

from vqrae_jax import cli
from vqrae_jax import config as config_lib
from vqrae_jax.cost import bench


def main(_) -> None:
    values = _CONFIG.value
    task = config_lib.parse(values).task
    cases = _CASES.value or bench.CASES[task]
    for case in cases:
        if case not in bench.CASES[task]:
            raise ValueError(f"--case={case} cannot be measured with the config of a {task}, only "
                             f"{', '.join(bench.CASES[task])}")
    if task == "generator":
        values.model.random_weights = True
        values.data.classes = values.data.classes or 1  # their number makes no difference
    else:
        values.model.encoder.random_weights = values.loss.perceptual.random_weights = True
    values.train.batch_size = _BATCH.value or values.train.batch_size
    values.data.source = _DATA.value or values.data.source
    config = config_lib.parse(values)
    if _CHILD.value:
        return bench.serve(config, _CHILD.value, plain_attention=_PLAIN_ATTENTION.value)
    jax.config.update("jax_platforms", "cpu")  # of this process: an accelerator is the children's
    results, file = {}, Path(_JSON.value) if _JSON.value else None
    command = [sys.executable, "-m", "vqrae_jax.bench", *sys.argv[1:]]
    for case in cases:
        if file:  # before the work, and again after each case: what is measured is not lost
            file.write_text(json.dumps(results, indent=2) + "\n")
        results[case] = bench.measure(config, case, [*command, f"--child={case}"], repeats=_REPEATS.value,
                                      against=_AGAINST.value)
        print(bench.line(case, results[case]), flush=True)
    if file:
        file.write_text(json.dumps(results, indent=2) + "\n")
    for result in results.values():
        if "torch_error" in result:
            raise ValueError(result["torch_error"])


if __name__ == "__main__":
    _CONFIG = cli.config_file()
    _BATCH = flags.DEFINE_integer("batch", 0, "images at once; 0 is train.batch_size", lower_bound=0)
    _AGAINST = flags.DEFINE_enum("against", None, bench.FRAMEWORKS, "also run the same model in PyTorch")
    _JSON = flags.DEFINE_string("json", "", "file for the results")
    _REPEATS = flags.DEFINE_integer("repeats", 5, "runs that count", lower_bound=1)
    _DATA = flags.DEFINE_string("data", "", "SPEC of the images of input and tokenize; empty is data.source")
    _ALL = [case for of_task in bench.CASES.values() for case in of_task]
    _CASES = flags.DEFINE_multi_enum("case", None, _ALL, "only this case of the config's task; may be repeated")
    _PLAIN_ATTENTION = flags.DEFINE_bool("plain_attention", False, "on NVIDIA GPUs without cuDNN's attention")
    _CHILD = flags.DEFINE_enum("child", None, _ALL, "internal: serve one case")
    cli.run(main)
