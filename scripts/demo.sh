#!/usr/bin/env bash
# bash scripts/demo.sh [--keep]
# Stock SGLang and SGLang with packinfer, side by side on a tiny model: same answers, fewer KV tokens read.
# Makes its own environment; needs Python >= 3.11 and a package index, no GPU and no model download.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

packinfer_env "$PACKINFER_SGLANG"
exec "$PACKINFER_ENV/bin/python" scripts/demo.py "$@"
