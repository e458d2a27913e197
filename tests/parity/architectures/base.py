"""Dense decoders: one attention and one gated MLP a layer, and the wrappers around them whose images are not served."""

import mlx.core as mx
from models import config as small

from .publishing import head_repeated, inverse_frequencies, quiet_embeddings, renamed, then, with_extra
from .row import Row, Weights

# An epsilon so large that it shows.
COMMON = {"rms_norm_eps": 0.01, "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
          "torch_dtype": "float32"}
# One period of three sliding layers and a global one, and the begin of the next.
SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
AROUND_FULL = ((3,), (3, 4))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# The betas are such that the ramp lies inside the few frequencies of a small head.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 1.2, "beta_slow": 0.12}
SHORT_FACTORS = [1.0, 1.1, 1.2, 1.3, 1.5, 1.8, 2.2, 2.8]
LONG_FACTORS = [1.0, 1.3, 1.9, 2.7, 4.1, 6.3, 9.5, 14.0]
IMAGES = ("vision_tower.blocks.*.attn.qkv.weight", "multi_modal_projector.linear_1.weight")


def config(model_type: str, without: tuple[str, ...] = (), **changes) -> dict:
    """Keys as transformers writes them; the ones of `without` are named otherwise, or missing, in this family."""
    return {key: value for key, value in {**small(model_type), **COMMON, **changes}.items() if key not in without}


def wrapper(model_type: str, text_config: dict, **changes) -> dict:
    return {"model_type": model_type, "text_config": text_config, "vision_config": {"hidden_size": 32}, "image_token_index": 10,
            "tie_word_embeddings": text_config["tie_word_embeddings"], **changes}


def rope_parameters(config: dict) -> dict:
    """As transformers 5 writes them: the base and the scaling in one table."""
    scaling = config.pop("rope_scaling", None) or {"rope_type": "default"}
    return {**config, "rope_parameters": {"rope_theta": config.pop("rope_theta"), **scaling}}


def flat(config: dict) -> dict:
    """The wrapper's text_config at the top, as its first releases had it."""
    return {**config["text_config"], "model_type": config["model_type"], "vision_config": config["vision_config"]}


# The wrappers' two layouts: the one first published, which is mlx's too, and the one of transformers 4.52 and later.
first_layout = with_extra(*IMAGES)
nested_layout = then(renamed((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head")),
                     with_extra(*(f"model.{name}" for name in IMAGES)))
qwen_first_layout = then(renamed((r"^language_model\.", "")), with_extra("visual.blocks.*.attn.qkv.weight"))
qwen_nested_layout = then(renamed((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head")),
                          with_extra("model.visual.blocks.*.attn.qkv.weight"))


FP8_SCALE = 2.0**-7
FP8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
                               "modules_to_not_convert": ["lm_head"]}}


def fp8_exact(weights: Weights) -> Weights:
    """Matrices that fp8 codes with this scale hold exactly."""
    return {name: mx.from_fp8(mx.to_fp8(value / FP8_SCALE), dtype=mx.float32) * FP8_SCALE if "_proj.weight" in name else value
            for name, value in weights.items()}


def fp8(weights: Weights, _: dict) -> Weights:
    """Codes and a scale for each matrix of a layer, and the scale of its input, which is not used."""
    out = dict(weights)
    for name, value in weights.items():
        if "_proj.weight" in name:
            out |= {name: mx.to_fp8(value / FP8_SCALE), f"{name}_scale_inv": mx.array(FP8_SCALE),
                    name.replace(".weight", ".activation_scale"): mx.array(3.0)}
    return out


def small_embeddings(weights: Weights) -> Weights:
    """So that a multiplier does not drown what the layers add."""
    return {**weights, "model.embed_tokens.weight": 0.1 * weights["model.embed_tokens.weight"]}


def head_is_embedding(weights: Weights) -> Weights:
    quiet = quiet_embeddings(0.1)(weights)
    return {**quiet, "lm_head.weight": quiet["model.embed_tokens.weight"]}


def without_head(weights: Weights, _: dict) -> Weights:
    return {name: value for name, value in weights.items() if name != "lm_head.weight"}


LLAMA = [
    Row("llama", config("llama", num_hidden_layers=5, tie_word_embeddings=True, rope_scaling=LLAMA3, attention_bias=False, mlp_bias=False),
        "llama3 rope, tied", published=then(head_repeated, inverse_frequencies)),
    Row("llama", config("llama", num_key_value_heads=4, rope_scaling={"type": "linear", "factor": 2.0}), "linear rope, all heads",
        published=inverse_frequencies),
    Row("llama", config("llama", max_position_embeddings=32, rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic rope",
        chunks_matter=True),
    Row("llama", config("llama", rope_scaling=YARN), "yarn"),
    Row("llama", config("llama", max_position_embeddings=256, rope_scaling={
        "rope_type": "longrope", "original_max_position_embeddings": 32, "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS}),
        "longrope"),
    Row("llama", config("llama", num_hidden_layers=5, layer_types=SLIDING_THEN_FULL, sliding_window=16), "sliding layers",
        cuts=((1,), *AROUND_FULL)),
    Row("llama", config("llama", head_dim=32, attention_bias=True, mlp_bias=True, rope_theta=500000.0), "biases, wide heads",
        published=inverse_frequencies),
    Row("mistral", config("mistral", head_dim=32, sliding_window=4096)),
    Row("iquestcoder", config("iquestcoder", head_dim=16, rope_theta=500000.0, attention_bias=False, mlp_bias=False)),
    Row("xverse", config("xverse", num_key_value_heads=4), published=inverse_frequencies),
]

QWEN = [
    Row("qwen2", config("qwen2", tie_word_embeddings=True, rope_theta=1000000.0, use_sliding_window=False, max_window_layers=4),
        published=then(head_repeated, inverse_frequencies)),
    Row("qwen2", config("qwen2", rope_scaling=YARN), "yarn, untied"),
    Row("qwen3", config("qwen3", num_hidden_layers=5, head_dim=24, attention_bias=False), cuts=((2,), (1, 4))),
    Row("qwen3", config("qwen3", head_dim=32, tie_word_embeddings=True, rope_theta=50000.0, rope_scaling=YARN), "yarn, tied",
        published=head_repeated, published_config=rope_parameters),
    Row("qwen2_vl", wrapper("qwen2_vl", config("qwen2", rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]})),
        published=qwen_first_layout, published_config=flat),
    Row("qwen2_5_vl", wrapper("qwen2_5_vl", config("qwen2", tie_word_embeddings=True, rope_scaling={
        "rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]})), published=qwen_nested_layout),
    Row("qwen3_vl", wrapper("qwen3_vl", config("qwen3", head_dim=16, tie_word_embeddings=True, rope_theta=5000000.0, rope_scaling={
        "rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True})), published=qwen_nested_layout),
]

MINISTRAL_ROPE = {"type": "yarn", "rope_type": "yarn", "rope_theta": 50000.0, "factor": 4.0, "original_max_position_embeddings": 16,
                  "beta_fast": 0.6, "beta_slow": 0.06, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}
MISTRAL = [
    Row("ministral3", config("ministral3", ("rope_theta",), head_dim=32, rope_parameters=MINISTRAL_ROPE), "position-scaled queries",
        # mlx-lm multiplies the bytes of the codes with the scale.
        adjust=fp8_exact, published=fp8, published_config=lambda settings: settings | FP8, mlx_lm_loads=False),
    Row("ministral3", config("ministral3", ("rope_theta",), num_hidden_layers=5, head_dim=32, tie_word_embeddings=True,
                             rope_parameters=MINISTRAL_ROPE, layer_types=SLIDING_THEN_FULL, sliding_window=16), "sliding layers, tied",
        cuts=((1,), *AROUND_FULL), published=then(head_repeated, inverse_frequencies)),
    Row("mistral3", wrapper("mistral3", config("mistral", head_dim=32)), "over mistral", published=first_layout),
    Row("mistral3", wrapper("mistral3", config("ministral3", head_dim=32, rope_parameters=MINISTRAL_ROPE)), "over ministral3",
        published=nested_layout),
    Row("pixtral", wrapper("pixtral", config("mistral", head_dim=32, rope_theta=1000000.0)), published=first_layout),
    Row("pixtral", wrapper("pixtral", config("mistral", head_dim=32)), "nested", published=nested_layout, mlx_lm_loads=False),
    Row("llava", wrapper("llava", config("llama", num_key_value_heads=4)), published=first_layout),
    Row("llava", wrapper("llava", config("mistral", head_dim=32)), "nested", published=nested_layout),
]

NORMS_AND_SCALARS = [
    Row("smollm3", config("smollm3", num_hidden_layers=5, tie_word_embeddings=True, no_rope_layer_interval=4,
                          no_rope_layers=[1, 1, 1, 0, 1], attention_bias=False, mlp_bias=False, use_sliding_window=False,
                          rope_theta=2000000.0),
        cuts=AROUND_FULL, published=then(head_repeated, inverse_frequencies)),
    Row("granite", config("granite", tie_word_embeddings=True, attention_bias=False, mlp_bias=False, attention_multiplier=0.4,
                          embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=2.0),
        adjust=quiet_embeddings(0.02), published=head_repeated),
    Row("granite", config("granite", attention_bias=True, mlp_bias=True, attention_multiplier=0.5, embedding_multiplier=6.0,
                          residual_multiplier=0.5, logits_scaling=0.5), "biases, untied", adjust=small_embeddings),
    Row("minicpm", config("minicpm", dim_model_base=32, scale_depth=1.4, scale_emb=12.0), adjust=small_embeddings),
    Row("minicpm", config("minicpm", dim_model_base=32, scale_depth=1.4, scale_emb=3.0, num_key_value_heads=4),
        "no head in the checkpoint", adjust=head_is_embedding, published=without_head),
    Row("olmo2", config("olmo2", attention_bias=False, rope_theta=500000.0), published=inverse_frequencies),
    Row("olmo3", config("olmo3", num_hidden_layers=5, attention_bias=False, sliding_window=16, layer_types=SLIDING_THEN_FULL,
                        rope_scaling={**YARN, "attention_factor": 1.138629436111989}), cuts=((1,), *AROUND_FULL)),
    Row("exaone4", config("exaone4", num_hidden_layers=5, head_dim=16, sliding_window=16, sliding_window_pattern="LLLG",
                          layer_types=SLIDING_THEN_FULL, rope_scaling=LLAMA3), "sliding layers",
        cuts=((1,), *AROUND_FULL)),
    Row("exaone4", config("exaone4", head_dim=16, sliding_window=None, sliding_window_pattern=None, tie_word_embeddings=True,
                          rope_scaling=LLAMA3), "full attention"),
    Row("glm4", config("glm4", head_dim=32, attention_bias=True, partial_rotary_factor=0.5, num_key_value_heads=2)),
    Row("cohere", config("cohere", ("rms_norm_eps",), layer_norm_eps=0.01, logit_scale=1.5, tie_word_embeddings=True, use_qk_norm=True),
        "normed queries and keys"),
    Row("cohere", config("cohere", ("rms_norm_eps",), layer_norm_eps=0.01, logit_scale=1.5, tie_word_embeddings=True, use_qk_norm=False,
                         attention_bias=True, layer_norm_bias=True), "biases"),
    Row("cohere2", config("cohere2", ("rms_norm_eps",), num_hidden_layers=5, head_dim=16, layer_norm_eps=0.01, logit_scale=1.5,
                          tie_word_embeddings=True, sliding_window=16, sliding_window_pattern=4, layer_switch=4, rotary_pct=1.0,
                          order_of_interleaved_layers="local_attn_first", position_embedding_type="rope_gptj", attention_bias=False,
                          use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True), cuts=((1,), *AROUND_FULL)),
    Row("llama4_text", config("llama4_text", head_dim=16, num_hidden_layers=5, intermediate_size_mlp=96, no_rope_layers=[1, 1, 1, 0, 1],
                              use_qk_norm=True, attention_bias=False), cuts=AROUND_FULL,
        published=renamed(("^output", "lm_head")), mlx_lm_loads=False),
    Row("llama4_text", config("llama4_text", head_dim=16, num_hidden_layers=4, intermediate_size_mlp=96, no_rope_layers=[1, 1, 1, 1],
                              use_qk_norm=False, tie_word_embeddings=True), "tied", quantizes=False),
]

OTHER_NAMES = [
    Row("phi3", config("phi3", max_position_embeddings=256, original_max_position_embeddings=32, partial_rotary_factor=0.75,
                       tie_word_embeddings=True, rope_scaling={
                           "type": "longrope", "short_factor": SHORT_FACTORS[:6], "long_factor": LONG_FACTORS[:6]}),
        "longrope, partial, tied"),
    Row("phi3", config("phi3", num_key_value_heads=4, sliding_window=2047, original_max_position_embeddings=4096, rope_scaling=None)),
    Row("exaone", {**config("exaone", ("num_hidden_layers", "rms_norm_eps", "hidden_act")), "num_layers": 4, "layer_norm_epsilon": 0.01,
                   "activation_function": "silu", "rope_scaling": LLAMA3, "head_dim": 16}),
    Row("mimo", config("mimo", num_nextn_predict_layers=1, attention_bias=True, rope_theta=640000.0, head_dim=16),
        published=then(inverse_frequencies,
                       with_extra("model.mtp_layers.0.input_proj.weight", "model.mtp_layers.0.self_attn.q_proj.weight"))),
    Row("seed_oss", config("seed_oss", head_dim=32, attention_bias=True, attention_out_bias=False, mlp_bias=False, rope_theta=10000000.0,
                           rope_scaling={"rope_type": "default"})),
    Row("seed_oss", config("seed_oss", head_dim=16, attention_bias=True, attention_out_bias=True, mlp_bias=True, tie_word_embeddings=True),
        "all biases, tied", quantizes=False, published=head_repeated),
    Row("telechat3", config("telechat3", head_dim=16, attention_bias=False, mlp_bias=True, rope_scaling={
        **YARN, "type": "telechat3-yarn", "mscale": 1.0, "mscale_all_dim": 0.7})),
    Row("helium", config("helium", head_dim=16, attention_bias=False, mlp_bias=False, rope_theta=100000.0)),
    Row("ernie4_5", config("ernie4_5", head_dim=32, use_bias=False, tie_word_embeddings=True, rope_theta=500000.0)),
    Row("ernie4_5", config("ernie4_5", head_dim=16, use_bias=True), "biases"),
    Row("internlm2", config("internlm2", bias=False, rope_theta=1000000.0, max_position_embeddings=32,
                            rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic rope", chunks_matter=True,
        published=with_extra("model.layers.*.attention.rope.inv_freq")),
    Row("internlm2", config("internlm2", bias=True, num_key_value_heads=1, rope_scaling={"type": "linear", "factor": 2.0}),
        "biases, linear rope"),
    Row("internlm3", config("internlm3", bias=False, qkv_bias=False, head_dim=16, max_position_embeddings=32,
                            rope_scaling={"rope_type": "dynamic", "factor": 6.0}), "dynamic rope", chunks_matter=True),
    Row("internlm3", config("internlm3", bias=True, qkv_bias=True, head_dim=16), "biases"),
    # mlx-lm turns the whole head whatever the config says.
    Row("glm", config("glm", head_dim=16, attention_bias=True, num_key_value_heads=2, partial_rotary_factor=1.0),
        published=inverse_frequencies),
    Row("hunyuan_v1_dense", config("hunyuan_v1_dense", head_dim=32, use_qk_norm=True, attention_bias=False, tie_word_embeddings=True,
                                   rope_scaling={"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0,
                                                 "mscale_all_dim": 0.0, "type": "dynamic"}), published=head_repeated),
    Row("starcoder2", config("starcoder2", ("rms_norm_eps",), norm_epsilon=0.01, hidden_act="gelu_pytorch_tanh", use_bias=True,
                             tie_word_embeddings=True, sliding_window=4096, rope_theta=999999.4)),
]

ROWS = LLAMA + QWEN + MISTRAL + NORMS_AND_SCALARS + OTHER_NAMES
