//! Every kind of block, split over many groups: ranks cover the model, and each rank's spec is that of the parameters it has.

use super::*;
use crate::{
    architectures::read_spec,
    dtype::DType,
    published::SymbolicTensor,
    spec::{ConvolutionSpec, FeedForward, Mixer, NormSpec, Weight},
    weights::Parameter,
};
use serde_json::{Value, json};

const GROUPS: [&[u32]; 6] = [&[1, 1], &[2, 1], &[1, 1, 1], &[1, 5], &[3, 2, 2, 1], &[1; 7]];

fn specs(quantised: bool) -> Vec<ModelSpec> {
    let dense = json!({"hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2,
        "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 515, "max_position_embeddings": 512, "rope_theta": 1e4});
    let with = |changes: Value| {
        let mut config = dense.clone();
        let fields = config.as_object_mut().expect("an object");
        fields.extend(changes.as_object().expect("an object").clone());
        if quantised {
            fields.insert("quantization".into(), json!({"group_size": 32, "bits": 4}));
        }
        read_spec(&config).unwrap_or_else(|error| panic!("{changes}: {error}"))
    };
    vec![
        with(json!({"model_type": "llama", "tie_word_embeddings": true})),
        with(json!({"model_type": "qwen2", "num_key_value_heads": 1})),
        with(json!({"model_type": "phi3"})),
        with(json!({"model_type": "internlm2"})),
        with(json!({"model_type": "olmo2"})),
        with(json!({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})),
        with(
            json!({"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "intermediate_size": 64,
            "layer_types": ["sliding_attention", "full_attention"]}),
        ),
        with(
            json!({"model_type": "deepseek_v3", "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 4,
            "first_k_dense_replace": 1, "moe_layer_freq": 1, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
            "v_head_dim": 32, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true,
            "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6}),
        ),
        with(json!({"model_type": "qwen3_next", "num_attention_heads": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "decoder_sparse_step": 1, "shared_expert_intermediate_size": 64, "mlp_only_layers": [], "moe_intermediate_size": 64,
            "norm_topk_prob": true, "partial_rotary_factor": 0.5, "full_attention_interval": 2, "head_dim": 32})),
        with(json!({"model_type": "mamba2", "num_heads": 8, "head_dim": 16, "intermediate_size": 128, "state_size": 16, "hidden_size": 64,
            "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 2, "use_bias": false, "use_conv_bias": true, "tie_word_embeddings": true,
            "time_step_limit": [0.001, 100.0], "time_step_rank": "auto"})),
        with(json!({"model_type": "lfm2", "norm_eps": 1e-5, "conv_bias": false, "conv_L_cache": 3, "block_dim": 96, "block_ff_dim": 160,
            "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": false, "full_attn_idxs": [1]})),
        with(
            json!({"model_type": "mamba", "intermediate_size": 128, "state_size": 16, "conv_kernel": 4, "use_bias": false, "use_conv_bias": true,
            "time_step_rank": 4, "hidden_size": 64}),
        ),
    ]
}

/// The parameters of a spec, each a tensor of its own; matrices quantised where their width allows it.
fn whole(spec: &ModelSpec) -> WeightMap {
    let mut map = WeightMap::default();
    for part in spec.parts() {
        let weights = spec.weights(part);
        map.parts.insert(part, weights.iter().flat_map(|weight| parameters(spec, weight)).collect());
    }
    map
}

fn parameter(name: String, dtype: DType, shape: Vec<u64>) -> Parameter {
    Parameter::new(name.clone(), SymbolicTensor::of_checkpoint(&name, dtype, shape))
}

fn parameters(spec: &ModelSpec, weight: &Weight<'_>) -> Vec<Parameter> {
    let path = weight.path();
    let named = |piece: &str| format!("{path}.{piece}");
    let vector = |piece: &str, shape: &[u32]| parameter(named(piece), DType::F32, shape.iter().map(|dim| u64::from(*dim)).collect());
    let matrix = |shape: &[u32]| {
        let (columns, rows) = shape.split_last().expect("a matrix");
        let rows: Vec<u64> = rows.iter().map(|dim| u64::from(*dim)).collect();
        let with = |piece: &str, dtype, columns: u64| parameter(named(piece), dtype, [rows.clone(), vec![columns]].concat());
        match spec.quantization.scheme(path).and_then(|scheme| scheme.packed_columns(*columns).zip(scheme.groups(*columns))) {
            Some((words, groups)) => {
                vec![with("weight", DType::U32, words), with("scales", DType::F32, groups), with("biases", DType::F32, groups)]
            }
            None => vec![with("weight", DType::F32, u64::from(*columns))],
        }
    };
    let biased = |mut of: Vec<Parameter>, bias: bool, shape: &[u32]| {
        of.extend(bias.then(|| vector("bias", shape)));
        of
    };
    match weight {
        Weight::Embedding(of) => matrix(&[of.vocab_size, of.dims]),
        Weight::Linear(of) => biased(matrix(&[of.output_dims, of.input_dims]), of.bias, &[of.output_dims]),
        Weight::Experts(of) => biased(matrix(&[of.n_experts, of.output_dims, of.input_dims]), of.bias, &[of.n_experts, of.output_dims]),
        Weight::HeadLinear(of) => matrix(&[of.n_heads, of.output_dims, of.input_dims]),
        Weight::Norm(NormSpec { dims, .. }) => vec![vector("weight", &[*dims])],
        Weight::Convolution(ConvolutionSpec { channels, kernel, bias, .. }) => {
            biased(vec![vector("weight", &[*channels, *kernel, 1])], *bias, &[*channels])
        }
        Weight::Tensor(of) => vec![parameter(of.name.clone(), DType::F32, of.shape.iter().map(|dim| u64::from(*dim)).collect())],
    }
}

#[test]
fn the_ranks_of_every_group_cover_every_model() {
    for spec in [specs(false), specs(true)].concat() {
        for shares in GROUPS {
            check_cover(&spec, &whole(&spec), &spec.parts(), shares).unwrap_or_else(|error| panic!("{}: {error}", spec.model_type));
        }
    }
}

#[test]
fn a_rank_is_a_smaller_model() {
    for spec in [specs(false), specs(true)].concat() {
        let map = whole(&spec);
        for shares in GROUPS {
            for rank in 0..shares.len() as u32 {
                let own = rank_model(&spec, &map, &TensorPlace { rank, shares: shares.to_vec() }).expect("splits");
                // Tables and heads keep the whole vocabulary in the spec.
                let parts = spec.parts().into_iter().filter(|part| matches!(part, Part::Layer(_) | Part::FinalNorm));
                for part in parts {
                    let shapes = |map: &WeightMap| -> Vec<_> {
                        map.parts[&part].iter().map(|parameter| (parameter.name.clone(), parameter.shape.clone())).collect()
                    };
                    assert_eq!(shapes(&own.weights), shapes(&whole(&own.spec)), "{} {part:?} rank {rank} of {shares:?}", spec.model_type);
                }
            }
        }
    }
}

#[test]
fn two_equal_ranks_have_half_of_what_weighs() {
    for spec in specs(false) {
        let map = whole(&spec);
        let bytes = map.bytes(&spec.parts()) as f64;
        for rank in 0..2 {
            let own = rank_model(&spec, &map, &TensorPlace { rank, shares: vec![1, 1] }).expect("splits");
            let share = own.weights.bytes(&spec.parts()) as f64 / bytes;
            // Routers, norms, latents and the like are on both.
            assert!((0.45..0.63).contains(&share), "{}: rank {rank} has {share:.2}", spec.model_type);
        }
    }
}

#[test]
fn what_a_hole_or_an_overlap_is_called() {
    let spec = specs(false).remove(0);
    let mut map = whole(&spec);
    let layer = map.parts.get_mut(&Part::Layer(0)).expect("a layer");
    let down = layer.iter_mut().find(|parameter| parameter.name.ends_with("down_proj.weight")).expect("an MLP");
    down.shape[1] += 1;
    let error = check_cover(&spec, &map, &spec.parts(), &[1, 1]).expect_err("one column is on no rank");
    assert!(error.to_string().contains("down_proj.weight") && error.to_string().contains("on no rank"), "{error}");
}

#[test]
fn blocks_that_cannot_be_split_are_whole() {
    let spec = specs(false).remove(0);
    let map = whole(&spec);
    // Seven ranks, six heads: attention is whole on all, the MLP is not.
    let own = rank_model(&spec, &map, &TensorPlace { rank: 6, shares: vec![1; 7] }).expect("splits");
    let (Mixer::Attention(attention), FeedForward::Mlp(mlp)) = (&own.spec.layers[0].mixer, &own.spec.layers[0].feed_forward) else {
        panic!("a dense layer")
    };
    assert_eq!(attention.n_heads, 6);
    assert!((22..=23).contains(&mlp.inner_dims()), "{}", mlp.inner_dims());
    assert_eq!(own.n_collectives(Part::Layer(0)), 1);
    assert_eq!(rank_model(&spec, &map, &TensorPlace { rank: 0, shares: vec![1, 1] }).expect("splits").n_collectives(Part::Layer(0)), 2);
}
