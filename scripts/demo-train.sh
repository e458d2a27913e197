#!/usr/bin/env bash
# A cluster of two workers on this machine that teaches the bundled model to subtract, and then serves it with and without what it learned.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup-mlx.sh
cargo build --release --locked
binary=$PWD/target/release/mlx-cluster
scratch=$(mktemp -d "${TMPDIR:-/tmp}/mlx-cluster-demo-train-XXXXXX")
cluster=demo-train-$$-$RANDOM
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MLX_CLUSTER_URL=http://127.0.0.1:$port
# Of held-out questions, to a model and to the same with the adapter.
questions=200
train_s=600
percent_before=10
percent_after=90
pids=()

start() { # start NAME VERB…: in the background, with a home of its own; what it logs goes to a file
  local name=$1
  shift
  MLX_CLUSTER_HOME=$scratch/home-$name "$binary" "$@" 2>"$scratch/$name.log" &
  pids+=($!)
}
stop() { # ask politely, wait 10 s, then insist
  local pid
  ((${#pids[@]})) || return 0
  kill "${pids[@]}" 2>/dev/null || true
  for _ in $(seq 100); do
    kill -0 "${pids[@]}" 2>/dev/null || break
    sleep 0.1
  done
  for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
  wait "${pids[@]}" 2>/dev/null || true
  pids=()
}
finish() {
  local status=$?
  stop
  if ((status && status < 128)); then
    echo "the demo failed; the last lines of each log:" >&2
    tail -n 15 "$scratch"/*.log >&2 || true
  fi
  rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '\n\033[1m%s\033[0m\n' "$1"; }

within() { # within SECONDS COMMAND…: macOS has no timeout(1)
  local limit=$1
  shift
  python3 - "$limit" "$@" <<'PYTHON'
import signal, subprocess, sys

limit, command = float(sys.argv[1]), sys.argv[2:]
child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
signal.signal(signal.SIGTERM, lambda *_: child.terminate())
try:
    sys.exit(child.wait(limit))
except subprocess.TimeoutExpired:
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
    sys.exit(f"{' '.join(command)} took longer than {limit:.0f} s")
PYTHON
}

post() { # post PATH JSON
  curl -sS --fail-with-body --max-time 60 "$MLX_CLUSTER_URL$1" -H 'Content-Type: application/json' -d "$2" && echo
}

ask() { # ask MODEL QUESTION
  printf '%s: ' "$1"
  within 60 "$binary" generate --model "$1" --max-tokens 100 --temperature 0 --prompt "$2"
}

percent_exact() { # percent_exact MODEL: of the held-out questions, how many are answered word for word
  within 300 "$binary" evaluate --data "$scratch/data" --limit $questions --max-tokens 100 --json --model "$1" >"$scratch/measured.json" || return 1
  python3 -c 'import json, sys; print("%.1f" % (100 * json.load(open(sys.argv[1]))["exact_match"]))' "$scratch/measured.json"
}

say "Questions and answers, of which a tenth of the pairs of numbers is held out"
python3 demo/subtract/make_data.py --to "$scratch/data"

say "Two workers and an idle coordinator on this machine"
start one worker --cluster "$cluster" --name one --listen 127.0.0.1:0 >/dev/null
start two worker --cluster "$cluster" --name two --listen 127.0.0.1:0 >/dev/null
start coordinator coordinator --cluster "$cluster" --http "127.0.0.1:$port" --min-workers 2
for _ in $(seq 600); do
  curl -sf --max-time 5 "$MLX_CLUSTER_URL/health" >/dev/null && break
  sleep 0.1
done
curl -sSf --max-time 5 "$MLX_CLUSTER_URL/health" >/dev/null

say "The base model, spread over both, before"
post /v1/cluster/load "{\"model\": \"$PWD/demo/model\", \"strategy\": \"pipeline\"}"
within 60 "$binary" status --wait 60 >/dev/null
before=$(percent_exact demo/model)
echo "$before % of $questions held-out questions answered exactly"

say "Training, each worker on its own layers"
began=$SECONDS
within $train_s "$binary" train --config demo/subtract/lora.yaml --strategy pipeline --data "$scratch/data" --adapter-path "$scratch/adapter"
seconds=$((SECONDS - began))

say "The adapter beside the base model, in the same cluster"
post /v1/adapters "{\"name\": \"subtract\", \"path\": \"$scratch/adapter\"}"
question="What is 83 - 47?"
say "> $question"
ask demo/model "$question"
ask demo/model:subtract "$question"
base=$(percent_exact demo/model)
adapted=$(percent_exact demo/model:subtract)
say "Held-out subtractions answered exactly: base $base %, with the adapter $adapted %, after $seconds s of training"
stop
python3 - "$before" "$base" "$adapted" <<PYTHON
import sys

before, base, adapted = map(float, sys.argv[1:])
if before >= $percent_before or base != before or adapted < $percent_after:
    sys.exit(f"wanted: the base below $percent_before % and the same before and after, the adapter at least at $percent_after %")
PYTHON
say "All stopped."
