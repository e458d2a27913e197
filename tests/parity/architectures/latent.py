"""Multi-head latent attention: the DeepSeek family and its relatives."""

import mlx.core as mx

from .packing import each_matrix, fp8_blocks, fp8_rounded, int4_experts, int4_packed
from .publishing import Layout, experts_apart, experts_fused, head_repeated, inverse_frequencies, then, with_extra
from .row import Row, Weights

# Head sizes that differ, and an epsilon that is felt, so that no mix-up of them goes unseen.
LATENT = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 64,
          "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 48, "vocab_size": 320, "rms_norm_eps": 0.02, "rope_theta": 10000.0,
          "max_position_embeddings": 4096, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
          "tie_word_embeddings": False, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
EXPERTS = {"intermediate_size": 160, "moe_intermediate_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1,
           "moe_layer_freq": 1, "first_k_dense_replace": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
           "routed_scaling_factor": 2.5, "n_group": 1, "topk_group": 1, "ep_size": 1, "num_nextn_predict_layers": 0}
# With so few frequencies the usual 32 and 1 would leave none between the two ends of the ramp.
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 1.0, "beta_slow": 0.1, "mscale": 1.0,
        "mscale_all_dim": 1.0}
FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}}
INT4 = {"quantization_config": {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed", "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": {
        "num_bits": 4, "group_size": 32, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False, "actorder": None}}}}}
AFFINE = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}


def config(model_type: str, *parts: dict, **changes) -> dict:
    whole: dict = {"model_type": model_type}
    for part in (*parts, changes):
        whole |= part
    return whole


def is_fp8(name: str) -> bool:
    """What DeepSeek stores in fp8: every matrix of the layers but the router's and the indexer's head weights."""
    ends = ("_proj.weight", ".kv_a_proj_with_mqa.weight", ".wq_b.weight", ".wk.weight")
    return ".layers." in name and name.endswith(ends) and not name.endswith(".weights_proj.weight")


def fp8_exact(settings: dict):
    """Weights that fp8 blocks hold exactly, also those of the fused key and value projection."""
    heads, key_rows = settings["num_attention_heads"], settings["qk_nope_head_dim"]

    def adjust(weights: Weights) -> Weights:
        out = {name: each_matrix(fp8_rounded, value) if is_fp8(name) else value for name, value in weights.items()}
        for name, value in latent_projection(weights, {}).items():
            if name.endswith(".kv_b_proj.weight"):
                before, both = name.removesuffix("kv_b_proj.weight"), fp8_rounded(value).reshape(heads, -1, value.shape[1])
                out |= {before + "embed_q.weight": both[:, :key_rows].swapaxes(-1, -2), before + "unembed_out.weight": both[:, key_rows:]}
        return out

    return adjust


def without_quantization(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "quantization"}


DEEPSEEK_V2 = config("deepseek_v2", LATENT, EXPERTS, num_hidden_layers=4, n_shared_experts=2, topk_method="group_limited_greedy",
                     scoring_func="softmax", n_group=4, topk_group=2, norm_topk_prob=False, routed_scaling_factor=4.0,
                     aux_loss_alpha=0.001, seq_aux=True, pretraining_tp=1, rope_scaling={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707})
DEEPSEEK_V3 = config("deepseek_v3", LATENT, EXPERTS, num_hidden_layers=5, first_k_dense_replace=2, n_group=4, topk_group=2,
                     rope_scaling={**YARN, "beta_fast": 32, "beta_slow": 1})
KIMI_K2 = config("kimi_k2", LATENT, EXPERTS, num_hidden_layers=4, rope_theta=50000.0, routed_scaling_factor=2.827,
                 rope_scaling={**YARN, "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0})
JOYAI = config("joyai_llm_flash", LATENT, EXPERTS, num_hidden_layers=4, rope_theta=32000000.0, rope_scaling=None, first_k_dense_replace=1)
# Eight heads and more: with few of them keys whose score is exactly zero tie for the last place.
INDEXER = {"index_n_heads": 8, "index_head_dim": 32, "index_topk": 16}
DEEPSEEK_V32 = config("deepseek_v32", LATENT, EXPERTS, INDEXER, num_hidden_layers=4, first_k_dense_replace=2, n_group=4, topk_group=2,
                      rope_scaling=YARN)
GLM_MOE_DSA = config("glm_moe_dsa", LATENT, EXPERTS, INDEXER, num_hidden_layers=4, first_k_dense_replace=2, indexer_rope_interleave=True,
                     rope_interleave=True, qk_head_dim=48, head_dim=16, num_nextn_predict_layers=1,
                     rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"})
GLM_MOE_DSA.pop("rope_theta")
GLM4_MOE_LITE = config("glm4_moe_lite", LATENT, EXPERTS, num_hidden_layers=4, first_k_dense_replace=1, rope_theta=1000000.0, rope_scaling=None,
                       routed_scaling_factor=1.8, partial_rotary_factor=1.0, num_nextn_predict_layers=1)
KIMI_K25 = {"model_type": "kimi_k25", "media_placeholder_token_id": 300, "vision_config": {"model_type": "", "vt_hidden_size": 32},
            "text_config": KIMI_K2}
KIMI_VL = {"model_type": "kimi_vl", "media_placeholder_token_id": 300, "vision_config": {"model_type": "moonvit", "hidden_size": 32},
           "text_config": config("deepseek_v3", LATENT, EXPERTS, num_hidden_layers=4, q_lora_rank=None, rope_theta=800000.0, rope_scaling=None,
                                 routed_scaling_factor=2.446)}
MISTRAL4_ROPE = {**YARN, "rope_type": "yarn", "rope_theta": 100000.0, "factor": 128.0, "llama_4_scaling_beta": 0.1}
MISTRAL4 = config("mistral4", LATENT, EXPERTS, num_hidden_layers=4, first_k_dense_replace=0, n_routed_experts=8, num_experts_per_tok=2,
                  routed_scaling_factor=1.0, qk_head_dim=48, head_dim=48, rope_interleave=True, rope_parameters=MISTRAL4_ROPE)
YOUTU = config("youtu_llm", LATENT, num_hidden_layers=4, intermediate_size=128, rope_theta=1600000.0, rope_interleave=True,
               tie_word_embeddings=True,
               mlp_bias=False, qk_head_dim=48, head_dim=16, rope_scaling=None)
MINICPM3_ROPE = {"type": "longrope", "original_max_position_embeddings": 32, "short_factor": [1.0 + 0.05 * i for i in range(8)],
                 "long_factor": [1.0 + 0.4 * i for i in range(8)]}
MINICPM3 = config("minicpm3", LATENT, num_hidden_layers=4, intermediate_size=128, dim_model_base=40, scale_emb=1.5, scale_depth=1.4,
                  max_position_embeddings=256, rope_scaling=MINICPM3_ROPE)
MINICPM3.pop("v_head_dim")


def latent_projection(weights: Weights, _: dict) -> Weights:
    """`kv_b_proj`, per head the rows of the keys, then those of the values, instead of its two absorbed halves."""
    out = {}
    for name, value in weights.items():
        if name.endswith(".embed_q.weight"):
            before = name.removesuffix("embed_q.weight")
            both = mx.concatenate([value.swapaxes(-1, -2), weights[before + "unembed_out.weight"]], axis=1)
            out[before + "kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
        elif not name.endswith(".unembed_out.weight"):
            out[name] = value
    return out


def prediction_layer(index: int) -> Layout:
    """A layer of multi-token prediction, which is not part of the model."""
    names = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "self_attn.kv_b_proj", "mlp.experts.0.up_proj")
    return with_extra(*(f"model.layers.{index}.{name}.weight" for name in names))


EXPERTS_APART = experts_apart(r"switch_mlp\.(\w+_proj)", r"experts.{i}.\1")
APART = then(EXPERTS_APART, latent_projection)
FUSED = then(experts_fused("switch_mlp", "experts"), latent_projection)
FP8_APART = then(APART, fp8_blocks(is_fp8))
IMAGES = with_extra("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight")
KIMI_VL_IMAGES = with_extra("vision_tower.patch_embed.proj.weight", "multi_modal_projector.linear_1.weight")


def tensor_scale(value: mx.array) -> mx.array:
    """The scale of a whole matrix, or one an expert, `[expert, 1, 1]`."""
    if value.ndim == 2:
        return mx.array(2.0**-8)
    return mx.power(2.0, -7.0 - mx.arange(value.shape[0], dtype=mx.float32) % 2)[:, None, None]


def fp8_tensors_exact(weights: Weights) -> Weights:
    """Weights that fp8 with those scales holds exactly."""
    def rounded(value: mx.array, scale: mx.array) -> mx.array:
        return mx.from_fp8(mx.to_fp8(value / scale), dtype=mx.float32) * scale

    absorbed, out = mx.array(2.0**-8), dict(weights)
    for name, value in weights.items():
        if is_fp8(name):
            out[name] = rounded(value, tensor_scale(value))
        elif name.endswith((".embed_q.weight", ".unembed_out.weight")):
            out[name] = rounded(value, absorbed)
    return out


def fp8_tensors(weights: Weights, _: dict) -> Weights:
    """Mistral's fp8: a scale a matrix or an expert, beside those of the activations."""
    out = {}
    for name, value in weights.items():
        fused = name.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        if not fused and not is_fp8(name):
            out[name] = value
            continue
        scale, base = tensor_scale(value), name.removesuffix(".weight")
        activation = f"{base}_activation_scale" if fused else f"{base}.activation_scale"
        out |= {name: mx.to_fp8(value / scale), f"{name}_scale_inv": scale, activation: mx.array(0.5)}
    return out


ROWS = [
    Row("deepseek_v2", DEEPSEEK_V2, "groups of experts", published=EXPERTS_APART),
    Row("deepseek_v2", {**DEEPSEEK_V2, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
                        "routed_scaling_factor": 1.0},
        "plain queries, greedy", published=EXPERTS_APART),
    Row("deepseek_v2", {**DEEPSEEK_V2, "attention_bias": True, "moe_layer_freq": 2, "first_k_dense_replace": 2}, "biases, every second layer",
        published=EXPERTS_APART, cuts=((3,), (2, 3))),
    Row("deepseek_v3", DEEPSEEK_V3, cuts=((2,), (1, 3)), published=then(APART, inverse_frequencies, prediction_layer(61))),
    Row("deepseek_v3", {**DEEPSEEK_V3, "q_lora_rank": None, "attention_bias": True, "norm_topk_prob": False,
                        "rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.6}},
        "plain queries, biases, scaling yarn", cuts=((2,), (1, 3)), published=APART),
    Row("deepseek_v3", DEEPSEEK_V3, "fp8", cuts=((2,), (1, 3)), adjust=fp8_exact(DEEPSEEK_V3), published=FP8_APART,
        published_config=lambda settings: settings | FP8),
    Row("kimi_k2", KIMI_K2, published=APART),
    Row("kimi_k2", KIMI_K2 | AFFINE, "int4 experts", adjust=int4_experts, published=then(APART, int4_packed),
        published_config=lambda settings: without_quantization(settings) | INT4, quantizes=False),
    Row("joyai_llm_flash", JOYAI, published=APART),
    Row("deepseek_v32", DEEPSEEK_V32, cuts=((2,), (1, 3)), published=then(APART, prediction_layer(4))),
    Row("deepseek_v32", {**DEEPSEEK_V32, "rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.6}}, "fp8, scaling yarn",
        cuts=((2,), (1, 3)), adjust=fp8_exact(DEEPSEEK_V32), published=FP8_APART,
        published_config=lambda settings: settings | FP8),
    Row("glm_moe_dsa", GLM_MOE_DSA, cuts=((2,), (1, 3)), published=then(APART, prediction_layer(4))),
    Row("kimi_k25", KIMI_K25, published=then(APART, IMAGES)),
    Row("kimi_k25", KIMI_K25 | AFFINE, "int4 experts", adjust=int4_experts, published=then(APART, int4_packed, IMAGES), quantizes=False,
        published_config=lambda settings: without_quantization(settings) | {"text_config": KIMI_K2 | INT4}),
    # mlx-lm's own conversion of Kimi-VL does not know `kv_b_proj`.
    Row("kimi_vl", KIMI_VL, published=then(APART, KIMI_VL_IMAGES), mlx_lm_loads=False),
    Row("kimi_vl", KIMI_VL, "absorbed", published=then(EXPERTS_APART, KIMI_VL_IMAGES)),
    Row("glm4_moe_lite", GLM4_MOE_LITE, published=then(APART, prediction_layer(4))),
    Row("mistral4", MISTRAL4, published=FUSED),
    Row("mistral4", {**MISTRAL4, "first_k_dense_replace": 2, "n_group": 4, "topk_group": 2, "rope_interleave": False, "q_lora_rank": None,
                     "attention_bias": True, "tie_word_embeddings": True, "norm_topk_prob": False, "routed_scaling_factor": 2.0},
        "groups, halves rotated, tied", cuts=((2,), (1, 3)), published=APART),
    Row("mistral4", MISTRAL4, "fp8", adjust=fp8_tensors_exact, published=then(FUSED, fp8_tensors),
        published_config=lambda settings: settings | FP8),
    Row("mistral3", {"model_type": "mistral3", "text_config": MISTRAL4, "vision_config": {"hidden_size": 32}}, "over mistral4",
        published=then(FUSED, KIMI_VL_IMAGES)),
    Row("youtu_llm", YOUTU, published=head_repeated),
    Row("youtu_llm", {**YOUTU, "q_lora_rank": None, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True,
                      "rope_traditional": False}, "plain queries, biases, halves rotated"),
    Row("minicpm3", MINICPM3),
    Row("minicpm3", {**MINICPM3, "tie_word_embeddings": True, "attention_bias": True}, "tied, biases"),
]
