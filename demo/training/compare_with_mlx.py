"""Compares the written model with mlx-lm's forward pass, exact and quantised.

Run it where both JAX and mlx-lm are installed, or run it twice with `--logits FILE`: the first run, with
JAX, writes the file; the second, with mlx-lm, reads it.
"""

import argparse
import importlib.util
import random
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))


def with_jax(folder: Path, file: Path) -> None:
    import jax.numpy as jnp

    import corpus
    import export
    import model
    import tokens

    config = model.Config()
    weights = export.read_weights(folder, config)
    encoder, rng = corpus.Encoder(tokens.load(folder / "tokenizer.json")), random.Random(11)
    found = {}
    for number in range(8):
        ids = encoder.encode(corpus.example(rng, 0.5)).ids
        found[f"ids{number}"] = np.array(ids)
        found[f"logits{number}"] = np.asarray(model.logits(config, weights, jnp.array(ids)))
    np.savez(file, **found)


def with_mlx(folder: Path, file: Path) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import load

    expected = np.load(file)
    exact, _ = load(str(folder))
    coarse, _ = load(str(folder))
    nn.quantize(coarse, group_size=32, bits=8)
    worst, agreeing, total = 0.0, 0, 0
    for number in range(8):
        ids = mx.array(expected[f"ids{number}"])[None]
        logits = np.array(exact(ids)[0])
        worst = max(worst, float(np.abs(logits - expected[f"logits{number}"]).max()))
        agreeing += int((np.array(coarse(ids)[0]).argmax(-1) == logits.argmax(-1)).sum())
        total += ids.size
    print(f"largest difference of a logit: {worst:.2e}")
    print(f"likeliest token unchanged by 8-bit weights: {100 * agreeing / total:.1f} % of {total}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=FOLDER / "model")
    parser.add_argument("--logits", type=Path, default=Path("logits.npz"))
    args = parser.parse_args()
    if importlib.util.find_spec("jax"):
        with_jax(args.model, args.logits)
    if importlib.util.find_spec("mlx_lm"):
        with_mlx(args.model, args.logits)


if __name__ == "__main__":
    main()
