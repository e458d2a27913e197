"""Does a stage learn what mlx-lm learns? Losses of some steps and the parameters after them, whole, cut into stages, with checkpointing, and split.

    python tests/parity/training/losses.py [--only TEXT] [--architectures [--first] [--fine-tune lora|full] [--split]] [--module base] [--seed N] [--verbose]

Works with the example `train` of the crate mlx-cluster-lm, in one process a model. Without `--architectures`: options of training on a few models; with
it: default LoRA on every model type of the table, which also compares the names and shapes of all factors. Ends with `N passed, N failed`.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

mx.set_default_device(mx.cpu)
root = Path(__file__).parents[3]
sys.path[0] = str(Path(__file__).parent.parent)
sys.path.insert(1, str(root / "tests" / "harness"))

import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

from architectures import rows
from architectures.fabricate import build as build_row
from architectures.row import Row
from models import AFFINE4, FAMILIES, Case, build
from report import Report

STEPS = 4
# Of a loss in nats, and of all parameters together in parts of their change. Sums over ranks round differently, and Adam divides gradients that
# are all but zero by themselves.
LOSS, CHANGE = 2e-4, 1e-3
LOSS_OF_RANKS, CHANGE_OF_RANKS = 2e-3, 5e-2
ADAM = {"adam": {"betas": [0.9, 0.999], "eps": 1e-8, "bias_correction": False}}
ADAFACTOR = {"adafactor": {"eps": [1e-30, 1e-3], "clip_threshold": 1.0, "decay_rate": -0.8, "beta_1": None, "weight_decay": 0.0, "scale_parameter": True,
                           "relative_step": False, "warmup_init": False}}
MUON = {"muon": {"momentum": 0.95, "weight_decay": 0.01, "nesterov": True, "ns_steps": 5}}
LORA = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": None}


@dataclass
class Settings:
    """What is special about a run."""

    name: str
    fine_tune: str = "lora"
    lora: dict = field(default_factory=dict)
    num_layers: int | None = None
    optimizer: dict = field(default_factory=lambda: dict(ADAM))
    rate: float = 1e-3
    accumulation: int = 1
    checkpoint: bool = False
    offsets: bool = False
    # Rows of a micro-batch; None: all.
    micro_rows: int | None = None
    model: Case = field(default_factory=lambda: Case("llama", FAMILIES["llama"]))
    shares: list[list[int]] = field(default_factory=lambda: [[1, 1]])
    # First layers of stages after the first; None: whole, and cut once and twice.
    cuts: list[list[int]] | None = None


def qwen3_moe(quantization: dict | None = None) -> Case:
    return Case("qwen3_moe", FAMILIES["qwen3_moe"], quantization)


OPTIONS = [
    Settings("lora"),
    Settings("lora, untied", model=Case("mistral", FAMILIES["mistral"])),
    Settings("lora, prompts masked", offsets=True),
    Settings("lora, accumulated", accumulation=2),
    Settings("lora, checkpointed", checkpoint=True),
    Settings("lora, micro-batches", micro_rows=1),
    Settings("lora, last layers and keys", num_layers=2, lora={"keys": ["self_attn.q_proj", "self_attn.v_proj"]}),
    Settings("lora, embedding and head", lora={"keys": ["self_attn.q_proj", "model.embed_tokens", "lm_head"]}, model=Case("mistral", FAMILIES["mistral"])),
    Settings("lora, four bits", model=Case("llama", FAMILIES["llama"], AFFINE4)),
    Settings("lora, experts", model=qwen3_moe()),
    Settings("lora, experts in four bits", model=qwen3_moe(AFFINE4)),
    Settings("dora", fine_tune="dora", shares=[[1, 1], [2, 1]]),
    Settings("dora, four bits", fine_tune="dora", model=Case("llama", FAMILIES["llama"], AFFINE4)),
    Settings("dora, embedding that is the head", fine_tune="dora", lora={"keys": ["self_attn.q_proj", "model.embed_tokens"]}, cuts=[[]]),
    Settings("dora, embedding and head", fine_tune="dora", lora={"keys": ["self_attn.q_proj", "model.embed_tokens", "lm_head"]}, model=Case("mistral", FAMILIES["mistral"])),
    Settings("full", fine_tune="full", rate=1e-4, shares=[[1, 1], [2, 1], [1, 1, 1, 1]]),
    Settings("full, last layer, experts", fine_tune="full", num_layers=1, rate=1e-4, model=qwen3_moe()),
    Settings("full, checkpointed", fine_tune="full", rate=1e-4, checkpoint=True),
    Settings("full, accumulated", fine_tune="full", rate=1e-4, accumulation=2),
    Settings("full, adafactor", fine_tune="full", optimizer=ADAFACTOR, rate=1e-4, shares=[[1, 1], [1, 1, 1, 1]]),
    Settings("full, muon", fine_tune="full", optimizer=MUON, rate=1e-3, shares=[[1, 1], [1, 1, 1, 1]]),
    Settings("lora, sgd", optimizer={"sgd": {"momentum": 0.0, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False}}, rate=1e-3),
]


def data(seed: int, n_tokens: int, vocab: int, offsets: bool) -> list[list[tuple[list[int], int]]]:
    """Batches of rows of tokens, and where each row's answer starts."""
    r = random.Random(seed)
    lengths = [n_tokens, 7, n_tokens // 2 + 1, 3]
    return [[(r.choices(range(1, vocab), k=length), r.randint(1, length - 2) if offsets else 0) for length in lengths] for _ in range(2)]


def padded(batch: list[tuple[list[int], int]]) -> tuple[mx.array, mx.array]:
    width = 1 + 32 * ((max(len(row) for row, _ in batch) + 31) // 32)
    return mx.array([row + [0] * (width - len(row)) for row, _ in batch]), mx.array([[offset, len(row)] for row, offset in batch])


def micro_batches(batch: list[tuple[list[int], int]], number: int, rows: int | None) -> list[dict]:
    made = []
    for tokens, offset in batch:
        first = max(offset, 1) - 1
        made.append({"tokens": tokens, "targets": tokens[1:] + [0], "counted": {"start": first, "end": len(tokens)}})
    counted = sum(row["counted"]["end"] - row["counted"]["start"] for row in made)
    rows = rows or len(made)
    return [{"rows": made[i : i + rows], "batch_targets": counted, "batch": number, "first_row": i} for i in range(0, len(made), rows)]


def reference(folder: Path, settings: Settings, batches: list, start: Path) -> tuple[list[float], dict[str, mx.array], dict[str, mx.array]]:
    """mlx-lm's losses, and what it trains before and after; writes the start."""
    model, _ = load_model(folder)
    model.freeze()
    n = len(model.layers) if settings.num_layers is None else settings.num_layers
    if settings.fine_tune == "full":
        for layer in model.layers[len(model.layers) - n :]:
            layer.unfreeze()
    else:
        lora = {key: value for key, value in {**LORA, **settings.lora}.items() if value is not None}
        linear_to_lora_layers(model, n, lora, use_dora=settings.fine_tune == "dora")
        mx.random.seed(1)
        randomised = [(name, value if name.endswith(".m") else 0.1 * mx.random.normal(value.shape)) for name, value in tree_flatten(model.trainable_parameters())]
        model.load_weights(randomised, strict=False)
    before = dict(tree_flatten(model.trainable_parameters()))
    mx.eval(before)
    before = {name: mx.array(value) for name, value in before.items()}
    mx.save_safetensors(str(start), before)
    (name, options), = settings.optimizer.items()
    optimizer = {"adam": optim.Adam, "sgd": optim.SGD, "adafactor": optim.Adafactor, "muon": optim.Muon}[name](settings.rate, **options)
    step = nn.value_and_grad(model, default_loss)
    model.train()
    losses, sums = [], None
    for number in range(STEPS * settings.accumulation):
        (loss, _), gradients = step(model, *padded(batches[number % len(batches)]))
        sums = gradients if sums is None else tree_map(lambda x, y: x + y, sums, gradients)
        losses.append(loss.item())
        if (number + 1) % settings.accumulation == 0:
            optimizer.update(model, tree_map(lambda x: x / settings.accumulation, sums))
            mx.eval(model.parameters(), optimizer.state)
            sums = None
    return losses, before, dict(tree_flatten(model.trainable_parameters()))


def ours(folder: Path, settings: Settings, batches: list, start: Path, cuts: list[list[int]], shares: list[list[int]]) -> list[dict]:
    binary = Path(os.environ.get("MLX_CLUSTER_TRAIN", root / "target" / "debug" / "examples" / "train"))
    role = {"fine_tune": "full" if settings.fine_tune == "full" else {settings.fine_tune: {**LORA, **settings.lora}}, "num_layers": settings.num_layers,
            "optimizer": settings.optimizer, "schedule": {"warmup": None, "decay": {"constant": {"rate": settings.rate}}}, "seed": 0,
            "grad_checkpoint": settings.checkpoint, "clear_cache_threshold": 0, "parallel": "tensor"}
    numbers = iter(range(STEPS * settings.accumulation))
    steps = [[micro_batches(batches[n % len(batches)], n, settings.micro_rows) for n in [next(numbers) for _ in range(settings.accumulation)]] for _ in range(STEPS)]
    request = {"role": role, "steps": steps, "layouts": cuts, "shares": shares, "start": str(start), "save": str(start.with_name("trained"))}
    run = subprocess.run([binary, folder], input=json.dumps(request) + "\n", capture_output=True, text=True, timeout=300)
    if run.returncode:
        raise RuntimeError(run.stderr.strip()[-400:])
    return [json.loads(line) for line in run.stdout.splitlines()]


def compare(folder: Path, settings: Settings, n_tokens: int, vocab: int, cuts: list[list[int]], shares: list[list[int]], seed: int, verbose: bool) -> str | None:
    batches, start = data(seed, n_tokens, vocab, settings.offsets), folder.with_name(folder.name + "-start") / "start.safetensors"
    start.parent.mkdir()
    losses, before, after = reference(folder, settings, batches, start)
    faults = []
    for number, answer in enumerate(ours(folder, settings, batches, start, cuts, shares)):
        layout = f"layout {answer['layout']}{' of ranks' if number >= len(cuts) else ''}"
        wanted = {name: list(value.shape) for name, value in before.items()}
        if answer["shapes"] != wanted:
            missing, spare = sorted(set(wanted) - set(answer["shapes"])), sorted(set(answer["shapes"]) - set(wanted))
            faults.append(f"{layout}: without {missing[:3]} ({len(missing)}), with {spare[:3]} ({len(spare)})")
            continue
        apart = max(abs(x - y) if x == x else float("inf") for x, y in zip(losses, answer["losses"]))
        trained = mx.load(str(start.with_name(f"trained.{number}.safetensors")))
        change = distance(after, trained) / distance(after, before)
        if verbose:
            print(f"    {layout}: losses {apart:.2g} apart, parameters {change:.2g} of their change")
        loss_max, change_max = (LOSS, CHANGE) if number < len(cuts) else (LOSS_OF_RANKS, CHANGE_OF_RANKS)
        if not apart < loss_max or not change < change_max:
            faults.append(f"{layout}: losses {apart:.2g} apart ({losses[-1]:.4f}, {answer['losses'][-1]:.4f}), parameters {change:.2g} of their change")
    return "; ".join(faults) or None


def distance(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    return math.sqrt(sum(mx.square(value.astype(mx.float32) - other[name].astype(mx.float32)).sum().item() for name, value in one.items()))


def check_option(settings: Settings, folder: Path, seed: int, verbose: bool) -> str | None:
    build(settings.model, folder, seed)
    usual = [[], [1], [2, 3]] if settings.model.config["num_hidden_layers"] > 3 else [[], [1]]
    return compare(folder, settings, 40, settings.model.config["vocab_size"], settings.cuts or usual, settings.shares, seed, verbose)


# mlx-lm turns dynamic RoPE by the length of a batch, we by a token's own position (docs/differences-from-mlx-lm.md); it cannot put factors beside the
# linears of gemma3n, whose weights its model reads directly.
APART = ("dynamic rope", "gemma3n")


def check_row(row: Row, folder: Path, fine_tune: str, split: bool, seed: int, verbose: bool) -> str | None:
    build_row(row, folder, seed, None, False)
    settings = Settings(fine_tune, fine_tune=fine_tune, rate=1e-4, lora={"scale": 1.0})
    return compare(folder, settings, row.prompt_tokens, 250, [[], list(row.cuts[0])], [[1, 1]] if split else [], seed, verbose)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--architectures", action="store_true")
    parser.add_argument("--first", action="store_true", help="of each model type the first row alone")
    parser.add_argument("--fine-tune", default="lora", choices=["lora", "full"], help="of architectures")
    parser.add_argument("--split", action="store_true", help="architectures over two ranks that split matrices, too")
    parser.add_argument("--module", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="training-") as scratch:
        if args.architectures:
            seen = set()
            for number, row in enumerate(rows(args.module)):
                is_wanted = not (args.first and row.model_type in seen) and not any(what in row.title for what in APART)
                seen.add(row.model_type)
                if args.only in row.title and is_wanted:
                    report.check(row.title, check_row, row, Path(scratch) / str(number), args.fine_tune, args.split, args.seed + number, args.verbose)
        else:
            for number, settings in enumerate(OPTIONS):
                if args.only in settings.name:
                    report.check(settings.name, check_option, settings, Path(scratch) / str(number), args.seed + number, args.verbose)
    report.close()


if __name__ == "__main__":
    main()
