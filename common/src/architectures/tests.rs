//! Every architecture reads a config, and says what is wrong with one.

use super::*;
use crate::spec::{Mixer, RopeKind};
use serde_json::json;

/// A config with the keys of every family, at the top and, for models that also see, in `text_config`.
pub(crate) fn tiny(model_type: &str) -> Value {
    let mut config = json!({"model_type": model_type, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "max_position_embeddings": 4096, "sliding_window": 16, "partial_rotary_factor": 0.5,
        "rotary_dim": 8, "rope_parameters": {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}});
    let mut add = |part: Value| config.as_object_mut().expect("an object").extend(part.as_object().expect("an object").clone());
    add(json!({"num_experts": 8, "num_local_experts": 4, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2,
        "moe_top_k": 2, "moe_k": 2, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "share_expert_dim": 32, "decoder_sparse_step": 1,
        "first_k_dense_replace": 1, "is_moe_layer": [false, true, true], "routed_scaling_factor": 1.5, "num_attention_groups": 2}));
    add(json!({"attention_multiplier": 0.5, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0}));
    add(json!({"num_kv_shared_layers": 1, "vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 32,
        "rope_local_base_freq": 10000.0, "altup_num_inputs": 4, "altup_active_idx": 0, "altup_coef_clip": 0.4, "altup_correct_scale": true,
        "laurel_rank": 32, "final_logit_softcapping": null, "activation_sparsity_pattern": [0.9, 0.0, 0.0]}));
    add(json!({"num_heads": 8, "state_size": 16, "n_groups": 2, "conv_kernel": 4, "time_step_rank": "auto", "layer_norm_epsilon": 1e-5}));
    add(json!({"num_layers": 3, "scale_depth": 1.4, "scale_emb": 12.0, "dim_model_base": 32, "no_rope_layers": [1, 0, 1],
        "intermediate_size_mlp": 96}));
    add(json!({"norm_eps": 1e-5, "full_attn_idxs": [1], "conv_L_cache": 3, "num_dense_layers": 1}));
    add(json!({"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_d_conv": 4, "mamba_expand": 2,
        "shared_intermediate_size": 32, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "moe_shared_expert_intermediate_size": 32}));
    add(json!({"q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}));
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let rope = json!({"rope_theta": 10000.0});
    match model_type {
        "dots1" | "glm4_moe" | "solar_open" => add(json!({"norm_topk_prob": true})),
        "glm4_moe_lite" => add(json!({"partial_rotary_factor": 1.0})),
        "exaone_moe" => add(json!({"layer_types": types})),
        "granitemoehybrid" => add(json!({"layer_types": ["mamba", "attention", "mamba"]})),
        "jamba" => add(json!({"sliding_window": null})),
        "mellum" => add(json!({"layer_types": types, "rope_parameters": {"full_attention": rope, "sliding_attention": rope}})),
        "nemotron_h" => add(json!({"hybrid_override_pattern": "M*E", "norm_topk_prob": true})),
        "plamo2" => add(json!({"hidden_size_per_head": 16})),
        "qwen3_moe" => add(json!({"norm_topk_prob": true, "mlp_only_layers": [1]})),
        _ => {}
    }
    config["text_config"] = config.clone();
    config["text_config"]["model_type"] = "llama".into();
    config
}

#[test]
fn every_architecture_reads_a_config() {
    for model_type in supported_model_types() {
        let spec = read_spec(&tiny(model_type)).expect(model_type);
        assert_eq!((spec.n_layers(), spec.hidden_size, spec.vocab_size), (3, 64, 512), "{model_type}");
    }
}

#[test]
fn layers_with_experts() {
    let routed = |model_type: &str| -> Vec<bool> {
        let spec = read_spec(&tiny(model_type)).expect(model_type);
        spec.layers.iter().map(|layer| layer.feed_forward.experts().is_some()).collect()
    };
    assert_eq!(routed("llama"), [false, false, false]);
    assert_eq!(routed("mixtral"), [true, true, true]);
    assert_eq!(routed("qwen3_moe"), [true, false, true]);
    assert_eq!(routed("glm4_moe"), [false, true, true]);
    assert_eq!(routed("exaone_moe"), [false, true, true]);
}

#[test]
fn a_missing_or_absurd_value_is_named() {
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("num_hidden_layers", json!(1_000_000_000_000u64)),
        ("vocab_size", json!(-1)),
        ("rms_norm_eps", json!("small")),
        ("num_key_value_heads", json!(3)),
    ] {
        for model_type in ["llama", "mixtral", "qwen2", "qwen3", "qwen3_moe"] {
            let mut config = tiny(model_type);
            config[key] = value.clone();
            let message = read_spec(&config).expect_err(key).to_string();
            assert!(message.contains(key), "{model_type}: {message}");
        }
    }
    let mut config = tiny("llama");
    config.as_object_mut().expect("an object").remove("hidden_size");
    assert_eq!(read_spec(&config), Err(ConfigError::Missing { key: "hidden_size".into() }));
}

#[test]
fn an_unknown_model_type_names_the_nearest() {
    let message = read_spec(&json!({"model_type": "qwen3-moe"})).expect_err("unknown").to_string();
    assert!(message.contains("`qwen3-moe`") && message.contains("`qwen3_moe`") && message.contains("adding-an-architecture"), "{message}");
}

#[test]
fn rope_kinds() {
    let kind = |scaling: Value| {
        let mut config = tiny("llama");
        config["rope_scaling"] = scaling;
        read_spec(&config).map(|spec| {
            let Mixer::Attention(attention) = &spec.layers[0].mixer else { panic!("attention") };
            attention.rope.clone().expect("rope").kind
        })
    };
    assert_eq!(kind(Value::Null), Ok(RopeKind::Default));
    assert_eq!(kind(json!({"type": "linear", "factor": 4})), Ok(RopeKind::Linear { factor: 4.0 }));
    assert!(matches!(kind(json!({"rope_type": "llama3", "factor": 8.0})), Ok(RopeKind::Llama3 { original_context: 8192, .. })));
    assert!(matches!(kind(json!({"rope_type": "yarn", "factor": 4.0})), Ok(RopeKind::Yarn { original_context: 4096, .. })));
    assert!(kind(json!({"rope_type": "yarn", "factor": 0})).is_err());
    assert!(kind(json!({"rope_type": "spiral"})).is_err());
}
