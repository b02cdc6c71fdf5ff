#!/usr/bin/env bash
# One host with one or several NVIDIA GPUs: one process drives them all. Paths are relative to the repository.
#
#   bash launch/gpu.sh --config=configs/siglip_l_stage1.py --workdir=runs/s1 --config.data.source=folder:/my/images
#
# The first start installs; needs Python >= 3.11 and a driver for CUDA 12. The same command continues a run.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -c "import vqrae_jax, jax_cuda12_plugin" 2>/dev/null ||
  .venv/bin/pip install --quiet --editable '.[cuda]'
# JAX itself would train on the CPU, slowly and without a word.
.venv/bin/python -c 'import jax; jax.devices("cuda")' >/dev/null 2>&1 || {
  echo "error: JAX finds no NVIDIA GPU: see nvidia-smi, and whether the driver is one for CUDA 12" >&2
  exit 1
}
export JAX_PLATFORMS=cuda,cpu
# Lets computation go on while GPUs exchange parameters and gradients: XLA's default is off, JAX's GPU guide turns it on.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
unset SLURM_JOB_ID  # in a shell inside a SLURM job, JAX would take one GPU only
exec .venv/bin/python -m vqrae_jax.main "$@"
