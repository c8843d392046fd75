#!/usr/bin/env bash
# What benchmarks/gpu.sh needs on a machine without a network and nvcc: build/gpu_bundle, at most 64 MB.
#   _C.abi3.so    the library with CUDA kernels for sm_90, built against the torch of $PYTHON; torch >= 2.10 loads it
#   packages/     liger-kernel and cut-cross-entropy, as far as they fit, without what they depend on (torch and triton)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} BUNDLE=build/gpu_bundle MOST_BYTES=$((64 << 20))
PEERS=${PEERS:-liger-kernel cut-cross-entropy}

size() { du --apparent-size --summarize --bytes "$1" | cut -f 1; }

rm -rf "$BUNDLE"
mkdir -p "$BUNDLE/packages"
AVA_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 PYTHONPATH="$PWD" "$PYTHON" setup.py --quiet build_ext --build-lib "$BUNDLE/built"
cp "$BUNDLE/built/ava_ext/_C.abi3.so" "$BUNDLE/"
rm -r "$BUNDLE/built"
strip --strip-unneeded "$BUNDLE/_C.abi3.so" || true
for peer in $PEERS; do
  folder=$(mktemp -d)
  if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "$peer"; then
    echo "without $peer: it could not be fetched"
  elif [ $(($(size "$BUNDLE") + $(size "$folder"))) -gt "$MOST_BYTES" ]; then
    echo "without $peer: it takes $(size "$folder") bytes"
  else
    cp -r "$folder/." "$BUNDLE/packages/"
  fi
  rm -rf "$folder"
done
find "$BUNDLE" -name __pycache__ -prune -exec rm -rf {} +
echo "$BUNDLE: $(size "$BUNDLE") bytes"
[ "$(size "$BUNDLE")" -le "$MOST_BYTES" ]
