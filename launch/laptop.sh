#!/usr/bin/env bash
# From a fresh clone to a picture: installs, trains nano stage 1 and stage 2 on images that need no network,
# and puts both side by side. Needs Python >= 3.11; a second start continues where the first one ended.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -c "import vqrae_jax" 2>/dev/null || .venv/bin/pip install --quiet --editable .
.venv/bin/python -m vqrae_jax.main --config=configs/nano_stage1.py --workdir=runs/nano_stage1
.venv/bin/python -m vqrae_jax.main --config=configs/nano_stage2.py --workdir=runs/nano_stage2
.venv/bin/python -m vqrae_jax.evaluate --workdir=runs/nano_stage1 --workdir=runs/nano_stage2 --out=runs/nano
