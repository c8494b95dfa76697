#!/usr/bin/env bash
# Everything that a GPU is to show, in a quarter of an hour: is it right, and how fast is it.
#
#     bash tests/gpu/first_run.sh 1          about 4 minutes: build, correctness
#     bash tests/gpu/first_run.sh 2          about 6 minutes: timings, and what a profiler says
#     bash tests/gpu/first_run.sh 3          about 1 minute: variants of the kernels, tests/gpu/*.patch
#     bash tests/gpu/first_run.sh build      beforehand, no GPU needed: the kernels, and each variant
#     bash tests/gpu/first_run.sh --rehearse beforehand, on a CPU: every step of 1 to 3, small
#
# Several parts may be given ("1 2 3").  What was built beforehand is used: equimini/_kernels*.so and
# build/gpu (git ignores both).  Part 1 runs side by side, the others alone, the most wanted first.
# Every step has a time limit, as has each part, and the failure of one step does not keep the others
# from running.  In $OUT (runs/gpu unless set), written as the steps go: summary.txt, results.jsonl (a
# line for each result), ncu.csv, logs.tar.gz.  $PYTHON (python3 unless set) has torch.
set -u
cd "$(dirname "$0")/../.."
OUT=$(realpath -m "${OUT:-runs/gpu}") PYTHON=${PYTHON:-python3} WORK=$(mktemp -d)
LOGS=$WORK/logs VARIANTS=$PWD/build/gpu PARTS=$* DEVICE=cuda WIDTH=5 SLOWER=1 SHORT=''
mkdir -p "$OUT" "$LOGS"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 LC_ALL=C
export TORCHINDUCTOR_CACHE_DIR=$PWD/build/inductor TRITON_CACHE_DIR=$PWD/build/triton
declare -A LIMITS=([1]=250 [2]=400 [3]=100 [build]=99999)  # seconds; $DEADLINE in place of each

case $PARTS in
  --rehearse)  # short sizes; programs that a CPU lacks only check their options
    PARTS='1 2 3' VARIANTS=$WORK/variants DEVICE=cpu WIDTH=0 SLOWER=20 SHORT=--short
    PATH=$PWD/tests/gpu/stand_ins:$PATH LIMITS=([1]=99999 [2]=99999 [3]=99999)
    export EQUIMINI_TEST_DEVICE=cpu OMP_NUM_THREADS=1 ;;
  *) for part in ${PARTS:-none}; do
       [ -n "${LIMITS[$part]:-}" ] || { sed -n '2,/^set/s/^# \?//p' "$0"; exit 2; }
     done ;;
esac

note() { echo "[$SECONDS s] $*" | tee -a "$OUT/summary.txt"; }
keep() { tar czf "$WORK/$BASHPID.tgz" -C "$WORK" logs 2>/dev/null; mv -f "$WORK/$BASHPID.tgz" "$OUT/logs.tar.gz"; }
trap 'keep; rm -rf "$WORK"' EXIT
trap 'exit 143' TERM INT
real() { [ "$DEVICE" = cuda ]; }
choose() { if real; then echo "$1"; else echo "$2"; fi; }  # a GPU's sizes, or a rehearsal's

# step NAME SECONDS COMMAND…: its output to a log, lines of JSON to results.jsonl as they come
step() {
  local name=$1 limit=$(($2 * SLOWER)) start=$SECONDS left=$((UNTIL - SECONDS)); shift 2
  [ $left -lt 5 ] && { note "$name: left out, no time"; return 1; }
  [ $left -lt $limit ] && limit=$left
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$LOGS/$name.log" \
    | sed -un "/}\$/s/^{/{\"step\": \"$name\", /p" >> "$OUT/results.jsonl"
  local rc=${PIPESTATUS[0]}
  keep
  note "$name: exit code $rc, $((SECONDS - start)) s: $(grep -v '^ *$' "$LOGS/$name.log" | tail -1 | cut -c1-160)"
  return "$rc"
}
# warm NAME SECONDS COMMAND…: fills the compilers' caches, in the background
warm() { local name=$1 limit=$2; shift 2; timeout -k 5 $((limit * SLOWER)) "$@" >"$LOGS/warm_$name.log" 2>&1 & }
probe() { step "$1" "$2" "$PYTHON" tests/gpu/probe.py "${@:3}" --device "$DEVICE" $SHORT; }
bench() { step "$1" "$2" "$PYTHON" -m equimini.bench "${@:3}"; }
built() { [ "$("$PYTHON" -c 'from equimini.attention import implementation as i; print(i("cuda"))' 2>&1)" = CUDA ]; }

# compile FOLDER: the extension, beside the sources in a folder
compile() {
  cd "$1" && EQUIMINI_BUILD=$(choose cuda cpu) TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0} \
    EQUIMINI_MARCH=${EQUIMINI_MARCH:-$(choose x86-64-v3 native)} MAX_JOBS=${MAX_JOBS:-4} \
    "$PYTHON" setup.py -q build_ext --inplace
}
# variant NAME PATCH…: a copy of the tree with patches, $VARIANTS/NAME; not built again if it is current
variant() {
  local folder=$VARIANTS/$1 mark patch; shift
  mark="$DEVICE $(cat setup.py csrc/*.* csrc/*/* "$@" | sha256sum) $(
    "$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')"
  [ "$(cat "$folder/current" 2>/dev/null)" = "$mark" ] || rm -rf "$folder"
  mkdir -p "$folder"
  tar cf - --exclude='_kernels*' --exclude=__pycache__ equimini | tar xf - -C "$folder"
  if [ -e "$folder/current" ]; then return 0; fi
  cp -r csrc setup.py pyproject.toml README.md "$folder"
  for patch in "$@"; do
    GIT_CEILING_DIRECTORIES=$VARIANTS git -C "$folder" apply "$PWD/$patch" \
      || patch -d "$folder" -p1 < "$patch" || return
  done
  if real; then (compile "$folder") || return; fi  # a rehearsal only applies the patches
  echo "$mark" > "$folder/current"
}
variants() {
  local patch job jobs=() failed=0
  for patch in tests/gpu/*.patch; do
    variant "$(basename "$patch" .patch)" "$patch" & jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return $failed
}
export -f real choose compile variant variants; export PYTHON DEVICE VARIANTS

correctness() {
  # compilations that need no kernels of ours fill the caches while nvcc runs
  local w shape
  for w in 4 32 128 256; do
    shape=$(choose "8 4096 16 64 $w" "1 32 1 16 $w"); [ $w = 4 ] && real && shape="2048 16 12 64 4"
    real || [ $w = 4 ] || continue
    EQUIMINI_ATTENTION=reference warm "flex_$w" 110 "$PYTHON" -c "
import sys, torch
from equimini.bench.attention_peers import flex
device, (b, n, h, d, w) = sys.argv[1], map(int, sys.argv[2:])
attend = flex(b, n, w, device)
with torch.no_grad():
    attend(*torch.randn(b, n, 3, h, d, device=device, dtype=torch.bfloat16).unbind(2))
if device == 'cuda':
    qkv = [torch.randn(b, n, h, d, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    torch.autograd.grad(attend(*qkv).sum(), qkv)
" "$DEVICE" $shape
  done
  if ! real; then :
  elif built; then note "the binary that was built beforehand is used"
  else step build 170 bash -c 'compile .' || note "NO KERNELS: what follows is the reference"; fi
  if ! probe smoke 60 smoke; then
    note "WRONG RESULTS: no timings"
    sanitize memcheck probe_memcheck tests/gpu/probe.py smoke --device "$DEVICE" $SHORT
    return 1
  fi
  step variants 200 bash -c variants &  # for part 3, while processors are idle
  step sweep 130 "$PYTHON" tests/kernel/test_window_attention.py --cases "$(choose 1600 5)" \
    --longest "$(choose 257 40)" --device "$DEVICE" &
  step elements 90 "$PYTHON" -m pytest -q -p no:cacheprovider -m '' -k 2_31 tests/kernel/test_on_gpu.py &
  step pytest_attention 150 "$PYTHON" -m pytest -q -x -p no:cacheprovider -m '' \
    -k "$(choose cuda test_flops)" tests/kernel/test_window_attention.py &
  local workers=(); "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n $WIDTH)
  OMP_NUM_THREADS=3 step pytest_gpu 210 "$PYTHON" -m pytest -q -p no:cacheprovider -m '' "${workers[@]}" \
    -k "$(choose 'not 2_31' 'graphs or family')" tests/kernel/test_on_gpu.py &
  local tool; for tool in memcheck racecheck synccheck initcheck; do
    sanitize $tool $tool tests/kernel/test_window_attention.py --cases "$(choose 8 1)" \
      --longest "$(choose 130 20)" --device "$DEVICE" --judge-device cpu &
  done
  wait
}
# sanitize TOOL NAME FILE…: without torch's own cache, so that what is written beside a tensor is seen.
# The truth comes from a CPU: on an H200 both initcheck and racecheck stumbled over cuBLAS's products
# (it may be their bulk stores), and not over our kernels.
sanitize() {
  local ours=(--kernel-name kns=equimini)
  [ "$1" != initcheck ] && compute-sanitizer --help 2>&1 | grep -q -e --kernel-name || ours=()
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$2" 160 compute-sanitizer --tool "$1" "${ours[@]}" \
    --error-exitcode 7 --target-processes application-only "$PYTHON" "${@:3}"
}

timings() {
  probe time 40 time
  step ncu 40 ncu --clock-control none --target-processes all -k regex:'forward_kernel|backward_kernel' \
    --launch-skip 2 --launch-count 2 --section SpeedOfLight --section MemoryWorkloadAnalysis \
    --section SchedulerStats --section WarpStateStats --section Occupancy --section LaunchStats \
    --csv --page raw "$PYTHON" tests/gpu/probe.py once --device "$DEVICE" $SHORT
  cp "$LOGS/ncu.log" "$OUT/ncu.csv"
  local graphs=--cuda-graphs batch setting w; real || graphs=
  attention "$(choose "2048 16 12 64 4" "2 16 2 64 4")" efficient flash2 sdpa cudnn shifts flex flex-folded
  for setting in plain bf16 fast; do
    bench "train_$setting" 60 train --preset "$(choose base tiny)" --batch-size "$(choose 256 2)" \
      --settings "$(choose $setting plain)" --steps "$(choose 5 1)" --peak measured --profile \
      --device "$DEVICE" --json
  done
  for batch in 1 8 64; do
    bench "sample_$batch" 35 sample --preset "$(choose small tiny)" --batch "$(choose $batch 1)" \
      --steps "$(choose 100 2)" --columns "$(choose 16 3)" $graphs --device "$DEVICE" --json
  done
  for w in 32 128 256; do
    real && attention "8 4096 16 64 $w" efficient flash2 cudnn flex
  done
}
# attention SHAPE PEER…: peers that compile come last
attention() {
  bench "attention_${1// /_}" 60 attention --device "$DEVICE" --dtype bfloat16 --no-rope --json \
    --shape $1 --peers "${@:2}"
}

judge_variants() {
  step variants 150 bash -c variants
  local name folder=$PWD; for name in as_is $(basename -s .patch tests/gpu/*.patch); do
    if [ $name != as_is ]; then
      [ -e "$VARIANTS/$name/current" ] || continue
      folder=$VARIANTS/$name
    fi
    PYTHONPATH=$folder probe "smoke_$name" 25 smoke && PYTHONPATH=$folder probe "time_$name" 25 time
  done
}

: > "$OUT/results.jsonl"; : > "$OUT/summary.txt"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,clocks.mem --format=csv,noheader \
  | tee -a "$OUT/summary.txt"
for home in ${CUDA_HOME:-} /usr/local/cuda "$(dirname "$(dirname "$(readlink -f "$(command -v nvcc)")")")"; do
  ls "$home"/include/cuda_runtime.h "$home"/targets/*/include/cuda_runtime.h >/dev/null 2>&1 \
    && export CUDA_HOME=$home && break
done
note "CUDA in ${CUDA_HOME:-none}; $("$PYTHON" -c 'import torch; print("torch", torch.__version__)' 2>&1 | tail -1)"
for part in $PARTS; do
  UNTIL=$((SECONDS + ${DEADLINE:-${LIMITS[$part]}}))
  note "--- part $part"
  case $part in
    1) correctness || break ;;  # no timings of what is wrong
    2) timings ;;
    3) judge_variants ;;
    build) step build 3600 bash -c 'compile .'; step variants 7200 bash -c variants ;;
  esac
done
failures=$(grep -cE ': exit code [1-9]|: left out' "$OUT/summary.txt")
note "done; failed or left out: $failures"
[ "$failures" = 0 ]
