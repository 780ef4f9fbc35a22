#!/usr/bin/env bash
# All that is to be measured on a GPU (or TPU), in one go, in some twenty minutes, most of them compilation:
#
#     bash benchmarks/gpu.sh                     # results into benchmarks/results/gpu/
#     STEPS="scale long" ENVS="64 128" LONG=20 bash benchmarks/gpu.sh /tmp/check
#
# compile: the programs of scale and env_rates, many processes at a time, into $RLADAPTER_CACHE
# scale:   rates with and without guidance, and memory, for ENVS envs, each in a process of its own
# env_rates: rates of env and rollout, and Craftax_Baselines' PPO beside ours
# same:    are two runs the same with XLA's deterministic operations, and without? Prints their last metrics.
# long:    a run with LONG_ENVS envs for LONG seconds, compilation included, stopped by one Ctrl-C: it saves
# Every JSON names the device.
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/results/gpu}")
cd "$(dirname "$0")/.."
envs=${ENVS:-1024 8192 32768}
python=${PYTHON:-python}
temporary=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$temporary"' EXIT
export RLADAPTER_CACHE=${RLADAPTER_CACHE:-$temporary/cache} XLA_PYTHON_CLIENT_PREALLOCATE=false
mkdir -p "$out"
rate_run=(benchmarks/throughput.py --num-envs 1024 8192 --no-trainings)
long_run=(rladapter_ppo.py --num-envs "${LONG_ENVS:-4096}" --num-minibatches 16 --queries-per-phase 64
    --total-timesteps 1e9 --no-anneal-lr)

jobs=()
side_by_side() {
    $python "$@" &
    jobs+=($!)
}

wait_for_all() { # and fail if one of them failed
    for job in "${jobs[@]}"; do wait "$job"; done
    jobs=()
}

compile() {
    for num_envs in $envs; do
        for guidance in full none; do
            side_by_side benchmarks/throughput.py --child --turns 1 --num-envs "$num_envs" --guidance $guidance
        done
    done
    side_by_side "${rate_run[@]}" --turns 1 >/dev/null
    wait_for_all
}

scale() {
    # shellcheck disable=SC2086
    $python benchmarks/throughput.py --scale $envs --guidance full none --scale-turns 3 --warm --json "$out/scale.json"
}

env_rates() {
    $python "${rate_run[@]}" --turns 64 --json "$out/throughput.json"
}

same() {
    for flags in "" --xla_gpu_deterministic_ops=true; do
        for turn in 1 2; do
            XLA_FLAGS="${XLA_FLAGS:-} $flags" side_by_side rladapter_ppo.py --adapter none --total-timesteps 1e5 --eval-episodes 64 \
                --run-dir "$temporary/same$flags$turn" >/dev/null
        done
    done
    wait_for_all
    for run in "$temporary"/same*; do
        echo "${run##*/same}: $(tail -n 1 "$run/metrics.jsonl" | grep -o '"losses/[a-z_]*": [-0-9.e]*' | tr '\n' ' ')"
    done | tee "$out/same.txt"
}

long() {
    run=$temporary/long
    timeout --foreground --signal=INT "${LONG:-240}" $python "${long_run[@]}" --run-dir "$run" || [ $? -eq 124 ]
    cp "$run/config.json" "$out/long_config.json"
    cp "$run/metrics.jsonl" "$out/long_metrics.jsonl"
}

for step in ${STEPS:-compile scale env_rates same long}; do
    echo "$step: $(date +%T)"
    $step
done
echo "results: $out"
