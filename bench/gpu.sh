#!/usr/bin/env bash
# From a bare checkout, against whatever torch is there, nothing downloaded: builds in place, runs the
# tests that need a device and compute-sanitizer on small steps side by side, then the benchmarks, whose
# tables come last. Within nine minutes: limits of what comes one after another add up to 8:50. Logs
# and JSON go to the folder that OUT names (build/gpu).
#
# Where torch finds no GPU it is a dry run: the same commands on small sizes, the kernels on the host.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-build/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# A bare checkout has Triton's kernels beside the package, an installed one inside.
if [[ ! -e fastmeta/kernels ]]; then
  ln -s ../kernels fastmeta/kernels
  trap 'rm -f fastmeta/kernels' EXIT
fi
python=${PYTHON:-python3}
failed=$out/failed
: >"$failed"

# step NAME SECONDS COMMAND...: runs it with its output in a log; what fails is told at the end.
step() {
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  timeout -k 1 "$seconds" "$@" >"$out/$name.log" 2>&1
  local status=$?
  printf '== %s: status %d after %d s: %s\n' "$name" "$status" "$((SECONDS - start))" \
    "$(tail -n 1 "$out/$name.log")"
  if ((status != 0)); then
    echo "$name" >>"$failed"
    tail -n 25 "$out/$name.log"
  fi
  return "$status"
}

if timeout 15 "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/device.txt"
  # For this device alone: a third of the time.
  archs=$(timeout 15 "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export FASTMETA_CUDA_ARCHS=${FASTMETA_CUDA_ARCHS:-$archs}
  # Triton compiles on other cores meanwhile; what it compiled it keeps on disk.
  for workload in "W5s, T=32" "W6, T=4"; do
    TRITON_INTERPRET=0 timeout 150 "$python" -m bench.gpu --only "$workload" --peers fastmeta \
      --seconds 0.05 --limit 140 >"$out/triton ${workload%%,*}.log" 2>&1 &
  done
  step build 150 env FASTMETA_EXTENSION=1 FASTMETA_CUDA=1 "$python" setup.py build_ext --inplace
  built=$?
  wait
  ((built == 0)) || exit 1
  cp fastmeta/_build.json "$out/"
  # What is not timed runs side by side.
  step info 30 "$python" -m fastmeta info &
  export CUBLAS_WORKSPACE_CONFIG=:4096:8
  pytest=("$python" -m pytest -q -p no:cacheprovider -W ignore::UserWarning)
  step tests 90 env FASTMETA_TEST_DEVICE=cuda "${pytest[@]}" tests/cuda/test_device.py \
    tests/executors/test_fuzz.py &
  step layered-tests 90 env FASTMETA_TEST_DEVICE=cuda TRITON_INTERPRET=0 "${pytest[@]}" \
    tests/cuda/test_layered_device.py tests/kernels/test_convolutions.py tests/kernels/test_block.py &
  # Torch's kernels made slow too would take longer than there is; older versions know no filter.
  ours=(--kernel-name kns=fastmeta)
  timeout 5 compute-sanitizer "${ours[@]}" true >"$out/filter.log" 2>&1 || ours=()
  for tool in memcheck racecheck synccheck; do
    step "$tool" 85 compute-sanitizer --tool "$tool" --error-exitcode 9 "${ours[@]}" \
      "$python" -m bench.gpu.small &
  done
  wait
  unset CUBLAS_WORKSPACE_CONFIG
  step bench 135 "$python" -m bench.gpu --deadline 115 --output "$out/gpu.json"
  step bench-layered 125 env TRITON_INTERPRET=0 "$python" -m bench.gpu --deadline 105 \
    --only "W5s, T=32" "W6, T=4" "W5, T=32" --limit 60 --output "$out/layered.json" --peers fastmeta \
    "plain loop" torch.func "supervised step" "JAX jit"
else
  echo "torch finds no GPU here: a dry run"
  if ! "$python" -c 'import fastmeta._C' 2>/dev/null; then
    step build 300 env FASTMETA_CUDA=0 "$python" setup.py build_ext --inplace || exit 1
  fi
  host=(env PYTHONPATH="$PWD:$PWD/tests" "$python" -c)
  step small 120 "${host[@]}" \
    'import host_cuda; host_cuda.register(); from bench.gpu import small; small.main("cpu")'
  if "$python" -c 'import triton' 2>/dev/null; then
    step bench-layered 200 env TRITON_INTERPRET=1 "${host[@]}" \
      'import sys, triton_on_host; triton_on_host.register(); from bench.gpu.__main__ import main; main(sys.argv[1:])' \
      --device cpu --only "tiny block" --peers fastmeta "plain loop" --seconds 0.1 \
      --output "$out/layered.json"
  fi
  step bench 200 "${host[@]}" \
    'import sys, host_cuda; host_cuda.register(); from bench.gpu.__main__ import main; main(sys.argv[1:])' \
    --device cpu --only tiny --peers fastmeta "plain loop" --seconds 0.1 --output "$out/gpu.json"
fi
cat "$out"/bench*.log
count=$(wc -l <"$failed")
((count == 0)) || echo "failed: $(paste -sd ' ' "$failed"); the logs are in $out"
exit "$count"
