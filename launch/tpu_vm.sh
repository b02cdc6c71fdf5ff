#!/usr/bin/env bash
# A TPU VM or a whole pod slice, from your own machine (with gcloud set up): copies the code to every worker, installs,
# starts the same command on all of them and shows their output.
#
#   bash launch/tpu_vm.sh NAME ZONE --config=configs/siglip2_so400m_256_stage1.py --workdir=/mnt/shared/runs/s1 \
#       --config.data.source='array_record:/mnt/shared/train*.array_record'
#
# The workdir must be one file system, mounted on all workers at the same path: Filestore (NFS), or a bucket with
# hierarchical namespace mounted with gcsfuse (others cannot rename folders). gs:// paths are not understood.
# The run survives a lost connection; its output stays in ~/vqrae_jax/train.log. The same command continues a run that
# ended, also on a slice that was made anew. To watch it again, and to save and stop it:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=0 --command='tail -F vqrae_jax/train.log'
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command='pkill -TERM -f [v]qrae_jax.main'
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 NAME ZONE --config=FILE --workdir=DIR [--config.key=value ...]" >&2; exit 1; }
name=$1 zone=$2
shift 2
cd "$(dirname "$0")/.."

archive=$(mktemp -d)/vqrae_jax.tgz
trap 'rm -r "$(dirname "$archive")"' EXIT
tar -czf "$archive" LICENSE README.md configs pyproject.toml requirements.txt vqrae_jax
gcloud compute tpus tpu-vm scp "$archive" "$name:" --zone="$zone" --worker=all

# The workers' own Python may be too old, so uv brings one.
# shellcheck disable=SC2016  # expands on the workers
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command='set -eu
mkdir -p vqrae_jax && cd vqrae_jax && tar -xzf ../vqrae_jax.tgz
export PATH="$HOME/.local/bin:$PATH" JAX_PLATFORMS=tpu,cpu
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d .venv ] || uv venv --quiet --python=3.12
uv pip install --quiet --editable ".[tpu]"
: >train.log
setsid .venv/bin/python -m vqrae_jax.main'"$(printf ' %q' "$@")"' >>train.log 2>&1 </dev/null &
tail --pid=$! -n +1 -F train.log
wait $!'
