#!/usr/bin/env bash
# Everything that needs a GPU, in one command and at most ten minutes, on a machine that may have no network.
#
#   OUT=results-folder SYSTEM=1 bash bench/device.sh        the interpreter in PYTHON (default python3) as it is
#   OUT=results-folder bash bench/device.sh                 the environment that `make` has made in .venv
#   WHEEL=dist/svdkern-….whl … bash bench/device.sh         a carried wheel instead of a build
#   STAGES="accuracy linear" … bash bench/device.sh         only these; what other stages found before stays
#   STAGES=tune … bash bench/device.sh                      the tiles of the Triton kernels, for svdkern/backends/triton_tiles.json
#   REHEARSE=1 bash bench/device.sh                         the same code on the CPU with tiny sizes, to test this file
#
# Stages, in order, each with a time limit and a log of its own: environment, build, doctor, tests (each kernel against
# fp64), sanitizer (a few of them under compute-sanitizer, where there is one), accuracy, ceilings, linear, graphs, memory,
# compile, svd, plots. Only where STAGES names it: tune, which takes the ten minutes for
# itself; what it has measured is in triton_tiles.json among the parts. A stage that fails or runs out of time is written down
# and the rest goes on; the exit status says whether all went well. A provider whose result is wrong is not timed, its row says
# why.
# A copy without .git is told its commit by BENCH_COMMIT; without that nothing it measures counts as a result.
#
# Written to $OUT (default runs/device), anew after every stage: summary.json (stages with exit status and seconds) and
# device.tar.gz (logs, tests.xml, results/<machine>/*.jsonl and plots, refused/). The parts lie in $OUT.parts until the next
# run of all stages.

set -u -o pipefail
OUT=$(realpath -m "${OUT:-$(dirname "${BASH_SOURCE[0]}")/../runs/device}")
PARTS=$OUT.parts # beside it: whoever carries $OUT away wants few files
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

REHEARSE=${REHEARSE:-}
TOTAL_SECONDS=${TOTAL_SECONDS:-570}
if [ -n "${SYSTEM:-}" ]; then PYTHON=${PYTHON:-python3}; else PYTHON=${PYTHON:-.venv/bin/python}; fi
[ -n "${STAGES:-}" ] || rm -rf "$PARTS" # all of them: nothing of an earlier run counts
ALL="environment build doctor tests sanitizer accuracy ceilings linear graphs memory compile svd plots"
STAGES=${STAGES:-$ALL}
mkdir -p "$OUT" "$PARTS"
touch "$PARTS/stages.tsv"

if [ -n "$REHEARSE" ]; then
  DEVICE=cpu
  SHAPES="64x128x96x8 1x128x128x8"
  ACCURACY_SHAPES="16x64x48x4"
  SVD_SHAPES="64x48"
  SECONDS_A_GROUP=0.2
  KERNELS=""
  TUNE_SHAPES="8x64x64x4"
  TUNE_SECONDS=20
  TESTS="tests/test_functional.py -k gates" # what needs a GPU cannot run here
  SANITIZER=none-without-a-gpu
else
  DEVICE=cuda
  # Training at two model sizes and three ranks, SmolLM2's layers, decoding, call overhead.
  SHAPES="8192x4096x4096x16 8192x4096x4096x64 8192x4096x4096x128 2048x2048x2048x16 2048x2048x2048x64 1024x576x1536x16
          1024x1536x576x64 1x4096x4096x16 16x4096x4096x16 16x4096x14336x16 4x64x64x4"
  GRAPH_SHAPES="8192x4096x4096x16 8192x4096x4096x128 1x4096x4096x16 16x4096x4096x16" # what roofline.py predicts
  ACCURACY_SHAPES="512x1024x1024x16 512x1024x1024x128 4x4096x1024x16"
  SVD_SHAPES="4096x4096 14336x4096"
  SECONDS_A_GROUP=1.5
  KERNELS="svdkern-triton svdkern-cuda"
  # r = 16 first: compiling is most of the time, and layers of one R and dtype share what is compiled.
  TUNE_SHAPES="8192x4096x4096x16 2048x4096x4096x16 8192x2048x2048x16 1024x576x1536x16 16x4096x4096x16 4x4096x4096x16
               8192x4096x4096x64 2048x4096x4096x64"
  TUNE_SECONDS=400
  TESTS="-m gpu --continue-on-collection-errors -n 12"
  SANITIZER=compute-sanitizer
fi
SANITIZED="cuda and dtype0 and (dropout or (core and 32) or (same_bits and not 1000 and not 8192))" # of test_gpu_backends.py
export BENCH_RESULTS="$PARTS/results" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

summary() { # after every stage, so that a run that is killed still leaves one
  "$PYTHON" - "$PARTS" "$OUT" "$DEVICE" "$SECONDS" <<'PYTHON'
import json, pathlib, sys

parts, out, device, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
stages = {}
for line in (parts / "stages.tsv").read_text().splitlines():
    name, status, took = line.split("\t")
    meaning = {"0": "ok", "124": "out of time"}
    stages[name] = {"stage": name, "rc": int(status), "seconds": int(took), "result": meaning.get(status, "failed")}
summary = {"device": device, "seconds": seconds, "stages": list(stages.values())}
(out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
PYTHON
  tar -czf "$OUT/device.tar.gz" -C "$PARTS" .
}

FAILED=0
stage() { # stage NAME LIMIT COMMAND...
  local name=$1 limit=$2 left=$((TOTAL_SECONDS - SECONDS)) start=$SECONDS status
  shift 2
  case " $STAGES " in *" $name "*) ;; *) return ;; esac
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name: $*"
  if [ "$limit" -lt 1 ]; then
    echo "no time left" | tee "$PARTS/$name.log"
    status=124
  else
    timeout --kill-after=10 "$limit" "$@" >"$PARTS/$name.log" 2>&1
    status=$?
    [ "$status" -eq 137 ] && status=124
    tail -n 5 "$PARTS/$name.log"
  fi
  [ "$status" -eq 0 ] || FAILED=1
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$PARTS/stages.tsv"
  echo "== $name: exit status $status after $((SECONDS - start)) s"
  summary
}

for name in $STAGES; do
  case " $ALL tune " in
    *" $name "*) ;;
    *) echo "STAGES names $name; there are $ALL tune" >&2
       exit 2 ;;
  esac
done

# shellcheck disable=SC2086  # SHAPES is a list
{
  stage environment 30 "$PYTHON" -c 'import platform, torch
print(platform.platform(), "python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
for i in range(torch.cuda.device_count()): print(torch.cuda.get_device_properties(i))
from bench import machine
print(machine.provenance("cuda" if torch.cuda.is_available() else "cpu"))'
  if [ -n "${WHEEL:-}" ]; then # its extension beside the sources: they are what runs, from here
    stage build 60 "$PYTHON" -c 'import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    for name in wheel.namelist():
        if name.endswith(".so"): print(wheel.extract(name))' "$WHEEL"
  else
    stage build 180 "$PYTHON" setup.py build_ext --inplace
  fi
  stage doctor 90 "$PYTHON" -m svdkern doctor
  stage tests 240 "$PYTHON" -m pytest -q $TESTS -p no:cacheprovider --junitxml="$PARTS/tests.xml"
  stage sanitizer 90 bash -c 'command -v "$1" || { echo "$1 is not here: nothing was checked"; exit 0; }
sanitizer=$1 status=0
shift
for tool in memcheck racecheck; do "$sanitizer" --tool "$tool" --error-exitcode 9 "$@" || status=$?; done
exit "$status"' sanitizer "$SANITIZER" "$PYTHON" -m pytest -q tests/test_gpu_backends.py -p no:cacheprovider \
    -k "$SANITIZED"
  stage accuracy 60 "$PYTHON" -m svdkern bench accuracy --device "$DEVICE" --shapes $ACCURACY_SHAPES \
    --providers eager addmm materialised peft_default peft_bf16 svdkern-eager $KERNELS svdkern
  stage ceilings 30 "$PYTHON" -m svdkern bench ceilings --device "$DEVICE"
  stage linear 170 "$PYTHON" -m svdkern bench linear --device "$DEVICE" --shapes $SHAPES --seconds "$SECONDS_A_GROUP" \
    --dtypes bf16 fp16 fp32 --providers frozen eager addmm peft_default peft_bf16 svdkern-eager $KERNELS svdkern
  [ -n "$REHEARSE" ] || stage graphs 60 "$PYTHON" -m svdkern bench linear --device "$DEVICE" --graph --shapes $GRAPH_SHAPES \
    --dtypes bf16 --seconds "$SECONDS_A_GROUP" --providers frozen eager addmm peft_bf16 $KERNELS svdkern
  stage memory 60 "$PYTHON" -m svdkern bench memory --device "$DEVICE" --dtypes bf16 --shapes ${SHAPES%% *}
  stage compile 60 "$PYTHON" -m svdkern bench linear --device "$DEVICE" --shapes ${SHAPES%% *} --dtypes bf16 \
    --seconds "$SECONDS_A_GROUP" --providers frozen eager svdkern $KERNELS --compile
  stage svd 60 "$PYTHON" -m svdkern bench svd_kernels --device "$DEVICE" --shapes $SVD_SHAPES --dtypes bf16 fp32
  # It begins nothing new after TUNE_SECONDS; what is left is for the candidates that it has begun.
  stage tune $((TUNE_SECONDS + 90)) "$PYTHON" -m svdkern tune --device "$DEVICE" --shapes $TUNE_SHAPES --dtypes bfloat16 \
    --seconds "$SECONDS_A_GROUP" --stop-after "$TUNE_SECONDS" --out "$PARTS/triton_tiles.json"
  stage plots 45 "$PYTHON" -m svdkern bench report --plots
}

cat "$OUT/summary.json"
exit "$FAILED"
