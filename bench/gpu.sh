#!/usr/bin/env bash
# From a bare checkout, against whatever torch is there, nothing downloaded: builds in place, runs the
# tests that need a device, compute-sanitizer on small steps, then the benchmarks, whose tables come
# last. Within nine minutes. Logs and JSON go to the folder that OUT names (build/gpu).
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
failed=()

# step NAME SECONDS COMMAND...: runs it with its output in a log; what fails is told at the end.
step() {
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  local status=$?
  printf '== %s: status %d after %d s: %s\n' "$name" "$status" "$((SECONDS - start))" \
    "$(tail -n 1 "$out/$name.log")"
  if ((status != 0)); then
    failed+=("$name")
    tail -n 25 "$out/$name.log"
  fi
  return "$status"
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/device.txt"
  # For this device alone: a third of the time.
  archs=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  export FASTMETA_CUDA_ARCHS=${FASTMETA_CUDA_ARCHS:-$archs}
  # Triton compiles on other cores meanwhile; what it compiled it keeps on disk.
  compiling=()
  for workload in "W5s, T=32" "W6, T=4"; do
    TRITON_INTERPRET=0 timeout 170 "$python" -m bench.gpu --only "$workload" --peers fastmeta \
      --seconds 0.05 --limit 160 >"$out/triton ${workload%%,*}.log" 2>&1 &
    compiling+=($!)
  done
  step build 170 env FASTMETA_EXTENSION=1 FASTMETA_CUDA=1 "$python" setup.py build_ext --inplace ||
    exit 1
  step info 60 "$python" -m fastmeta info
  cp fastmeta/_build.json "$out/"
  export FASTMETA_TEST_DEVICE=cuda
  step tests 90 env CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -m pytest -q -p no:cacheprovider \
    -W ignore::UserWarning tests/cuda/test_device.py \
    tests/executors/test_fuzz.py
  wait "${compiling[@]}"
  step layered-tests 75 env TRITON_INTERPRET=0 CUBLAS_WORKSPACE_CONFIG=:4096:8 "$python" -m pytest \
    -q -p no:cacheprovider -W ignore::UserWarning tests/cuda/test_layered_device.py \
    tests/kernels/test_convolutions.py tests/kernels/test_block.py
  unset FASTMETA_TEST_DEVICE
  # Torch's kernels made slow too would take longer than there is; older versions know no filter.
  ours=(--kernel-name kns=fastmeta)
  compute-sanitizer "${ours[@]}" true >"$out/filter.log" 2>&1 || ours=()
  for tool in memcheck racecheck synccheck; do
    step "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 9 "${ours[@]}" \
      "$python" -m bench.gpu.small
  done
  step bench 130 "$python" -m bench.gpu --deadline 110 --output "$out/gpu.json"
  step bench-layered 130 env TRITON_INTERPRET=0 "$python" -m bench.gpu --deadline 110 \
    --only "W5s, T=32" "W6, T=4" "W5, T=32" --limit 60 --output "$out/layered.json" --peers fastmeta \
    "plain loop" torch.func "supervised step" "JAX jit"
else
  echo "torch finds no GPU here: a dry run"
  if ! "$python" -c 'import fastmeta._C' 2>/dev/null; then
    step build 300 env FASTMETA_CUDA=0 "$python" setup.py build_ext --inplace || exit 1
  fi
  export FASTMETA_CUDA_ON_HOST=1
  host=(env PYTHONPATH="$PWD:$PWD/tests" "$python" -c)
  step small 120 "${host[@]}" \
    'import host_cuda; host_cuda.register(); from bench.gpu import small; small.main("cpu")'
  if "$python" -c 'import triton' 2>/dev/null; then
    step bench-layered 200 env TRITON_INTERPRET=1 FASTMETA_TRITON_ON_HOST=1 "${host[@]}" \
      'import sys, triton_on_host; from bench.gpu.__main__ import main; main(sys.argv[1:])' \
      --device cpu --only "tiny block" --peers fastmeta "plain loop" --seconds 0.1 \
      --output "$out/layered.json"
  fi
  step bench 200 "${host[@]}" \
    'import sys, host_cuda; host_cuda.register(); from bench.gpu.__main__ import main; main(sys.argv[1:])' \
    --device cpu --only tiny --peers fastmeta "plain loop" --seconds 0.1 --output "$out/gpu.json"
fi
cat "$out"/bench*.log
((${#failed[@]} == 0)) || echo "failed: ${failed[*]}; the logs are in $out"
exit "${#failed[@]}"
