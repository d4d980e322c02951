#!/usr/bin/env bash
# The minutes of a GPU, in order of value: the same command until it ends with 0 (3: not all is done yet).
#
#   bash benchmarks/gpu_minutes.sh [--minutes 8.5] [--rehearse]
#
# It installs what runs/parcels/1/wheels.zip holds, joins the weights' parts if there are any (benchmarks/parcels.py;
# only the runs at the queue's end take them), and goes on with benchmarks/gpu.py's queue in runs/gpu; --rehearse: at toy
# size on a CPU, in runs/rehearsal. Where OUT names a folder, OUT/results.tar.gz has every result so far, also after a
# kill. PYTHON: the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} results=runs/gpu
for word in "$@"; do [ "$word" != --rehearse ] || results=runs/rehearsal; done
export PYTHONPATH=$PWD:$PWD/runs/site PYTHONUNBUFFERED=1

keep() {
  [ -n "${OUT:-}" ] && [ -d "$results" ] || return 0
  tar -czf "$OUT/.results" --exclude=checkpoints --exclude=reference "$results" || [ $? = 1 ]  # 1: one grew meanwhile
  mv "$OUT/.results" "$OUT/results.tar.gz"
}
trap keep EXIT

if [ -e runs/parcels/1/wheels.zip ] && [ ! -d runs/site ]; then
  "$python" -m zipfile -e runs/parcels/1/wheels.zip runs/wheels
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target runs/site.new runs/wheels/*.whl
  mv runs/site.new runs/site
fi
if ls runs/parcels/*/part.json >/dev/null 2>&1 && ! ls weights/*smollm2* >/dev/null 2>&1; then
  "$python" -m benchmarks.parcels join runs/parcels || exit 3
fi
"$python" -m benchmarks.gpu --queue "$results" "$@" &
queue=$!
trap 'kill "$queue"' HUP INT TERM
while sleep 20; do keep; done >/dev/null 2>&1 &
trap "kill $! || :; keep" EXIT
status=0
wait "$queue" || status=$?
[ "$status" -le 128 ] || wait "$queue" || status=$?  # a signal ended the first wait, not the queue
exit "$status"
