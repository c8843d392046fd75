#!/usr/bin/env bash
# Check and measure on the GPU of this machine: bash benchmarks/gpu.sh [options of benchmarks/gpu.py]
#
#   bash benchmarks/gpu.sh --dtype bfloat16 --vocab-size 128256 --no-compile
#
# Needs a Python with a torch that sees the GPU. Without a built library it builds one, which needs nvcc, a C++ compiler
# and setuptools. No network: `make gpu-bundle`, on another machine, puts a library for sm_90 and the peers' packages
# into build/gpu_bundle, where this script finds them. Without pytest and hypothesis the tests are left out, without
# compute-sanitizer its checks; it says so.
#
#   GPU_STEPS="build check ..."   which steps, in this order; default: all, the most valuable first (see `limit_of`)
#   GPU_SECONDS=540      for all together; what is not done by then is cut off or left out
#   OUT=build/gpu        gets gpu.log and <GPU>.json; the JSON holds every figure as soon as it is there
#   PYTHON=python3
#   GPU_DEVICE=cpu       a dry run: the same commands on the CPU, over tiny sizes
set -uo pipefail
cd "$(dirname "$0")/.."

ALL_STEPS="build check rows check-full linear router sweep tests memcheck racecheck synccheck"
STEPS=${GPU_STEPS:-$ALL_STEPS}
GPU_SECONDS=${GPU_SECONDS:-540}
OUT=${OUT:-build/gpu}
PYTHON=${PYTHON:-python3}
DEVICE=${GPU_DEVICE:-cuda}
BUNDLE=build/gpu_bundle
options=("$@")
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -d "$BUNDLE/packages" ]; then PYTHONPATH="$PYTHONPATH:$PWD/$BUNDLE/packages"; fi
mkdir -p "$OUT" || exit 1
results=()

# seconds that a step may take at most, so that a slow one does not eat up the others
limit_of() {
  case $1 in
    build) echo 300 ;;
    rows) echo 150 ;;
    tests) echo 120 ;;
    *) echo 90 ;;
  esac
}

has_module() { "$PYTHON" -c "import $1" 2>/dev/null; }

# has_library: whether the library is there and, for a GPU, has CUDA kernels
look_for_library() {
  has_library=no
  if "$PYTHON" -c '
import sys, ava_ext
sys.exit(sys.argv[1] == "cuda" and ava_ext.build_info()["cuda"].startswith("none"))' "$DEVICE" 2>/dev/null; then
    has_library=yes
  fi
}

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
  look_for_library
  if [ $has_library = no ] && [ -f "$BUNDLE/_C.abi3.so" ]; then
    echo "the library of $BUNDLE"
    cp "$BUNDLE/_C.abi3.so" ava_ext/
    look_for_library
  fi
  if [[ " $STEPS " == *" build "* ]] && [ $has_library = no ]; then
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

# step NAME COMMAND...: within its limit and what is left of the time
step() {
  local name=$1 start=$SECONDS limit outcome
  shift
  limit=$(limit_of "$name")
  if [ $((GPU_SECONDS - SECONDS)) -lt "$limit" ]; then limit=$((GPU_SECONDS - SECONDS)); fi
  if [ "$limit" -lt 5 ]; then
    results+=("$name: left out, the time is up")
    return 1
  fi
  printf '\n=== %s, %d s at most: %s\n' "$name" "$limit" "$*"
  timeout -k 5 "$limit" "$@"
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
  if [ $has_library = yes ]; then
    results+=("build: left out, there is a library")
    return
  fi
  if [ "$DEVICE" = cuda ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    export TORCH_CUDA_ARCH_LIST AVA_CUDA=1
    echo "for compute capability $TORCH_CUDA_ARCH_LIST"
  fi
  step build "$PYTHON" setup.py --quiet build_ext --inplace
}

check() { # NAME OPTIONS...: against the reference
  local name=$1
  shift
  step "$name" "$PYTHON" benchmarks/gpu_check.py --device "$DEVICE" "$@"
}

# the tests that have "cuda" as a parameter, without the options of pyproject.toml, which ask for pytest-xdist
run_tests() {
  local files workers=()
  if [ "$DEVICE" != cuda ] || ! has_module pytest || ! has_module hypothesis; then
    results+=("tests: left out, they need a GPU, pytest and hypothesis")
    return
  fi
  files=$("$PYTHON" -c '
import pathlib, sys
sys.path.insert(0, "tests")
import conftest
names = set().union(*conftest.FILES_OF_KERNELS.values(), ["test_cuda_graph.py"])
print(*[path for path in sorted(pathlib.Path("tests").rglob("test_*.py")) if path.name in names])') || return
  if has_module xdist; then workers=(-n 4); fi
  # shellcheck disable=SC2086  # several files
  step tests "$PYTHON" -m pytest -o addopts= -q ${workers[@]+"${workers[@]}"} $files \
    -k '([cuda] or [cuda- or -cuda]) and not [cuda-emulated'
}

sanitize() { # TOOL of compute-sanitizer
  local filter=() sanitizer
  sanitizer=$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}"/bin/compute-sanitizer 2>/dev/null)
  if [ -z "$sanitizer" ]; then
    results+=("$1: left out, no compute-sanitizer here")
    return
  fi
  # our kernels only; older releases call the option otherwise, and check all kernels here
  if grep -q -- --kernel-name <<<"$("$sanitizer" --help 2>&1)"; then filter=(--kernel-name kernel_substring=_ZN3ava); fi
  # every tensor an allocation of its own, so that an access behind its end is seen
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$1" "$sanitizer" --tool "$1" --error-exitcode 9 --print-limit 20 \
    ${filter[@]+"${filter[@]}"} "$PYTHON" benchmarks/gpu_check.py --device "$DEVICE" --small
}

measure() { # PART OPTIONS..., which those of the command line follow and override
  local part=$1
  shift
  if [ "$DEVICE" != cuda ]; then set -- --device "$DEVICE" --quick --no-compile; fi
  step "$part" "$PYTHON" benchmarks/gpu.py "$part" --out "$OUT" "$@" ${options[@]+"${options[@]}"}
}

run() {
  for name in $STEPS; do
    if [[ ! " $ALL_STEPS " == *" $name "* ]]; then
      echo "GPU_STEPS: expected steps of $ALL_STEPS, got $name"
      return 1
    fi
  done
  look_around || return 1
  for name in $STEPS; do
    case $name in
      build) build || break ;; # nothing else can be right
      check) check check --small ;;
      check-full) if [ "$DEVICE" = cuda ]; then check check-full; else check check-full --small; fi ;;
      # what torch.compile takes long for is left out here
      rows) measure rows --dtype bfloat16 --n-rows 8192 --vocab-size 128256 50257 32000 --no-compile ;;
      linear | router | sweep) measure "$name" --no-compile ;;
      tests) run_tests ;;
      *) sanitize "$name" ;;
    esac
  done
  printf '\nresults in %s\n' "$OUT"
  printf '  %s\n' "${results[@]}"
  ! grep -qE ': (FAILED|cut off)' <<<"$(printf '%s\n' "${results[@]}")"
}

run 2>&1 | tee "$OUT/gpu.log"
exit "${PIPESTATUS[0]}"
