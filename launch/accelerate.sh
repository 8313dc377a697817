#!/usr/bin/env bash
# usage: bash launch/accelerate.sh ddp|fsdp2|hsdp|zero2|zero3 RECIPE.yaml [--key value ...]     paths from the root
#   Takes configs/accelerate_*.yaml. Not for a recipe with a `deepspeed:` line unless it means the same.
#   GPUS=n          use n GPUs of this machine (default: all)
#   DRY_RUN=1       only print the command
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
[ $# -ge 2 ] && [ -f "$here/../configs/accelerate_$1.yaml" ] || { sed -n '2,/^set/{/^#/p;}' "$0" >&2; exit 2; }
. "$here/env.sh"
strategy=$1; shift
processes=$(gpus_or_die)
run "$PYTHON" -m accelerate.commands.launch --config_file "configs/accelerate_$strategy.yaml" \
  --num_processes "$processes" -m lp_dist.finetune "$@"
