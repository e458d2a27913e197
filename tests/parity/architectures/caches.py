"""Keys and values that are quantised, and caches of limited size: what a shard says against what mlx-lm says, token by token.

    python tests/parity/architectures/caches.py [--only TEXT] [--seed N] [--verbose]

mlx-lm's answers with such caches depend on how a prompt is cut, ours do not: so mlx-lm is fed single tokens. Two things it has not, sliding
windows that are quantised and attention that mlx-lm does not know over quantised keys, are made of its own parts here. Ends with `N passed, N failed`.
"""

import argparse
import json
import random
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[1])

import mlx.core as mx
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models import cache as caches
from mlx_lm.utils import load_model

from architectures import rows
from architectures.fabricate import build
from architectures.run import NEW_TOKENS, Findings, Wanted, as_wanted, ask, continued, distance
from architectures.row import Row
from report import Report

KEPT = 4


@dataclass
class Options:
    kv_bits: int | None = None
    kv_group_size: int = 32
    quantized_kv_start: int = 0
    max_kv_size: int | None = None

    def request(self) -> dict:
        quantization = ("kv_bits", "kv_group_size", "quantized_kv_start") if self.kv_bits else ()
        limit = ("max_kv_size",) if self.max_kv_size else ()
        return {name: getattr(self, name) for name in quantization + limit}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.request().items())


class Rounded(caches.RotatingKVCache):
    """Gives its keys and values as they are after quantisation, to tokens from the start on. (A rotating cache of mlx-lm says that its
    quantisation is not implemented yet.)"""

    def __init__(self, max_size: int, keep: int, options: Options):
        super().__init__(max_size, keep)
        self.options = options

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        late = self.offset >= max(self.options.quantized_kv_start, 1)
        fetched = super().update_and_fetch(keys, values)
        return tuple(map(self.rounded, fetched)) if late else fetched

    def rounded(self, array: mx.array) -> mx.array:
        scheme = {"group_size": self.options.kv_group_size, "bits": self.options.kv_bits}
        return mx.dequantize(*mx.quantize(array, **scheme), **scheme).astype(array.dtype)

    # `maybe_quantize_kv_cache` asks for it.
    to_quantized = property()


def reference(folder: Path, prompt: list[int], options: Options, refuses: bool) -> Wanted:
    model, _ = load_model(folder)
    cache = [replaced(one, options, refuses) for one in caches.make_prompt_cache(model, options.max_kv_size)]

    def step(tokens: list[int]) -> mx.array:
        logits = model(mx.array([tokens]), cache=cache)
        maybe_quantize_kv_cache(cache, options.quantized_kv_start, options.kv_group_size, options.kv_bits)
        return logits[0]

    return continued(mx.concatenate([step([token]) for token in prompt], axis=0), prompt, step)


def replaced(cache, options: Options, refuses: bool):
    """The cache that the options mean, where mlx-lm makes another one: models that make their own do not heed `max_kv_size`."""
    if isinstance(cache, caches.CacheList):
        return caches.CacheList(*(replaced(one, options, True) for one in cache.caches))
    limit = options.max_kv_size if isinstance(cache, caches.KVCache) else None
    has_keys = isinstance(cache, caches.KVCache | caches.RotatingKVCache)
    if options.kv_bits and has_keys and (refuses or limit or isinstance(cache, caches.RotatingKVCache)):
        if isinstance(cache, caches.RotatingKVCache):
            return Rounded(cache.max_size, cache.keep, options)
        return Rounded(limit, KEPT, options) if limit else Rounded(1 << 20, 0, options)
    return caches.RotatingKVCache(limit, KEPT) if limit else cache


def examine(row: Row, options: Options, folder: Path, seed: int, verbose: bool) -> str | None:
    if not folder.exists():
        build(row, folder, seed)
    ids = random.Random(seed)
    prompts = [ids.choices(range(256), k=length) for length in (row.prompt_tokens, 5, row.prompt_tokens // 2 + 1)]
    wanted = reference(folder, prompts[0], options, row.model_type in REFUSES_QUANTISED)
    plain = ask(folder, prompts[:1], [[]])[0]["alone"][0]
    whole, *split = ask(folder, prompts, [[], *map(list, row.cuts)], options.request())
    found = Findings()
    found.note("mlx-lm", distance(whole["alone"][0], wanted))
    found.note("chunks", distance(whole["chunked"], wanted))
    for alone, batched in zip(whole["alone"], whole["batched"]):
        found.note("batch", distance(batched, as_wanted(alone, [0.0] * NEW_TOKENS)))
    for layout in (whole, *split):
        for alone, unscored in zip(whole["alone"], layout["unscored"]):
            found.note("unscored", distance(unscored, Wanted([], alone["tokens"], alone["logprobs"], [0.0] * NEW_TOKENS)))
    for other in split:
        for kind in ("alone", "batched"):
            for ours, theirs in zip(other[kind], whole[kind]):
                found.note("split", distance(ours, as_wanted(theirs, [1.0] * NEW_TOKENS)))
    if verbose:
        print("   ", ", ".join(f"{what} {value:.2g}" for what, value in found.worst.items()))
    # An option that changes nothing would pass all of this.
    if json.dumps(plain) == json.dumps(whole["alone"][0]):
        return "the answer is the one without these options"
    return found.fault({"split"})


QUANTISED = [Options(bits, quantized_kv_start=start) for bits in (8, 4) for start in (0, 20)] + [Options(3), Options(6)]
LIMITED = [Options(max_kv_size=16), Options(max_kv_size=5), Options(4, quantized_kv_start=20, max_kv_size=16)]
# Attention with sinks or a soft cap, and layers that read the cache of others, cannot have quantised caches in mlx-lm.
REFUSES_QUANTISED = {"gpt_oss", "gemma2", "gemma3n", "gemma4_text"}
CHECKS = {
    "llama biases, wide heads": QUANTISED + LIMITED,
    "qwen3 yarn, tied": [Options(8), *LIMITED],
    "ministral3 sliding layers, tied": [Options(8), Options(4, quantized_kv_start=20), *LIMITED],
    "gpt_oss": [Options(8), Options(4, quantized_kv_start=20), *LIMITED],
    "gemma2": [Options(4, quantized_kv_start=20)],
    "gemma4_text shared keys and values, inputs for each layer": [Options(4, quantized_kv_start=20), Options(max_kv_size=16)],
    "falcon_h1": [Options(4, quantized_kv_start=20), Options(max_kv_size=16)],
    # Keys and values made of latent vectors before they are kept, and latent vectors that are kept.
    "youtu_llm": [Options(4, quantized_kv_start=20), Options(max_kv_size=16)],
    "deepseek_v3": [Options(max_kv_size=16)],
    "deepseek_v32": [Options(max_kv_size=16)],
}


def with_even_heads(row: Row) -> Row:
    """Heads that groups of 32 divide."""
    latent = {"qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "qk_head_dim": 64, "v_head_dim": 32}
    return replace(row, config=row.config | {name: value for name, value in latent.items() if name in row.config})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a row's title")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    report = Report()
    by_title = {row.title: with_even_heads(row) for row in reversed(rows(""))}
    with tempfile.TemporaryDirectory(prefix="caches-") as scratch:
        for number, (title, checks) in enumerate(CHECKS.items()):
            for options in checks if args.only in title else []:
                run = partial(examine, by_title[title], options, Path(scratch) / str(number), args.seed, args.verbose)
                report.check(f"{title}, {options}", run)
    report.close()


if __name__ == "__main__":
    main()
