#!/usr/bin/env bash
# Speed and memory as ratios, each from paired rounds in one run. Wants a quiet machine. Arguments go to tests/bench/bench.py.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup-mlx.sh
cargo build --release --locked
exec "$(scripts/python-env.sh)" tests/bench/bench.py "$@"
