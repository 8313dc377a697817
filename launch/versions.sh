#!/usr/bin/env bash
# usage: bash launch/versions.sh lowest|current FOLDER [PACKAGE==VERSION ...]        FOLDER: its absolute path
# Runs the fast tests, a cell of each engine and several axes with other versions than those of .venv. Makes an
# environment in FOLDER once: gigabytes outside of the project, since an old torch comes with CUDA. No GPU is needed.
#   lowest          with the lower bounds of pyproject.toml: every >= of what is installed becomes ==
#   current         with what pip chooses
#   PACKAGE==VERSION ...         with these besides, such as torch==2.13.0 or deepspeed==0.18.9
#   LP_DIST_PYTHON=python3.10    the interpreter that FOLDER is made with (default: python3)
#   DRY_RUN=1       only print the commands
set -euo pipefail
[ $# -ge 2 ] && [[ $1 =~ ^(lowest|current)$ && $2 == /* ]] || { sed -n '2,/^set/{/^#/p;}' "$0" >&2; exit 2; }
bounds=$1 folder=$2; shift 2
LP_DIST_PYTHON=${LP_DIST_PYTHON:-python3}
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

wanted=("$@")
if [ "$bounds" = lowest ]; then
  # Up to the tools of developers, which run once and in one version.
  while read -r bound; do
    [[ " $* " == *" ${bound%%==*}=="* ]] || wanted+=("$bound")
  done < <(sed -nE -e '/^dev = /q' -e '/^dependencies|^\[project.opt/,$!d' \
    -e 's/"([][a-z0-9_-]+)>=([0-9.]+)[^"]*"/\n\1==\2\n/gp' pyproject.toml | sed -n '/^[][a-z0-9_-]*==/p')
fi
stamp=$folder/lp_dist_installed
made="$(cksum pyproject.toml) ${wanted[*]}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$made" ]; then
  [ -x "$folder/bin/python" ] || run "$PYTHON" -m venv "$folder"
  run "$folder/bin/python" -m pip install --disable-pip-version-check -e '.[test]' "${wanted[@]}"
  [ -n "${DRY_RUN:-}" ] || printf '%s\n' "$made" > "$stamp"
fi
PATH=$folder/bin:$PATH   # ninja is a program there
# torch names its folder of compiled ops after Python and CUDA alone: two versions of torch would share it, and one
# that was interrupted would leave its lock to the other, which then waits for ever.
export TORCH_EXTENSIONS_DIR=$folder/torch_extensions
run "$folder/bin/python" -m pytest -q -n "$(getconf _NPROCESSORS_ONLN)" -m "not distributed and not long" tests/unit
run "$folder/bin/python" -m pytest -q -p no:xdist -m "not long" \
  tests/distributed/test_{engines,shards,replicas,axes}.py
