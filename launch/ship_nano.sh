#!/usr/bin/env bash
# Makes the nano models that ship with the package: a tokenizer in two stages, and a generator of its codes.
#
#   bash launch/ship_nano.sh DATA_DIR
#
# DATA_DIR is where TFDS keeps CIFAR-10, in ArrayRecord format. A second start continues where the first one ended; what
# is in vqrae_jax/assets/models/nano is kept, so remove model.safetensors there to make it anew. The numbers of the model
# cards are of the packed models: those that it prints, and samples' of other guidance, by the last command with --cfg.
set -euo pipefail
[ -d "${1:-}" ] || { echo "error: give the folder where TFDS keeps CIFAR-10" >&2; exit 1; }
TFDS_DATA_DIR=$(realpath "$1")
export TFDS_DATA_DIR  # and the configs that ship name no folder of this machine
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -c "import vqrae_jax" 2>/dev/null || .venv/bin/pip install --quiet --editable .
models=vqrae_jax/assets/models/nano

pack() { [ -e "$2/model.safetensors" ] || .venv/bin/python launch/pack.py --workdir="$1" --out="$2"; }

.venv/bin/python -m vqrae_jax.main --config=configs/nano_cifar10_stage1.py --workdir=runs/nano_cifar10_stage1
.venv/bin/python -m vqrae_jax.main --config=configs/nano_cifar10_stage2.py --workdir=runs/nano_cifar10_stage2
pack runs/nano_cifar10_stage2 $models/tokenizer
[ -e runs/nano_shipped/metrics.json ] ||
  .venv/bin/python -m vqrae_jax.evaluate --workdir=nano --data=tfds:cifar10:test --probe=tfds:cifar10:train \
    --out=runs/nano_shipped

# By the packed tokenizer: its rounded weights are others than the run's, and make other codes of a few patches.
.venv/bin/python -m vqrae_jax.tokenize --workdir=nano --data=tfds:cifar10:train --views=2 --out=runs/nano_codes
.venv/bin/python -m vqrae_jax.tokenize --workdir=nano --data=tfds:cifar10:test --out=runs/nano_codes_test
.venv/bin/python -m vqrae_jax.main --config=configs/nano_cifar10_generator.py --workdir=runs/nano_cifar10_generator
pack runs/nano_cifar10_generator $models/generator
[ -e runs/nano_samples_metrics.json ] ||
  .venv/bin/python -m vqrae_jax.generate --workdir=nano --tokenizer=nano --num=1000 --cfg=2 \
    --reference=tfds:cifar10:test --probe=tfds:cifar10:train --probe_limit=10000 --out=runs/nano_samples.npz
