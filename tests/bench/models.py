"""The models that speed is measured on: random weights, made once and kept beside the build."""

import importlib
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import MODEL_REMAPPING
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FOLDER = Path(__file__).parents[2] / "target" / "bench-models"
FOUR_BITS = {"group_size": 64, "bits": 4}

CONFIGS = {
    # Hundreds of tiny kernels a token: what is measured is everything around them.
    "host-bound": ({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 32, "intermediate_size": 128, "num_attention_heads": 4,
                    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 512, "rope_theta": 10000.0,
                    "tie_word_embeddings": True}, None),
    # 60M parameters in 4 bits.
    "kernel-bound": ({"model_type": "llama", "hidden_size": 512, "num_hidden_layers": 16, "intermediate_size": 1536, "num_attention_heads": 8,
                      "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 8192, "rope_theta": 10000.0,
                      "tie_word_embeddings": False}, FOUR_BITS),
    "routed": ({"model_type": "qwen3_moe", "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512, "moe_intermediate_size": 256,
                "num_experts": 16, "num_experts_per_tok": 4, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-6, "vocab_size": 4096,
                "rope_theta": 1e6, "max_position_embeddings": 4096, "tie_word_embeddings": False}, FOUR_BITS),
    "latent": ({"model_type": "deepseek_v3", "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512, "moe_intermediate_size": 256,
                "num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
                "first_k_dense_replace": 1, "moe_layer_freq": 1, "kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 32,
                "qk_nope_head_dim": 64, "v_head_dim": 64, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
                "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "vocab_size": 4096, "rope_theta": 10000.0,
                "max_position_embeddings": 4096, "attention_bias": False, "rope_scaling": None, "tie_word_embeddings": False}, FOUR_BITS),
    # Three layers of the gated delta rule to one of attention, experts in all.
    "hybrid": ({"model_type": "qwen3_next", "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512, "num_attention_heads": 8,
                "num_key_value_heads": 4, "head_dim": 64, "linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 64,
                "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "num_experts": 16, "num_experts_per_tok": 4, "decoder_sparse_step": 1,
                "shared_expert_intermediate_size": 256, "mlp_only_layers": [], "moe_intermediate_size": 256, "norm_topk_prob": True,
                "rms_norm_eps": 1e-6, "vocab_size": 4096, "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "max_position_embeddings": 4096,
                "full_attention_interval": 4, "tie_word_embeddings": False}, FOUR_BITS),
    # 13M parameters in f32 on a slow BLAS: products take nearly all of the time, and a prompt of 1,024 tokens is read in seconds.
    "compute-bound": ({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 16, "intermediate_size": 768, "num_attention_heads": 8,
                       "num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-5, "vocab_size": 512, "rope_theta": 10000.0,
                       "tie_word_embeddings": True}, None),
    # 100M parameters in f32 in few wide layers: products of one token take long against what a sum over two ranks takes.
    "wide-layers": ({"model_type": "llama", "hidden_size": 1536, "num_hidden_layers": 4, "intermediate_size": 4096, "num_attention_heads": 24,
                     "num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-5, "vocab_size": 512, "rope_theta": 10000.0,
                     "tie_word_embeddings": True}, None),
    # 1.6M parameters in f32: an update of 4,096 tokens is seconds of products.
    "training": ({"model_type": "llama", "hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 384, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "vocab_size": 512, "rope_theta": 10000.0,
                  "tie_word_embeddings": True}, None),
    # Activations of 8 KiB a token in f32, little else: for the way between two engines.
    "wide": ({"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 2, "intermediate_size": 256, "num_attention_heads": 16,
              "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "vocab_size": 512, "rope_theta": 10000.0,
              "tie_word_embeddings": True}, None),
    # Activations of 64 KiB a token in f32: a prompt of 64 tokens is a message of 4 MiB.
    "very-wide": ({"model_type": "llama", "hidden_size": 16384, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 32, "rms_norm_eps": 1e-5, "vocab_size": 320, "rope_theta": 10000.0,
                   "tie_word_embeddings": True}, None),
}


def path(name: str) -> Path:
    """The folder of a model, written when it is not there yet."""
    folder = FOLDER / name
    if not (folder / "tokenizer.json").exists():
        config, quantization = CONFIGS[name]
        write(folder, dict(config), quantization)
    return folder


def write(folder: Path, config: dict, quantization: dict | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    kind = MODEL_REMAPPING.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if quantization:
        nn.quantize(model, quantization["group_size"], quantization["bits"])
        config["quantization"] = quantization
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 256}))
    write_tokenizer(folder, config["vocab_size"])


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Bytes, then fillers that decode to plain text, so that streams show every token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    vocab |= {f"w{i}": i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w256", "chat_template": template}))
    tokenizer.save(str(folder / "tokenizer.json"))
