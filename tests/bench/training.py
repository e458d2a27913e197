"""Speed and memory of fine-tuning, against `mlx_lm.lora` and against fewer workers, each worker (and mlx-lm) with one core."""

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import models
import requests
from cluster import Processes, binary, free_port
from common import PinnedWorkers, core, row

JOB_S = 900
# An update has two batches of 16 rows: a replica gets some 1,000 tokens of each, and a micro-batch of a pipeline has 2 rows.
ROWS, ACCUMULATION = 16, 2
# As those of most data do, rows differ: mlx-lm fills a batch up to its longest. And rows of one length, where nothing is filled up.
VARIED, EVEN = (64, 192), (128, 128)
# The first report has the first calls of all kernels in it and is left out.
REPORTS = 3

# mlx_lm.lora with the reports in full.
THEIRS = """
import json, sys, types
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lm import lora
from mlx_lm.tuner.callbacks import TrainingCallback

class Written(TrainingCallback):
    def on_train_loss_report(self, info):
        with open(sys.argv[2], "a") as file:
            print(json.dumps(info), file=file)

# `run` makes its own callback, whatever it is given.
lora.get_reporting_callbacks = lambda *_, **__: Written()
lora.run(types.SimpleNamespace(**lora.CONFIG_DEFAULTS | json.load(open(sys.argv[1]))))
"""


@dataclass
class Measured:
    tokens_per_second: float
    # Bytes of MLX's memory at its peak, by worker.
    peaks: dict[str, float]


def train(rounds: int) -> None:
    """The same job by mlx-lm, by one worker, and by two in both ways; then the memory of stages where weights are most of it."""
    even, varied, pipeline, data, memory = [], [], [], [], []
    with tempfile.TemporaryDirectory() as scratch, cluster(1) as one, cluster(2) as two:
        scratch = Path(scratch)
        job, even_job = (settings(scratch, "training", ROWS, ACCUMULATION, REPORTS, tokens) for tokens in (VARIED, EVEN))
        for _ in range(rounds):
            even.append(by_cluster(one, even_job, "auto", scratch).tokens_per_second / by_mlx_lm(even_job, scratch))
            theirs = by_mlx_lm(job, scratch)
            ours = by_cluster(one, job, "auto", scratch).tokens_per_second
            split = by_cluster(two, job, "pipeline", scratch).tokens_per_second
            copies = by_cluster(two, job, "data", scratch).tokens_per_second
            print(f"  tokens/s: mlx_lm.lora {theirs:.0f}, one worker {ours:.0f}, pipeline of two {split:.0f}, two replicas {copies:.0f}", flush=True)
            varied.append(ours / theirs)
            pipeline.append(split / ours)
            data.append(copies / ours)
        heavy = settings(scratch, "wide-layers", 1, 1, 2)
        alone = max(by_cluster(one, heavy, "auto", scratch).peaks.values())
        stages = by_cluster(two, heavy, "pipeline", scratch).peaks
        for worker, peak in sorted(stages.items()):
            print(f"  {worker}: peak {peak:.3f} GB of MLX's memory as a stage, alone {alone:.3f} GB")
            memory.append(peak / alone)
    row("training on rows of one length, tokens/s, one worker / mlx_lm.lora", even, 1.0)
    row("training on rows that differ, tokens/s, one worker / mlx_lm.lora", varied, 1.0)
    row("training, tokens/s, pipeline of two workers / one", pipeline, 1.6)
    row("training, tokens/s, two replicas / one worker", data, 1.8)
    row("training, peak memory of a stage of two / one worker", memory, 0.6, at_most=True)


@contextlib.contextmanager
def cluster(workers: int):
    """The address of a coordinator without a model over workers that are pinned to a core each."""
    with PinnedWorkers(workers) as nodes:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        nodes.start("coordinator", "coordinator", "--cluster", nodes.cluster, "--http", f"127.0.0.1:{port}", "--min-workers", str(workers))
        deadline = time.monotonic() + 60
        while True:
            nodes.check()
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {workers} workers after 60 s\n{nodes.logs()}")
            time.sleep(0.1)
        yield url


def settings(scratch: Path, model: str, rows: int, accumulation: int, reports: int, row_tokens: tuple[int, int] = VARIED) -> dict:
    """A job of mlx-lm's keys."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    rng = random.Random(1)
    # One token a character. With as many rows as a report has, each is over the same ones.
    texts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(*row_tokens))) for _ in range(accumulation * rows)]
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "model": str(models.path(model)), "data": str(folder), "train": True, "fine_tune_type": "lora", "num_layers": -1,
        "batch_size": rows, "iters": accumulation * reports, "grad_accumulation_steps": accumulation, "steps_per_report": accumulation,
        "steps_per_eval": 10_000, "val_batches": 1, "save_every": 10_000, "max_seq_length": 256, "learning_rate": 1e-5, "optimizer": "adam",
        "lora_parameters": {"rank": 8, "scale": 10.0, "dropout": 0.0}, "seed": 0,
    }


def written(job: dict, scratch: Path) -> tuple[Path, Path]:
    """The file of a job, and a new folder for its adapter."""
    adapter = Path(tempfile.mkdtemp(dir=scratch))
    path = adapter / "lora.yaml"
    # JSON is YAML.
    path.write_text(json.dumps(job | {"adapter_path": str(adapter)}))
    return path, adapter


def by_mlx_lm(job: dict, scratch: Path) -> float:
    config, adapter = written(job, scratch)
    told = adapter / "reports.jsonl"
    command = [*core(0), sys.executable, "-c", THEIRS, str(config), str(told)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=JOB_S, env=environment)
    rates = [json.loads(line)["tokens_per_second"] for line in told.read_text().splitlines()] if told.exists() else []
    if run.returncode or len(rates) != job["iters"] // job["steps_per_report"]:
        raise RuntimeError(f"mlx_lm.lora: {run.stdout[-500:]}{run.stderr[-500:]}")
    return statistics.median(rates[1:])


def by_cluster(url: str, job: dict, strategy: str, scratch: Path) -> Measured:
    config, adapter = written(job, scratch)
    command = [binary(), "train", "--coordinator", url, "--config", str(config), "--strategy", strategy]
    environment = os.environ | {"MLX_CLUSTER_HOME": str(Processes.home)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=JOB_S, env=environment)
    if run.returncode:
        raise RuntimeError(f"train: {run.stdout[-500:]}{run.stderr[-500:]}")
    reports = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    reports = [report for report in reports if "train_loss" in report]
    if len(reports) != job["iters"] // job["steps_per_report"]:
        raise RuntimeError(f"{len(reports)} reports of {strategy}")
    peaks = {worker: max(report["peak_memory_per_worker"][worker] for report in reports) for worker in reports[0]["peak_memory_per_worker"]}
    return Measured(statistics.median(report["tokens_per_second"] for report in reports[1:]), peaks)
