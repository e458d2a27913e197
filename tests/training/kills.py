"""Does a job end with the same bits when processes are killed while it runs?

    python tests/training/kills.py [--kills 20] [--seed N] [--layout NAME] [--until 0.15] [--twice] [--stop]

For each layout one job runs uncut. Then others of the same settings run, and at a random moment kill -9 hits an engine, a worker or the
coordinator; a worker comes back within 3 s, a coordinator at once, and is told to resume. In the end the adapters, those of checkpoints
too, are the same to the last bit, and metrics.jsonl has the same losses, each once. Ends with `N passed, N failed`.

`--stop` stops an engine instead (SIGSTOP), as a machine that hangs would.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

mx.set_default_device(mx.cpu)
root = Path(__file__).parents[2]
sys.path[1:1] = [str(root / "tests" / "harness"), str(root / "tests" / "parity")]

import requests

from cluster import Processes, binary, free_port
from models import AFFINE4, Case, build, config
from report import Report

WAIT_S = 180
# Seconds within which somebody has to notice that an engine does not answer any more.
NOTICED_S = 15
VICTIMS = ["engine", "worker", "coordinator"]
ITERATIONS, SAVE_EVERY = 40, 4
# Some seconds more than a worker takes to come back.
GROWN_ITERATIONS = 200


@dataclass
class Layout:
    name: str
    workers: int
    strategy: str
    accumulation: int
    fine_tune: str = "lora"
    # Sums over other ranks are rounded otherwise, so a job that goes on with fewer workers has other bits. An engine comes back to the same ranks.
    victims: tuple[str, ...] = tuple(VICTIMS)


LAYOUTS = [
    Layout("pipeline", 2, "pipeline", 2),
    Layout("data", 2, "data", 1),
    Layout("split matrices", 2, "tensor", 2, "full", ("engine",)),
    Layout("one worker", 1, "auto", 2),
    Layout("pipeline, no accumulation", 2, "pipeline", 1),
]


class Cluster(Processes):
    """Workers and a coordinator that can be killed and come back, each with a folder of its own that stays."""

    def __init__(self, layout: Layout, model: Path, data: Path):
        super().__init__()
        self.layout, self.model, self.data = layout, model, data
        self.name, self.port = f"kills-{uuid.uuid4().hex[:8]}", free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        for i in range(self.layout.workers):
            self.start_worker(f"worker{i}")
        self.start_coordinator()
        return self

    def start_worker(self, name: str) -> None:
        self.start_at_home(name, "worker", "--cluster", self.name, "--name", name, "--listen", "127.0.0.1:0")

    def start_coordinator(self) -> None:
        self.start_at_home("coordinator", "coordinator", "--cluster", self.name, "--http", f"127.0.0.1:{self.port}",
                           "--min-workers", str(self.layout.workers))
        self.until(lambda: requests.get(f"{self.url}/health", timeout=2).status_code == 200, "the coordinator is not healthy")

    def start_at_home(self, name: str, *args: str) -> None:
        home = self.folder / f"{name}-home"
        home.mkdir(exist_ok=True)
        measured = self.home / "measurement.json"
        if measured.exists() and not (home / measured.name).exists():
            shutil.copy(measured, home)
        self.start(name, *args, prefix=["env", f"MLX_CLUSTER_HOME={home}"])
        if not measured.exists() and name.startswith("worker"):
            self.until((home / measured.name).exists, f"{name} has measured nothing")
            shutil.copy(home / measured.name, measured)

    def until(self, condition, why: str, limit: float = WAIT_S, pause: float = 0.02) -> None:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except requests.RequestException:
                pass
            time.sleep(pause)
        raise TimeoutError(f"{why} after {limit} s\n{self.logs()}")

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def engines(self, worker: str) -> list[int]:
        """Process ids of what a worker has started to train with."""
        found = subprocess.run(["pgrep", "-P", str(self.running[worker].pid)], capture_output=True, text=True).stdout.split()
        is_engine = lambda pid: b"--probe" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        return [int(pid) for pid in found if os.path.exists(f"/proc/{pid}/cmdline") and is_engine(pid)]

    def signal_engine(self, worker: str, number: signal.Signals) -> None:
        """Waits a little for one that is just being started."""
        self.until(lambda: self.engines(worker), f"{worker} has no engine", 20)
        os.kill(self.engines(worker)[0], number)

    def tool(self, *args: str) -> str:
        command = [binary(), args[0], "--coordinator", self.url, *args[1:]]
        run = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, env=os.environ | {"MLX_CLUSTER_HOME": str(self.folder / "tool")})
        if run.returncode:
            raise RuntimeError(f"{' '.join(args)}: {run.stderr.strip()[-400:]}")
        return run.stdout

    def begin(self, adapter: str, **changes) -> "Job":
        settings = {
            "model": str(self.model), "data": str(self.data), "adapter_path": str(self.folder / adapter), "train": True, "test": True,
            "fine_tune_type": self.layout.fine_tune, "num_layers": -1, "batch_size": 4, "iters": ITERATIONS, "save_every": SAVE_EVERY, "steps_per_report": 1, "steps_per_eval": 9,
            "val_batches": 2, "learning_rate": 1e-3, "optimizer": "adamw", "mask_prompt": True, "seed": 11,
            "grad_accumulation_steps": self.layout.accumulation,
            "lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1},
            "lr_schedule": {"name": "cosine_decay", "warmup": 5, "arguments": [1e-3, ITERATIONS, 1e-5]},
            **changes,
        }
        path = self.folder / "lora.json"
        path.write_text(json.dumps(settings))
        job = self.tool("train", "--config", str(path), "--strategy", self.layout.strategy, "--detach").strip()
        return Job(self, job, self.folder / adapter)


class Job:
    def __init__(self, cluster: Cluster, name: str, adapter: Path):
        self.cluster, self.name, self.adapter = cluster, name, adapter
        self.started = time.monotonic()
        # What was seen of it: seconds, iteration.
        self.seen: list[tuple[float, int]] = []

    def look(self) -> dict:
        record = requests.get(f"{self.cluster.url}/v1/jobs/{self.name}", timeout=5).json()
        self.seen.append((time.monotonic(), record["iteration"]))
        return record

    def is_active(self) -> bool:
        return self.look()["state"] in ("queued", "running")

    def finish(self) -> None:
        self.cluster.until(lambda: not self.is_active(), f"job {self.name} has not ended: {self.cluster.tool('jobs', 'logs', self.name)}")
        state = self.look()
        if state["state"] != "finished":
            raise RuntimeError(f"{state['state']}: {state.get('cause')}\n{self.logs()}\n{self.cluster.logs()}")

    def logs(self) -> str:
        return self.cluster.tool("jobs", "logs", self.name)

    def results(self) -> dict:
        """What has to be the same: every tensor of every adapter, and every report without its times."""
        adapters = {path.name: tensors(path) for path in sorted(self.adapter.glob("*.safetensors"))}
        kept = ("iteration", "train_loss", "val_loss", "test_loss", "learning_rate", "trained_tokens")
        reports = [json.loads(line) for line in (self.adapter / "metrics.jsonl").read_text().splitlines()]
        return {"adapters": adapters, "reports": [{key: report[key] for key in kept if key in report} for report in reports]}

    def went_on(self, killed: float) -> float | None:
        """Seconds until another batch was done; None when it was killed before the first one."""
        after = [(at, iteration) for at, iteration in self.seen if at > killed + 0.1]
        if not after or after[0][1] == 0:
            return None
        lowest = min(range(len(after)), key=lambda i: (after[i][1], -i))
        later = [at for at, iteration in after[lowest:] if iteration > after[lowest][1]]
        return later[0] - killed if later else None


def tensors(path: Path) -> dict:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, data = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()}


def difference(got: dict, wanted: dict) -> str | None:
    if got["reports"] != wanted["reports"]:
        pairs = zip(got["reports"] + [None], wanted["reports"] + [None])
        first = next((pair for pair in pairs if pair[0] != pair[1]), None)
        return f"{len(got['reports'])} reports, wanted are {len(wanted['reports'])}; the first that differs: {first}"
    if got["adapters"].keys() != wanted["adapters"].keys():
        return f"files {sorted(got['adapters'])}, wanted are {sorted(wanted['adapters'])}"
    other = [f"{file}: {name}" for file, all in wanted["adapters"].items() for name in all if got["adapters"][file].get(name) != all[name]]
    return f"{len(other)} tensors are other bits, such as {other[0]}" if other else None


def chats(folder: Path) -> Path:
    """Texts of unequal lengths, chats and completions."""
    words = random.Random(5)
    sentence = lambda: " ".join("".join(words.choices("abcdefgh", k=words.randint(1, 7))) for _ in range(words.randint(1, 6)))
    for name, count in [("train", 26), ("valid", 9), ("test", 9)]:
        rows = [{"messages": [{"role": "user", "content": sentence()}, {"role": "assistant", "content": sentence()}]} for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Kills:
    def __init__(self, cluster: Cluster, draw: random.Random):
        self.cluster, self.draw = cluster, draw
        self.count = 0
        start = time.monotonic()
        whole = cluster.begin("whole")
        whole.finish()
        self.wanted, self.seconds = whole.results(), time.monotonic() - start
        self.check_reference()

    def check_reference(self) -> None:
        trained = [report["iteration"] for report in self.wanted["reports"] if "train_loss" in report]
        assert trained == list(range(1, ITERATIONS + 1)), trained
        assert len(self.wanted["adapters"]) == 1 + ITERATIONS // SAVE_EVERY, sorted(self.wanted["adapters"])

    def begin(self) -> Job:
        self.count += 1
        return self.cluster.begin(f"cut{self.count}")

    def compare(self, job: Job) -> str | None:
        job.finish()
        why = difference(job.results(), self.wanted)
        return why and f"{why}\n{job.logs()}"

    def kill(self, victims: list[str], part: float) -> str | None:
        """The first after `part` of the time that the whole job took, others a little later, when the job has not recovered yet."""
        for attempt in range(4):
            job = self.begin()
            self.follow(job, self.seconds * part * 0.7**attempt)
            if job.is_active():
                break
            job.finish()
        at, killed = job.seen[-1][1], time.monotonic()
        for victim in victims:
            self.hit(job, victim)
            self.follow(job, self.draw.uniform(0, 3) if victim is not victims[-1] else 0)
        why = self.compare(job)
        self.tell(job, at, killed)
        return why

    def hit(self, job: Job, victim: str) -> None:
        worker = f"worker{self.draw.randrange(self.cluster.layout.workers)}"
        match victim:
            case "engine":
                if job.is_active():
                    self.cluster.signal_engine(worker, signal.SIGKILL)
            case "worker":
                self.cluster.kill(worker)
                self.follow(job, self.draw.uniform(0, 3))
                self.cluster.start_worker(worker)
            case "coordinator":
                self.cluster.kill("coordinator")
                self.cluster.start_coordinator()
                if job.look()["state"] == "stopped":
                    self.cluster.tool("jobs", "resume", job.name, "--detach")

    def tell(self, job: Job, at: int, killed: float) -> None:
        went_on = job.went_on(killed)
        again = min([iteration for when, iteration in job.seen if when > killed + 0.1] or [at])
        what = "before the first batch" if went_on is None else f"{max(at - again, 0)} iterations again, went on after {went_on:.1f} s"
        print(f"  at iteration {at}, {killed - job.started:.2f} s: {what}", flush=True)

    def follow(self, job: Job, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and job.is_active():
            time.sleep(0.02)

    def lose(self) -> str | None:
        """A worker goes in the middle of the job and never comes back."""
        job = self.begin()
        self.cluster.until(lambda: job.look()["iteration"] >= ITERATIONS // 3, "it does not begin")
        at, killed = job.seen[-1][1], time.monotonic()
        self.cluster.kill("worker1")
        why = self.compare(job)
        self.tell(job, at, killed)
        self.cluster.start_worker("worker1")
        return why or self.said(job, "worker1")

    def come_back(self) -> str | None:
        """A worker comes back when the job has gone on without it, and the job takes it again. Its settings are those of the whole one but for their number."""
        job = self.cluster.begin("grown", iters=GROWN_ITERATIONS)
        self.cluster.until(lambda: job.look()["iteration"] >= 2, "it does not begin")
        self.cluster.kill("worker1")
        self.cluster.until(lambda: "goes on from the checkpoint" in job.logs(), "it does not go on without the worker", pause=0.2)
        self.cluster.start_worker("worker1")
        grown = "worker1 is there again"
        self.cluster.until(lambda: grown in job.logs() or not job.is_active(), "it does not take the worker again", pause=0.2)
        job.finish()
        logs, plans = job.logs(), job.logs().count("plan to train")
        if grown not in logs or plans != 3:
            return f"{plans} plans in\n{logs}"
        again = self.cluster.begin("not cut", iters=GROWN_ITERATIONS)
        again.finish()
        return difference(job.results(), again.results())

    def said(self, job: Job, worker: str) -> str | None:
        """Whether the log says who was lost, and what happens next."""
        logs = job.logs()
        lost = [line for line in logs.splitlines() if line.startswith(f"lost worker {worker} (") and "goes on from its last checkpoint" in line]
        goes_on = "goes on from the checkpoint at iteration" in logs
        return None if lost and goes_on else f"not a word about {worker} or about going on in\n{logs}"

    def stop(self, worker: str, continued_after: float | None) -> str | None:
        job = self.begin()
        self.cluster.until(lambda: job.look()["iteration"] >= ITERATIONS // 3, "it does not begin")
        at, stopped = job.seen[-1][1], time.monotonic()
        engine = self.cluster.engines(worker)[0]
        os.kill(engine, signal.SIGSTOP)
        self.cluster.until(lambda: job.look() and "lost worker" in job.logs(), "nobody notices", pause=0.2)
        noticed = time.monotonic() - stopped
        if continued_after:
            self.follow(job, stopped + continued_after - time.monotonic())
            os.kill(engine, signal.SIGCONT)
        why = self.compare(job)
        print(f"  noticed after {noticed:.1f} s", flush=True)
        self.tell(job, at, stopped)
        print("\n".join(f"  | {line}" for line in job.logs().splitlines() if "lost" in line or "goes on" in line))
        return why or (f"noticed after {noticed:.1f} s" if noticed > NOTICED_S else None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--layout", help="only this one")
    parser.add_argument("--until", type=float, default=1, help="no kill after this part of the time; small values hit loading and linking")
    parser.add_argument("--twice", action="store_true", help="something else is killed within 3 s of the first")
    parser.add_argument("--stop", action="store_true", help="stop an engine instead of killing anything")
    args = parser.parse_args()
    print(f"seed {args.seed}")
    draw, report = random.Random(args.seed), Report()
    layouts = [layout for layout in LAYOUTS if args.layout in (None, layout.name)]
    layouts = layouts[:1] if args.stop else layouts[: (args.kills + 1) // 2]
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for fine_tune, quantization in [("lora", AFFINE4), ("full", None)]:
            model = build(Case("tiny", config("qwen3", head_dim=16, num_hidden_layers=4), quantization), Path(folder) / fine_tune, 3)
            settings = json.loads((model / "tokenizer_config.json").read_text())
            (model / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|special_1|>"}))
            models[fine_tune] = model
        (Path(folder) / "data").mkdir()
        data = chats(Path(folder) / "data")
        for number, layout in enumerate(layouts):
            with Cluster(layout, models[layout.fine_tune], data) as cluster:
                kills = Kills(cluster, draw)
                # Each of them comes as often as the others.
                victims = (victim for _ in range(2 * args.kills) for victim in draw.sample(layout.victims, len(layout.victims)))
                print(f"{layout.name}: a whole job took {kills.seconds:.1f} s", flush=True)
                if args.stop:
                    report.check("an engine of the last stage stops for ever", kills.stop, "worker1", None)
                    report.check("an engine of the first stage stops for ever", kills.stop, "worker0", None)
                    report.check("an engine stops for 12 s", kills.stop, "worker1", 12)
                    continue
                for count in range(number, args.kills, len(layouts)):
                    hit, part = [next(victims) for _ in range(2 if args.twice else 1)], draw.uniform(0, args.until)
                    report.check(f"{layout.name}: {' and '.join(hit)} killed at {part:.0%}", kills.kill, hit, part)
                if layout.name == "pipeline":
                    report.check(f"{layout.name}: a worker never comes back", kills.lose)
                    report.check(f"{layout.name}: a worker comes back late", kills.come_back)
    report.close()


if __name__ == "__main__":
    main()
