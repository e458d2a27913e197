"""Three layers of gated delta rule and one of gated attention: dense, and with experts."""

from .base import config, flat
from .publishing import Layout, depthwise_channels_first, experts_apart, experts_fused, less_one, renamed, then, with_extra
from .row import Row

# Key and value sizes and head counts differ, so that no mix-up of them goes unseen. Five layers: a period and the begin of the next.
DELTA = {"num_hidden_layers": 5, "head_dim": 32, "attention_bias": False, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 32, "linear_value_head_dim": 64, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
         "layer_types": ["linear_attention"] * 3 + ["full_attention", "linear_attention"]}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96,
           "router_aux_loss_coef": 0.001, "output_router_logits": False}
ROPE = {"rope_type": "default", "rope_theta": 100000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
# Inside the period; the attention layer alone in its stage.
CUTS = ((2,), (1, 4), (3, 4))

# The weight of these is added to one when it is published; that of the delta rule's own norm is not.
ADDED_TO_ONE = (".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight", ".q_norm.weight", ".k_norm.weight")
PREDICTION = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.norm.weight")


def text(model_type: str, **changes) -> dict:
    return config(model_type, ("rope_theta",), **{**DELTA, "rope_parameters": ROPE, **changes})


def wrapped(model_type: str, **changes) -> dict:
    inner = text(f"{model_type}_text", **changes)
    return {"model_type": model_type, "text_config": inner, "vision_config": {"hidden_size": 32, "depth": 2}, "image_token_id": 10,
            "tie_word_embeddings": inner["tie_word_embeddings"]}


def published(*prefix: tuple[str, str], experts: Layout = lambda weights, _: weights, images: bool = True) -> Layout:
    extra = [*PREDICTION, *(["model.visual.blocks.*.attn.qkv.weight", "model.visual.patch_embed.proj.weight"] if images else [])]
    return then(experts, less_one(*ADDED_TO_ONE), depthwise_channels_first, renamed(*prefix), with_extra(*extra))


NESTED = ((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"))
TEXT_ONLY = ((r"^language_model\.", ""),)
FUSED = experts_fused("mlp.switch_mlp", "mlp.experts")
APART = experts_apart(r"mlp\.switch_mlp\.(\w+_proj)", r"mlp.experts.{i}.\1")

ROWS = [
    Row("qwen3_5", wrapped("qwen3_5", tie_word_embeddings=True), "tied", cuts=CUTS, published=published(*NESTED)),
    Row("qwen3_5", wrapped("qwen3_5"), "flat config", cuts=CUTS, published=published(*TEXT_ONLY, images=False), published_config=flat),
    Row("qwen3_5", wrapped("qwen3_5", num_hidden_layers=4, full_attention_interval=2,
                           layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=4, linear_value_head_dim=32),
        "every second layer", cuts=((1,), (1, 2))),
    Row("qwen3_5_moe", wrapped("qwen3_5_moe", **EXPERTS), cuts=CUTS, published=published(*NESTED, experts=FUSED)),
    Row("qwen3_next", config("qwen3_next", **DELTA, **EXPERTS, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
                             partial_rotary_factor=0.25), cuts=CUTS, published=published(experts=APART, images=False)),
    Row("qwen3_next", config("qwen3_next", **DELTA, **EXPERTS, decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=False,
                             tie_word_embeddings=True, partial_rotary_factor=0.5), "dense layers between, tied", cuts=CUTS),
]
