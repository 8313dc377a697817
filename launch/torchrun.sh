#!/usr/bin/env bash
# usage: bash launch/torchrun.sh RECIPE.yaml [--key value ...]      paths from the project root
# torchrun on this machine. Where a scheduler says which node of how many this is, torchrun reads it: PET_NNODES,
# PET_NPROC_PER_NODE, PET_NODE_RANK, PET_MASTER_ADDR and PET_MASTER_PORT, as Kubeflow does (launch/kubernetes.yaml).
#   GPUS=n          use n GPUs of this machine (default: all)
#   DRY_RUN=1       only print the command
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/{/^#/p;}' "$0" >&2; exit 2; }
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ -n "${PET_NNODES:-}" ]; then where=(); else n=$(gpus_or_die); where=(--standalone --nproc_per_node "$n"); fi
run "$PYTHON" -m torch.distributed.run "${where[@]}" -m lp_dist.finetune "$@"
