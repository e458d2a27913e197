"""Measures, while training, how often an answer to something held out is right from end to end.

Every learnt token is compared with the likeliest one. All of them right is the same as: greedy
decoding writes exactly this answer.
"""

import random
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import held_out
import model
import sums
import tool_examples
from batches import Batch, Shape, assemble
from conversation import Example, user
from corpus import Encoder, Tokens
from tool_kinds import KINDS

COUNT = 200


class Check(NamedTuple):
    batch: Batch
    # Which row a learnt token belongs to.
    row: np.ndarray
    rows: int


def _sum(rng: random.Random, thinking: bool) -> Example:
    a, b = rng.choice(held_out.held_out_pairs())
    question = rng.choice(sums.PHRASINGS).format(a=a, b=b)
    return Example([user(question)], sums.answer(a, b), thought=sums.columns(a, b) if thinking else None)


def _call(rng: random.Random) -> Example:
    kind = rng.choice([k for k in KINDS if k.names[0] in ("get_weather", "add", "get_time", "set_timer")])
    chosen = tool_examples.offers(rng, kind)[:3]
    offer = next((o for o in chosen if o.kind is kind), None)
    if offer is None:
        return _call(rng)
    a, b = rng.choice(held_out.held_out_pairs())
    values = {"city": rng.choice(held_out.CITIES), "minutes": rng.choice(held_out.MINUTES), "a": a, "b": b}
    question = rng.choice(kind.questions).format(**values)
    return Example([user(question)], offer.call_text(values), tools=[o.schema for o in chosen])


def _check(encoder: Encoder, length: int, make) -> Check:
    rng = random.Random(7)
    encoded: list[Tokens] = []
    while len(encoded) < COUNT:
        tokens = encoder.encode(make(rng))
        if len(tokens.ids) <= length:
            encoded.append(tokens)
    learnt = sum(sum(w > 0 for w in t.weights) for t in encoded)
    batch = assemble([([[t] for t in encoded], Shape(COUNT, length, learnt))])
    return Check(batch, batch.picked // length, COUNT)


def checks(encoder: Encoder) -> dict[str, Check]:
    return {
        "sums": _check(encoder, 64, lambda rng: _sum(rng, thinking=False)),
        "sums, thinking": _check(encoder, 96, lambda rng: _sum(rng, thinking=True)),
        "tool calls": _check(encoder, 320, _call),
    }


@partial(jax.jit, static_argnums=0)
def _right(config: model.Config, weights: dict, batch: Batch) -> jax.Array:
    x, _ = model.hidden_states(config, weights, batch.ids, list(batch.segments), 2.5)
    return jnp.argmax(x[batch.picked] @ weights["embed"].T, axis=-1) == batch.targets


def share_right(config: model.Config, weights: dict, check: Check) -> float:
    right = np.asarray(_right(config, weights, check.batch))
    wrong_rows = np.unique(check.row[~right])
    return 1 - len(wrong_rows) / check.rows
