#!/usr/bin/env bash
# Measures one NVIDIA GPU in under nine minutes: speed, memory, parity, determinism, and PyTorch beside it. It prints a
# table and keeps every row in gpu.json at once; the same command goes on with the rows that are missing.
#
#   bash launch/measure_gpu.sh wheels                  # with internet: packages into wheels/, for this Python; about 4 GB
#   bash launch/measure_gpu.sh [--json=FILE] [--only=ROW ...] [--seconds=N]      # on the GPU's machine, without any
#
# Nothing is downloaded there: what the environment lacks is installed from wheels/. The environment is .venv, made if it
# is not there, or that of PYTHON=..., whose JAX is then kept. Both machines need x86-64 Linux and the same Python (3.11
# or newer); the GPU's a driver for CUDA 13.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=(--requirement requirements.txt 'jax[cuda13]' torch)
if [ "${1:-}" = wheels ]; then
  exec "${PYTHON:-python3}" -m pip wheel --wheel-dir wheels "${packages[@]}"
fi
python=${PYTHON:-.venv/bin/python}
export PYTHONPATH=$PWD
if [ -n "${PYTHON:-}" ]; then
  packages=(--requirement requirements.txt)
elif [ ! -x "$python" ]; then
  python3 -m venv .venv
fi
"$python" -c 'import vqrae_jax.bench, jax; jax.devices("cuda")' >/dev/null 2>&1 ||
  "$python" -m pip install --quiet --no-index --find-links wheels "${packages[@]}"
# JAX itself would measure the CPU, slowly and without a word.
"$python" -c 'import jax; jax.devices("cuda")' >/dev/null 2>&1 || {
  echo "error: JAX finds no NVIDIA GPU: see nvidia-smi, and whether the driver is one for the CUDA of $python's JAX" >&2
  exit 1
}
export JAX_PLATFORMS=cuda,cpu CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
unset SLURM_JOB_ID  # in a shell inside a SLURM job, JAX would look for the others
exec "$python" launch/measure_gpu.py --seconds=$((540 - SECONDS)) "$@"
