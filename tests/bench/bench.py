"""Speed and memory as ratios within one run: `bench.py [--only decode,memory,pipeline,tensor,hop,server,train] [--rounds 5]`.

Every ratio is the median of paired rounds (first one side, then the other), shown with its smallest and largest. Run it on a quiet
machine. A figure that misses its target is printed as such; the exit status does not depend on it.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "harness"))
import load
import models
import reference
import requests
import training
from cluster import Coordinator, Workers
from common import PinnedWorkers, row

ROOT = Path(__file__).parents[2]
MEMORY_BASE = 150e6
# Tokens of each of the 16 streams.
SERVER_TOKENS = 16


@contextlib.contextmanager
def cluster(model: str, workers: int = 1, pinned: bool = False, strategy: str = ""):
    with (PinnedWorkers if pinned else Workers)(workers) as nodes, Coordinator(nodes, models.path(model), strategy=strategy) as coordinator:
        yield coordinator


def decode(rounds: int) -> None:
    """One worker against mlx-lm's own loop, through HTTP and gRPC on our side."""
    wanted = [("host-bound", 128, 1.4), ("kernel-bound", 32, 1.0), ("routed", 64, 1.0), ("latent", 64, 1.0), ("hybrid", 64, 1.0)]
    for model, max_tokens, target in wanted:
        ids = load.prompt(128, 1)
        loop = reference.Loop(models.path(model))
        prefill, decoding = [], []
        with cluster(model) as coordinator:
            loop.speeds(ids, 8), load.speeds(coordinator.url, ids, 8)
            for _ in range(rounds):
                theirs, ours = loop.speeds(ids, max_tokens), load.speeds(coordinator.url, ids, max_tokens)
                prefill.append(ours[0] / theirs[0])
                decoding.append(ours[1] / theirs[1])
        row(f"decode of the {model} model, one worker / mlx-lm", decoding, target)
        row(f"prefill of the {model} model, one worker / mlx-lm", prefill, 1.0)


def memory(rounds: int) -> None:
    """A worker's resident memory, its engine included, over 1.1 times its shard and 150 MB."""
    values = []
    with cluster("kernel-bound", 2) as coordinator:
        load.together(coordinator.url, [load.prompt(64, i) for i in range(4)], 8)
        shards = {rank["worker"]: rank["weights_bytes"] for stage in requests.get(f"{coordinator.url}/v1/cluster", timeout=5).json()["plan"]["stages"] for rank in stage["ranks"]}
        for name, process in coordinator.workers.running.items():
            if name in shards:
                resident = sum(resident_bytes(pid) for pid in family(process.pid))
                values.append(resident / (1.1 * shards[name] + MEMORY_BASE))
                print(f"  {name}: {resident / 1e6:.0f} MB resident, shard {shards[name] / 1e6:.0f} MB")
    row("resident memory of a worker / (1.1 x its shard + 150 MB)", values, 1.0, at_most=True)


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return [pid] + [descendant for file in children for child in file.read_text().split() for descendant in family(int(child))]


def resident_bytes(pid: int) -> int:
    return status_bytes(pid, "VmRSS")


def status_bytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def pipeline(rounds: int) -> None:
    """Two workers against one, a core each, eight requests at once."""
    decoding, prefill = [], []
    short, long = [load.prompt(8, i) for i in range(8)], load.prompt(1024, 9)
    with cluster("compute-bound", 1, True) as one, cluster("compute-bound", 2, True) as two:
        for url in (one.url, two.url):
            load.together(url, short, 2)
        for _ in range(rounds):
            seconds = [load.together(url, short, 48) - load.together(url, short, 1) for url in (one.url, two.url)]
            decoding.append(seconds[0] / seconds[1])
        for _ in range(rounds):
            seconds = [load.timed(url, long, 1) for url in (one.url, two.url)]
            prefill.append(seconds[0] / seconds[1])
    row("decode of 8 requests, two workers / one", decoding, 1.7)
    row("prefill of a 1,024-token prompt, two workers / one", prefill, 1.7)


def tensor(rounds: int) -> None:
    """A tensor-parallel group of two workers against one, a core each; and what each of its engines has in memory, now and at most."""
    decoding, batch, prefill = [], [], []
    ids, short = load.prompt(64, 1), [load.prompt(8, i) for i in range(4)]
    with cluster("wide-layers", 1, True) as one, cluster("wide-layers", 2, True, "tensor") as two:
        for url in (one.url, two.url):
            load.speeds(url, ids, 8), load.together(url, short, 2)
        for _ in range(rounds):
            (ours, theirs) = (load.speeds(url, ids, 32) for url in (two.url, one.url))
            prefill.append(ours[0] / theirs[0])
            decoding.append(ours[1] / theirs[1])
            seconds = [load.together(url, short, 24) - load.together(url, short, 1) for url in (one.url, two.url)]
            batch.append(seconds[0] / seconds[1])
        size = sum(file.stat().st_size for file in models.path("wide-layers").glob("*.safetensors"))
        engines = [pid for process in two.workers.running.values() for pid in family(process.pid)[1:]]
        allowed = 0.55 * size + MEMORY_BASE
        resident, peak = ([status_bytes(pid, line) / allowed for pid in engines] for line in ("VmRSS", "VmHWM"))
    row("decode of one request, tensor-parallel over two / one worker", decoding, 1.6)
    row("decode of 4 requests, tensor-parallel over two / one worker", batch, 1.6)
    row("prefill of 64 tokens, tensor-parallel over two / one worker", prefill, 1.6)
    row("resident memory of a rank / (0.55 x the model + 150 MB)", resident, 1.0, at_most=True)
    row("peak memory of a rank / (0.55 x the model + 150 MB)", peak, 1.0, at_most=True)


def hop(rounds: int) -> None:
    """The way from one engine to the next at decode, against bare TCP with the same bytes."""
    config, _ = models.CONFIGS["wide"]
    size = str(4 * config["hidden_size"])
    subprocess.run(["cargo", "build", "-q", "--release", "-p", "mlx-cluster-proto", "--example", "tcp_one_way"], cwd=ROOT, check=True)
    values = []
    with cluster("wide", 2) as coordinator:
        for i in range(rounds):
            load.timed(coordinator.url, load.prompt(4, i), 200)
            ours = requests.get(f"{coordinator.url}/v1/cluster", timeout=5).json()["load"]["hop_ns"]
            bare = int(subprocess.run([ROOT / "target/release/examples/tcp_one_way", size], capture_output=True, text=True, check=True).stdout)
            print(f"  hop {ours / 1e3:.0f} us, bare TCP {bare / 1e3:.0f} us with {size} bytes")
            values.append(ours / bare)
    row(f"hop at decode / bare TCP one-way of {size} bytes", values, 2.0, at_most=True)


def server(rounds: int) -> None:
    """16 streams at once against mlx_lm.server, 64-token prompts."""
    texts = ["".join(chr(i) for i in load.random.Random(seed).choices(range(97, 123), k=64)) for seed in range(16)]
    folder = models.path("kernel-bound")
    rates: dict[int, list[float]] = {1: [], 2: []}
    firsts: dict[int, list[float]] = {1: [], 2: []}
    theirs_extra, ours_extra = {"model": str(folder)}, {"ignore_eos": True}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(rounds):
            with reference.Server(folder, Path(scratch) / "server.log") as them:
                load.streams(them.url, texts[:1], 1, theirs_extra)
                their_rate, their_first = load.streams(them.url, texts, SERVER_TOKENS, theirs_extra)
            print(f"  mlx_lm.server {their_rate:.1f} tokens/s, first token after {their_first:.1f} s", flush=True)
            for workers in (1, 2):
                with cluster("kernel-bound", workers) as us:
                    load.streams(us.url, texts[:1], 1, ours_extra)
                    rate, first = load.streams(us.url, texts, SERVER_TOKENS, ours_extra)
                print(f"  {workers} worker(s) {rate:.1f} tokens/s, first token after {first:.1f} s", flush=True)
                rates[workers].append(rate / their_rate)
                firsts[workers].append(first / their_first)
    row("16 streams, tokens/s, one worker / mlx_lm.server", rates[1], 1.0)
    row("16 streams, median time to first token, one worker / mlx_lm.server", firsts[1], 0.7, at_most=True)
    row("16 streams, tokens/s, two workers / mlx_lm.server", rates[2], 1.7)


PARTS = {"decode": decode, "memory": memory, "hop": hop, "pipeline": pipeline, "tensor": tensor, "server": server, "train": training.train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault("MLX_CLUSTER_BIN", str(ROOT / "target/release/mlx-cluster"))
    for name in arguments.only.split(","):
        PARTS[name](arguments.rounds)


if __name__ == "__main__":
    main()
