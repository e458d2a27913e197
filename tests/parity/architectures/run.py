"""Says a shard what mlx-lm says? Every architecture: prompt whole and in chunks, cached decode, batches, pipelines, 4 bits, published names.

    python tests/parity/architectures/run.py [--only TEXT] [--module base] [--schemes f32,affine4,published] [--seed N] [--verbose]

Works with the example `parity` of the crate mlx-cluster-lm, in one process a model; the same models go through the real cluster in
`tests/parity/parity.py` for a few. Ends with `N passed, N failed`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

mx.set_default_device(mx.cpu)
root = Path(__file__).parents[3]
sys.path[0] = str(Path(__file__).parent.parent)
sys.path.insert(1, str(root / "tests" / "harness"))

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from architectures import rows
from architectures.fabricate import build
from architectures.row import Row
from report import Report
from ties import TIE, nearest_tie

# Nats; f32 against f32 on the same kernels.
TOLERANCE = 2e-3
NEW_TOKENS, CHUNKS = 6, 8
# The tensor-parallel group that every model is split over, and one for the first row of each model type: more ranks than some blocks have heads.
SHARES = {"f32": [1, 1], "affine4": [2, 1], "published": [1, 1]}
MORE_SHARES = {"f32": [1, 1, 1]}
# A group takes less of everything: its ranks wait for each other at every layer.
GROUP_PROMPTS, GROUP_TOKENS, GROUP_CHUNKS = 3, 4, 3
SCHEMES = {
    "f32": None, "published": None, **{f"affine{bits}": {"group_size": 32, "bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


@dataclass
class Wanted:
    """What mlx-lm says: log-probabilities of the prompt's tokens but the first, and the greedy continuation."""

    prompt_logprobs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # How much more likely each token is than the runner-up: a tie may break either way.
    margins: list[float] = field(default_factory=list)


def reference(folder: Path, prompt: list[int], one_by_one: bool) -> Wanted:
    """`one_by_one` feeds single tokens, where mlx-lm's answer depends on how a prompt is cut: a token alone sees just what is before it."""
    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    pieces = [[token] for token in prompt] if one_by_one else [prompt]
    logits = mx.concatenate([model(mx.array([piece]), cache=cache) for piece in pieces], axis=1)[0]
    return continued(logits, prompt, lambda tokens: model(mx.array([tokens]), cache=cache)[0])


def continued(logits: mx.array, prompt: list[int], step: Callable[[list[int]], mx.array]) -> Wanted:
    """From the logits of a prompt's tokens to the greedy continuation; `step` gives the logits of the tokens that come next."""
    wanted, rows = Wanted(), normalised(logits)
    wanted.prompt_logprobs = [rows[i, token].item() for i, token in enumerate(prompt[1:])]
    row = rows[-1]
    for _ in range(NEW_TOKENS):
        second, first = mx.sort(row)[-2:].tolist()
        token = int(mx.argmax(row).item())
        wanted.tokens.append(token)
        wanted.logprobs.append(row[token].item())
        wanted.margins.append(first - second)
        row = normalised(step([token]))[-1]
    return wanted


def normalised(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def ask(folder: Path, prompts: list[list[int]], layouts: list[list[int]], options: dict | None = None) -> list[dict]:
    binary = Path(os.environ.get("MLX_CLUSTER_PARITY", root / "target" / "debug" / "examples" / "parity"))
    request = json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS, "chunks": CHUNKS, "layouts": layouts, **(options or {})})
    run = subprocess.run([binary, folder], input=request + "\n", capture_output=True, text=True, timeout=300)
    if run.returncode:
        raise RuntimeError(run.stderr.strip()[-400:])
    return [json.loads(line) for line in run.stdout.splitlines()]


def groups(scheme: str, is_first: bool, folder: Path, prompts: list[list[int]]) -> list[dict]:
    shares = [by_scheme[scheme] for by_scheme in (SHARES, MORE_SHARES)[: 1 + is_first] if scheme in by_scheme]
    return ask(folder, prompts, [], {"shares": shares, "new_tokens": GROUP_TOKENS, "chunks": GROUP_CHUNKS}) if shares else []


def first(wanted: Wanted) -> Wanted:
    """What a group is asked for of it."""
    return Wanted(wanted.prompt_logprobs, wanted.tokens[:GROUP_TOKENS], wanted.logprobs[:GROUP_TOKENS], wanted.margins)


def distance(got: dict, wanted: Wanted) -> float:
    """The largest difference of a log-probability; a token that is another one, and clearly, is infinitely far."""
    ours = got["prompt_logprobs"][1:]
    if len(ours) != len(wanted.prompt_logprobs) or len(got["tokens"]) != len(wanted.tokens):
        return float("inf")
    worst = max(map(apart, ours, wanted.prompt_logprobs), default=0.0)
    for i, token in enumerate(wanted.tokens):
        if got["tokens"][i] != token:
            return worst if wanted.margins[i] < TOLERANCE else float("inf")
        worst = max(worst, apart(got["logprobs"][i], wanted.logprobs[i]))
    return worst


def apart(ours: float | None, theirs: float) -> float:
    """A log-probability that is no number is null in JSON."""
    return float("inf") if ours is None else abs(ours - theirs)


def as_wanted(answer: dict, margins: list[float]) -> Wanted:
    return Wanted(answer["prompt_logprobs"][1:], answer["tokens"], answer["logprobs"], margins)


@dataclass
class Findings:
    worst: dict[str, float] = field(default_factory=dict)
    # What was asked, with the answers to it.
    asked: list[list[int]] = field(default_factory=list)

    def nearest_tie(self, folder: Path) -> float:
        return min(nearest_tie(folder, tokens) for tokens in self.asked)

    def note(self, what: str, value: float) -> None:
        self.worst[what] = max(self.worst.get(what, 0.0), value)

    def fault(self, exact: set[str], besides: tuple[str, ...] = ()) -> str | None:
        far = [f"{what} {value:.2g}" for what, value in self.worst.items() if not value < TOLERANCE and not what.startswith(besides or "-")]
        unequal = [f"{what} {value:.2g} is not equal" for what, value in self.worst.items() if what in exact and value != 0.0]
        return "; ".join(far + unequal) or None


def check(row: Row, scheme: str, is_first: bool, folder: Path, seed: int, verbose: bool) -> str | None:
    found = examine(row, scheme, is_first, folder, seed, verbose)
    # Sums over ranks round differently, and where two experts are all but equal that picks the other one.
    if found.fault({"split"}) and not found.fault({"split"}, besides=("tensor",)) and found.nearest_tie(folder) < TIE:
        found = examine(row, scheme, is_first, folder.with_name(folder.name + "-again"), seed + 1000, verbose)
    return found.fault({"split"})


def examine(row: Row, scheme: str, is_first: bool, folder: Path, seed: int, verbose: bool) -> Findings:
    build(row, folder, seed, SCHEMES[scheme], scheme == "published")
    ids = random.Random(seed)
    lengths = [row.prompt_tokens, 5, row.prompt_tokens // 2 + 1]
    prompts = [ids.choices(range(256), k=length) for length in lengths]
    if scheme == "published" and not row.mlx_lm_loads:
        twin = folder.with_name(folder.name + "-twin")
        wanted = reference(build(row, twin, seed), prompts[0], row.chunks_matter)
    else:
        wanted = reference(folder, prompts[0], row.chunks_matter)
    layouts = [[]] if scheme == "published" else [[], *map(list, row.cuts)]
    whole, *split = ask(folder, prompts, layouts)
    found = Findings(asked=[prompt + answer["tokens"] for prompt, answer in zip(prompts, whole["alone"])])
    found.note("mlx-lm", distance(whole["alone"][0], wanted))
    found.note("chunks", distance(whole["chunked"], wanted))
    loose = [0.0] * NEW_TOKENS
    for alone, batched in zip(whole["alone"], whole["batched"]):
        found.note("batch", distance(batched, as_wanted(alone, loose)))
    for layout in (whole, *split):
        for alone, unscored in zip(whole["alone"], layout["unscored"]):
            found.note("unscored", distance(unscored, Wanted([], alone["tokens"], alone["logprobs"], loose)))
    for other in split:
        for kind in ("alone", "batched"):
            for ours, theirs in zip(other[kind], whole[kind]):
                found.note("split", distance(ours, as_wanted(theirs, [1.0] * NEW_TOKENS)))
        found.note("split", distance(other["chunked"], as_wanted(whole["chunked"], [1.0] * NEW_TOKENS)))
    for group in groups(scheme, is_first, folder, prompts[:GROUP_PROMPTS]):
        name = "tensor " + ":".join(map(str, group["shares"]))
        found.note(name, distance(group["alone"][0], first(wanted)))
        found.note(name, distance(group["chunked"], first(wanted)))
        for kind in ("alone", "batched", "unscored"):
            for ours, theirs in zip(group[kind], whole[kind]):
                found.note(name, distance(ours, first(as_wanted(theirs, loose))))
    if verbose:
        print("   ", ", ".join(f"{what} {value:.2g}" for what, value in found.worst.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a row's title, or its model_type with =")
    parser.add_argument("--module", default="")
    parser.add_argument("--schemes", default="f32,affine4,published")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    report, seen = Report(), set()
    with tempfile.TemporaryDirectory(prefix="architectures-") as scratch:
        for number, row in enumerate(rows(args.module)):
            is_first = row.model_type not in seen
            seen.add(row.model_type)
            named = row.model_type == args.only[1:] if args.only.startswith("=") else args.only in row.title
            for scheme in args.schemes.split(",") if named else []:
                absent = (scheme == "published" and row.published is None) or (SCHEMES[scheme] and not row.quantizes)
                if not absent:
                    folder = Path(scratch) / f"{number}-{scheme}"
                    report.check(f"{row.title}, {scheme}", check, row, scheme, is_first, folder, args.seed + number, args.verbose)
    report.close()


if __name__ == "__main__":
    main()
