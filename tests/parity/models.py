"""Tiny models in the published layout, every parameter random, and the cases that parity is checked for."""

import copy
import importlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import MODEL_REMAPPING
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BASE = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "vocab_size": 320, "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False}
MOE = {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1,
       "mlp_only_layers": [], "norm_topk_prob": True}
AFFINE4, AFFINE8 = {"group_size": 32, "bits": 4}, {"group_size": 32, "bits": 8}


@dataclass
class Case:
    name: str
    config: dict
    quantization: dict | None = None
    # Settings of single layers: a path, and a scheme or False for "not quantised".
    per_layer: dict = field(default_factory=dict)
    # One tensor an expert, as on the hub, instead of stacked as mlx-lm saves them.
    experts_apart: bool = False
    files: int = 2
    # The row of the table of architectures that it is, if any.
    row: object = None


def config(model_type: str, **changes) -> dict:
    return {"model_type": model_type, **BASE, **changes}


def llama3_rope() -> dict:
    return {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def yarn_rope() -> dict:
    return {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


FAMILIES = {
    "llama": config("llama", num_hidden_layers=5, tie_word_embeddings=True, rope_scaling=llama3_rope()),
    "mistral": config("mistral", head_dim=32),
    "qwen2": config("qwen2", tie_word_embeddings=True, vocab_size=328),
    "qwen3": config("qwen3", head_dim=24, num_hidden_layers=6),
    "qwen3_moe": config("qwen3_moe", **{**MOE, "mlp_only_layers": [1]}),
    "mixtral": config("mixtral", num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2),
}
SCHEMES = {"plain": None, "affine4": AFFINE4, "affine8": AFFINE8}

VARIANTS = [
    Case("llama linear rope, biases", config("llama", attention_bias=True, mlp_bias=True, rope_scaling={"type": "linear", "factor": 2.0})),
    Case("llama yarn", config("llama", rope_scaling=yarn_rope()), files=1),
    Case("qwen2 untied, affine4", config("qwen2"), AFFINE4),
    Case("qwen3 yarn, tied", config("qwen3", head_dim=16, tie_word_embeddings=True, rope_scaling=yarn_rope()), files=3),
    Case("llama layers quantised one by one", config("llama"), AFFINE4,
         {"model.layers.1.mlp.down_proj": {"group_size": 64, "bits": 8}, "model.layers.2.self_attn.q_proj": False, "lm_head": AFFINE8}),
    Case("qwen3_moe router in 8 bits", config("qwen3_moe", **MOE), AFFINE4, {f"model.layers.{i}.mlp.gate": AFFINE8 for i in range(4)}),
    Case("qwen3_moe experts apart, every second layer", config("qwen3_moe", **{**MOE, "decoder_sparse_step": 2, "norm_topk_prob": False}), experts_apart=True),
    Case("mixtral experts apart", FAMILIES["mixtral"], experts_apart=True),
    Case("mixtral experts apart, affine4", FAMILIES["mixtral"], AFFINE4, experts_apart=True),
]


# Rows of the table of architectures that go through the whole cluster too: each has something else in its frames or caches.
FROM_TABLE = {
    "gpt_oss": None,
    "deepseek_v3": AFFINE4,
    "deepseek_v32": None,
    "qwen3_next": AFFINE4,
    "gemma4_text shared keys and values, inputs for each layer": None,
    "gemma4_text experts": None,
    "mamba2": None,
    "falcon_h1": None,
    "lfm2": None,
}


def cases() -> list[Case]:
    families = [Case(f"{name} {scheme}", config, SCHEMES[scheme]) for name, config in FAMILIES.items() for scheme in SCHEMES]
    return families + VARIANTS + table_cases()


def table_cases() -> list[Case]:
    from architectures import rows

    found = {row.title: row for row in rows() if row.title in FROM_TABLE}
    return [Case(title, found[title].config, scheme, row=found[title]) for title, scheme in FROM_TABLE.items()]


def build(case: Case, folder: Path, seed: int) -> Path:
    """Writes the model of a case."""
    if case.row:
        from architectures.fabricate import build as build_row

        return build_row(case.row, folder, seed, case.quantization)
    folder.mkdir(parents=True)
    mx.random.seed(seed)
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(case.config['model_type'], case.config['model_type'])}")
    model = module.Model(module.ModelArgs.from_dict(copy.deepcopy(case.config)))
    model.update(tree_map_with_path(random_parameter, model.parameters()))
    # Tokens must differ enough to matter in the last layer; where the head is tied, not so much that each token predicts itself.
    model.model.embed_tokens.weight *= 2 if case.config["tie_word_embeddings"] else 8
    published = copy.deepcopy(case.config)
    if case.quantization:
        nn.quantize(model, **case.quantization, class_predicate=lambda path, module: scheme_of(case, path, module))
        published["quantization"] = {**case.quantization, **case.per_layer}
    weights = dict(tree_flatten(model.parameters()))
    if case.experts_apart:
        weights = dict(pair for name, value in weights.items() for pair in experts_apart(name, value))
    save(weights, folder, case.files)
    write_tokenizer(folder, case.config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(published))
    return folder


def random_parameter(path: str, value: mx.array) -> mx.array:
    """Matrices scaled so that activations keep their size; norms around one; biases around zero."""
    if value.ndim > 1:
        return mx.random.normal(value.shape) / math.sqrt(value.shape[-1])
    return mx.random.normal(value.shape) * 0.1 + (1.0 if path.endswith("weight") else 0.0)


def scheme_of(case: Case, path: str, module: nn.Module) -> bool | dict:
    scheme = case.per_layer.get(path, case.quantization)
    fits = scheme and hasattr(module, "to_quantized") and module.weight.shape[-1] % scheme["group_size"] == 0
    return scheme if fits else False


def experts_apart(name: str, value: mx.array) -> list[tuple[str, mx.array]]:
    """`….switch_mlp.gate_proj.weight` of all experts as one tensor an expert, under the names that the hub has."""
    if ".switch_mlp." not in name:
        return [(name, value)]
    before, after = name.split(".switch_mlp.")
    if ".block_sparse_moe" in before:
        for ours, theirs in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
            after = after.replace(ours, theirs)
    return [(f"{before}.experts.{i}.{after}", value[i]) for i in range(value.shape[0])]


def save(weights: dict[str, mx.array], folder: Path, files: int) -> None:
    names = sorted(weights)
    if files == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        return
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = names[i::files]
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in part}, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Ids 0-255 are bytes, the rest are special. None of them ends an answer, as mlx-lm's `generate_step` knows no end either."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|special_{i}|>" for i in range(vocab_size - 256)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|special_0|>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
