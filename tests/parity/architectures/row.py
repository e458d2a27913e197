"""One row of the table: a tiny model of one architecture, and what is special about it."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

Weights = dict[str, mx.array]


@dataclass
class Row:
    model_type: str
    # The complete config.json: last dimensions divisible by 32, so that 4 bits in groups of 32 fit most linears.
    config: dict
    # What is special, where a model_type has several rows.
    name: str = ""
    # Enough to cross this row's thresholds (windows, yarn's original length, ...) and not more.
    prompt_tokens: int = 48
    # Stages begin at these layers: one pipeline of 2, one of 3, cut in awkward places.
    cuts: tuple[tuple[int, ...], ...] = ((1,), (1, 2))
    # Canonical (mlx) names to the names and layout of the Hugging Face checkpoint.
    published: Callable[[Weights, dict], Weights] | None = None
    # Where config.json differs too.
    published_config: Callable[[dict], dict] | None = None
    # A change of the random parameters, for what must not be random.
    adjust: Callable[[Weights], Weights] | None = None
    # False where mlx-lm itself cannot run the model in 4 bits.
    quantizes: bool = True
    # True where mlx-lm's own answer depends on how the prompt is cut into chunks.
    chunks_matter: bool = False
    # False where mlx-lm itself cannot load the published layout, or loads it as something else.
    mlx_lm_loads: bool = True
    # True where mlx-lm's own answer without a cache is another one: the reference is the run with a cache.
    cache_matters: bool = False

    @property
    def title(self) -> str:
        return f"{self.model_type} {self.name}".strip()
