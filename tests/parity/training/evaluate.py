"""Does `mlx-cluster evaluate` measure the loss that mlx-lm measures? The demo model on rows of all forms, prompts masked.

    python tests/parity/training/evaluate.py

Ends with `N passed, N failed`.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import mlx.core as mx

mx.set_default_device(mx.cpu)
root = Path(__file__).parents[3]
sys.path.insert(1, str(root / "tests" / "harness"))

import mlx.nn as nn
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import default_loss, evaluate
from mlx_lm.utils import load

from report import Report

MODEL = root / "demo" / "model"
# Nats: f32 against f32, sums of some hundred tokens.
TOLERANCE = 1e-3
QUESTIONS = {f"What is {a} + {b}?": f"{a} + {b} = {a + b}." for a, b in [(27, 46), (11, 12), (50, 31), (8, 77), (64, 5)]}


def chat(question: str, answer: str) -> dict:
    messages = [("system", "Be brief."), ("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


FORMS = {
    "chats": [chat(question, answer) for question, answer in QUESTIONS.items()],
    "completions": [{"prompt": question, "completion": answer} for question, answer in QUESTIONS.items()],
    "texts": [{"text": f"Once upon a time there was a {animal}. {'It ran home. ' * i}"} for i, animal in enumerate(("fox", "cat", "hen", "bear"))],
}


class Answering:
    """Asks as our server does: mlx-lm asks a model that can think to think, and then the empty thought before an answer counts as said."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def apply_chat_template(self, *arguments, **options):
        return self.tokenizer.apply_chat_template(*arguments, enable_thinking=False, **options)


def theirs(rows: list[dict]) -> float:
    model, tokenizer = load(str(MODEL))
    tokenizer = Answering(tokenizer)
    options = types.SimpleNamespace(mask_prompt="text" not in rows[0])
    dataset = CacheDataset(create_dataset(rows, tokenizer, options))
    return evaluate(model, dataset, batch_size=1, num_batches=-1, max_seq_length=2048, loss=without_padding)


def without_padding(model: nn.Module, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's own loss takes the first token of padding behind a row as one that the model should say."""
    return default_loss(model, batch, lengths - mx.array([[0, 1]]))


def ours(rows: list[dict], folder: Path) -> dict:
    binary = os.environ.get("MLX_CLUSTER_BIN", str(root / "target" / "debug" / "mlx-cluster"))
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [binary, "evaluate", "--data", folder, "--model", MODEL, "--max-tokens", "0", "--json"]
    # No coordinator answers at this port, so the tool serves the model itself.
    environment = os.environ | {"MLX_CLUSTER_HOME": str(folder / "home"), "MLX_CLUSTER_URL": "http://127.0.0.1:9"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    if run.returncode:
        raise RuntimeError(run.stderr.strip()[-400:])
    return json.loads(run.stdout)


def check(rows: list[dict]) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        got = ours(rows, Path(folder))
    wanted = theirs(rows)
    if got["rows"] != len(rows) or got["answers"] or not math.isclose(got["perplexity"], math.exp(got["loss"]), rel_tol=1e-6):
        return str(got)
    return None if abs(got["loss"] - wanted) < TOLERANCE else f"loss {got['loss']}, mlx-lm's is {wanted}"


if __name__ == "__main__":
    report = Report()
    for form, rows in FORMS.items():
        report.check(form, check, rows)
    report.close()
