"""Says the cluster what mlx-lm says? Tokens and log-probabilities of tiny random models, on one worker and split over two and three in every way.

    python tests/parity/parity.py [--only TEXT] [--layouts single,pipeline2,pipeline3,tensor2,tensor3,hybrid,unequal] [--seed N]

The workers stay; each model gets one coordinator a layout. Ends with `N passed, N failed`.
"""

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlx.core as mx

mx.set_default_device(mx.cpu)
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import models
from ties import TIE, nearest_tie

sys.path.insert(0, str(Path(__file__).parents[1] / "harness"))
from cluster import Coordinator, Workers
from report import Report

# Nats; f32 against f32 on the same kernels.
TOLERANCE = 2e-3
# The second prompt is longer than a prefill chunk of its pipeline, and than the original context of the scaled RoPEs.
PROMPT_TOKENS = [7, 700]
NEW_TOKENS = 12


@dataclass
class Layout:
    workers: int
    strategy: str = ""
    # Stages as `--stages` takes them, with the number of a middle layer and of the last one to fill in.
    stages: str = ""

    def args(self, n_layers: int) -> list[str]:
        cut = max(n_layers // 2 - 1, 0)
        return ["--stages", self.stages.format(cut=cut, after=cut + 1, last=n_layers - 1)] if self.stages else []


LAYOUTS = {
    "single": Layout(1),
    "pipeline2": Layout(2),
    "pipeline3": Layout(3),
    "tensor2": Layout(2, "tensor"),
    "tensor3": Layout(3, "tensor"),
    "hybrid": Layout(3, stages="worker1+worker0:0-{cut},worker2:{after}-{last}"),
    "hybrid-end": Layout(3, stages="worker2:0-{cut},worker0+worker1:{after}-{last}"),
    "unequal": Layout(2, stages="worker0*2+worker1:0-{last}"),
}


@dataclass
class Reference:
    """What mlx-lm says of a prompt: the log-probability of each prompt token but the first, then its greedy continuation."""

    prompt: list[int]
    prompt_logprobs: list[float]
    tokens: list[int]
    logprobs: list[float]
    # How much more likely each token is than the runner-up: a tie may break either way.
    margins: list[float]


def reference(model, prompt: list[int]) -> Reference:
    logits = model(mx.array([prompt]))[0].astype(mx.float32)
    rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    got = Reference(prompt, [rows[i, token].item() for i, token in enumerate(prompt[1:])], [], [], [])
    for token, row in generate_step(mx.array(prompt), model, max_tokens=NEW_TOKENS):
        second, first = mx.sort(row.astype(mx.float32))[-2:].tolist()
        got.tokens.append(int(token))
        got.logprobs.append(row[int(token)].item())
        got.margins.append(first - second)
    return got


def compare(wanted: Reference, choice: dict) -> str | None:
    """The first difference in words."""
    prompt_tokens, logprobs, tokens = len(wanted.prompt), choice["logprobs"]["token_logprobs"], choice["token_ids"]
    if len(logprobs) != prompt_tokens + len(tokens):
        return f"{len(logprobs)} logprobs for {prompt_tokens} prompt tokens and {len(tokens)} new ones"
    if logprobs[0] is not None:
        return f"the first prompt token has logprob {logprobs[0]}"
    for i, (ours, theirs) in enumerate(zip(logprobs[1:prompt_tokens], wanted.prompt_logprobs)):
        if not abs(ours - theirs) < TOLERANCE:
            return f"logprob of prompt token {i + 1} of {prompt_tokens}: {ours:.4f}, mlx-lm {theirs:.4f}"
    for i, token in enumerate(wanted.tokens):
        if i >= len(tokens):
            return f"{len(tokens)} tokens, mlx-lm {len(wanted.tokens)}"
        if tokens[i] != token:
            return None if wanted.margins[i] < TOLERANCE else f"token {i}: {tokens[i]}, mlx-lm {token}"
        ours = logprobs[prompt_tokens + i]
        if not abs(ours - wanted.logprobs[i]) < TOLERANCE:
            return f"logprob of token {i}: {ours:.4f}, mlx-lm {wanted.logprobs[i]:.4f}"
    return None


def ask(workers: Workers, layout: Layout, n_layers: int, folder: Path, references: list[Reference]) -> str | None:
    with Coordinator(workers, folder, *layout.args(n_layers), strategy=layout.strategy) as coordinator:
        for wanted in references:
            choice = coordinator.complete(wanted.prompt, NEW_TOKENS, temperature=0, logprobs=1, echo=True)
            if why := compare(wanted, choice):
                return f"prompt of {len(wanted.prompt)} tokens: {why}"
    return None


class Model:
    """A case's random model with what mlx-lm says of some prompts."""

    def __init__(self, case: models.Case, folder: Path, seed: int):
        self.case, self.seed = case, seed
        self.folder = models.build(case, folder, seed)
        model, _ = load_model(self.folder)
        random_ids = random.Random(seed)
        self.references = [reference(model, random_ids.choices(range(256), k=count)) for count in PROMPT_TOKENS]

    def ask(self, workers: Workers, layout: Layout) -> str | None:
        return ask(workers, layout, self.case.config["num_hidden_layers"], self.folder, self.references)

    @cached_property
    def another(self) -> "Model":
        return Model(self.case, self.folder.with_name(self.folder.name + "-another"), self.seed + 1000)

    def check(self, workers: Workers, layout: Layout) -> str | None:
        why = self.ask(workers, layout)
        # Sums over ranks round differently, and where two experts are all but equal that picks the other one.
        splits_matrices = layout.strategy == "tensor" or layout.stages
        if why and splits_matrices and self.has_tie:
            why = self.another.ask(workers, layout)
        return why

    @cached_property
    def has_tie(self) -> bool:
        return any(nearest_tie(self.folder, wanted.prompt + wanted.tokens) < TIE for wanted in self.references)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    report = Report()
    layouts = {name: LAYOUTS[name] for name in args.layouts.split(",")}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="parity-")))
        clusters = {count: stack.enter_context(Workers(count)) for count in {layout.workers for layout in layouts.values()}}
        for number, case in enumerate(models.cases()):
            if args.only not in case.name:
                continue
            model = Model(case, scratch / f"model-{number}", args.seed + number)
            # A cut that layers with shared keys and values reach across does not meet a group.
            fitting = {name: layout for name, layout in layouts.items() if not (case.config.get("num_kv_shared_layers") and "hybrid" in name)}
            for name, layout in fitting.items():
                report.check(f"{case.name}, {name}", model.check, clusters[layout.workers], layout)
    report.close()


if __name__ == "__main__":
    main()
