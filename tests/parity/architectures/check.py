"""Runs each row with mlx-lm alone: is the table sound, and where does mlx-lm disagree with itself?"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

sys.path[0] = str(Path(__file__).parent.parent)

from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import models
from architectures import rows
from architectures.fabricate import build
from architectures.row import Row

mx.set_default_device(mx.cpu)

TOLERANCE = 1e-3
CHUNKS, DECODED = 8, 4


def logprobs(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def apart(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


def chunked(model, tokens: mx.array) -> mx.array:
    """All but the last tokens in chunks, then those one by one, as decoding feeds them."""
    cache, prompt = make_prompt_cache(model), tokens.shape[0] - DECODED
    edges = [prompt * i // CHUNKS for i in range(CHUNKS)] + list(range(prompt, tokens.shape[0] + 1))
    parts = []
    for start, end in zip(edges, edges[1:]):
        parts.append(model(tokens[None, start:end], cache=cache))
        mx.eval(parts[-1])
    return logprobs(mx.concatenate(parts, axis=1))


def examine(row: Row, folder: Path) -> tuple[mx.array, list[str]]:
    """The log-probabilities of every position, and what is wrong."""
    model, _ = load_model(folder)
    mx.random.seed(7)
    tokens = mx.random.randint(0, 256, (row.prompt_tokens + DECODED,))
    whole = logprobs(model(tokens[None], cache=make_prompt_cache(model)))
    faults = []
    if mx.isnan(whole).any().item():
        return whole, ["NaN"]
    if mx.std(whole, axis=1).mean().item() < 0.05:
        faults.append("positions hardly differ")
    if len(set(mx.argmax(whole[0], axis=-1).tolist())) < 4:
        faults.append("always the same greedy token")
    if mx.mean(mx.argmax(whole[0], axis=-1) == tokens).item() > 0.5:
        faults.append("repeats its input")
    difference = apart(whole, logprobs(model(tokens[None])))
    if (difference > TOLERANCE) != row.cache_matters:
        faults.append(f"without a cache: {difference:.2g} away")
    difference = apart(whole, chunked(model, tokens))
    if (difference > TOLERANCE) != row.chunks_matter:
        faults.append(f"in chunks: {difference:.2g} away")
    return whole, faults


def attempt(label: str, run, faults: list[str]):
    """What `run` gives, or None where it fails; adds its faults to the list."""
    try:
        value, found = run()
    except Exception as error:  # any failure of the module is a finding
        value, found = None, [f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"]
    faults += [f"{label}: {fault}" for fault in found]
    return value


def check(row: Row, folder: Path, seed: int) -> list[str]:
    faults: list[str] = []
    plain = attempt("f32", lambda: examine(row, build(row, folder / "f32", seed)), faults)
    if row.quantizes:
        attempt("4-bit", lambda: examine(row, build(row, folder / "affine4", seed, models.AFFINE4)), faults)
    if row.published and plain is not None:
        refusals: list[str] = []
        value = attempt("published", lambda: (examine(row, build(row, folder / "published", seed, published=True))[0], []), refusals)
        if row.mlx_lm_loads:
            faults += refusals
        elif value is not None and apart(plain, value) == 0.0:
            faults.append("published: mlx-lm loads it after all")
        if row.mlx_lm_loads and value is not None and apart(plain, value) != 0.0:
            faults.append(f"published: {apart(plain, value):.2g} away from its twin")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a row's title")
    parser.add_argument("--module", default="", help="only the rows of this file")
    arguments = parser.parse_args()
    chosen = [row for row in rows(arguments.module) if arguments.only in row.title]
    bad = 0
    for seed, row in enumerate(chosen):
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            faults = check(row, Path(folder), seed)
        bad += bool(faults)
        print(f"{'FAIL' if faults else 'ok  '} {row.title} ({time.time() - start:.1f} s)", *faults, sep="\n     ", flush=True)
    print(f"{len(chosen)} rows, {bad} with findings")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
