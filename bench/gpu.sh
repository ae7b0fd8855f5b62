#!/usr/bin/env bash
# Everything that is to be done on a machine with a GPU, in stages that are each useful alone, the most telling first:
#
#   bench/gpu.sh [--emulated] [FOLDER]
#
# build      the kernels for the GPU at hand, without network and without build isolation
# smoke      each kernel once against the CPU, a line each
# tests      tests/cuda, a worker for four cores
# memcheck, racecheck   the smoke set in float32 under compute-sanitizer
# bench      the benchmarks, most important rows first
#
# A stage may take what is left, less what the later ones need at least; one that fails, or that hangs and is ended, leaves them that, and
# what a stage did not use is theirs, too. FOLDER (default: bench/results) gets what each has written so far, a line a stage in
# stages.txt, and the tables. SECONDS_TOTAL is the time for all of it (default 540). --emulated runs the same stages on the emulated device
# of tests/cuda. For tests of this script: STAGE_SECONDS_<name> is a stage's time, LEAST_<name> what it needs at least, STAGES names those
# to run, BREAK_<name>=fail or hang breaks one.
set -uo pipefail
cd "$(dirname "$0")/.."
emulated=
if [ "${1:-}" = --emulated ]; then
    emulated=1
    shift
fi
mkdir -p "${1:-bench/results}"
out=$(cd "${1:-bench/results}" && pwd)
total=${SECONDS_TOTAL:-540}
failed=0
: >"$out/stages.txt"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
export PYTHONDONTWRITEBYTECODE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false

# Each stage and the seconds that it needs at least; smoke never takes more than 60.
order=(build smoke tests memcheck racecheck bench)
declare -A least=([build]=160 [smoke]=60 [tests]=80 [memcheck]=40 [racecheck]=40 [bench]=100)
for name in "${order[@]}"; do
    own=LEAST_$name
    least[$name]=${!own:-${least[$name]}}
done
built=1
wanted() { [[ " ${STAGES:-$1} " == *" $1 "* ]]; }

# stage NAME COMMAND...: the command, for what is left of the time less the later stages' least.
stage() {
    local name=$1 begun=$SECONDS seconds=$((total - SECONDS)) later= status word own break_it other
    shift
    wanted "$name" || return 0
    for other in "${order[@]}"; do
        [ -z "$later" ] || ! wanted "$other" || seconds=$((seconds - least[$other]))
        [ "$other" != "$name" ] || later=1
    done
    # Where there is not enough for all, what is left is shared by their least.
    if [ "$seconds" -lt "${least[$name]}" ]; then
        seconds=$((total - SECONDS < least[$name] ? total - SECONDS : least[$name]))
    fi
    [ "$name" != smoke ] || [ "$seconds" -le 60 ] || seconds=60
    own=STAGE_SECONDS_$name
    seconds=${!own:-$seconds}
    [ $((total - SECONDS)) -ge "$seconds" ] || seconds=$((total - SECONDS))
    printf '\n== %s (at %ss, at most %ss)\n' "$name" "$begun" "$seconds"
    break_it=BREAK_$name
    if [ "$built" = 0 ]; then
        status=126
    elif [ "$seconds" -lt 1 ]; then
        status=125
    elif [ "${!break_it:-}" = fail ]; then
        false
        status=$?
    elif [ "${!break_it:-}" = hang ]; then
        timeout -k 5 "$seconds" sleep 1000
        status=$?
    else
        # An interrupt first: pytest then writes what it has.
        timeout -s INT -k 10 "$seconds" "$@" 2>&1 | tee "$out/$name.log"
        status=${PIPESTATUS[0]}
    fi
    case $status in
        0) word=passed ;;
        124 | 137) word="ran out of its $seconds s" ;;
        125) word="had no time left" ;;
        126) word="not run, as nothing was built" ;;
        77) word="skipped: compute-sanitizer is not here" ;;
        *) word="failed with status $status" ;;
    esac
    [ "$status" = 0 ] || [ "$status" = 77 ] || failed=1
    printf '%-10s %4ss  %s\n' "$name" $((SECONDS - begun)) "$word" | tee -a "$out/stages.txt"
    return "$status"
}

build() {
    if [ -n "$emulated" ]; then
        cmake -S tests/cuda -B "${SUBSPAN_EMULATED_BUILD:-$work/emulated}" -DPython_EXECUTABLE="$(command -v "$python")" \
            -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" && cmake --build "${SUBSPAN_EMULATED_BUILD:-$work/emulated}" --parallel "$(nproc)"
        return
    fi
    CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)} "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index \
        --target "$work/site" -Ccmake.define.SUBSPAN_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native .
}
sanitized() {
    local tool=$1 run=()
    shift
    if [ -z "$emulated" ]; then # memory past an array stops the emulated device without one
        command -v compute-sanitizer >/dev/null || return 77
        run=(compute-sanitizer --tool "$tool" --kernel-regex kns=subspan --report-api-errors no --error-exitcode 9)
    fi
    rm -f "$out/$tool.txt"
    "${run[@]}" "$python" bench/gpu_smoke.py --dtypes float32 ${emulated:+--cases 8} --save "$out/$tool.txt" "$@"
}
tests() {
    local workers=$(($(nproc) / 4)) some=()
    [ "$workers" -ge 1 ] || workers=0
    # A fraction of them on the emulated device, where CI runs them all.
    [ -z "$emulated" ] || some=(-k "test_cuda_spaces and vectors")
    local split=()
    ! "$python" -c "import xdist" 2>/dev/null || split=(-n "$workers")
    "$python" -m pytest -W default -q "${split[@]}" -p no:cacheprovider --junitxml "$out/tests.xml" tests/cuda "${some[@]}"
}
smoke() {
    rm -f "$out/smoke.txt"
    "$python" bench/gpu_smoke.py --save "$out/smoke.txt" "${where[@]}"
}
benchmarks() {
    if [ -n "$emulated" ]; then # times mean nothing there
        rm -f "$out/bench.txt"
        "$python" bench/gpu_smoke.py --dtypes float32 --cases 8 --save "$out/bench.txt" "${where[@]}"
        return
    fi
    "$python" bench/gpu.py --save "$out"
}
where=()
if [ -n "$emulated" ]; then
    export SUBSPAN_EMULATED_BUILD=${SUBSPAN_EMULATED_BUILD:-$work/emulated}
    where=(--emulated "$SUBSPAN_EMULATED_BUILD")
else
    export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" SUBSPAN_TEST_GPU=1
    "$python" -c 'import cupy, torch; assert torch.cuda.is_available(), "PyTorch sees no CUDA device"' || exit 1
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
fi
export emulated out work python
export -f build sanitized tests smoke benchmarks

stage build bash -c build || built=0
stage smoke bash -c 'where=("$@"); smoke' bash "${where[@]}"
stage tests bash -c tests
stage memcheck bash -c 'sanitized memcheck "$@"' bash "${where[@]}"
stage racecheck bash -c 'sanitized racecheck "$@"' bash "${where[@]}"
stage bench bash -c 'where=("$@"); benchmarks' bash "${where[@]}"
printf '\n== done in %ss, %s\n' "$SECONDS" "$([ $failed = 0 ] && echo well || echo with failures)"
cat "$out/stages.txt"
exit $failed
