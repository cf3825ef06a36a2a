#!/usr/bin/env bash
# Trains the same small model on one process and on several, and shows that nothing changed but
# the memory. Makes its own environment; needs no GPU and no download of models or data.
#
#   scripts/demo.sh [--out DIR] [--steps N] [--tp N]

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
# shellcheck source=scripts/_env.sh
source "$here/_env.sh"

exec python "$here/demo.py" "$@"
