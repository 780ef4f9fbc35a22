#!/usr/bin/env bash
# All that is to be measured on a GPU (or TPU), in one go, in under ten minutes:
#
#     bash benchmarks/gpu.sh                     # results into benchmarks/results/gpu/
#     ENVS="64 128" LONG=20 bash benchmarks/gpu.sh /tmp/check
#
# Rates with and without guidance, and memory, for 1,024 to 32,768 envs; then the default run, with many envs, for as
# long as is left (LONG seconds), stopped by one Ctrl-C: it saves. Every JSON names the device.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu}
envs=${ENVS:-1024 4096 16384 32768}
python=${PYTHON:-python}
mkdir -p "$out"
# shellcheck disable=SC2086
$python benchmarks/throughput.py --num-envs $envs --turns 3 --no-baseline --json "$out/throughput.json"
# shellcheck disable=SC2086
$python benchmarks/throughput.py --scale $envs --turns 3 --json "$out/scale.json"
many=${envs##* }
run=$(mktemp -d)/run
timeout --signal=INT "${LONG:-240}" $python rladapter_ppo.py --num-envs "$many" --num-minibatches 8 \
    --total-timesteps 1e9 --no-anneal-lr --run-dir "$run" || true
cp "$run/config.json" "$out/long_config.json"
cp "$run/metrics.jsonl" "$out/long_metrics.jsonl"
echo "results: $out"
