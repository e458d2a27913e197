"""mlx-lm on the same machine: its generation loop in this process, and its server in one of its own."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import requests
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


class Loop:
    """`generate_step`, as `mlx_lm.generate` drives it."""

    def __init__(self, model: Path):
        mx.set_default_device(mx.cpu)
        self.model, _ = load_model(model)

    def speeds(self, ids: list[int], max_tokens: int) -> tuple[float, float]:
        """Prefill and decode in tokens a second."""
        start, first = time.perf_counter(), None
        for _token, _ in generate_step(mx.array(ids), self.model, max_tokens=max_tokens):
            first = first or time.perf_counter()
        end = time.perf_counter()
        return len(ids) / (first - start), (max_tokens - 1) / (end - first)


class Server:
    """`mlx_lm.server` with a model, ready inside the `with` block."""

    def __init__(self, model: Path, log: Path):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.model, self.log = model, log

    def __enter__(self):
        command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ, HF_HUB_OFFLINE="1"))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if requests.get(f"{self.url}/health", timeout=1).status_code == 200:
                    return self
            except requests.RequestException:
                time.sleep(0.1)
        self.__exit__()
        raise TimeoutError(f"mlx_lm.server did not start: {self.log.read_text()[-500:]}")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
