#!/usr/bin/env bash
# Build, check and measure on the GPU of this machine: bash benchmarks/gpu.sh
#
# Needs nvcc, a C++ compiler and a Python with a torch that sees the GPU and setuptools; no network. Without pytest and
# hypothesis a smaller check runs, without compute-sanitizer none; it says so.
#
#   GPU_STEPS="build check sanitize rows linear router"   which steps, in this order, which is that of their worth
#   GPU_SECONDS=540      what is not done by then is cut off or left out
#   OUT=build/gpu        gets gpu.log and <GPU>.json; the JSON is written after every case
#   PYTHON=python3
#   GPU_DEVICE=cpu       a dry run: the same commands on the CPU, over tiny sizes
set -uo pipefail
cd "$(dirname "$0")/.."

STEPS=${GPU_STEPS:-build check sanitize rows linear router}
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
DEVICE=${GPU_DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT" || exit 1
results=()

has_module() { "$PYTHON" -c "import $1" 2>/dev/null; }

# what is missing, and what it is for; fails where nothing can be done without it
look_around() {
  local missing=()
  if ! command -v "$PYTHON" >/dev/null; then
    echo "missing: $PYTHON; set PYTHON"
    return 1
  fi
  "$PYTHON" --version
  has_module torch || missing+=("torch in $("$PYTHON" -c 'import sys; print(sys.executable)')")
  if [ "$DEVICE" = cuda ] && [ ${#missing[@]} -eq 0 ]; then
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
      missing+=("a GPU that torch $("$PYTHON" -c 'import torch; print(torch.__version__)') can use")
    fi
    command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
  fi
  if [[ " $STEPS " == *" build "* ]]; then
    if [ "$DEVICE" = cuda ]; then
      command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/nowhere}/bin/nvcc" ] || missing+=("nvcc on PATH, or CUDA_HOME")
    fi
    has_module setuptools || missing+=("the Python package setuptools")
    command -v "${CXX:-c++}" >/dev/null || missing+=("a C++ compiler; set CXX")
    if ! has_module ninja && ! command -v ninja >/dev/null; then
      echo "without ninja: the build takes one file after another, several minutes"
    fi
  fi
  printf 'missing: %s\n' ${missing[@]+"${missing[@]}"} | grep -v '^missing: $'
  [ ${#missing[@]} -eq 0 ]
}

# step NAME COMMAND...: within what is left of the time
step() {
  local name=$1 start=$SECONDS limit=() outcome
  shift
  if [ -n "${GPU_SECONDS:-}" ]; then
    local left=$((GPU_SECONDS - SECONDS))
    if [ $left -lt 5 ]; then
      results+=("$name: left out, the time is up")
      return 1
    fi
    limit=(timeout -k 5 "$left")
  fi
  printf '\n=== %s: %s\n' "$name" "$*"
  ${limit[@]+"${limit[@]}"} "$@"
  case $? in
    0) outcome=passed ;;
    124 | 137) outcome="cut off" ;;
    *) outcome=FAILED ;;
  esac
  results+=("$name: $outcome, $((SECONDS - start)) s")
  echo "=== ${results[-1]}"
  [ "$outcome" = passed ]
}

build() {
  if [ "$DEVICE" = cuda ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST AVA_CUDA=1
    echo "for compute capability $TORCH_CUDA_ARCH_LIST"
  fi
  step build "$PYTHON" setup.py --quiet build_ext --inplace
}

check() {
  if [ "$DEVICE" != cuda ]; then
    step check "$PYTHON" benchmarks/gpu_check.py --device "$DEVICE" --small
    return
  fi
  step check "$PYTHON" benchmarks/gpu_check.py
  if ! has_module pytest || ! has_module hypothesis; then
    echo "without pytest and hypothesis: the check above is all that was tested"
    return
  fi
  # the tests that have "cuda" as a parameter, without the options of pyproject.toml, which ask for pytest-xdist
  local files workers=()
  files=$("$PYTHON" -c '
import pathlib, sys
sys.path.insert(0, "tests")
import conftest
names = set().union(*conftest.FILES_OF_KERNELS.values(), ["test_cuda_graph.py"])
print(*[path for path in sorted(pathlib.Path("tests").rglob("test_*.py")) if path.name in names])') || return
  if has_module xdist; then workers=(-n 4); fi
  # shellcheck disable=SC2086  # several files
  step "tests on cuda" "$PYTHON" -m pytest -o addopts= -q ${workers[@]+"${workers[@]}"} $files \
    -k '([cuda] or [cuda- or -cuda]) and not [cuda-emulated'
}

sanitize() {
  local tool filter=() sanitizer
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ]; then
    results+=("sanitize: left out, no compute-sanitizer here")
    return
  fi
  # our kernels only; older releases call the option otherwise, and check all kernels here
  if grep -q -- --kernel-name <<<"$("$sanitizer" --help 2>&1)"; then filter=(--kernel-name kernel_substring=_ZN3ava); fi
  # every tensor an allocation of its own, so that an access behind its end is seen
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck synccheck; do
    step "$tool" "$sanitizer" --tool $tool --error-exitcode 9 --print-limit 20 ${filter[@]+"${filter[@]}"} \
      "$PYTHON" benchmarks/gpu_check.py --device "$DEVICE" --small
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

measure() { # PART
  local options=()
  if [ "$DEVICE" != cuda ]; then options=(--device "$DEVICE" --quick --no-compile); fi
  step "$1" "$PYTHON" benchmarks/gpu.py "$1" --out "$OUT" ${options[@]+"${options[@]}"}
}

run() {
  for name in $STEPS; do
    if [[ ! " build check sanitize rows linear router " == *" $name "* ]]; then
      echo "GPU_STEPS: expected build, check, sanitize, rows, linear or router, got $name"
      return 1
    fi
  done
  look_around || return 1
  for name in $STEPS; do
    case $name in
      build) build || break ;; # nothing else can be right
      check) check ;;
      sanitize) sanitize ;;
      *) measure "$name" ;;
    esac
  done
  printf '\nresults in %s\n' "$OUT"
  printf '  %s\n' "${results[@]}"
  ! grep -qE ': (FAILED|cut off)' <<<"$(printf '%s\n' "${results[@]}")"
}

run 2>&1 | tee "$OUT/gpu.log"
exit "${PIPESTATUS[0]}"
