#!/usr/bin/env bash
# usage: bash launch/lint.sh        what a change must pass besides the tests: ruff, mypy, import-linter; as CI runs it
#   DRY_RUN=1       only print the commands
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
run "$PYTHON" -m ruff format --check .
run "$PYTHON" -m ruff check .
run "$PYTHON" -m mypy
run "$PYTHON" -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
