"""State spaces and short convolutions, alone and between attention layers."""

import mlx.core as mx

from .publishing import Layout, depthwise_channels_first, experts_apart, experts_fused, head_repeated, renamed, then, with_extra
from .row import Row, Weights

# The scan works in chunks of 256 tokens.
TWO_CHUNKS = 300
# Epsilons are ones that are felt.
TEXT = {"hidden_size": 64, "vocab_size": 320, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "attention_dropout": 0.0}
INFINITY = float("inf")


def config(model_type: str, *parts: dict, **changes) -> dict:
    whole: dict = {"model_type": model_type}
    for part in (*parts, changes):
        whole |= part
    return whole


def remembering(weights: Weights) -> Weights:
    """Steps as short as trained ones, so that a state outlives a chunk and a chunk of prefill."""
    def change(name: str, value: mx.array) -> mx.array:
        if name.endswith((".dt_bias", ".dt_proj.bias")):
            return mx.random.uniform(-6.0, -2.0, value.shape)
        return mx.random.uniform(-1.5, 1.5, value.shape) if name.endswith(".A_log") and value.ndim == 1 else value

    return {name: change(name, value) for name, value in weights.items()}


def among_tokens(weights: Weights) -> Weights:
    """Embeddings so faint that, where the head is tied, a token does not just predict itself."""
    return {name: 0.2 * value if name.endswith(("embeddings.weight", "embed_tokens.weight")) else value for name,
            value in remembering(weights).items()}


def tagged_infinity(settings: dict) -> dict:
    """As transformers writes it since 5.0, where JSON has no infinity."""
    return settings | {"time_step_limit": [settings["time_step_limit"][0], {"__float__": "Infinity"}]}


MAMBA = config("mamba", TEXT, intermediate_size=128, state_size=16, num_hidden_layers=4, conv_kernel=4, use_bias=False, use_conv_bias=True,
               time_step_rank=32, expand=2, hidden_act="silu", layer_norm_epsilon=0.02, residual_in_fp32=True, rescale_prenorm_residual=False,
               time_step_min=0.001, time_step_max=0.1, time_step_floor=0.0001, time_step_scale=1.0, time_step_init_scheme="random",
               tie_word_embeddings=True)
FALCON_MAMBA = config("falcon_mamba", {name: value for name, value in MAMBA.items() if name != "model_type"}, mixer_rms_eps=0.02,
                      use_mambapy=False,
                      tie_word_embeddings=False)
MAMBA2 = config("mamba2", TEXT, intermediate_size=128, num_heads=4, head_dim=32, state_size=32, num_hidden_layers=4, layer_norm_epsilon=0.02,
                conv_kernel=4, n_groups=2, use_bias=False, use_conv_bias=True, expand=2, chunk_size=256, hidden_act="silu", rms_norm=True,
                residual_in_fp32=True, time_step_rank="auto", time_step_limit=[0.0, INFINITY], time_step_min=0.001, time_step_max=0.1,
                tie_word_embeddings=True)
JAMBA = config("jamba", TEXT, ATTENTION, intermediate_size=128, num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=1,
               expert_layer_period=2,
               expert_layer_offset=1, num_experts=8, num_experts_per_tok=2, mamba_d_conv=4, mamba_d_state=16, mamba_expand=2, mamba_dt_rank=32,
               mamba_conv_bias=True, mamba_proj_bias=False, use_mamba_kernels=True, rms_norm_eps=0.02, hidden_act="silu", sliding_window=None,
               tie_word_embeddings=False, num_logits_to_keep=1, output_router_logits=False, router_aux_loss_coef=0.001)
JAMBA_PUBLISHED = then(depthwise_channels_first, experts_apart(r"feed_forward\.switch_mlp\.(\w+_proj)", r"feed_forward.experts.{i}.\1"))

# Multipliers are powers of two, so that folding them into the weights loses nothing.
FALCON_H1 = config("falcon_h1", TEXT, ATTENTION, num_hidden_layers=4, intermediate_size=128, head_dim=32, rms_norm_eps=0.02, rope_theta=100000.0,
                   rope_scaling=None, attention_bias=False, mlp_bias=False, projectors_bias=False, hidden_act="silu", mlp_expansion_factor=8,
                   mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_head=32, mamba_d_ssm=128, mamba_d_state=32,
                   mamba_expand=2,
                   mamba_n_groups=2, mamba_n_heads=4, mamba_norm_before_gate=False, mamba_proj_bias=False, mamba_rms_norm=False,
                   mamba_use_mlp=True,
                   attention_in_multiplier=1.0, attention_out_multiplier=0.5, key_multiplier=1.0, embedding_multiplier=2.0,
                   lm_head_multiplier=4.0,
                   mlp_multipliers=[0.5, 2.0], ssm_in_multiplier=2.0, ssm_multipliers=[0.5, 0.25, 2.0, 4.0, 0.5], ssm_out_multiplier=0.5,
                   tie_word_embeddings=True)


def falcon_h1_published(weights: Weights, settings: dict) -> Weights:
    """Without the multipliers, which mlx-lm folds into what it saves."""
    inner, state = settings["mamba_d_ssm"], settings["mamba_n_groups"] * settings["mamba_d_state"]
    sizes = [inner, inner, state, state, settings["mamba_n_heads"]]
    rows = mx.concatenate([mx.full((size,), factor) for size, factor in zip(sizes, settings["ssm_multipliers"])])
    factors = {"embed_tokens": settings["embedding_multiplier"], "lm_head": settings["lm_head_multiplier"],
               "q_proj": settings["attention_in_multiplier"], "k_proj": settings["attention_in_multiplier"],
               "o_proj": settings["attention_out_multiplier"], "out_proj": settings["ssm_out_multiplier"],
               "gate_proj": settings["mlp_multipliers"][0], "down_proj": settings["mlp_multipliers"][1],
               "in_proj": settings["ssm_in_multiplier"] * rows[:, None]}
    plain = {name: value / factors.get(name.split(".")[-2], 1.0) if name.endswith(".weight") else value for name, value in weights.items()}
    return depthwise_channels_first(plain, settings)


GRANITE = config("granitemoehybrid", TEXT, ATTENTION, num_hidden_layers=6, layer_types=["mamba", "mamba", "attention", "mamba", "mamba",
                                                                                        "attention"],
                 intermediate_size=64, shared_intermediate_size=96, num_local_experts=8, num_experts_per_tok=2, attention_bias=False,
                 mamba_n_heads=4, mamba_d_head=32, mamba_d_state=32, mamba_d_conv=4, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=256,
                 mamba_conv_bias=True, mamba_proj_bias=False, position_embedding_type="nope", rope_theta=10000.0, rope_scaling=None,
                 rms_norm_eps=0.02, hidden_act="silu", normalization_function="rmsnorm", embedding_multiplier=1.5, attention_multiplier=0.4,
                 residual_multiplier=0.7, logits_scaling=0.8, tie_word_embeddings=True, output_router_logits=False, router_aux_loss_coef=0.01)
DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 96, "position_embedding_type": "rope"}
GRANITE_PUBLISHED = then(
    experts_fused("switch_mlp", "fused"), depthwise_channels_first, head_repeated,
    renamed((r"\.fused\.gate_up_proj$", ".input_linear.weight"), (r"\.fused\.down_proj$", ".output_linear.weight")))


def granite_dense_published(weights: Weights, _: dict) -> Weights:
    """The one MLP under the name of the shared one, gate and up in one matrix."""
    out = {name: value for name, value in weights.items() if ".mlp." not in name}
    for name, gate in weights.items():
        if name.endswith(".mlp.gate_proj.weight"):
            layer = name.removesuffix(".mlp.gate_proj.weight")
            out[f"{layer}.shared_mlp.input_linear.weight"] = mx.concatenate([gate, weights[f"{layer}.mlp.up_proj.weight"]])
            out[f"{layer}.shared_mlp.output_linear.weight"] = weights[f"{layer}.mlp.down_proj.weight"]
    return depthwise_channels_first(out, {})


NEMOTRON_H = config("nemotron_h", TEXT, ATTENTION, hybrid_override_pattern="M-M*-M-*", num_hidden_layers=8, head_dim=32, attention_head_dim=32,
                    intermediate_size=128, mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=32, n_groups=2, conv_kernel=4, chunk_size=128,
                    expand=2,
                    use_bias=False, use_conv_bias=True, mamba_proj_bias=False, mlp_bias=False, attention_bias=False, mlp_hidden_act="relu2",
                    mamba_hidden_act="silu", layer_norm_epsilon=0.02, norm_eps=0.02, residual_in_fp32=False, rescale_prenorm_residual=True,
                    sliding_window=None, time_step_limit=[0.0, INFINITY], time_step_min=0.001, time_step_max=0.1, time_step_floor=0.0001,
                    use_mamba_kernels=True, tie_word_embeddings=False, num_logits_to_keep=1)
NEMOTRON_EXPERTS = {"hybrid_override_pattern": "MEM*EME*", "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64,
                    "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 96, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
                    "routed_scaling_factor": 2.5, "time_step_limit": [0.01, 0.2]}
NEMOTRON_PUBLISHED = then(
    depthwise_channels_first, experts_apart(r"mixer\.switch_mlp\.(fc\d)", r"mixer.experts.{i}.\1"),
    renamed((r"\.experts\.(\d+)\.fc1", r".experts.\1.up_proj"), (r"\.experts\.(\d+)\.fc2", r".experts.\1.down_proj")),
    with_extra("mtp.layers.0.eh_proj.weight", "mtp.layers.0.mixer.q_proj.weight"))
NEMOTRON_LIST = {name: value for name, value in NEMOTRON_H.items() if name not in ("hybrid_override_pattern", "num_hidden_layers",
                                                                                   "time_step_limit")}
NEMOTRON_LIST["layers_block_type"] = ["attention", "mamba", "mlp", "mamba", "moe", "attention", "mlp"]

PLAMO2 = config("plamo2", TEXT, ATTENTION, num_hidden_layers=4, hidden_size_per_head=32, intermediate_size=128, rms_norm_eps=0.02,
                attention_window_size=2048, full_attention_idx=[], mamba_d_state=32, mamba_d_conv=4, mamba_num_heads=4, mamba_step=2,
                mamba_chunk_size=256, mamba_enabled=True, linear_type="normal", tie_word_embeddings=True)
SHORT, FULL = "conv", "full_attention"
LFM2 = config("lfm2", TEXT, ATTENTION, num_hidden_layers=6, layer_types=[SHORT, SHORT, FULL, SHORT, FULL, SHORT], block_dim=64, block_ff_dim=192,
              block_multiple_of=32, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=True, block_mlp_init_scale=1.0, block_norm_eps=1e-5,
              block_use_swiglu=True, block_use_xavier_init=True, conv_L_cache=3, conv_bias=False, conv_dim=64, conv_dim_out=64,
              conv_use_xavier_init=True,
              norm_eps=0.02, rope_theta=1000000.0, theta=1000000.0, use_pos_enc=True, tie_embedding=True)
LFM2_LISTED = {name: value for name, value in LFM2.items() if name not in ("layer_types", "block_ff_dim", "rope_theta", "theta")} | {
    "full_attn_idxs": [0, 3], "conv_bias": True, "conv_L_cache": 4, "intermediate_size": 128, "block_auto_adjust_ff_dim": False,
    "rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}}
LFM2_MOE = config("lfm2_moe", TEXT, ATTENTION, num_hidden_layers=6, layer_types=LFM2["layer_types"], intermediate_size=128,
                  moe_intermediate_size=64,
                  num_experts=8, num_experts_per_tok=4, num_dense_layers=2, norm_topk_prob=True, use_expert_bias=True, routed_scaling_factor=1.0,
                  conv_L_cache=3, conv_bias=False, norm_eps=0.02, rope_theta=1000000.0, tie_embedding=True)
LFM2_VL = {"model_type": "lfm2-vl", "image_token_index": 300, "downsample_factor": 2, "text_config": LFM2,
           "vision_config": {"model_type": "siglip2_vision_model", "hidden_size": 32}}


def short_kernels(weights: Weights, _: dict) -> Weights:
    """[channels, 1, width]."""
    return {name: value.swapaxes(1, 2) if name.endswith("conv.conv.weight") else value for name, value in weights.items()}


def numbered(before: str) -> Layout:
    """`w1`, `w2`, `w3` for gate, down and up."""
    return renamed(*((rf"({before}){ours}", rf"\1{theirs}") for ours, theirs in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3"))))


LFM2_MOE_PUBLISHED = then(short_kernels, experts_apart(r"feed_forward\.switch_mlp\.(\w+_proj)", r"feed_forward.experts.{i}.\1"),
                          numbered(r"\.feed_forward\.(?:experts\.\d+\.)?"))
LFM2_VL_SEPARATE = with_extra("vision_tower.encoder.layers.*.mlp.fc1.weight", "multi_modal_projector.linear_1.weight")
LFM2_VL_TOGETHER = then(short_kernels, renamed((r"^language_model\.model\.", "model.language_model.")),
                        with_extra("model.vision_tower.vision_model.encoder.layers.*.mlp.fc1.weight",
                                   "model.multi_modal_projector.linear_1.weight"))

ROWS = [
    Row("mamba", MAMBA, adjust=among_tokens, published=depthwise_channels_first),
    Row("mamba", {**MAMBA, "time_step_rank": "auto", "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
        "biases, head apart",
        adjust=remembering),
    Row("falcon_mamba", FALCON_MAMBA, adjust=remembering, published=depthwise_channels_first),
    Row("mamba2", MAMBA2, prompt_tokens=TWO_CHUNKS, adjust=remembering, published=depthwise_channels_first, published_config=tagged_infinity),
    Row("mamba2", {**MAMBA2, "n_groups": 1, "time_step_limit": [0.01, 0.1], "use_bias": True, "use_conv_bias": False,
                   "tie_word_embeddings": False},
        "limited steps, biases", prompt_tokens=TWO_CHUNKS, adjust=remembering),
    Row("jamba", JAMBA, cuts=((2,), (1, 3)), adjust=remembering, published=JAMBA_PUBLISHED),
    Row("jamba", {**JAMBA, "num_experts": 1, "mamba_dt_rank": "auto", "mamba_proj_bias": True, "mamba_conv_bias": False,
                  "tie_word_embeddings": True,
                  "layers_block_type": ["attention", "mamba", "mamba", "attention", "mamba", "mamba"]}, "dense, listed layers",
        cuts=((3,), (1, 5)),
        adjust=remembering, published=then(depthwise_channels_first, head_repeated)),
    Row("falcon_h1", FALCON_H1, prompt_tokens=TWO_CHUNKS, adjust=remembering, published=falcon_h1_published),
    Row("falcon_h1", {**FALCON_H1, "mamba_rms_norm": True, "mamba_n_groups": 1, "attention_bias": True, "mlp_bias": True,
                      "projectors_bias": True,
                      "mamba_proj_bias": True, "tie_word_embeddings": False}, "gated norm, biases, head apart", prompt_tokens=TWO_CHUNKS,
        adjust=remembering, published=falcon_h1_published),
    Row("falcon_h1", {**FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": True, "mamba_conv_bias": False, "key_multiplier": 0.4,
                      "attention_in_multiplier": 1.2}, "norm before the gate", prompt_tokens=TWO_CHUNKS, adjust=remembering),
    Row("granitemoehybrid", GRANITE, prompt_tokens=TWO_CHUNKS, cuts=((1,), (2, 4)), adjust=remembering, published=GRANITE_PUBLISHED),
    Row("granitemoehybrid", {**GRANITE, **DENSE, "mamba_n_groups": 2, "mamba_proj_bias": True, "mamba_conv_bias": False, "attention_bias": True,
                             "tie_word_embeddings": False, "time_step_limit": [0.01, 0.1], "rope_parameters": {"rope_theta": 50000.0}},
        "dense, rotated", prompt_tokens=TWO_CHUNKS, cuts=((1,), (2, 4)), adjust=remembering, published=granite_dense_published),
    Row("granitemoehybrid", {**GRANITE, **DENSE, "num_hidden_layers": 4, "layer_types": ["attention"] * 4, "mamba_n_heads": None,
                             "mlp_bias": True},
        "dense, attention alone"),
    Row("nemotron_h", NEMOTRON_H, prompt_tokens=TWO_CHUNKS, cuts=((1,), (1, 2), (2, 6)), adjust=remembering, published=NEMOTRON_PUBLISHED,
        published_config=tagged_infinity),
    Row("nemotron_h", {**NEMOTRON_H, **NEMOTRON_EXPERTS}, "experts", prompt_tokens=TWO_CHUNKS, cuts=((1,), (2, 5)), adjust=remembering,
        published=NEMOTRON_PUBLISHED),
    Row("nemotron_h", {**NEMOTRON_LIST, **NEMOTRON_EXPERTS, "hybrid_override_pattern": None, "moe_latent_size": 32, "n_group": 4,
                       "topk_group": 2,
                       "mlp_bias": True, "attention_bias": True, "mamba_proj_bias": True, "use_conv_bias": False},
        "listed layers, latent experts, biases",
        prompt_tokens=TWO_CHUNKS, cuts=((3,), (1, 4)), adjust=remembering),
    Row("plamo2", PLAMO2, prompt_tokens=TWO_CHUNKS, adjust=among_tokens, published=depthwise_channels_first),
    Row("plamo2", {**PLAMO2, "num_hidden_layers": 6, "mamba_step": 3, "tie_word_embeddings": False}, "every third layer, head apart",
        prompt_tokens=TWO_CHUNKS, cuts=((2,), (1, 3)), adjust=remembering),
    Row("plamo2", {**PLAMO2, "mamba_enabled": False}, "attention alone", adjust=among_tokens),
    Row("lfm2", LFM2, cuts=((1,), (2, 3)), published=short_kernels),
    Row("lfm2", LFM2_LISTED, "listed indices, biases", cuts=((1,), (2, 4)), published=short_kernels),
    Row("lfm2-vl", LFM2_VL, cuts=((1,), (2, 3)), published=LFM2_VL_SEPARATE),
    # mlx-lm reads only what has been converted before, with turned kernels too.
    Row("lfm2-vl", LFM2_VL, "as transformers names it", cuts=((1,), (2, 3)), published=LFM2_VL_TOGETHER, mlx_lm_loads=False),
    Row("lfm2_moe", LFM2_MOE, cuts=((1,), (2, 3)), published=LFM2_MOE_PUBLISHED),
    Row("lfm2_moe", {**LFM2_MOE, "use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 1.5, "num_dense_layers": 0,
                     "conv_bias": True},
        "no expert bias, not renormalised", cuts=((1,), (2, 4)), published=LFM2_MOE_PUBLISHED),
]
