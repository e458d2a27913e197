"""Writes the model folder: weights, configuration, tokenizer, chat template."""

import json
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import chat
from model import Config

NAMES = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "router": "mlp.gate",
    "gate": "mlp.switch_mlp.gate_proj",
    "up": "mlp.switch_mlp.up_proj",
    "down": "mlp.switch_mlp.down_proj",
}


def write_weights(folder: Path, config: Config, weights: dict) -> None:
    """In mlx-lm's layout: the experts of a layer are one tensor [experts, out, in]."""
    tensors = {
        "model.embed_tokens.weight": np.asarray(weights["embed"]),
        "model.norm.weight": np.asarray(weights["norm"]),
    }
    for ours, theirs in NAMES.items():
        stacked = np.asarray(weights["layers"][ours])
        for layer in range(config.num_hidden_layers):
            tensors[f"model.layers.{layer}.{theirs}.weight"] = np.ascontiguousarray(stacked[layer])
    # A reader never sees half a file.
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "mlx"})
    os.replace(partial, folder / "model.safetensors")


def read_weights(folder: Path, config: Config) -> dict:
    """What `write_weights` wrote."""
    tensors = load_file(folder / "model.safetensors")
    layers = range(config.num_hidden_layers)
    return {
        "embed": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "layers": {
            ours: np.stack([tensors[f"model.layers.{layer}.{theirs}.weight"] for layer in layers])
            for ours, theirs in NAMES.items()
        },
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_rest(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """Everything but the weights."""
    start, end, endoftext = (tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"))
    _write_json(folder / "config.json", config.published(bos=endoftext, eos=end))
    _write_json(folder / "generation_config.json", {
        "bos_token_id": endoftext,
        "eos_token_id": [end, endoftext],
        "pad_token_id": endoftext,
    })
    added = {
        str(tid): {
            "content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
            "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special,
        }
        for tid, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    _write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": chat.TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": config.max_position_embeddings,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    })
    tokenizer.save(str(folder / "tokenizer.json"))
