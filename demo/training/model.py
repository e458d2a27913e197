"""The model: Qwen3-MoE in JAX, the same function as mlx-lm's `qwen3_moe`.

Tokens of all rows lie behind each other in one axis; only attention looks at rows. The router takes
the softmax over all experts, keeps the best two and renormalises. Experts compute only the tokens
routed to them, up to a capacity; `exact=True` leaves no token out.
"""

from dataclasses import asdict, dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Config:
    vocab_size: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 64
    intermediate_size: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048

    def published(self, bos: int, eos: int) -> dict:
        """The `config.json` that other programs read."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **asdict(self),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "decoder_sparse_step": 1,
            "eos_token_id": eos,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "use_cache": True,
            "use_sliding_window": False,
        }


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotates halves (not neighbours); `x` is [rows, positions, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = (np.asarray(f(angles), np.float32)[None, :, None, :] for f in (np.cos, np.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(config: Config, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention of [rows, positions, heads, head_dim] within segments of a row."""
    rows, length, heads, dim = q.shape
    groups = config.num_key_value_heads
    q, k = rope(q, config.rope_theta), rope(k, config.rope_theta)
    q = q.reshape(rows, length, groups, heads // groups, dim)
    scores = jnp.einsum("rqghd,rkgd->rghqk", q, k) * dim**-0.5
    causal = np.tril(np.ones((length, length), bool))
    mask = causal & (segments[:, :, None] == segments[:, None, :])
    scores = jnp.where(mask[:, None, None], scores, -1e9)
    mixed = jnp.einsum("rghqk,rkgd->rqghd", jax.nn.softmax(scores, axis=-1), v)
    return mixed.reshape(rows * length, heads * dim)


def attention(config: Config, x: jax.Array, layer: dict, parts: list[jax.Array]) -> jax.Array:
    """`parts` holds the segments of each group of rows; the groups differ in row length."""
    eps = config.rms_norm_eps
    q = rms_norm((x @ layer["q"].T).reshape(len(x), config.num_attention_heads, -1), layer["q_norm"], eps)
    k = rms_norm((x @ layer["k"].T).reshape(len(x), config.num_key_value_heads, -1), layer["k_norm"], eps)
    v = (x @ layer["v"].T).reshape(len(x), config.num_key_value_heads, -1)
    mixed, start = [], 0
    for segments in parts:
        stop = start + segments.size
        shaped = [t[start:stop].reshape(*segments.shape, *t.shape[1:]) for t in (q, k, v)]
        mixed.append(attend(config, *shaped, segments))
        start = stop
    return jnp.concatenate(mixed) @ layer["o"].T


def _padded(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])


# Gathers whose gradients are gathers too: a scatter is slow on a CPU. `choice_of_slot` names, for each
# place in an expert's batch, the (token, choice) in it; `slot_of_choice` is its inverse.
@jax.custom_vjp
def to_experts(x: jax.Array, choice_of_slot: jax.Array, slot_of_choice: jax.Array) -> jax.Array:
    return _padded(x)[choice_of_slot // slot_of_choice.shape[1]]


def _to_experts_forward(x, choice_of_slot, slot_of_choice):
    return to_experts(x, choice_of_slot, slot_of_choice), slot_of_choice


def _to_experts_backward(slot_of_choice, grad):
    return _padded(grad)[slot_of_choice].sum(axis=1), None, None


to_experts.defvjp(_to_experts_forward, _to_experts_backward)


@jax.custom_vjp
def from_experts(y: jax.Array, choice_of_slot: jax.Array, slot_of_choice: jax.Array) -> jax.Array:
    return _padded(y)[slot_of_choice]


def _from_experts_forward(y, choice_of_slot, slot_of_choice):
    return from_experts(y, choice_of_slot, slot_of_choice), choice_of_slot


def _from_experts_backward(choice_of_slot, grad):
    return _padded(grad.reshape(-1, grad.shape[-1]))[choice_of_slot], None, None


from_experts.defvjp(_from_experts_forward, _from_experts_backward)


def _running_count(chosen: jax.Array) -> jax.Array:
    """Exclusive cumulative sum along the first axis, by blocks: XLA's own is slow on a CPU."""
    count, experts = chosen.shape
    blocks = chosen.reshape(-1, 64, experts)
    inside = jnp.einsum("ij,bje->bie", np.tril(np.ones((64, 64), np.float32), -1), blocks)
    totals = blocks.sum(axis=1)
    number = len(totals)
    before = np.tril(np.ones((number, number), np.float32), -1) @ totals
    return (inside + before[:, None]).reshape(count, experts)


def mixture(config: Config, x: jax.Array, layer: dict, real: jax.Array, capacity_factor: float) -> tuple[jax.Array, jax.Array]:
    """The sparse feed-forward, and its load-balancing loss (Switch Transformer, equation 4)."""
    tokens, experts, kept = len(x), config.num_experts, config.num_experts_per_tok
    probabilities = jax.nn.softmax(x @ layer["router"].T, axis=-1)
    masked, chosen = jax.lax.stop_gradient(probabilities), []
    for _ in range(kept):
        chosen.append(jax.nn.one_hot(jnp.argmax(masked, axis=-1), experts, dtype=jnp.float32))
        masked = masked - 2 * chosen[-1]
    choices = jnp.stack(chosen, axis=1)
    scores = (probabilities[:, None] * choices).sum(axis=-1)
    scores = scores / scores.sum(axis=-1, keepdims=True)

    capacity = min(tokens, int(np.ceil(capacity_factor * tokens * kept / experts / 16)) * 16)
    wanted = (choices * real[:, None, None]).reshape(tokens * kept, experts)
    place = (_running_count(wanted) * wanted).sum(axis=-1).astype(jnp.int32)
    fits = (wanted.sum(axis=-1) > 0) & (place < capacity)
    slot = jnp.where(fits, jnp.argmax(wanted, axis=-1) * capacity + place, experts * capacity)
    choice_of_slot = jnp.full(experts * capacity + 1, tokens * kept, jnp.int32).at[slot].set(jnp.arange(tokens * kept, dtype=jnp.int32))
    choice_of_slot = choice_of_slot.at[-1].set(tokens * kept)[:-1]
    slot_of_choice = slot.reshape(tokens, kept)

    inputs = to_experts(x, choice_of_slot, slot_of_choice).reshape(experts, capacity, -1)
    inner = jax.nn.silu(jnp.einsum("ech,eih->eci", inputs, layer["gate"])) * jnp.einsum("ech,eih->eci", inputs, layer["up"])
    outputs = jnp.einsum("eci,ehi->ech", inner, layer["down"]).reshape(experts * capacity, -1)
    y = (from_experts(outputs, choice_of_slot, slot_of_choice) * scores[..., None]).sum(axis=1)

    share = (wanted.sum(axis=0)) / jnp.maximum(wanted.sum(), 1)
    mean = (probabilities * real[:, None]).sum(axis=0) / jnp.maximum(real.sum(), 1)
    return y, experts * (share * mean).sum()


def hidden_states(config: Config, weights: dict, ids: jax.Array, parts: list[jax.Array], capacity_factor: float) -> tuple[jax.Array, jax.Array]:
    """[tokens, hidden] after the final norm, and the mean balance loss. A segment below 0 is padding."""
    real = jnp.concatenate([p.reshape(-1) for p in parts]) >= 0

    def block(x: jax.Array, layer: dict) -> tuple[jax.Array, jax.Array]:
        x = x + attention(config, rms_norm(x, layer["input_norm"], config.rms_norm_eps), layer, parts)
        y, balance = mixture(config, rms_norm(x, layer["post_norm"], config.rms_norm_eps), layer, real.astype(jnp.float32), capacity_factor)
        return x + y, balance

    x, balance = jax.lax.scan(block, weights["embed"][ids], weights["layers"])
    return rms_norm(x, weights["norm"], config.rms_norm_eps), balance.mean()


@partial(jax.jit, static_argnums=0)
def logits(config: Config, weights: dict, ids: jax.Array) -> jax.Array:
    """[positions, vocabulary] for one row of ids: the exact function, no token left out."""
    padded = jnp.zeros(-(-len(ids) // 64) * 64, ids.dtype).at[: len(ids)].set(ids)
    segments = (jnp.arange(len(padded)) >= len(ids)).astype(jnp.int32) * -1
    x, _ = hidden_states(config, weights, padded, [segments[None]], config.num_experts / config.num_experts_per_tok)
    return (x @ weights["embed"].T)[: len(ids)]


def count(weights: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(weights))
