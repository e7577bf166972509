#!/usr/bin/env bash
# bash scripts/test.sh [--sglang VERSION] [--nightly] [pytest arguments...]
# Makes the environment of that SGLang release and runs the tests; on the default release ruff and mypy, too.
# With --nightly (an option that tests/conftest.py adds to pytest) also those that take minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh
source scripts/lib/test_halves.sh

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

tests=0
packinfer_test_halves "$@" || tests=$?
[[ $lint == passed ]] || echo "scripts/test.sh: ruff or mypy failed (above)" >&2
[[ $tests != 0 || $lint == passed ]] || tests=1
exit "$tests"
