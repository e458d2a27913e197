"""How published checkpoints name and lay out what the canonical ones hold; shared by the families."""

import re
from collections.abc import Callable

import mlx.core as mx

from .row import Weights

Layout = Callable[[Weights, dict], Weights]


def then(*layouts: Layout) -> Layout:
    """One layout after the other."""

    def combined(weights: Weights, config: dict) -> Weights:
        for layout in layouts:
            weights = layout(weights, config)
        return weights

    return combined


def renamed(*pairs: tuple[str, str]) -> Layout:
    """Regular expressions and replacements, in this order, for every name."""

    def apply(name: str) -> str:
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        return name

    return lambda weights, _: {apply(name): value for name, value in weights.items()}


def with_extra(*names: str) -> Layout:
    """Tensors that a loader must ignore; `*` stands for a layer, 0 and 1."""

    def apply(weights: Weights, _: dict) -> Weights:
        extra = {name.replace("*", str(layer)) for name in names for layer in (0, 1)}
        return {**weights, **{name: mx.random.normal((4, 32)) for name in sorted(extra)}}

    return apply


def head_repeated(weights: Weights, _: dict) -> Weights:
    """A tied head that is in the checkpoint all the same."""
    return {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}


def quiet_embeddings(factor: float, prefix: str = "model.", offset: float = 0.0) -> Callable[[Weights], Weights]:
    """For embeddings that are multiplied and tied: without this each token would predict itself, as the head is so like the input.

    The embeddings get smaller by the factor and the last norm, whose weight is added to the offset, larger by as much.
    """
    embedding, norm = f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"
    return lambda weights: {**weights, embedding: weights[embedding] * factor, norm: (weights[norm] + offset) / factor - offset}


inverse_frequencies = with_extra("model.layers.*.self_attn.rotary_emb.inv_freq")


def experts_apart(stacked: str, apart: str) -> Layout:
    """`stacked` with a group for the projection, such as `mlp.switch_mlp.(\\w+_proj)`; `apart` with `{i}` and `\\1`."""
    pattern = re.compile(stacked)

    def apply(weights: Weights, _: dict) -> Weights:
        out: Weights = {}
        for name, value in weights.items():
            if not pattern.search(name):
                out[name] = value
                continue
            for i in range(value.shape[0]):
                out[pattern.sub(apart.replace("{i}", str(i)), name)] = value[i]
        return out

    return apply


def experts_fused(stacked: str, fused: str) -> Layout:
    """`….gate_proj.weight` and `….up_proj.weight` become `gate_up_proj` [experts, 2 x hidden, input]; no `.weight` at the end."""

    def apply(weights: Weights, _: dict) -> Weights:
        out = {name: value for name, value in weights.items() if stacked not in name}
        for name, gate in weights.items():
            if name.endswith(f"{stacked}.gate_proj.weight"):
                before = name.removesuffix(f"{stacked}.gate_proj.weight")
                out[f"{before}{fused}.gate_up_proj"] = mx.concatenate([gate, weights[f"{before}{stacked}.up_proj.weight"]], axis=-2)
                out[f"{before}{fused}.down_proj"] = weights[f"{before}{stacked}.down_proj.weight"]
        return out

    return apply


def depthwise_channels_first(weights: Weights, _: dict) -> Weights:
    """Kernels of depthwise convolutions as PyTorch has them: [channels, 1, width]."""
    return {name: mx.moveaxis(value, 1, 2) if name.endswith("conv1d.weight") else value for name, value in weights.items()}


def less_one(*endings: str) -> Layout:
    """Norms whose published weight is added to one."""
    return lambda weights, _: {name: value - 1.0 if name.endswith(endings) else value for name, value in weights.items()}
