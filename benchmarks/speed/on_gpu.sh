#!/usr/bin/env bash
# What a machine with a GPU is asked, in at most ten minutes: the tests marked cuda, updates a second with 1 and 10 lanes (eager and
# captured graphs), PRDC's index, the denoiser at the authors' size. JSON and logs go to a folder; a step that fails stops no other.
#
#     benchmarks/speed/on_gpu.sh OUT               # needs offrl installed (`make setup`), run from the checkout
#     DEVICE=cpu SHARE=20 benchmarks/speed/on_gpu.sh OUT     # a rehearsal without a GPU, each step cut to a twentieth of its time
#
# PYTHON (default: .venv/bin/python where it exists), DEVICE (cuda) and SHARE (1) may be set.
set -u
[ $# -eq 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.." || exit 1
DEVICE=${DEVICE:-cuda} SHARE=${SHARE:-1}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD
failed=0

# step NAME SECONDS COMMAND...: one measurement, with its log and a bound on its time
step() {
    local name=$1 limit=$(($2 / SHARE + 20)) began=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || failed=$((failed + 1))
    printf '{"step": "%s", "status": %d, "seconds": %d}\n' "$name" $status $((SECONDS - began)) | tee -a "$OUT/steps.jsonl"
}

: >"$OUT/steps.jsonl"
engines=eager
[ "$DEVICE" = cuda ] && engines=eager,cudagraph
step environment 10 "$PYTHON" -c "import json, torch; from offrl.utils.provenance import environment; print(json.dumps(environment(), default=str)); assert '$DEVICE' == 'cpu' or torch.cuda.is_available()"
step tests 150 "$PYTHON" -m pytest -m cuda -q
step td3_bc 110 "$PYTHON" benchmarks/speed/updates.py --device "$DEVICE" --agent td3_bc --lanes 1,10,50 --engines $engines --seconds $((4 / SHARE + 1)) --out "$OUT/td3_bc.json"
step iql 70 "$PYTHON" benchmarks/speed/updates.py --device "$DEVICE" --agent iql --lanes 1,10 --engines $engines --seconds $((4 / SHARE + 1)) --out "$OUT/iql.json"
step prdc 120 "$PYTHON" benchmarks/speed/prdc.py --device "$DEVICE" --size $((200000 / SHARE)) --updates $((4000 / SHARE)) --marks '' --out "$OUT/prdc.json"
step denoiser 80 "$PYTHON" benchmarks/speed/augment.py --device "$DEVICE" --features 128 --batch 64 --trajectories 32 --rounds 2 --out "$OUT/denoiser.json"
echo "$failed of $(wc -l <"$OUT/steps.jsonl") steps failed; logs and JSON: $OUT"
[ $failed -eq 0 ]
