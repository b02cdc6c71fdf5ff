#!/usr/bin/env bash
# GPU nodes under SLURM, one task per GPU. Submit it from the repository; all nodes must see it and the workdir:
#
#   python3 -m venv .venv && .venv/bin/pip install --editable '.[cuda]'    # once
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 --time=24:00:00 launch/slurm.sh \
#       --config=configs/siglip_l_stage1.py --workdir=/shared/runs/s1 --config.data.source=folder:/shared/images
#
# JAX takes coordinator, process count and rank from SLURM's variables, and the task of local rank i the i-th GPU of its
# node. Every task must therefore see all GPUs of the node: --gpus-per-task would hide the others.
# Before the time limit and when preempted, the tasks get SIGTERM: the run saves, ends with exit code 75 and is queued
# again, to continue. Any other failure ends the job.
#SBATCH --job-name=vqrae_jax
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
set -euo pipefail
if [ "${SLURM_NTASKS_PER_NODE:-1}" != "${SLURM_GPUS_ON_NODE:-0}" ]; then
  echo "error: --ntasks-per-node=${SLURM_NTASKS_PER_NODE:-1}, but ${SLURM_GPUS_ON_NODE:-0} GPUs a node: give sbatch" \
    "--gpus-per-node=N --ntasks-per-node=N" >&2
  exit 1
fi
# JAX itself would train on the CPU, slowly and without a word.
.venv/bin/python -c 'import jax; jax.devices("cuda")' >/dev/null 2>&1 || {
  echo "error: JAX finds no NVIDIA GPU on $(hostname): see nvidia-smi, and whether the driver is one for CUDA 12" >&2
  exit 1
}
export JAX_PLATFORMS=cuda,cpu
# Lets computation go on while GPUs exchange parameters and gradients: XLA's default is off, JAX's GPU guide turns it on.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"
status=0
# srun does not take --cpus-per-task from sbatch by itself. JAX ends the tasks that outlive another one; were srun to kill
# them, its exit code would not be the 75 of a task that was stopped.
srun --kill-on-bad-exit=0 --gpu-bind=none ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
  .venv/bin/python -m vqrae_jax.main "$@" || status=$?
if [ "$status" = 75 ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
