# The commands of this project. Each one installs what it needs into this folder.
.PHONY: build demo demo-train test test-net bench

build: ## the binary for daily use: target/release/mlx-cluster
	scripts/setup-mlx.sh
	cargo build --release --locked

demo: ## one coordinator and two workers on this machine, three questions
	scripts/demo.sh

demo-train: ## two workers on this machine teach the bundled model to subtract and serve it with the adapter
	scripts/demo-train.sh

test: ## formatting, lints, all tests, parity with mlx-lm
	scripts/test.sh

test-net: ## as root on Linux: workers in network namespaces with a slow and a fast cable between them
	cargo build --locked
	scripts/python-env.sh
	.venv/bin/python tests/net/links.py

bench: ## speed and memory, as ratios to mlx-lm and to one worker
	scripts/bench.sh
