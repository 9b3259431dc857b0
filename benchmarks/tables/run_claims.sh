#!/usr/bin/env bash
# Runs the cells of docs/claims.md: one training a process, two processes at a time, at the lowest priority.
#
#     benchmarks/tables/run_claims.sh DIR                  # the stages of DEFAULT below, in that order
#     benchmarks/tables/run_claims.sh DIR a f              # some of them
#     LIST=1 benchmarks/tables/run_claims.sh DIR b         # only prints the commands
#
# DIR lies outside the checkout. What is finished is skipped and what was cut short goes on, so the same command restarts a killed
# one. Stage f needs CORL=PATH, a checkout of corl-team/CORL, and starts a cut run anew. OFFRL (the command), PYTHON, JOBS
# (processes) and NICE may be set; at the default, 19, next to nothing gets done while other programs keep the cores busy.
set -euo pipefail

DEFAULT="a f b c e a2pr d h i j g"
# Not by themselves: `long` and `maze` when docs/claims.md asks for them, `measure` when e and d are finished.

[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
RUNS=$(cd "$1" && pwd)
shift
TABLES=$(cd "$(dirname "$0")" && pwd)
OFFRL=${OFFRL:-offrl} PYTHON=${PYTHON:-python} JOBS=${JOBS:-2} NICE=${NICE:-19} CORL=${CORL:-}
export OMP_NUM_THREADS=1

# train FOLDER WORD...: a line of the queue for one sweep of one run, or of several short ones
train() { printf '%s train progress=false out=%q %s\n' "$OFFRL" "$RUNS/$1" "${*:2}"; }

# Seeds of one cell are lanes of one process: together they take less time than one by one, and give the same numbers to rounding.
stage_a() {
    local agent
    for agent in td3_bc prdc; do train a experiment=claims/a_prdc agent=$agent seed=0 lanes=5; done
    train a experiment=claims/a_alpha40 seed=0 lanes=5
    for agent in iql bc; do train a experiment=claims/a_baselines agent=$agent seed=0 lanes=5; done
}

stage_a2pr() {
    train a experiment=claims/a_depth seed=0 lanes=3
    train a experiment=claims/a_a2pr seed=0 lanes=3
}

# The finished runs of stage a go on to 500,000 updates in copies of their folders.
stage_long() {
    local agent
    for agent in td3_bc prdc; do go_on $agent experiment=claims/a_prdc agent=$agent updates=500000; done
    go_on "td3_bc (alpha 40)" experiment=claims/a_alpha40 updates=500000
}

# go_on METHOD WORD...: copies each finished run of stage a of that method, and prints the command that continues it
go_on() {
    local config folder name lanes
    for config in "$RUNS"/a/*/*/seed*/config.json; do
        folder=$(dirname "$config")
        [ -f "$folder/result.json" ] && grep -qF "\"method\": \"$1\"," "$config" || continue
        name=${folder#"$RUNS/a/"}
        [ -d "$RUNS/long/$name" ] || [ -n "${LIST:-}" ] || copy_to_go_on "$folder" "$RUNS/long/$name"
        [[ $name =~ /seed([0-9]+)(-([0-9]+))?-[0-9a-f]{8}$ ]]
        lanes=$((${BASH_REMATCH[3]:-${BASH_REMATCH[1]}} - BASH_REMATCH[1] + 1))
        train long "${@:2}" seed="${BASH_REMATCH[1]}" lanes=$lanes
    done
}

# copy_to_go_on FROM TO: without the result, so that nobody takes the copy for a finished run
copy_to_go_on() {
    mkdir -p "$(dirname "$2")"
    rm -rf "$2.part"
    cp -r "$1" "$2.part"
    rm "$2.part/result.json"
    mv "$2.part" "$2"
}

stage_f() {
    local seed method file
    [ -n "$CORL" ] || { echo "stage f is left out: set CORL=PATH, a checkout of corl-team/CORL" >&2; return; }
    mkdir -p "$RUNS/f"
    for seed in 0 1 2; do
        for method in td3_bc iql; do
            file=$RUNS/f/peers_${method}_seed$seed.json
            [ -f "$file" ] || printf '%s %q %q --methods %s --seeds 1 --dataset forge/halfcheetah/medium-replay-v0 --updates 200000 %s && mv %q %q\n' \
                "$PYTHON" "$TABLES/peers.py" "$CORL" $method "--evaluations 20 --final-episodes 100 --out $(printf %q "$file.part") data.size=200000 seed=$seed" \
                "$file.part" "$file"
        done
    done
}

stage_b() {
    local agent
    for agent in td3_bc prdc; do train b experiment=claims/b_hopper agent=$agent seed=0 lanes=5; done
    train b experiment=claims/b_weighted agent=td3_bc seed=0 lanes=5
    train b experiment=claims/b_hopper agent=iql seed=0 lanes=5
    train b experiment=claims/b_weighted agent=iql seed=0 lanes=5
}

stage_c() {
    local agent sampler dataset sets="forge/hopper/random-expert-0.05-v0 forge/halfcheetah/random-expert-0.1-v0"
    for agent in td3_bc iql; do
        for dataset in $sets; do
            for sampler in uniform advantage_weighted return_weighted top_percent; do
                train c experiment=claims/c_mixtures agent=$agent dataset=$dataset sampler=$sampler seed=0 lanes=3
            done
        done
    done
    for dataset in $sets; do # CQL costs ten times as much: last
        train c experiment=claims/c_cql dataset=$dataset sampler=uniform seed=0 lanes=3
        train c experiment=claims/c_cql_weighted dataset=$dataset sampler=advantage_weighted seed=0 lanes=3
        train c experiment=claims/c_cql dataset=$dataset sampler=top_percent seed=0 lanes=3
        train c experiment=claims/c_cql_weighted dataset=$dataset sampler=return_weighted seed=0 lanes=3
    done
}

stage_e() {
    local seed agent augment
    for seed in 0 1 2; do
        for agent in td3_bc iql; do train e experiment=claims/e_maze agent=$agent seed=$seed; done
    done
    for augment in policy_guided_diffusion world_model diffusion; do
        for seed in 0 1 2; do
            for agent in td3_bc iql; do train e experiment=claims/e_hopper agent=$agent augment=$augment seed=$seed; done
        done
    done
}

stage_maze() {
    local seed agent augment
    for augment in policy_guided_diffusion world_model diffusion; do
        for seed in 0 1 2; do
            for agent in td3_bc iql; do train e experiment=claims/e_maze agent=$agent augment=$augment seed=$seed; done
        done
    done
}

stage_g() {
    local recipe
    for recipe in g_alone g_world_model g_recorded g_penalty g_agents g_controls; do train g experiment=claims/$recipe; done
}

stage_h() {
    local agent
    for agent in fql flow_bc iql rebrac; do train h experiment=claims/h_cube dataset=forge/ogbench/cube-single-play-v0 agent=$agent; done
    train h experiment=claims/h_maze agent=flow_bc
    train h experiment=claims/h_maze agent=iql agent.expectile=0.9 agent.beta=10
    train h experiment=claims/h_maze agent=rebrac agent.activation=gelu agent.actor_bc=0.003 agent.critic_bc=0.01
    train h experiment=claims/h_maze agent=fql agent.alpha=10 agent.normalize_q=false agent.target=min
}

stage_i() {
    local agent dataset
    for dataset in forge/grid/cue-n2000-v0 forge/grid/place-n2000-v0; do
        for agent in discrete_cql iql; do history i $agent $dataset; done
    done
    history i iql forge/hopper/medium-replay-v1
}

# history FOLDER AGENT DATASET: the three methods of one row of claim I
history() { printf '%s %q --out %q --agents %s --datasets %s\n' "$PYTHON" "$TABLES/histories.py" "$RUNS/$1" "$2" "$3"; }

stage_j() {
    local agent dataset
    for dataset in forge/hopper/medium-replay-v0 forge/halfcheetah/medium-replay-v0; do
        for agent in iql td3_bc; do train j experiment=claims/j_online agent=$agent dataset=$dataset; done
        train j experiment=claims/j_online agent=rebrac dataset=$dataset batch_size=256 agent.hidden=[256,256] agent.actor_lr=3e-4 agent.critic_lr=3e-4
        train j experiment=claims/j_online agent=rlpd dataset=$dataset updates=0 online.updates_per_step=1 agent.critic_updates=1
    done
    for dataset in forge/hopper/medium-replay-v0 forge/halfcheetah/medium-replay-v0; do # ten times the others: last
        train j experiment=claims/j_online agent=cal_ql dataset=$dataset
    done
}

stage_d() {
    local seed recipe
    for recipe in bandit gambling lake; do
        for seed in 0 5 10 15; do
            train d experiment=dichotomy_of_control/$recipe seed=$seed
            train d experiment=dichotomy_of_control/$recipe agent=bc sampler=top_percent seed=$seed
        done
    done
}

# What needs finished runs: measures of synthetic trajectories, promises of the finite tasks.
stage_measure() {
    local run
    for run in "$RUNS"/e/{td3_bc,iql}/forge_pointmaze*/seed[012]-* "$RUNS"/b/{td3_bc,iql}/forge_hopper*/seed[012]-*; do
        [ -f "$run/result.json" ] && [ ! -f "$run/augment/metrics.json" ] || continue
        printf '%s augment metrics %q --coefficients 0,1,3,10\n' "$OFFRL" "$run"
    done
    [ -d "$RUNS/d" ] && printf '%s %q %q --out %q\n' "$PYTHON" "$TABLES/doc_curves.py" "$RUNS/d" "$RUNS/d"
}

[ $# -gt 0 ] || set -- $DEFAULT
for stage in "$@"; do
    declare -F "stage_$stage" >/dev/null || { echo "no stage $stage; there are $DEFAULT long maze measure" >&2; exit 2; }
done
queue() { for stage in "$@"; do "stage_$stage"; done; }
if [ -n "${LIST:-}" ]; then
    queue "$@"
    exit
fi
# One line is one job; a failed one leaves the others alone and is tried again by the next start.
queue "$@" | tr '\n' '\0' | xargs -0 -P "$JOBS" -I{} nice -n "$NICE" bash -c '{}' || {
    echo "some jobs did not finish; the same command goes on" >&2
    exit 1
}
