#!/usr/bin/env bash
# Everything that has to be green: lint, format, types, tests. Makes its own environment.
#
#   scripts/test.sh                        all stages, then a table of seconds
#   scripts/test.sh tests/unit -k plan     arguments go to pytest (paths from the root); only it runs
#
# All tests are shared by two workers, file by file: half of them run in one process, and would leave
# a core idle.

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=scripts/_env.sh
source "$here/_env.sh"

# Ranks are processes: one thread each, unless told otherwise, or they fight over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false

cd "$HF_SP_ROOT"
if (($# > 0)); then
  exec python -m pytest "$@"
fi

rows=()
failed=()

stage() {
  local name="$1" started=$SECONDS result=ok
  shift
  printf '\n== %s: %s\n' "$name" "$*"
  "$@" || { result=FAILED && failed+=("$name"); }
  rows+=("$(printf '%-8s %6d s  %s' "$name" "$((SECONDS - started))" "$result")")
}

# Every stage runs, so that one run shows everything that is wrong.
stage lint ruff check .
stage format ruff format --check .
stage types mypy
stage tests python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

printf '\n== summary\n'
printf '%s\n' "${rows[@]}"
if ((${#failed[@]} > 0)); then
  printf 'FAILED: %s\n' "${failed[*]}"
  exit 1
fi
