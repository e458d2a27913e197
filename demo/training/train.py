"""Trains the demo model from nothing: `python demo/training/train.py`.

Deterministic from `--seed` on one machine. Writes the model folder every `--save-every` steps, so that
a run that is cut off leaves a usable model.
"""

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import corpus
import export
import held_out_examples
import initial
import model
import tokens
from batches import Batch, Batches, Shape

CONFIG = model.Config()
SHORT = Shape(rows=9, length=128, learnt=832)
LONG = Shape(rows=4, length=384, learnt=640)
BALANCE_WEIGHT = 0.01
CAPACITY_FACTOR = 1.5
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
CLIP = 1.0


def loss(weights: dict, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x, balance = model.hidden_states(CONFIG, weights, batch.ids, list(batch.segments), CAPACITY_FACTOR)
    logits = x[batch.picked] @ weights["embed"].T
    right = jnp.argmax(logits, axis=-1) == batch.targets
    entropy = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, batch.targets[:, None], axis=-1)[:, 0]
    total = batch.weights.sum()
    mean = (entropy * batch.weights).sum() / total
    accuracy = (right * batch.weights).sum() / total
    return mean + BALANCE_WEIGHT * balance, (mean, accuracy, balance)


def learning_rate(step: jax.Array, steps: int, peak: float) -> jax.Array:
    """Linear warm-up, then a cosine down to a fiftieth."""
    warm_up = min(200, max(steps // 10, 1))
    done = jnp.clip((step - warm_up) / max(steps - warm_up, 1), 0, 1)
    return peak * jnp.minimum((step + 1) / warm_up, 0.02 + 0.98 * 0.5 * (1 + jnp.cos(jnp.pi * done)))


@partial(jax.jit, static_argnums=(4, 5), donate_argnums=(0, 1))
def update(weights: dict, moments: tuple, step: jax.Array, batch: Batch, steps: int, peak: float):
    """One step of AdamW. Norms and embeddings do not decay."""
    (_, measured), gradient = jax.value_and_grad(loss, has_aux=True)(weights, batch)
    norm = jnp.sqrt(sum((g * g).sum() for g in jax.tree.leaves(gradient)))
    scale = jnp.minimum(1.0, CLIP / (norm + 1e-6))
    rate = learning_rate(step, steps, peak)
    first_correction, second_correction = (1 - b ** (step + 1.0) for b in BETAS)

    def one(path, weight, grad, first, second):
        grad = grad * scale
        first = BETAS[0] * first + (1 - BETAS[0]) * grad
        second = BETAS[1] * second + (1 - BETAS[1]) * grad * grad
        change = first / first_correction / (jnp.sqrt(second / second_correction) + 1e-8)
        name = path[-1].key
        decay = 0.0 if "norm" in name or name == "embed" else WEIGHT_DECAY
        return weight - rate * (change + decay * weight), first, second

    stepped = jax.tree_util.tree_map_with_path(one, weights, gradient, *moments)
    pick = lambda i: jax.tree.map(lambda t: t[i], stepped, is_leaf=lambda t: isinstance(t, tuple))
    return pick(0), (pick(1), pick(2)), measured + (norm,)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "model")
    parser.add_argument("--start-from", type=Path, help="a model folder to go on from, instead of from nothing")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--check-every", type=int, default=250)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if args.start_from:
        tokenizer = tokens.load(args.start_from / "tokenizer.json")
        weights = export.read_weights(args.start_from, CONFIG)
    else:
        tokenizer = tokens.train(corpus.sample_texts(args.seed, 20000))
        weights = initial.weights(CONFIG, args.seed)
    encoder = corpus.Encoder(tokenizer)
    weights = jax.tree.map(jnp.asarray, weights)
    export.write_rest(args.output, CONFIG, tokenizer)
    export.write_weights(args.output, CONFIG, weights)
    print(f"{model.count(weights):,} parameters, {len(jax.devices())} device(s): {jax.devices()[0].platform}", flush=True)

    batches = Batches(encoder, args.seed + 1, SHORT, LONG)
    checks = held_out_examples.checks(encoder)
    moments = (jax.tree.map(jnp.zeros_like, weights), jax.tree.map(jnp.zeros_like, weights))
    recent = []
    for step in range(args.steps):
        weights, moments, measured = update(weights, moments, jnp.float32(step), batches.next(), args.steps, args.peak)
        recent.append(measured)
        if (step + 1) % 50 == 0:
            entropy, accuracy, balance, norm = np.array(recent).mean(axis=0)
            print(
                f"step {step + 1}  loss {entropy:.4f}  accuracy {accuracy:.4f}  balance {balance:.3f}  "
                f"gradient {norm:.2f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
            recent = []
        if (step + 1) % args.check_every == 0:
            figures = "  ".join(f"{name} {held_out_examples.share_right(CONFIG, weights, check):.3f}" for name, check in checks.items())
            print(f"step {step + 1}  held out, all tokens right: {figures}", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            export.write_weights(args.output, CONFIG, weights)
    print(f"done after {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
