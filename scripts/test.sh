#!/usr/bin/env bash
# Everything that a change must pass, from a clean clone on: formatting, lints, all Rust tests, documentation, parity with mlx-lm,
# sameness of answers, the official client. One build serves them all. Goes on after a failure, and says at the end what failed.
set -uo pipefail
cd "$(dirname "$0")/.."

failed=()
closing=()
step() { # step NAME COMMAND…: runs it, keeps the runner's closing line
  local name=$1 log start=$SECONDS
  shift
  log=$(mktemp)
  printf '\n== %s\n' "$name"
  if "$@" 2>&1 | tee "$log"; then
    closing+=("ok      $name: $(closing_line "$log") ($((SECONDS - start)) s)")
  else
    failed+=("$name")
    closing+=("FAILED  $name: $(closing_line "$log") ($((SECONDS - start)) s)")
    while read -r line; do closing+=("        $line"); done < <(grep -aE ' FAILED|^error' "$log" | head -n 8 | cut -c 1-300)
  fi
  rm -f "$log"
}
closing_line() { # the counts of all test runners in a log together, else its last line
  local counts
  counts=$(sed -nE 's/^(test result: .*\. )?([0-9]+) passed[;,] ([0-9]+) failed.*/\2 \3/p' "$1" | awk '{p += $1; f += $2; n++} END {if (n) print p " passed, " f " failed"}')
  echo "${counts:-$(tail -n 1 "$1" | cut -c 1-100)}"
}
rust_tests() { cargo test --locked --workspace --no-fail-fast; }
rust_docs() { RUSTDOCFLAGS='-D warnings' cargo doc --locked --workspace --no-deps; }

scripts/setup-mlx.sh || exit 1
step 'formatting' cargo fmt --all --check
step 'lints' cargo clippy --locked --workspace --all-targets -- -D warnings
step 'rust tests' rust_tests
step 'documentation' rust_docs

step 'python environment' scripts/python-env.sh
python=.venv/bin/python
export MLX_CLUSTER_BIN=$PWD/target/debug/mlx-cluster
step 'every architecture' "$python" tests/parity/architectures/run.py
step 'every cache' "$python" tests/parity/architectures/caches.py
step 'every quantisation' "$python" tests/parity/architectures/run.py --only =qwen3_moe --schemes affine2,affine3,affine5,affine6,affine8,mxfp4,nvfp4,mxfp8
step 'optimizers and losses' "$python" tests/parity/training/optimizers.py
step 'training' "$python" tests/parity/training/losses.py
step 'training of every architecture' "$python" tests/parity/training/losses.py --architectures --first
step 'adapters of requests' "$python" tests/parity/training/serving.py
step 'parity with mlx-lm' "$python" tests/parity/parity.py
step 'training kills' "$python" tests/training/kills.py --kills 6
step 'fused models' "$python" tests/parity/training/fuse.py
step 'evaluation' "$python" tests/parity/training/evaluate.py
step 'sameness' "$python" tests/parity/sameness.py
step 'openai client' "$python" tests/clients/openai_client.py

printf '\n== summary\n'
printf '%s\n' "${closing[@]}"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all passed"
