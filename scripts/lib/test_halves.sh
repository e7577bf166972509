# Sourced by scripts/test.sh: `packinfer_test_halves [pytest arguments...]` runs the tests with `python` of PATH, those
# that start engines beside all others. An engine takes a core; two at once would slow each other down by much more.
# shellcheck shell=bash

packinfer_test_halves() {
  local half color=() rc=0 empty=0
  local -A results
  declare -gA _halves=()
  _shown=
  [[ -t 1 ]] && color=(--color=yes)
  mkdir -p .pytest_cache
  trap '_packinfer_end_halves' INT TERM HUP
  set -m # each half in a process group of its own, which takes Ctrl-C and can be ended as one
  for half in engine others; do
    OMP_NUM_THREADS=1 python -m pytest --half "$half" -o "cache_dir=.pytest_cache/$half" \
      --durations=25 --durations-min=20 "${color[@]}" "$@" >".pytest_cache/$half.log" 2>&1 </dev/null &
    _halves[$half]=$!
  done
  set +m # or bash would tell of each job that ends
  for half in others engine; do
    tail --pid="${_halves[$half]}" --sleep-interval=0.2 --lines=+1 --follow=name --retry ".pytest_cache/$half.log" \
      2>/dev/null &
    _shown=$!
    wait "${_halves[$half]}" && results[$half]=0 || results[$half]=$?
    wait "$_shown" || true
  done
  trap - INT TERM HUP
  for half in others engine; do # 5: nothing was selected, which is no fault of one half
    case ${results[$half]} in
      0) ;;
      5) empty=$((empty + 1)) ;;
      *) rc=${results[$half]} ;;
    esac
    printf '%s (.pytest_cache/%s.log): %s\n' "$half" "$half" "$(tail -n 1 ".pytest_cache/$half.log")"
  done
  ((empty < 2)) || rc=5
  return "$rc"
}

# Ctrl-C for both, so that tests end what they have started; whatever is left of them after a while is killed.
_packinfer_end_halves() {
  trap '' INT TERM HUP
  local pid deadline=$((SECONDS + 30))
  for pid in "${_halves[@]}"; do kill -INT -- "-$pid" 2>/dev/null || true; done
  for pid in "${_halves[@]}"; do
    while kill -0 -- "-$pid" 2>/dev/null && ((SECONDS < deadline)); do sleep 0.2; done
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
  wait "$_shown" 2>/dev/null || true
  echo "scripts/test.sh: interrupted" >&2
  exit 130
}
