#!/usr/bin/env bash
# Everything that needs a GPU, in one command and at most ten minutes, on a machine that may have no network.
#
#   OUT=results-folder SYSTEM=1 bash bench/device.sh        the interpreter in PYTHON (default python3) as it is
#   OUT=results-folder bash bench/device.sh                 the environment that `make` has made in .venv
#   REHEARSE=1 bash bench/device.sh                         the same code on the CPU with tiny sizes, to test this file
#
# Stages, each with a time limit and a log of its own: machine, build, doctor, tests, linear, compile. A stage that fails
# or runs out of time is written down and the rest goes on; the exit status says whether all went well.
# Written to $OUT (default runs/device): summary.json (stages with exit status and seconds), tests.xml, *.jsonl, *.log.

set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

OUT=${OUT:-runs/device}
REHEARSE=${REHEARSE:-}
TOTAL_SECONDS=${TOTAL_SECONDS:-570}
if [ -n "${SYSTEM:-}" ]; then PYTHON=${PYTHON:-python3}; else PYTHON=${PYTHON:-.venv/bin/python}; fi
mkdir -p "$OUT"
: >"$OUT/stages.tsv"

if [ -n "$REHEARSE" ]; then
  DEVICE=cpu
  SHAPES="64x128x96x8 1x128x128x8"
  SECONDS_A_GROUP=0.2
else
  DEVICE=cuda
  # Training at two model sizes and three ranks, SmolLM2's layers, decoding, call overhead.
  SHAPES="8192x4096x4096x16 8192x4096x4096x64 8192x4096x4096x128 2048x2048x2048x16 1024x576x1536x16
          1024x1536x576x16 1x4096x4096x16 16x4096x4096x16 4x64x64x4"
  SECONDS_A_GROUP=2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

summary() { # after every stage, so that a run that is killed still leaves one
  "$PYTHON" - "$OUT" "$DEVICE" "$SECONDS" <<'PYTHON'
import json, pathlib, sys

out, device, seconds = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
stages = []
for line in (out / "stages.tsv").read_text().splitlines():
    name, status, took = line.split("\t")
    meaning = {"0": "ok", "5": "no test was selected" if name == "tests" else "failed", "124": "out of time"}
    stages.append({"stage": name, "rc": int(status), "seconds": int(took), "result": meaning.get(status, "failed")})
(out / "summary.json").write_text(json.dumps({"device": device, "seconds": seconds, "stages": stages}, indent=2) + "\n")
PYTHON
}

FAILED=0
stage() { # stage NAME LIMIT COMMAND...
  local name=$1 limit=$2 left=$((TOTAL_SECONDS - SECONDS)) start=$SECONDS status
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  echo "== $name: $*"
  if [ "$limit" -lt 1 ]; then
    echo "no time left" | tee "$OUT/$name.log"
    status=124
  else
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    [ "$status" -eq 137 ] && status=124
    tail -n 5 "$OUT/$name.log"
  fi
  # The rehearsal has no GPU, so pytest selects no test: its status 5.
  [ "$status" -eq 0 ] || { [ -n "$REHEARSE" ] && [ "$status" -eq 5 ]; } || FAILED=1
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$OUT/stages.tsv"
  echo "== $name: exit status $status after $((SECONDS - start)) s"
  summary
}

# shellcheck disable=SC2086  # SHAPES is a list
{
  stage machine 30 "$PYTHON" -c 'import platform, torch
print(platform.platform(), "python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
for i in range(torch.cuda.device_count()): print(torch.cuda.get_device_properties(i))'
  stage build 180 "$PYTHON" setup.py build_ext --inplace
  stage doctor 30 "$PYTHON" -m svdkern doctor
  stage tests 180 "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$OUT/tests.xml"
  stage linear 180 "$PYTHON" -m bench.linear --device "$DEVICE" --shapes $SHAPES --seconds "$SECONDS_A_GROUP" \
    --providers frozen eager addmm peft_default peft_bf16 svdkern-eager svdkern --out "$OUT/linear.jsonl"
  stage compile 90 "$PYTHON" -m bench.linear --device "$DEVICE" --shapes ${SHAPES%% *} --dtypes bf16 \
    --seconds "$SECONDS_A_GROUP" --providers frozen eager svdkern --compile --out "$OUT/linear_compile.jsonl"
}

cat "$OUT/summary.json"
exit "$FAILED"
