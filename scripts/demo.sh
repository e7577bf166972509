#!/usr/bin/env bash
# bash scripts/demo.sh [--keep]
# Stock SGLang and SGLang with packinfer, side by side on a small model: same answers, fewer KV tokens read.
# Makes its own environment and takes the model from the package index; needs Python >= 3.11 and that index, no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

packinfer_env "$PACKINFER_SGLANG"
export PACKINFER_ENVS # the model lies there, too
exec "$PACKINFER_ENV/bin/python" scripts/demo.py "$@"
