"""Are adapters that requests choose what mlx-lm makes of them? Base and two adapters in one batch, on one worker, in a pipeline of two and in a
tensor-parallel group of two; loaded and dropped at run time; back after an engine was killed; bad ones refused with a sentence.

    python tests/parity/training/serving.py [--only TEXT] [--seed N]

Adapters are random, made by mlx-lm. Ends with `N passed, N failed`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import requests

mx.set_default_device(mx.cpu)
root = Path(__file__).parents[3]
sys.path[0] = str(Path(__file__).parent.parent)
sys.path.insert(1, str(root / "tests" / "harness"))

from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

import models
from cluster import Coordinator, Processes, Workers, binary, free_port
from models import AFFINE4, Case, config
from report import Report

TOLERANCE = 1e-4
# An adapter that changes less would not be seen.
CHANGES_MIN = 1e-2
NEW_TOKENS = 5
PROMPTS = [[5, 17, 99, 200, 31, 8, 8, 64, 250, 3, 77, 140], [7, 7, 30, 211], [1] + list(range(40, 110))]
LAYOUTS = {"one worker": (1, "auto"), "pipeline of 2": (2, "pipeline"), "tensor group of 2": (2, "tensor")}
ATTENTION = ["self_attn.q_proj", "self_attn.v_proj"]


@dataclass
class Adapter:
    name: str
    rank: int
    scale: float
    kind: str = "lora"
    # Paths inside a layer or from the root; None: all that a layer has.
    keys: list[str] | None = None
    num_layers: int = -1


MODELS = {
    "llama affine4": (Case("llama", config("llama", num_hidden_layers=3), AFFINE4),
                      [Adapter("all", 4, 2.0), Adapter("weight-decomposed", 3, 1.5, "dora")]),
    "llama with biases, tied": (Case("tied", config("llama", num_hidden_layers=3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
                                [Adapter("table", 4, 2.0, keys=[*ATTENTION, "mlp.down_proj", "model.embed_tokens"]),
                                 Adapter("weight-decomposed", 6, 1.5, "dora", num_layers=2)]),
    "llama, weight-decomposed table that is the head": (Case("tied2", config("llama", num_hidden_layers=2, tie_word_embeddings=True)),
                                                        [Adapter("table", 4, 2.0, "dora", keys=[*ATTENTION, "model.embed_tokens"]),
                                                         Adapter("plain", 3, 1.5, keys=ATTENTION)]),
    "llama, weight-decomposed table and head": (Case("untied", config("llama", num_hidden_layers=2, tie_word_embeddings=False)),
                                                [Adapter("table", 4, 2.0, "dora", keys=["self_attn.q_proj", "model.embed_tokens"]),
                                                 Adapter("head", 3, 1.5, "dora", keys=["mlp.down_proj", "lm_head"])]),
    "qwen3_moe": (Case("moe", config("qwen3_moe", num_hidden_layers=2, **models.MOE)),
                  [Adapter("experts", 4, 2.0), Adapter("attention", 7, 3.0, keys=ATTENTION, num_layers=1)]),
}


def write(adapter: Adapter, base: Path, folder: Path, seed: int) -> Path:
    """A random adapter of mlx-lm's own shapes and names."""
    mx.random.seed(seed)
    folder.mkdir(parents=True)
    parameters = {"rank": adapter.rank, "scale": adapter.scale, "dropout": 0.0, **({"keys": adapter.keys} if adapter.keys else {})}
    settings = {"fine_tune_type": adapter.kind, "num_layers": adapter.num_layers, "lora_parameters": parameters, "model": "random/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    model = load_model(base)[0]
    keyed = {**parameters, "keys": set(adapter.keys)} if adapter.keys else parameters
    linear_to_lora_layers(model, adapter.num_layers if adapter.num_layers > 0 else len(model.layers), keyed, use_dora=adapter.kind == "dora")
    leaves = {name: value for name, value in tree_flatten(model.parameters()) if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b", "m")}
    mx.save_safetensors(str(folder / "adapters.safetensors"), {name: moved(name, value) for name, value in leaves.items()})
    return folder


def moved(name: str, value: mx.array) -> mx.array:
    if name.endswith(".m"):
        return value * (1 + 0.1 * mx.random.normal(value.shape))
    return value if name.endswith("lora_a") else 0.1 * mx.random.normal(value.shape)


def logprobs(model, tokens: list[int]) -> list[float]:
    """Of each token but the first, given those before it."""
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.take_along_axis(rows[:-1], mx.array(tokens[1:])[:, None], axis=-1)[:, 0].tolist()


class Served:
    """A model with adapters, as mlx-lm has them, and how a cluster answers."""

    def __init__(self, base: Path, adapters: dict[str, Path]):
        self.base, self.adapters = base, adapters
        self.models = {None: load_model(base)[0], **{name: load_adapters(load_model(base)[0], str(path)) for name, path in adapters.items()}}

    def wrong(self, coordinator: Coordinator, names: list[str | None]) -> str | None:
        """Asks all of them at the same time, several times each."""
        asked = [(name, prompt) for prompt in PROMPTS for name in names]
        with ThreadPoolExecutor(len(asked)) as pool:
            answers = list(pool.map(lambda pair: self.ask(coordinator, *pair), asked))
        return next((why for pair, answer in zip(asked, answers) if (why := self.different(*pair, answer))), None)

    def ask(self, coordinator: Coordinator, name: str | None, prompt: list[int]) -> dict:
        model = self.base.name if name is None else f"{self.base.name}:{name}"
        return coordinator.complete(prompt, NEW_TOKENS, model=model, temperature=0, logprobs=1, echo=True, ignore_eos=True)

    def different(self, name: str | None, prompt: list[int], answer: dict) -> str | None:
        tokens, ours = prompt + answer["token_ids"], answer["logprobs"]["token_logprobs"][1:]
        wanted = logprobs(self.models[name], tokens)
        apart = max(abs(a - b) for a, b in zip(ours, wanted, strict=True))
        if apart > TOLERANCE:
            return f"{name}: log-probabilities are {apart:.1e} from mlx-lm's"
        base = logprobs(self.models[None], tokens)
        changes = max(abs(a - b) for a, b in zip(base, wanted))
        return None if name is None or changes > CHANGES_MIN else f"{name} changes log-probabilities by {changes:.1e} alone"


def request(method: str, coordinator: Coordinator, path: str, body: dict | None = None) -> tuple[int, str]:
    response = requests.request(method, coordinator.url + path, json=body, timeout=60)
    return response.status_code, response.text


def refused(answer: tuple[int, str], status: int, *words: str) -> str | None:
    return None if answer[0] == status and all(word in answer[1] for word in words) else f"{answer[0]} {answer[1][:300]}, wanted {status} {words}"


def kill_an_engine(workers: Workers) -> None:
    worker = workers.running[f"worker{workers.count - 1}"].pid
    found = subprocess.run(["pgrep", "-P", str(worker), "-f", "engine"], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(found[0]), signal.SIGKILL)


def until_ready_again(coordinator: Coordinator) -> None:
    deadline = time.monotonic() + 10
    while requests.get(f"{coordinator.url}/health", timeout=5).status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.02)
    coordinator.wait_until_ready()


def check(report: Report, workers: Workers, strategy: str, title: str, served: Served, kills: bool) -> None:
    (first, first_path), (second, second_path) = served.adapters.items()
    with Coordinator(workers, served.base, "--adapter", f"{first}={first_path}", strategy=strategy) as coordinator:
        report.check(f"{title}: base and an adapter from the start", served.wrong, coordinator, [None, first])
        loaded = request("POST", coordinator, "/v1/adapters", {"name": second, "path": str(second_path)})
        report.check(f"{title}: another one is loaded", lambda: None if loaded[0] == 200 else loaded[1])
        report.check(f"{title}: base and both adapters in one batch", served.wrong, coordinator, [None, first, second])
        if kills:
            kill_an_engine(workers)
            until_ready_again(coordinator)
            report.check(f"{title}: they are back after an engine was killed", served.wrong, coordinator, [None, first, second])
        dropped = request("DELETE", coordinator, f"/v1/adapters/{first}")
        report.check(f"{title}: the first one is dropped", lambda: None if dropped[0] == 200 else dropped[1])
        gone = request("POST", coordinator, "/v1/completions", {"model": first, "prompt": [1], "max_tokens": 1})
        report.check(f"{title}: it cannot be asked for", refused, gone, 404, served.base.name, second)
        report.check(f"{title}: the others can", served.wrong, coordinator, [None, second])


def check_api(report: Report, workers: Workers, served: Served, scratch: Path, foreign: Path) -> None:
    """What is shown, vLLM's names, and what is refused."""
    (first, first_path), (second, second_path) = served.adapters.items()
    base = served.base.name
    with Coordinator(workers, served.base, "--adapter", str(first_path)) as coordinator:
        def listed(*wanted: str) -> str | None:
            found = requests.get(f"{coordinator.url}/v1/models", timeout=10).json()["data"]
            parents = {model["id"]: model.get("parent") for model in found}
            return None if parents == {base: None, **{f"{base}:{name}": base for name in wanted}} else f"{found}"

        def in_use() -> str | None:
            """Dropped under a running answer, which goes on to its end as it began."""
            prompt, tokens = PROMPTS[0], 200
            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(coordinator.complete, prompt, tokens, model=second, temperature=0, logprobs=1, echo=True, ignore_eos=True)
                time.sleep(0.3)
                status, text = request("DELETE", coordinator, f"/v1/adapters/{second}")
                return (None if status == 200 else text) or served.different(second, prompt, answer.result())

        post = lambda path, body: request("POST", coordinator, path, body)
        report.check("api: the folder's name is the adapter's", listed, first_path.name)
        answer = post("/v1/load_lora_adapter", {"lora_name": second, "lora_path": str(second_path / "adapters.safetensors")})
        report.check("api: vLLM's way to load, by the file", lambda: None if answer == (200, f"Success: LoRA adapter '{second}' added successfully.") else str(answer))
        report.check("api: models are listed with their parent", listed, first_path.name, second)
        state = {adapter["name"]: adapter["state"] for adapter in requests.get(f"{coordinator.url}/v1/cluster", timeout=10).json()["adapters"]}
        report.check("api: the cluster shows them", lambda: None if state == {first_path.name: "ready", second: "ready"} else str(state))
        status = subprocess.run([binary(), "status", "--url", coordinator.url], capture_output=True, text=True, timeout=20).stdout
        report.check("status: shows them", lambda: None if f"{second}" in status and "rank" in status else status)
        chosen = coordinator.post("/v1/completions", {"model": second, "prompt": [1, 2], "max_tokens": 1})
        report.check("api: the answer names model and adapter", lambda: None if chosen["model"] == f"{base}:{second}" else chosen["model"])
        report.check("api: unknown adapter", refused, post("/v1/completions", {"model": f"{base}:nobody", "prompt": [1]}), 404, second, first_path.name)
        report.check("api: taken name", refused, post("/v1/adapters", {"name": second, "path": str(second_path)}), 409, second)
        report.check("api: no such folder", refused, post("/v1/adapters", {"name": "x", "path": "/no/such"}), 400, "/no/such", "adapter_config.json")
        half = scratch / "half"
        half.mkdir()
        shutil.copy(first_path / "adapter_config.json", half)
        report.check("api: no weights", refused, post("/v1/adapters", {"name": "x", "path": str(half)}), 400, "adapters.safetensors")
        report.check("api: an adapter of another base", refused, post("/v1/adapters", {"name": "x", "path": str(foreign)}), 400, "random/base", base)
        (half / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1}))
        mx.save_safetensors(str(half / "adapters.safetensors"), {"model.norm.weight": mx.ones(64)})
        report.check("api: whole weights", refused, post("/v1/adapters", {"name": "x", "path": str(half)}), 400, "mlx-cluster fuse")
        report.check("api: bad name", refused, post("/v1/adapters", {"name": "a b", "path": "x"}), 400, "a b")
        report.check("api: nothing to drop", refused, request("DELETE", coordinator, "/v1/adapters/nobody"), 404, "nobody", second)
        report.check("api: dropped under a running answer", in_use)
        answer = post("/v1/unload_lora_adapter", {"lora_name": first_path.name})
        report.check("api: vLLM's way to unload", lambda: None if answer[0] == 200 and "removed" in answer[1] else str(answer))
        report.check("api: only the base is left", listed)


def check_command_line(report: Report, served: Served, foreign: Path) -> None:
    def ends(*args: str, words: list[str]) -> str | None:
        env = dict(os.environ, MLX_CLUSTER_HOME=str(Processes.home))
        done = subprocess.run([binary(), "coordinator", "--http", f"127.0.0.1:{free_port()}", *args], capture_output=True, text=True, timeout=30, env=env)
        return None if done.returncode and all(word in done.stderr for word in words) else f"{done.returncode} {done.stderr[-300:]}"

    model = ["--model", str(served.base)]
    report.check("command line: an adapter of another base", lambda: ends(*model, "--adapter", str(foreign), words=["random/base", served.base.name]))
    report.check("command line: no adapter", lambda: ends(*model, "--adapter", "/no/such", words=["/no/such"]))
    report.check("command line: an adapter without a model", lambda: ends("--adapter", str(foreign), words=["--model"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="checks of models and layouts whose title has this in it")
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    report = Report()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-")))
        served = {}
        for i, (name, (case, adapters)) in enumerate(MODELS.items()):
            base = models.build(case, scratch / f"base-{case.name}", args.seed + i)
            paths = {own.name: write(own, base, scratch / f"{case.name}-{own.name}", args.seed + 10 * i + j) for j, own in enumerate(adapters)}
            served[name] = Served(base, paths)
        clusters = {count: stack.enter_context(Workers(count)) for count in (1, 2)}
        for layout, (count, strategy) in LAYOUTS.items():
            for name, own in served.items():
                if args.only in f"{name}, {layout}":
                    check(report, clusters[count], strategy, f"{name}, {layout}", own, kills=name == "llama affine4")
        if args.only in "api, command line":
            tied, foreign = served["llama with biases, tied"], served["qwen3_moe"].adapters["experts"]
            check_api(report, clusters[1], tied, scratch, foreign)
            check_command_line(report, tied, foreign)
    report.close()


if __name__ == "__main__":
    main()
