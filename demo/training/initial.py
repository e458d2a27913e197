"""Random weights to start from, with a circuit for copying already in place.

To fill in a tool call the model copies names that it has never seen. What does that in a transformer is
an induction circuit (Olsson et al. 2022, arXiv:2209.11895): a head in one layer tells each position which
token stands before it, and a head in the next layer looks for the position that follows an earlier copy of
the current token. Found by chance it takes most of a training run as short as this one, so the first two
layers start with it, and training does the rest.
"""

import numpy as np

from model import Config

# How strongly the attention of the circuit's heads prefers its best position.
SHARPNESS = 1.9
# Pairs of dimensions that RoPE turns fast, for looking one token back, and slowly, for comparing tokens.
FAST_PAIRS = range(0, 3)
SLOW_PAIRS = range(7, 16)


def weights(config: Config, seed: int) -> dict:
    """The layers' weights are stacked along a first axis."""
    rng = np.random.default_rng(seed)
    layers, hidden, experts, inner = config.num_hidden_layers, config.hidden_size, config.num_experts, config.moe_intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim

    def normal(*shape: int, fan_in: int, gain: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * gain / np.sqrt(fan_in)).astype(np.float32)

    def ones(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32)

    random = {
        "embed": normal(config.vocab_size, hidden, fan_in=hidden, gain=0.5),
        "norm": ones(hidden),
        "layers": {
            "input_norm": ones(layers, hidden),
            "post_norm": ones(layers, hidden),
            "q": normal(layers, queries, hidden, fan_in=hidden),
            "k": normal(layers, keys, hidden, fan_in=hidden),
            "v": normal(layers, keys, hidden, fan_in=hidden),
            "o": normal(layers, hidden, queries, fan_in=queries, gain=0.05),
            "q_norm": ones(layers, config.head_dim),
            "k_norm": ones(layers, config.head_dim),
            "router": normal(layers, experts, hidden, fan_in=hidden, gain=0.5),
            "gate": normal(layers, experts, inner, hidden, fan_in=hidden),
            "up": normal(layers, experts, inner, hidden, fan_in=hidden),
            "down": normal(layers, experts, hidden, inner, fan_in=inner, gain=0.1),
        },
    }
    _add_copying(config, random, rng)
    return random


def _add_copying(config: Config, random: dict, rng: np.random.Generator) -> None:
    """Writes the circuit into layers 0 and 1. Directions of the hidden state are rows of a random rotation."""
    dim, half, layers = config.head_dim, config.head_dim // 2, random["layers"]
    rotation = np.linalg.qr(rng.standard_normal((config.hidden_size, config.hidden_size)))[0].astype(np.float32)
    compared, before, copied, constant = rotation[:dim], rotation[dim : 2 * dim], rotation[2 * dim : 4 * dim - 1], rotation[-1]
    # Attention by position alone needs something that is the same for all tokens.
    random["embed"] += 0.25 * constant

    # Layer 0, heads 0 and 1 (one key head): look one and two tokens back, write what stands there to `before`.
    angles = config.rope_theta ** (-np.arange(half) / half)
    for head, distance in ((0, 1), (1, 2)):
        layers["q"][0, head * dim : (head + 1) * dim] = np.outer(_fast_direction(dim, -distance * angles), constant)
    layers["k"][0, :dim] = np.outer(_fast_direction(dim, 0 * angles), constant)
    layers["v"][0, :dim] = compared
    layers["o"][0, :, :dim] = 0.2 * before.T
    layers["o"][0, :, dim : 2 * dim] *= 2
    layers["q_norm"][0] *= SHARPNESS
    layers["k_norm"][0] *= SHARPNESS

    # Layer 1, heads 0 and 2 (one of each key head): compare the token here with the tokens before other
    # positions, and add what stands at the best of those to the prediction.
    slots = [f for f in SLOW_PAIRS] + [f + half for f in SLOW_PAIRS]
    for group, head in ((0, 0), (1, 2)):
        picked = np.arange(len(slots)) + group * (dim - len(slots))
        for weight, source, row in (("q", compared, head * dim), ("k", before, group * dim)):
            layers[weight][1, row : row + dim] *= 0.02
            layers[weight][1, [row + s for s in slots]] += source[picked]
        part = copied[group * dim : (group + 1) * dim]
        layers["v"][1, group * dim : group * dim + len(part)] = part
        layers["o"][1, :, head * dim : head * dim + len(part)] = 0.75 * part.T
    layers["q_norm"][1] *= SHARPNESS
    layers["k_norm"][1] *= SHARPNESS


def _fast_direction(dim: int, angles: np.ndarray) -> np.ndarray:
    """A vector in the fast pairs of dimensions, each pair turned by its angle."""
    direction = np.zeros(dim, np.float32)
    for f in FAST_PAIRS:
        direction[f], direction[f + dim // 2] = np.cos(angles[f]), np.sin(angles[f])
    return direction
