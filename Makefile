# The commands of this project. Each one installs what it needs into this folder.
.PHONY: build demo test bench

build: ## the binary for daily use: target/release/mlx-cluster
	scripts/setup-mlx.sh
	cargo build --release --locked

demo: ## one coordinator and two workers on this machine, three questions
	scripts/demo.sh

test: ## formatting, lints, all tests, parity with mlx-lm
	scripts/test.sh

bench: ## speed and memory, as ratios to mlx-lm and to one worker
	scripts/bench.sh
