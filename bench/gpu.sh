#!/usr/bin/env bash
# Everything that is to be done on a machine with a GPU, in under eight minutes: builds for its architecture without network and
# without build isolation, runs the GPU tests (CuPy, PyTorch, JAX), a small set under compute-sanitizer, and the benchmarks. Tables
# go to the folder that is the first argument (default: bench/results), named by the device.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
mkdir -p "$out"
failed=0
step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }
python3 -c 'import cupy, torch; assert torch.cuda.is_available(), "PyTorch sees no CUDA device"' || exit 1
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

step "build"
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install --quiet --no-build-isolation --no-deps --no-index --target "$site" \
    -Ccmake.define.SUBSPAN_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native . || exit 1
export PYTHONPATH=$site SUBSPAN_TEST_GPU=1 PYTHONDONTWRITEBYTECODE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
(cd "$site" && python3 -m subspan info)

step "tests"
timeout 140 python3 -m pytest -W default -q -p no:cacheprovider tests/cuda || failed=1

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "compute-sanitizer $tool"
        timeout 60 compute-sanitizer --tool "$tool" --kernel-regex kns=subspan --report-api-errors no --error-exitcode 9 python3 -m pytest -W default -q -x -p no:cacheprovider tests/cuda -k sanitizer || failed=1
    done
else
    echo "compute-sanitizer is not here: skipped"
fi

step "benchmarks"
timeout 140 python3 bench/gpu.py --save "$out" || failed=1
step "done, $([ $failed = 0 ] && echo well || echo with failures)"
exit $failed
