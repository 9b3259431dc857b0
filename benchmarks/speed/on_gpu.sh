#!/usr/bin/env bash
# What a machine with a GPU is asked, in at most ten minutes: the tests marked cuda, updates a second of TD3+BC and PRDC with 1, 10 and
# 50 lanes and of IQL with 1 and 10 (eager and captured graphs), PRDC beside TD3+BC over a real run, the denoiser at the authors' size.
# JSON and logs go to a folder; a step that fails stops no other.
#
#     benchmarks/speed/on_gpu.sh OUT               # needs offrl installed (`make setup`), run from the checkout
#     DEVICE=cpu SHARE=20 GRACE=300 benchmarks/speed/on_gpu.sh OUT     # a rehearsal without a GPU, a twentieth as long, with one lane
#
# PYTHON (default: .venv/bin/python where it exists), DEVICE (cuda) and SHARE (1) may be set.
set -u
[ $# -eq 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/../.." || exit 1
DEVICE=${DEVICE:-cuda} SHARE=${SHARE:-1}
GRACE=${GRACE:-5} # seconds that a step may take beyond its share; a rehearsal shares its processor with others: GRACE=300
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD
failed=0

# step NAME SECONDS COMMAND...: one measurement, with its log and a bound on its time
step() {
    local name=$1 limit=$(($2 / SHARE + GRACE)) began=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || failed=$((failed + 1))
    printf '{"step": "%s", "status": %d, "seconds": %d}\n' "$name" $status $((SECONDS - began)) | tee -a "$OUT/steps.jsonl"
}

: >"$OUT/steps.jsonl"
engines=eager,cudagraph lanes=1,10,50 iql_lanes=1,10 denoiser="--features 128 --batch 64 --trajectories 32 --updates 5 --rounds 2"
[ "$DEVICE" = cuda ] || engines=eager
[ "$SHARE" = 1 ] || { lanes=1; iql_lanes=1; denoiser="--features 16 --batch 4 --trajectories 4 --updates 1 --rounds 1 --steps 4"; }
rates() { # rates AGENT LANES: arguments of updates.py
    echo benchmarks/speed/updates.py --alone --device "$DEVICE" --agent "$1" --lanes "$2" --engines "$engines" --rounds 1 --seconds 3 --out "$OUT/$1.json"
}
step environment 5 "$PYTHON" -c "import json, torch; from offrl.utils.provenance import environment; print(json.dumps(environment(), default=str)); assert '$DEVICE' == 'cpu' or torch.cuda.is_available()"
collected=$([ "$DEVICE" = cuda ] || echo --collect-only)
# shellcheck disable=SC2086
step tests 140 "$PYTHON" -m pytest -m cuda -q $collected
# shellcheck disable=SC2046,SC2086
step td3_bc 110 "$PYTHON" $(rates td3_bc $lanes)
# shellcheck disable=SC2046,SC2086
step iql 70 "$PYTHON" $(rates iql $iql_lanes)
# shellcheck disable=SC2046,SC2086
step prdc 110 "$PYTHON" $(rates prdc $lanes)
step prdc_run 65 "$PYTHON" benchmarks/speed/prdc.py --device "$DEVICE" --size $((200000 / SHARE)) --updates $((2000 / SHARE)) --alphas 2.5 --marks '' --skip-build --out "$OUT/prdc_run.json"
# shellcheck disable=SC2086
step denoiser 60 "$PYTHON" benchmarks/speed/augment.py --device "$DEVICE" $denoiser --out "$OUT/denoiser.json"
echo "$failed of $(wc -l <"$OUT/steps.jsonl") steps failed; logs and JSON: $OUT"
[ $failed -eq 0 ]
