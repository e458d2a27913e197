"""Writes the model of a row: every parameter random, in f32 or 4 bits, under mlx's names or the published ones."""

import copy
import json
import math
from contextlib import redirect_stdout
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model

import models

from .packing import declare_fp8
from .row import Row, Weights

# Their RMSNorm multiplies by one plus the weight.
ADDS_ONE = {"gemma", "gemma2", "gemma3", "gemma3_text"}


def build(row: Row, folder: Path, seed: int, quantization: dict | None = None, published: bool = False) -> Path:
    """Writes the model of a row, a tokenizer and config.json. A published layout is never quantised."""
    if quantization and published:
        raise ValueError("published checkpoints are not quantised")
    folder.mkdir(parents=True)
    config = copy.deepcopy(row.config)
    model, weights = random_model(row, seed)
    if quantization:
        weights, config = quantized(model, weights, config, quantization)
    if published:
        weights = row.published(weights, copy.deepcopy(config))
        config = row.published_config(config) if row.published_config else config
    models.save(weights, folder, files=2)
    if published:
        declare_fp8(folder)
    models.write_tokenizer(folder, text_config(config)["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def random_model(row: Row, seed: int) -> tuple[nn.Module, Weights]:
    """The module, and random parameters by mlx's names."""
    mx.random.seed(seed)
    config = copy.deepcopy(row.config)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    parameters = dict(tree_flatten(model.parameters()))
    tied = text_config(row.config).get("tie_word_embeddings", row.config.get("tie_word_embeddings", False))
    if tied:
        parameters.pop("lm_head.weight", None)
        parameters.pop("language_model.lm_head.weight", None)
    has_head = any(name.split(".")[-2] in ("lm_head", "output") for name in parameters)
    norm = 0.0 if row.model_type in ADDS_ONE else 1.0
    weights = {name: random_parameter(name, value, norm, 1.0 if has_head else 0.25) for name, value in parameters.items()}
    return model, row.adjust(weights) if row.adjust else weights


def random_parameter(name: str, value: mx.array, norm: float, embedding: float) -> mx.array:
    """Matrices keep the size of activations; all else stays near what the module starts with.

    Tokens must differ enough to matter in the last layer; where the head is tied, not so much that each token predicts itself.
    """
    noise = mx.random.normal(value.shape)
    if not name.endswith(".weight"):
        return value + 0.1 * noise
    if value.ndim == 1:
        return value - 1.0 + norm + 0.1 * noise
    if "norm" in name.split(".")[-2]:
        return norm + 0.1 * noise
    if any(part in name for part in ("embed_tokens.", "tok_embeddings.", "wte.", "embeddings.", "embed_tokens_per_layer.")):
        return embedding * noise
    fan_in = math.prod(value.shape[1:]) if ".conv" in name else value.shape[-1]
    return noise / math.sqrt(fan_in)


def quantized(model: nn.Module, weights: Weights, config: dict, quantization: dict) -> tuple[Weights, dict]:
    """As `mlx_lm.convert` does, which leaves out what the groups do not fit and takes the module's own exceptions."""
    sanitized = model.sanitize(dict(weights)) if hasattr(model, "sanitize") else weights
    model.load_weights(list(sanitized.items()))
    with redirect_stdout(None):
        model, config = quantize_model(model, config, quantization["group_size"], quantization["bits"], quantization.get("mode", "affine"))
    return dict(tree_flatten(model.parameters())), config


def text_config(config: dict) -> dict:
    return {**config, **config.get("text_config", {})}
