# Sourced by the other scripts: `packinfer_env VERSION` makes the environment of one SGLang release, once.
# It needs Python >= 3.11 and a package index, nothing else. Environments lie in .envs/ or in $PACKINFER_ENVS.
# shellcheck shell=bash

PACKINFER_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PACKINFER_SGLANG=0.5.23 # the release that demo and tests use unless told otherwise

# packinfer_env VERSION: sets PACKINFER_ENV to the folder of the environment, which is complete on success.
packinfer_env() {
  mkdir -p "${PACKINFER_ENVS:=$PACKINFER_ROOT/.envs}" || return 1
  PACKINFER_ENVS="$(cd "$PACKINFER_ENVS" && pwd)"
  PACKINFER_ENV="$PACKINFER_ENVS/sglang-$1"
  _packinfer_env_is_current && return 0
  (
    flock --nonblock 9 || { _packinfer_say "another run is making an environment here: waiting" && flock 9; }
    _packinfer_env_is_current || _packinfer_env_make "$1"
  ) 9>"$PACKINFER_ENVS/.lock"
}

# An environment is tied to its own place (scripts inside name it), to this checkout and to its pyproject.toml.
_packinfer_env_place() { echo "made in $PACKINFER_ENV"; }
_packinfer_env_stamp() { _packinfer_env_place && echo "$PACKINFER_ROOT $(cksum <"$PACKINFER_ROOT/pyproject.toml")"; }
_packinfer_env_is_current() {
  [[ -x $PACKINFER_ENV/bin/python && "$(cat "$PACKINFER_ENV/.stamp" 2>/dev/null)" == "$(_packinfer_env_stamp)" ]]
}

# uv ends with a list of some 230 packages; in a log it hides the lines that matter, on a terminal uv draws bars.
_packinfer_without_list() {
  if [[ -t 2 ]]; then
    "$@"
  else
    "$@" 2>&1 | sed -u '/^ [-+~] /d' >&2
    return "${PIPESTATUS[0]}"
  fi
}

_packinfer_say() { printf '[%3d s] %s\n' "$SECONDS" "$*" >&2; }
_packinfer_die() {
  printf 'packinfer-sgl: %s\n' "$*" >&2
  exit 1
}

# Runs in the subshell of packinfer_env. The stamp goes first and comes back last: whatever stops this in between
# leaves a folder without a stamp, which the next run throws away (a package cut off half-way cannot be told apart).
_packinfer_env_make() {
  local python uv stamp="$PACKINFER_ENV/.stamp" began=$SECONDS
  python="$(python3 -c 'import sys; print(sys.executable)' 2>/dev/null)" ||
    _packinfer_die "python3 is not on PATH or does not run; Python 3.11 or newer is needed"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    _packinfer_die "Python 3.11 or newer is needed, but python3 on PATH is $("$python" -V 2>&1)"

  if [[ -x $PACKINFER_ENV/bin/python && "$(head -n 1 "$stamp" 2>/dev/null)" == "$(_packinfer_env_place)" ]]; then
    _packinfer_say "pyproject.toml or the checkout changed: updating $PACKINFER_ENV"
    rm "$stamp" || exit 1
  else
    if [[ -e $PACKINFER_ENV ]]; then
      _packinfer_say "$PACKINFER_ENV is incomplete or was moved: making it again"
      rm -rf "$PACKINFER_ENV" || exit 1
    fi
    _packinfer_env_check_space
  fi
  uv="$(_packinfer_uv "$python")" || exit 1
  if [[ ! -d $PACKINFER_ENV ]]; then
    _packinfer_say "creating $PACKINFER_ENV with $("$python" -V)"
    "$uv" venv --quiet --no-project --python "$python" "$PACKINFER_ENV" ||
      _packinfer_die "uv could not create $PACKINFER_ENV"
  fi

  _packinfer_say "installing sglang==$1 and this checkout (10 GB; a minute or more)"
  # SGLang's own dependencies include pre-releases. Compiled at once, for an engine starts three processes that each
  # import SGLang: 13 s of a core instead of 36 where Python may not write what it compiles.
  _packinfer_without_list "$uv" pip install --compile-bytecode --python "$PACKINFER_ENV/bin/python" --prerelease=allow \
    "sglang==$1" --editable "$PACKINFER_ROOT[test,dev,bench]" ||
    _packinfer_die "sglang==$1 could not be installed, the reason stands above; the next run starts this step again"
  _packinfer_env_stamp >"$stamp.new" && mv "$stamp.new" "$stamp" || exit 1
  _packinfer_say "$PACKINFER_ENV is ready, after $((SECONDS - began)) s"
}

# 9.6 GiB were measured for 0.5.23 and 8.6 GiB for 0.5.17; the rest is room for uv and its package cache.
_packinfer_env_check_space() {
  local need_gib=12 free_kib
  free_kib="$(df -Pk "$PACKINFER_ENVS" | awk 'NR == 2 { print $4 }')"
  ((free_kib >= need_gib << 20)) ||
    _packinfer_die "$need_gib GiB of free disk are needed in $PACKINFER_ENVS, $((free_kib >> 20)) GiB are there" \
      "(PACKINFER_ENVS=DIR chooses another place)"
}

# Prints the path of uv: the one on PATH, or our own.
_packinfer_uv() {
  local own="$PACKINFER_ENVS/uv"
  command -v uv && return
  if ! "$own/bin/uv" --version >/dev/null 2>&1; then
    _packinfer_say "uv is not on PATH: installing it into $own"
    rm -rf "$own"
    "$1" -m venv "$own" >&2 || _packinfer_die "'$1 -m venv' failed: install the python3-venv package, or uv"
    "$own/bin/python" -m pip install --quiet uv >&2 ||
      _packinfer_die "pip could not install uv, the reason stands above"
  fi
  echo "$own/bin/uv"
}
