"""Real processes of the built binary on this machine: workers that stay, and coordinators that come and go over them."""

import atexit
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import requests

READY_S = 120
STOP_S = 10


def binary() -> str:
    return os.environ.get("MLX_CLUSTER_BIN") or str(Path(__file__).parents[2] / "target/debug/mlx-cluster")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Processes:
    """What was started, each with a log of its own; all of it ends with the `with` block."""

    # Shared by all, so that this machine is measured once.
    home = Path(tempfile.mkdtemp(prefix="mlx-cluster-home-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="mlx-cluster-test-"))
        self.running: dict[str, subprocess.Popen] = {}

    def start(self, name: str, *args: str, prefix: list[str] = []) -> subprocess.Popen:
        env = dict(os.environ, MLX_CLUSTER_HOME=str(self.home), OPENBLAS_NUM_THREADS="1", RUST_BACKTRACE="1")
        with open(self.folder / f"{name}.log", "ab") as log:
            process = subprocess.Popen([*prefix, binary(), *args], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        self.running[name] = process
        return process

    def stop(self, *names: str) -> None:
        """SIGTERM to all of them, and a failure when one does not end in time or not with 0."""
        processes = {name: self.running.pop(name) for name in names or list(self.running)}
        for process in processes.values():
            if process.poll() is None:
                process.terminate()
        late = []
        for name, process in processes.items():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                late.append(name)
        if late:
            raise RuntimeError(f"{', '.join(late)} did not end {STOP_S} s after SIGTERM\n{self.logs()}")

    def check(self) -> None:
        for name, process in self.running.items():
            if process.poll() is not None:
                raise RuntimeError(f"{name} exited with {process.returncode}\n{self.log(name)}")

    def log(self, name: str, lines: int = 15) -> str:
        path = self.folder / f"{name}.log"
        text = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"--- {name}", *text[-lines:]])

    def logs(self) -> str:
        return "\n".join(self.log(path.stem) for path in sorted(self.folder.glob("*.log")))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.stop()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


class Workers(Processes):
    """N workers of a cluster with a random name. They outlive the coordinators that use them one after the other."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count
        self.cluster = f"test-{uuid.uuid4().hex[:8]}"

    def __enter__(self):
        for i in range(self.count):
            self.start(f"worker{i}", "worker", "--cluster", self.cluster, "--name", f"worker{i}", "--listen", "127.0.0.1:0")
        return self


class Coordinator:
    """`with Coordinator(workers, model) as c: c.post("/v1/completions", {...})`: the model is ready inside."""

    def __init__(self, workers: Workers, model, *args: str, strategy: str = ""):
        self.workers, self.port = workers, free_port()
        self.name = f"coordinator-{self.port}"
        self.url = f"http://127.0.0.1:{self.port}"
        strategy = strategy or ("pipeline" if workers.count > 1 else "auto")
        self.args = ["--model", str(model), "--cluster", workers.cluster, "--http", f"127.0.0.1:{self.port}",
                     "--min-workers", str(workers.count), "--strategy", strategy, *args]

    def __enter__(self):
        self.workers.start(self.name, "coordinator", *self.args)
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            self.workers.check()
            try:
                if requests.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except requests.RequestException:
                pass
            time.sleep(0.05)
        raise TimeoutError(f"not ready after {READY_S} s\n{self.workers.logs()}")

    def post(self, path: str, body: dict) -> dict:
        response = requests.post(self.url + path, json=body, timeout=300)
        if response.status_code != 200:
            raise RuntimeError(f"{path}: {response.status_code} {response.text[:500]}")
        return response.json()

    def complete(self, prompt: list[int], max_tokens: int, **options) -> dict:
        """The first choice of a completion of token ids."""
        body = {"prompt": prompt, "max_tokens": max_tokens, "return_token_ids": True, **options}
        return self.post("/v1/completions", body)["choices"][0]

    def __exit__(self, *_):
        self.workers.stop(self.name)
