#!/usr/bin/env bash
# usage: bash launch/deepspeed.sh RECIPE.yaml [--key value ...]      paths from the project root
# DeepSpeed's own launcher.
#   The recipe names its DeepSpeed config (`deepspeed: configs/ds_zero3.json`); or add --deepspeed FILE
#   GPUS=n          use n GPUs of this machine (default: all)
#   HOSTFILE=file   many machines: lines such as `node1 slots=8`; needs pdsh, ssh without a password, and this folder
#                   with its environment at the same path on each
#   DRY_RUN=1       only print the command
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/{/^#/p;}' "$0" >&2; exit 2; }
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ -n "${HOSTFILE:-}" ]; then where=(--hostfile "$HOSTFILE"); else n=$(gpus_or_die); where=(--num_gpus "$n"); fi
# --no_local_rank: otherwise it puts --local_rank=N before the recipe; LOCAL_RANK is in the environment anyway
run "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --no_local_rank --module lp_dist.finetune "$@"
