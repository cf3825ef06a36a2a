# Sourced, not run: makes the project's virtual environment once, then puts it first on PATH.
#
#   HF_SP_VENV          where the environment lives            (default: .venv in the project root)
#   HF_SP_PYTHON        the Python to make it with             (default: the first >= 3.11 on PATH)
#   HF_SP_CONSTRAINTS   the pinned versions to install         (default: constraints.txt)
#
# Everything is installed with pip, and pip's own settings hold. On a machine without a GPU, point
# pip at a CPU build of torch first (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) to save the download of a
# CUDA one; either works.

set -euo pipefail

HF_SP_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

_env_say() { printf '[env] %s\n' "$*" >&2; }

_env_die() {
  _env_say "error: $1"
  shift
  for line in "$@"; do _env_say "  $line"; done
  exit 1
}

_env_python_ok() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

_env_find_python() {
  local candidate seen=""
  if [[ -n "${HF_SP_PYTHON:-}" ]]; then
    _env_python_ok "$HF_SP_PYTHON" || _env_die \
      "HF_SP_PYTHON=$HF_SP_PYTHON is not a Python 3.11 or newer" \
      "got: $("$HF_SP_PYTHON" --version 2>&1 | head -n 1 || true)"
    echo "$HF_SP_PYTHON"
    return
  fi
  for candidate in python3.11 python3 python3.12 python3.13 python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if _env_python_ok "$candidate"; then
      echo "$candidate"
      return
    fi
    seen+="$candidate is $("$candidate" --version 2>&1 | tail -n 1 || true); "
  done
  _env_die "hf_sp needs Python 3.11 or newer, and PATH has none" "found: ${seen:-no python at all}" \
    "install Python 3.11+, or name one: HF_SP_PYTHON=/path/to/python3.12 $0"
}

_env_install() {
  local python clear=""
  if ! "$HF_SP_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python="$(_env_find_python)"
    _env_say "1/2 making $HF_SP_VENV with $("$python" --version)"
    # Clear what is a broken environment; never a folder that is something else.
    [[ ! -f "$HF_SP_VENV/pyvenv.cfg" ]] || clear="--clear"
    "$python" -m venv $clear "$HF_SP_VENV" || _env_die "$python -m venv failed (see above)" \
      "Debian and Ubuntu keep it in a package of its own: apt install python3-venv"
  else
    _env_say "1/2 $HF_SP_VENV is there, its packages are out of date"
  fi
  _env_say "2/2 installing hf_sp and its tested set ($HF_SP_CONSTRAINTS); the first time takes minutes"
  "$HF_SP_VENV/bin/python" -m pip install --disable-pip-version-check \
    -c "$HF_SP_CONSTRAINTS" -e "$HF_SP_ROOT[test]" >&2 ||
    _env_die "pip could not install the tested set (see above)" \
      "nothing was stamped: the next run tries again"
}

_env_main() {
  # Relative paths are taken from the project root: the same command works from any directory.
  HF_SP_VENV="${HF_SP_VENV:-.venv}"
  [[ "$HF_SP_VENV" == /* ]] || HF_SP_VENV="$HF_SP_ROOT/$HF_SP_VENV"
  HF_SP_CONSTRAINTS="${HF_SP_CONSTRAINTS:-constraints.txt}"
  [[ "$HF_SP_CONSTRAINTS" == /* ]] || HF_SP_CONSTRAINTS="$HF_SP_ROOT/$HF_SP_CONSTRAINTS"
  [[ -f "$HF_SP_CONSTRAINTS" ]] || _env_die "no such constraints file: $HF_SP_CONSTRAINTS"

  # The stamp says what was installed and for which checkout (an editable install is a path).
  local stamp="$HF_SP_VENV/.hf-sp-stamp" want
  want="$HF_SP_ROOT $(cat "$HF_SP_ROOT/pyproject.toml" "$HF_SP_CONSTRAINTS" | cksum)"
  if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$want" ]] ||
    ! "$HF_SP_VENV/bin/python" -c '' 2>/dev/null; then
    local started=$SECONDS
    rm -f "$stamp"
    _env_install
    printf '%s\n' "$want" >"$stamp"
    _env_say "ready in $((SECONDS - started)) s"
  fi

  export HF_SP_VENV HF_SP_CONSTRAINTS
  export VIRTUAL_ENV="$HF_SP_VENV"
  export PATH="$HF_SP_VENV/bin:$PATH"
  unset PYTHONHOME
}

_env_main
