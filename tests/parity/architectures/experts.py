"""Grouped-query attention with a mixture of experts."""

import mlx.core as mx

from .packing import each_matrix, fp8_blocks, fp8_rounded, mxfp4_experts
from .publishing import experts_apart, experts_fused, head_repeated, inverse_frequencies, less_one, renamed, then, with_extra
from .row import Row, Weights

# The epsilon is one that is felt, and yarn gets a ramp that some of its few frequencies lie on.
ATTENTION = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 128, "vocab_size": 320,
             "rms_norm_eps": 0.02, "rope_theta": 10000.0, "max_position_embeddings": 4096, "attention_bias": False, "attention_dropout": 0.0,
             "hidden_act": "silu", "tie_word_embeddings": False, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
# The heads of some families always share the hidden size.
EVEN = {**ATTENTION, "head_dim": 16}
NOAUX = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "n_shared_experts": 1, "first_k_dense_replace": 1,
         "norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid",
         "topk_method": "noaux_tc"}
GROUPS = {"n_group": 4, "topk_group": 2}
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

APART = experts_apart(r"mlp\.switch_mlp\.(\w+_proj)", r"mlp.experts.{i}.\1")
NUMBERED = ((r"\.experts\.(\d+)\.gate_proj", r".experts.\1.w1"), (r"\.experts\.(\d+)\.down_proj", r".experts.\1.w2"),
            (r"\.experts\.(\d+)\.up_proj", r".experts.\1.w3"))
SPARSE_APART = then(experts_apart(r"block_sparse_moe\.switch_mlp\.(\w+_proj)", r"block_sparse_moe.experts.{i}.\1"), renamed(*NUMBERED))
PREDICTION = with_extra(*(f"model.layers.4.{name}.weight" for name in ("eh_proj", "enorm", "hnorm", "shared_head.norm",
                                                                       "mlp.experts.0.up_proj")))


def config(model_type: str, *parts: dict, **changes) -> dict:
    whole: dict = {"model_type": model_type}
    for part in (*parts, changes):
        whole |= part
    return whole


QWEN3_MOE = config("qwen3_moe", ATTENTION, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64,
                   mlp_only_layers=[1],
                   decoder_sparse_step=1, norm_topk_prob=True, rope_scaling=None, sliding_window=None, use_sliding_window=False,
                   max_window_layers=4,
                   router_aux_loss_coef=0.001, output_router_logits=False)
QWEN3_VL_TEXT = {**QWEN3_MOE, "model_type": "qwen3_vl_moe_text", "mlp_only_layers": [], "rope_theta": 5000000.0,
                 "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"}}
QWEN3_VL_MOE = {"model_type": "qwen3_vl_moe", "tie_word_embeddings": False, "image_token_id": 300, "video_token_id": 301,
                "vision_start_token_id": 302,
                "vision_end_token_id": 303, "vision_config": {"model_type": "qwen3_vl_moe", "depth": 1, "hidden_size": 32},
                "text_config": QWEN3_VL_TEXT}


def qwen3_vl_published(weights: Weights, _: dict) -> Weights:
    """Transformers multiplies by the experts from the right: `[expert, input, output]`."""
    fused = experts_fused("switch_mlp", "experts")(weights, {})
    turned = {name: value.swapaxes(-1, -2) if ".experts." in name else value for name, value in fused.items()}
    names = renamed((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"))
    return with_extra("model.visual.blocks.0.attn.qkv.weight")(names(turned, {}), {})


GPT_OSS = config("gpt_oss", ATTENTION, num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2, sliding_window=16, num_local_experts=8,
                 num_experts_per_tok=4,
                 experts_per_token=4, intermediate_size=64, attention_bias=True, rope_theta=150000.0, swiglu_limit=7.0, router_aux_loss_coef=0.9,
                 output_router_logits=False, initial_context_length=32,
                 rope_scaling={"rope_type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 0.1, "original_max_position_embeddings": 32,
                               "truncate": False})
MXFP4 = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
MXFP4_PUBLISHED = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}}


def gpt_oss_adjusted(weights: Weights) -> Weights:
    """Sinks that take a share worth noticing, and experts whose gates and values reach the limits of the activation."""
    def change(name: str, value: mx.array) -> mx.array:
        if name.endswith(".sinks"):
            return 10 * value
        if name.endswith(("experts.gate_proj.weight", "experts.up_proj.weight")):
            return 4 * value
        return value / 16 if name.endswith("experts.down_proj.weight") else value

    return {name: change(name, value) for name, value in weights.items()}


def interleaved(gate: mx.array, up: mx.array, axis: int) -> mx.array:
    """gate 0, up 0, gate 1, up 1, ... along the axis."""
    return mx.flatten(mx.stack([gate, up], axis=axis + 1), axis, axis + 1)


def gpt_oss_fused(weights: Weights, _: dict) -> Weights:
    """Gate and up interleaved in one tensor; of matrices as mlx has them, `[expert, output, input]`, and of what belongs to them."""
    out = {name: value for name, value in weights.items() if ".experts." not in name}
    for name, value in weights.items():
        before, _, kind = name.rpartition(".")
        if before.endswith(".experts.gate_proj"):
            up = weights[name.replace("gate_proj", "up_proj")]
            out[f"{before.replace('gate_proj', 'gate_up_proj')}_{kind}"] = interleaved(value, up, axis=1)
        elif before.endswith(".experts.down_proj"):
            out[f"{before}_{kind}"] = value
    return out


def gpt_oss_blocks(weights: Weights, _: dict) -> Weights:
    """The first release: bytes of two codes in blocks of 16, `[expert, output, block, byte]`."""
    def blocks(value: mx.array) -> mx.array:
        codes = value.view(mx.uint8)
        return codes.reshape(*codes.shape[:-1], -1, 16)

    fused = gpt_oss_fused(weights, {})
    return {name.replace("_proj_weight", "_proj_blocks"): blocks(value) if name.endswith("_proj_weight") else value for name,
            value in fused.items()}


def gpt_oss_matrices(weights: Weights, _: dict) -> Weights:
    """As transformers saves it in bf16: `[expert, input, output]`, without `weight` in the name."""
    fused = gpt_oss_fused(weights, {})
    return {name.removesuffix("_weight"): value.swapaxes(-1, -2) if name.endswith("_proj_weight") else value for name, value in fused.items()}


GLM4_MOE = config("glm4_moe", ATTENTION, NOAUX, num_hidden_layers=4, attention_bias=True, use_qk_norm=False, partial_rotary_factor=0.5,
                  rope_theta=1000000.0, rope_scaling=None, routed_scaling_factor=1.0, num_nextn_predict_layers=1)
SOLAR_OPEN = config("solar_open", ATTENTION, NOAUX, num_hidden_layers=4, first_k_dense_replace=0, partial_rotary_factor=1.0,
                    routed_scaling_factor=1.0,
                    rope_scaling=None)
MINIMAX = config("minimax", ATTENTION, num_hidden_layers=4, intermediate_size=64, num_local_experts=16, num_experts_per_tok=4,
                 shared_intermediate_size=0,
                 rotary_dim=16, use_qk_norm=True, qk_norm_type="per_layer", scoring_func="sigmoid", use_routing_bias=True,
                 attn_type_list=[1] * 4,
                 rope_theta=5000000.0, use_mtp=True, num_mtp_modules=3, mtp_transformer_layers=1)
FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
                               "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}}


def fp8_exact(weights: Weights) -> Weights:
    return {name: each_matrix(fp8_rounded, value) if name.endswith("_proj.weight") else value for name, value in weights.items()}


STEP3P5 = config("step3p5", num_hidden_layers=5, hidden_size=64, vocab_size=320, intermediate_size=128, rms_norm_eps=0.02,
                 max_position_embeddings=4096,
                 num_attention_heads=4, num_attention_groups=2, head_dim=32, sliding_window=16, use_head_wise_attn_gate=True, use_qk_norm=True,
                 layer_types=[FULL, SLIDING, SLIDING, SLIDING, FULL, SLIDING], rope_theta=[5000000.0, 10000.0, 10000.0, 10000.0, 5000000.0,
                                                                                           10000.0],
                 partial_rotary_factors=[0.5, 1.0, 1.0, 1.0, 0.5, 1.0], yarn_only_types=[FULL], rope_scaling=LLAMA3,
                 attention_other_setting={"attention_type": SLIDING, "num_attention_heads": 6, "num_attention_groups": 2, "head_dim": 32},
                 moe_num_experts=16, moe_top_k=4, moe_intermediate_size=64, share_expert_dim=64, moe_layers_enum="2,3,4",
                 moe_router_activation="sigmoid",
                 moe_router_scaling_factor=3.0, norm_expert_weight=True, use_moe_router_bias=True, need_fp32_gate=True, zero_centered=True,
                 swiglu_limits=[0.0, 0.0, 0.0, 0.6, 0.4, 0.0], swiglu_limits_shared=[0.0, 0.7, 0.0, 0.0, 0.5, 0.0], num_nextn_predict_layers=1,
                 tie_word_embeddings=False, torch_dtype="bfloat16")
STEP3P5_PUBLISHED = then(
    less_one("norm.weight"),
    renamed((r"\.mlp\.switch_mlp\.", ".moe."), (r"\.mlp\.gate\.gate\.", ".moe.gate."), (r"\.mlp\.gate\.router_bias", ".moe.router_bias"),
            (r"\.mlp\.share_expert\.", ".share_expert.")),
    with_extra("model.layers.5.eh_proj.weight", "model.layers.5.enorm.weight", "model.layers.5.transformer.shared_head.output.weight"))

MIXTRAL = config("mixtral", EVEN, num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2, rope_theta=1000000.0, sliding_window=None,
                 router_aux_loss_coef=0.02, output_router_logits=False)
MIXTRAL.pop("head_dim")
QWEN2_MOE = config("qwen2_moe", EVEN, num_hidden_layers=4, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=64,
                   shared_expert_intermediate_size=96, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[], use_sliding_window=False,
                   sliding_window=4096, max_window_layers=4, router_aux_loss_coef=0.001, output_router_logits=False)
QWEN2_MOE.pop("head_dim")
DOTS1 = config("dots1", ATTENTION, NOAUX, num_hidden_layers=4, n_shared_experts=2, scoring_func="noaux_tc", rope_scaling=None,
               sliding_window=None,
               use_sliding_window=False, max_window_layers=4, mlp_bias=False, moe_layer_freq=1)
OLMOE = config("olmoe", EVEN, num_hidden_layers=4, num_experts=8, num_experts_per_tok=4, intermediate_size=64, norm_topk_prob=False,
               clip_qkv=None,
               rope_scaling=None, router_aux_loss_coef=0.01, output_router_logits=False)
OLMOE.pop("head_dim")
MELLUM = config("mellum", ATTENTION, num_hidden_layers=5, layer_types=[SLIDING, SLIDING, SLIDING, FULL, SLIDING], sliding_window=16,
                num_experts=8,
                num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True, router_aux_loss_coef=0.001, output_router_logits=False,
                rope_parameters={FULL: {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 32,
                                        "beta_fast": 1.0, "beta_slow": 0.1}, SLIDING: {"rope_type": "default", "rope_theta": 10000.0}})
MELLUM.pop("rope_theta")
EXAONE_MOE = config("exaone_moe", ATTENTION, NOAUX, num_hidden_layers=6, layer_types=[SLIDING, SLIDING, SLIDING, FULL, SLIDING, FULL],
                    sliding_window=16,
                    sliding_window_pattern="LLLG", is_moe_layer=[False] + [True] * 5, num_experts=16, num_shared_experts=1, rope_scaling=None,
                    rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}, num_nextn_predict_layers=1)
for unknown in ("n_routed_experts", "n_shared_experts", "rope_theta"):
    EXAONE_MOE.pop(unknown)
EXAONE_PUBLISHED = then(APART, renamed((r"\.mlp\.gate\.e_score_correction_bias", ".mlp.e_score_correction_bias")),
                        with_extra("mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.mlp.up_proj.weight"))
ERNIE = config("ernie4_5_moe", ATTENTION, num_hidden_layers=4, moe_num_experts=8, moe_k=2, moe_intermediate_size=64, moe_layer_start_index=1,
               moe_layer_end_index=3, moe_layer_interval=1, moe_num_shared_experts=2, moe_capacity=[64, 64, 64], moe_use_aux_free=True,
               moe_gate="topk",
               moe_gate_act="softmax", use_bias=False, rope_theta=500000.0, tie_word_embeddings=True, num_nextn_predict_layers=1)
ERNIE_PUBLISHED = then(APART, with_extra("model.layers.*.mlp.moe_statics.e_score_correction_bias", "model.mtp_block.0.mlp.up_proj.weight",
                                         "model.mtp_linear_proj.0.weight", "model.mtp_hidden_norm.0.weight", "model.mtp_emb_norm.0.weight"))
BAILING = config("bailing_moe", EVEN, num_hidden_layers=4, num_experts=16, num_experts_per_tok=4, num_shared_experts=1, moe_intermediate_size=64,
                 norm_topk_prob=True, first_k_dense_replace=1, use_bias=False, use_qkv_bias=False, use_qk_norm=True, norm_head=False,
                 norm_softmax=False,
                 partial_rotary_factor=0.5, rotary_dim=8, rope_scaling=None, rope_theta=600000.0, moe_router_enable_expert_bias=True,
                 routed_scaling_factor=2.5, score_function="sigmoid", moe_shared_expert_intermediate_size=96, num_nextn_predict_layers=0,
                 **GROUPS)
LING_LITE = {**BAILING, "first_k_dense_replace": 0, "num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 2, "use_qk_norm": False,
             "norm_head": True, "use_qkv_bias": True, "score_function": "softmax", "moe_router_enable_expert_bias": False,
             "routed_scaling_factor": 1.0,
             "n_group": 1, "topk_group": 1, "partial_rotary_factor": 1.0, "rotary_dim": None, "moe_shared_expert_intermediate_size": None}
BAILING_PUBLISHED = then(APART, renamed((r"\.mlp\.gate\.gate_proj\.weight", ".mlp.gate.weight")))
GRANITE = config("granitemoe", EVEN, num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2, intermediate_size=64,
                 embedding_multiplier=0.4,
                 attention_multiplier=0.4, residual_multiplier=0.7, logits_scaling=0.8, rope_scaling=None, tie_word_embeddings=True,
                 router_aux_loss_coef=0.001, output_router_logits=False)
GRANITE.pop("head_dim")
GRANITE_PUBLISHED = then(
    experts_fused("switch_mlp", "fused"), head_repeated,
    renamed((r"\.fused\.gate_up_proj$", ".input_linear.weight"), (r"\.fused\.down_proj$", ".output_linear.weight")))

ROWS = [
    Row("qwen3_moe", QWEN3_MOE, published=APART),
    Row("qwen3_moe", {**QWEN3_MOE, "decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": False, "tie_word_embeddings": True},
        "every second layer, not renormalised, tied", published=then(APART, head_repeated)),
    Row("qwen3_vl_moe", QWEN3_VL_MOE, published=qwen3_vl_published),
    # mlx-lm reads what it saved itself and mxfp4 blocks, not what transformers saves.
    Row("gpt_oss", GPT_OSS, adjust=gpt_oss_adjusted, published=gpt_oss_matrices, mlx_lm_loads=False),
    Row("gpt_oss", GPT_OSS | MXFP4, "mxfp4", quantizes=False, published=gpt_oss_blocks,
        adjust=lambda weights: mxfp4_experts(".experts.")(gpt_oss_adjusted(weights)),
        published_config=lambda settings: {name: value for name, value in settings.items() if name != "quantization"} | MXFP4_PUBLISHED),
    Row("glm4_moe", GLM4_MOE, published=then(APART, PREDICTION)),
    Row("glm4_moe", {**GLM4_MOE, **GROUPS, "attention_bias": False, "use_qk_norm": True, "first_k_dense_replace": 2, "norm_topk_prob": False,
                     "routed_scaling_factor": 2.5}, "q/k norm, groups, not renormalised", cuts=((2,), (1, 3)),
        published=then(APART, PREDICTION)),
    Row("solar_open", SOLAR_OPEN, published=APART),
    Row("minimax", MINIMAX, published=SPARSE_APART),
    Row("minimax_m2", {**MINIMAX, "model_type": "minimax_m2", "use_qk_norm": False, "tie_word_embeddings": True}, "no q/k norm, tied",
        published=SPARSE_APART),
    Row("minimax_m2", {**MINIMAX, "model_type": "minimax_m2", "intermediate_size": 160}, "fp8", adjust=fp8_exact,
        published=then(SPARSE_APART, fp8_blocks(lambda name: name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")))),
        published_config=lambda settings: settings | FP8),
    Row("step3p5", STEP3P5, cuts=((2,), (1, 3)), published=STEP3P5_PUBLISHED),
    Row("step3p5", {**STEP3P5, "layer_types": None, "attention_other_setting": None, "moe_layers_enum": None, "yarn_only_types": None,
                    "swiglu_limits": None, "swiglu_limits_shared": None, "rope_theta": 10000.0, "partial_rotary_factors": None,
                    "use_head_wise_attn_gate": False, "norm_expert_weight": False}, "what it does without lists", cuts=((2,), (1, 3))),
    Row("mixtral", MIXTRAL, published=SPARSE_APART),
    Row("mixtral", {**MIXTRAL, "rope_traditional": True, "tie_word_embeddings": True}, "neighbours rotated, tied",
        published=then(SPARSE_APART, head_repeated)),
    Row("qwen2_moe", QWEN2_MOE, published=APART),
    Row("dots1", DOTS1, published=then(experts_apart(r"mlp\.experts\.(\w+_proj)", r"mlp.experts.{i}.\1"), inverse_frequencies)),
    Row("dots1", {**DOTS1, **GROUPS, "first_k_dense_replace": 2, "mlp_bias": True, "norm_topk_prob": False, "tie_word_embeddings": True},
        "groups, biases, tied", cuts=((2,), (1, 3))),
    Row("olmoe", OLMOE, published=APART),
    Row("olmoe", {**OLMOE, "norm_topk_prob": True, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                  "rope_scaling": LLAMA3},
        "renormalised, biases, tied, llama3"),
    Row("mellum", MELLUM, cuts=((2,), (1, 3)), published=APART),
    Row("exaone_moe", EXAONE_MOE, cuts=((2,), (1, 4)), published=EXAONE_PUBLISHED),
    Row("exaone_moe", {**EXAONE_MOE, **GROUPS, "rope_scaling": LLAMA3, "norm_topk_prob": False, "tie_word_embeddings": True,
                       "num_shared_experts": 0},
        "groups, llama3, tied", cuts=((3,), (1, 4))),
    Row("exaone_moe", {**EXAONE_MOE, "layer_types": [FULL] * 6, "is_moe_layer": [False, True] * 3}, "no window, so all rotated",
        cuts=((2,), (1, 4))),
    Row("ernie4_5_moe", ERNIE, published=ERNIE_PUBLISHED),
    Row("ernie4_5_moe", {**ERNIE, "moe_gate_act": "sigmoid", "use_bias": True, "moe_layer_interval": 2, "moe_layer_start_index": [1, 1],
                         "num_hidden_layers": 6,
                         "moe_layer_end_index": [4, 4], "moe_num_shared_experts": 0, "tie_word_embeddings": False},
        "sigmoid, biases, every second layer",
        cuts=((2,), (1, 4))),
    Row("bailing_moe", BAILING, published=BAILING_PUBLISHED),
    # mlx-lm normalises the packed words of a head in 4 bits as if they were its weights.
    Row("bailing_moe", LING_LITE, "softmax, head normalised", published=BAILING_PUBLISHED, quantizes=False),
    Row("granitemoe", GRANITE, published=GRANITE_PUBLISHED),
    Row("granitemoe", {**GRANITE, "attention_bias": True, "tie_word_embeddings": False}, "biases, head apart"),
]
