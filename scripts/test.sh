#!/usr/bin/env bash
# bash scripts/test.sh [--sglang VERSION] [pytest arguments...]
# Makes the environment of that SGLang release and runs the tests; on the default release ruff and mypy, too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

version=$PACKINFER_SGLANG
if [[ ${1-} == --sglang ]]; then
  version=${2:?a version must follow --sglang, for example 0.5.17}
  shift 2
fi
packinfer_env "$version"
export PATH="$PACKINFER_ENV/bin:$PATH"

lint=passed
if [[ $version == "$PACKINFER_SGLANG" ]]; then
  ruff check . || lint=failed
  ruff format --check . || lint=failed
  mypy || lint=failed
fi

python -m pytest --durations=25 --durations-min=20 "$@"
[[ $lint == passed ]] || { echo "scripts/test.sh: the tests passed, but ruff or mypy failed (above)" >&2 && exit 1; }
