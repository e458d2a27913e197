"""Where a router of experts is all but undecided: there, the smallest difference in rounding picks another expert, and the answer jumps."""

from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

# Scores of experts are sums of some dozens of products in f32.
TIE = 1e-5


def nearest_tie(folder: Path, tokens: list[int]) -> float:
    """The smallest gap in mlx-lm between the last expert that is picked and the first that is not, over all tokens and layers."""
    gaps, argpartition = [], mx.argpartition

    def watched(scores: mx.array, kth: int, axis: int = -1, **options) -> mx.array:
        ordered = mx.sort(scores, axis=axis)
        picked_below = kth + 1 if kth >= 0 else ordered.shape[axis] + kth
        below, above = ordered[..., :picked_below], ordered[..., picked_below:]
        if below.shape[-1] and above.shape[-1]:
            gaps.append((above[..., 0] - below[..., -1]).min().item())
        return argpartition(scores, kth=kth, axis=axis, **options)

    model, _ = load_model(folder)
    mx.disable_compile()
    mx.argpartition = watched
    try:
        mx.eval(model(mx.array([tokens])))
    finally:
        mx.argpartition = argpartition
        mx.enable_compile()
    return min(gaps, default=float("inf"))
