#!/usr/bin/env bash
# usage: bash launch/test.sh [PYTEST ARGUMENT ...]        e.g. bash launch/test.sh -x -k launch
# Makes the environment if there is none (launch/env.sh) and runs the tests; no GPU needed.
#   -m long         those that take minutes each and are left out otherwise: of two -m pytest takes the last
#   DRY_RUN=1       only print the command
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
# One process more than there are cores, since ranks wait for each other, and up to 4. Each takes a file at a time:
# most of the time goes into starting ranks and importing, on one core. In the order of names: the files that take
# longest have few tests, and would come last.
# Some build machines forbid bytecode files. Then every worker and every started program compiles all of it anew.
export PYTHONDONTWRITEBYTECODE=
processes=$(($(getconf _NPROCESSORS_ONLN) + 1))
run "$PYTHON" -m pytest -n "$processes" --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not long" "$@"
