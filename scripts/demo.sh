#!/usr/bin/env bash
# A cluster of two workers on this machine, found over mDNS, answering three questions with the bundled model.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup-mlx.sh
cargo build --release --locked
binary=$PWD/target/release/mlx-cluster
scratch=$(mktemp -d "${TMPDIR:-/tmp}/mlx-cluster-demo-XXXXXX")
cluster=demo-$$-$RANDOM
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
url=http://127.0.0.1:$port
pids=()
export MLX_CLUSTER_HOME=$scratch/home

start() { # start NAME VERB…: in the background, what it logs goes to a file
  local name=$1
  shift
  "$binary" "$@" 2>"$scratch/$name.log" &
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

say "Two workers and a coordinator on this machine, which find each other over mDNS"
start one worker --cluster "$cluster" --name one --listen 127.0.0.1:0 >/dev/null
start two worker --cluster "$cluster" --name two --listen 127.0.0.1:0 >/dev/null
start coordinator coordinator --cluster "$cluster" --model demo/model --http "127.0.0.1:$port" --min-workers 2 --strategy pipeline
# The coordinator prints whom it finds, its plan, and when it is ready.
"$binary" status --url "$url" --wait 60 >/dev/null 2>"$scratch/status.log"

ask() {
  say "> $1"
  "$binary" generate --url "$url" --max-tokens 200 --temperature 0 --prompt "$1"
}
ask "Tell me a short story about a fox."
ask "What is 27 + 46?"
ask "What is mlx-cluster?"

say "What the cluster looked like"
"$binary" status --url "$url"
stop
say "All stopped."
