"""The same request gives the same tokens: alone, among 15 others, streamed or not, on one worker, two and three; and in a tensor-parallel group.

    python tests/parity/sameness.py

Temperature 0.8 with a seed, on models with random weights (their distribution is flat, so that the smallest difference shows): routed in 4 bits, with a state, with latent
attention; and on the bundled one. Ends with `N passed, N failed`.
"""

import json
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx
import requests

mx.set_default_device(mx.cpu)
import models

sys.path.insert(0, str(Path(__file__).parents[1] / "harness"))
from cluster import Coordinator, Workers
from report import Report

WORKERS = [1, 2, 3]
OTHERS = 15
REQUEST = {"prompt": random.Random(7).choices(range(250), k=90), "max_tokens": 48, "temperature": 0.8, "seed": 1234, "return_token_ids": True}
OTHER_SETTINGS = [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"repetition_penalty": 1.2}, {}]


def other(number: int) -> dict:
    """A request unlike the one that is watched: its own length, seed and settings."""
    ids = random.Random(1000 + number)
    return {"prompt": ids.choices(range(250), k=ids.randint(1, 300)), "max_tokens": ids.randint(5, 90), "temperature": ids.choice([0, 0.8, 1.2]),
            "seed": number, "return_token_ids": True, **OTHER_SETTINGS[number % len(OTHER_SETTINGS)]}


def tokens(coordinator: Coordinator, body: dict) -> list[int]:
    return coordinator.post("/v1/completions", body)["choices"][0]["token_ids"]


def streamed_tokens(coordinator: Coordinator, body: dict) -> list[int]:
    got = []
    with requests.post(f"{coordinator.url}/v1/completions", json={**body, "stream": True}, stream=True, timeout=300) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                for choice in json.loads(line[6:])["choices"]:
                    got += choice.get("token_ids") or []
    return got


def among_others(coordinator: Coordinator, ask) -> list[int]:
    with ThreadPoolExecutor(OTHERS + 1) as pool:
        before = [pool.submit(tokens, coordinator, other(i)) for i in range(OTHERS // 2)]
        watched = pool.submit(ask, coordinator, REQUEST)
        after = [pool.submit(tokens, coordinator, other(i)) for i in range(OTHERS // 2, OTHERS)]
        for future in before + after:
            future.result()
        return watched.result()


def different(got: list[int], wanted: list[int]) -> str | None:
    if got == wanted:
        return None
    first = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
    return f"differs from token {first} on: {got[first : first + 4]} instead of {wanted[first : first + 4]} ({len(got)} and {len(wanted)} tokens)"


def check(report: Report, coordinator: Coordinator, where: str, wanted: list[int]) -> None:
    report.check(f"{where}: alone", different, tokens(coordinator, REQUEST), wanted)
    report.check(f"{where}: again", different, tokens(coordinator, REQUEST), wanted)
    report.check(f"{where}: among {OTHERS} others", different, among_others(coordinator, tokens), wanted)
    report.check(f"{where}: streamed among others", different, among_others(coordinator, streamed_tokens), wanted)
    another = tokens(coordinator, {**REQUEST, "seed": 1235})
    report.check(f"{where}: another seed differs", lambda: "the seed does not matter" if another == wanted else None)


def main() -> None:
    report = Report()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sameness-")))
        routed = models.Case("random routed model, 4 bits", models.config("qwen3_moe", **models.MOE), models.AFFINE4)
        folders = {routed.name: models.build(routed, scratch / "routed", 5), "bundled model": Path(__file__).parents[2] / "demo/model"}
        # Mixers that mind where a prompt is cut.
        for case in models.table_cases():
            if case.name in ("qwen3_next", "mamba2", "deepseek_v3"):
                folders[f"random {case.name}"] = models.build(case, scratch / case.name, 5)
        clusters = [stack.enter_context(Workers(count)) for count in WORKERS]
        for name, folder in folders.items():
            wanted = None
            for workers in clusters:
                with Coordinator(workers, folder) as coordinator:
                    wanted = wanted or tokens(coordinator, REQUEST)
                    check(report, coordinator, f"{name}, {workers.count} worker{'s'[: workers.count > 1]}", wanted)
            # Matrices that are split round otherwise than whole ones, so a group is compared with itself.
            with Coordinator(clusters[1], folder, strategy="tensor") as coordinator:
                check(report, coordinator, f"{name}, tensor-parallel", tokens(coordinator, REQUEST))
    report.close()


if __name__ == "__main__":
    main()
