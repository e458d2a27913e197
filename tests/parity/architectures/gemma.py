"""Norms around each sub-layer, GELU gates and scaled embeddings: the Gemma family."""

import mlx.core as mx

from .base import config, inverse_frequencies
from .publishing import experts_fused, quiet_embeddings, renamed, then, with_extra
from .row import Row, Weights

LOCAL, GLOBAL = "sliding_attention", "full_attention"
GELU = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "attention_bias": False}
IMAGES = ("vision_tower.encoder.layers.*.self_attn.q_proj.weight",)
IMAGES_AND_SOUND = (*IMAGES, "audio_tower.conformer.*.attention.attn.q_proj.weight", "embed_vision.embedding_projection.weight",
                    "embed_audio.embedding_projection.weight")


def gemma(model_type: str, **changes) -> dict:
    return config(model_type, **{**GELU, "tie_word_embeddings": True, "head_dim": 32, **changes})


def wrapper(model_type: str, text_config: dict) -> dict:
    # The vocabulary stands outside too, where the wrapper's own default would win over the inner one.
    return {"model_type": model_type, "text_config": text_config, "vocab_size": text_config["vocab_size"], "audio_config": None,
            "vision_config": {"hidden_size": 32}, "image_token_id": 10, "tie_word_embeddings": True}


# A window of 16 under prompts of 48; the last global layer of a period alone, and the layers after it.
GEMMA3 = {"num_hidden_layers": 7, "sliding_window": 16, "sliding_window_pattern": 3, "rope_theta": 1000000.0,
          "rope_local_base_freq": 10000.0, "query_pre_attn_scalar": 24}
GEMMA3_CUTS = ((1,), (2, 3), (3, 6))

# Tokens from 192 on have no input for each layer of their own.
# Layers 0-3 have keys and values of their own; 4-7 read those of layer 2 (local) and 3 (global).
SHARED = [LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, LOCAL, LOCAL, GLOBAL]
SHARED_CUTS = ((4,), (2,), (3, 6), (1, 5))
GEMMA3N = {
    "num_hidden_layers": 8, "layer_types": SHARED, "num_kv_shared_layers": 4, "intermediate_size": [128] * 4 + [160] * 4,
    "sliding_window": 16, "vocab_size_per_layer_input": 192, "hidden_size_per_layer_input": 32, "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0, "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.9, 0.9, 0.8, 0.0, 0.0, 0.0, 0.5, 0.0], "altup_num_inputs": 4, "altup_coef_clip": 0.4,
    "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 32, "rope_scaling": None}

GEMMA4_ROPE = {GLOBAL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
               LOCAL: {"rope_theta": 10000.0, "rope_type": "default"}}
GEMMA4 = {"num_hidden_layers": 6, "layer_types": [LOCAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL], "head_dim": 32, "global_head_dim": 64,
          "num_key_value_heads": 2, "num_global_key_value_heads": None, "sliding_window": 16, "rope_parameters": GEMMA4_ROPE,
          "final_logit_softcapping": 30.0, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 320,
          "attention_k_eq_v": False, "use_double_wide_mlp": False, "enable_moe_block": False, "num_experts": None, "top_k_experts": None,
          "moe_intermediate_size": None, "use_bidirectional_attention": None}
GEMMA4_SHARED = {"num_hidden_layers": 8, "layer_types": SHARED, "num_kv_shared_layers": 4, "use_double_wide_mlp": True,
                 "hidden_size_per_layer_input": 32, "num_key_value_heads": 1}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
GEMMA4_ONE_PROJECTION = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
GEMMA4_CUTS = ((1,), (2, 3), (3, 5))


def gemma4(model_type: str, *parts: dict, **changes) -> dict:
    whole = dict(GEMMA4)
    for part in (*parts, changes):
        whole |= part
    return {key: value for key, value in gemma(model_type, **whole).items() if key != "rope_theta"}


def unused_projections(weights: Weights, config: dict) -> Weights:
    """Published checkpoints have keys and values for the layers that read those of another layer, too."""
    text = config.get("text_config", config)
    prefix = next(name for name in weights if "layers.0." in name).split("layers.0.")[0]
    first = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    extra = {f"{prefix}layers.{layer}.self_attn.{name}.weight": mx.random.normal(shape)
             for layer in range(first, text["num_hidden_layers"])
             for name, shape in {"k_proj": (32, 64), "v_proj": (32, 64), "k_norm": (32,)}.items()}
    return {**weights, **extra}


def clipping_bounds(weights: Weights, _: dict) -> Weights:
    """What quantisation-aware training leaves beside the matrices."""
    extra = {name.replace(".weight", f".{bound}"): mx.array(3.0) for name in weights if ".q_proj.weight" in name
             for bound in ("input_min", "input_max", "output_min", "output_max")}
    return {**weights, **extra}


# gemma4's wrapper: `language_model.model.` becomes `model.language_model.`
nested = renamed((r"^language_model\.model\.", "model.language_model."))
images_and_sound = with_extra(*(f"model.{name}" for name in IMAGES_AND_SOUND))
fused = experts_fused("experts.switch_glu", "experts")

quiet = quiet_embeddings(0.1)
quiet_inside = quiet_embeddings(0.1, "language_model.model.")
quiet_offset = quiet_embeddings(0.1, offset=1.0)

ROWS = [
    Row("gemma", gemma("gemma", hidden_activation=None, hidden_act="gelu", num_key_value_heads=1), adjust=quiet_offset),
    Row("gemma2", gemma("gemma2", attn_logit_softcapping=20.0, final_logit_softcapping=15.0, query_pre_attn_scalar=24, sliding_window=4096),
        adjust=quiet_offset),
    Row("gemma3_text", gemma("gemma3_text", **GEMMA3), cuts=GEMMA3_CUTS, adjust=quiet_offset),
    Row("gemma3_text", gemma("gemma3_text", **{**GEMMA3, "sliding_window_pattern": 6,
                                               "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        "linear rope on global layers", cuts=((5,), (5, 6)), adjust=quiet_offset),
    Row("gemma3_text", gemma("gemma3_text", **{**GEMMA3, "tie_word_embeddings": False}), "untied", cuts=GEMMA3_CUTS),
    Row("gemma3", wrapper("gemma3", gemma("gemma3_text", **GEMMA3)), cuts=GEMMA3_CUTS,
        adjust=quiet_embeddings(0.1, "language_model.model.", offset=1.0),
        published=with_extra(*IMAGES, "multi_modal_projector.mm_input_projection_weight")),
    Row("gemma3n", wrapper("gemma3n", gemma("gemma3n_text", **GEMMA3N)), cuts=SHARED_CUTS, cache_matters=True,
        published=with_extra(*(f"model.{name}" for name in IMAGES_AND_SOUND))),
    Row("gemma4_text", gemma4("gemma4_text"), "dense", cuts=GEMMA4_CUTS, adjust=quiet,
        published=then(clipping_bounds, inverse_frequencies)),
    Row("gemma4_text", gemma4("gemma4_text", GEMMA4_SHARED), "shared keys and values, inputs for each layer", cuts=SHARED_CUTS,
        adjust=quiet, published=unused_projections),
    Row("gemma4_text", gemma4("gemma4_text", GEMMA4_EXPERTS, GEMMA4_ONE_PROJECTION), "experts", cuts=GEMMA4_CUTS, adjust=quiet,
        published=fused),
    Row("gemma4_text", gemma4("gemma4_text", tie_word_embeddings=False), "untied", cuts=GEMMA4_CUTS),
    Row("gemma4", wrapper("gemma4", gemma4("gemma4_text", GEMMA4_ONE_PROJECTION)), "keys are values", cuts=GEMMA4_CUTS,
        adjust=quiet_inside, published=then(nested, images_and_sound)),
    Row("gemma4", wrapper("gemma4", gemma4("gemma4_text", GEMMA4_SHARED)), "shared keys and values, inputs for each layer",
        cuts=SHARED_CUTS, adjust=quiet_inside, published=then(nested, unused_projections, images_and_sound)),
    Row("gemma4", wrapper("gemma4", gemma4("gemma4_text", GEMMA4_EXPERTS, GEMMA4_ONE_PROJECTION)), "experts", cuts=GEMMA4_CUTS,
        adjust=quiet_inside, published=then(fused, nested, images_and_sound)),
    Row("gemma4_unified", wrapper("gemma4_unified", gemma4("gemma4_text")), cuts=GEMMA4_CUTS, adjust=quiet_inside,
        published=then(nested, images_and_sound,
                       with_extra("model.vision_embedder.patch_dense.weight", "model.vision_embedder.pos_norm.weight"))),
]
