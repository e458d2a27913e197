//! Shards with several adapters beside shards with none, with one, and with one in the form in which it is trained.

use super::AdapterWeights;
use crate::{
    adapter::Adaption,
    error::LmError,
    shard::{Shard, StepOutput},
    weights::Weights,
};
use mlx_cluster_common::{
    architectures::read_spec,
    cache::CacheOptions,
    ids::{AdapterId, Epoch, SequenceId},
    request::TokenOut,
    sampling::SamplingParams,
    spec::{ModelSpec, Weight},
    step::{Admission, Output, Segment, Step, Token},
};
use mlx_rs::{Array, Dtype};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A tied head and biases: what DoRA multiplies has no bias in it.
fn dense() -> ModelSpec {
    spec(&json!({"model_type": "qwen2", "tie_word_embeddings": true, "intermediate_size": 48}))
}

/// Routed experts; more than eight tokens of a step are sorted by expert.
fn routed() -> ModelSpec {
    spec(&json!({"model_type": "qwen3_moe", "tie_word_embeddings": false, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_experts": 8, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": true,
        "head_dim": 16, "attention_bias": false}))
}

/// A recurrence with matrices inside.
fn recurrent() -> ModelSpec {
    spec(&json!({"model_type": "mamba", "intermediate_size": 64, "state_size": 8, "conv_kernel": 4, "use_bias": false,
        "use_conv_bias": true, "time_step_rank": 4, "tie_word_embeddings": true}))
}

fn spec(own: &Value) -> ModelSpec {
    let mut config = json!({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5, "vocab_size": 64, "rope_theta": 10000.0, "max_position_embeddings": 512});
    own.as_object().expect("an object").iter().for_each(|(key, value)| config[key] = value.clone());
    read_spec(&config).expect("a valid config")
}

fn numbers(shape: &[u32], seed: u64, size: f32) -> Array {
    let shape: Vec<i32> = shape.iter().map(|dim| *dim as i32).collect();
    let key = mlx_rs::random::key(seed).expect("a key");
    let array = mlx_rs::random::normal::<f32>(&shape, None, None, &key).expect("numbers");
    mlx_rs::ops::multiply(array, Array::from_f32(size)).expect("multiplies")
}

fn weights(spec: &ModelSpec) -> BTreeMap<String, Array> {
    let mut arrays = BTreeMap::new();
    for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
        let (path, seed) = (weight.path().to_owned(), 1 + arrays.len() as u64);
        let mut add = |suffix: &str, shape: &[u32], size| drop(arrays.insert(format!("{path}{suffix}"), numbers(shape, seed, size)));
        match weight {
            Weight::Embedding(table) => add(".weight", &[table.vocab_size, table.dims], 0.5),
            Weight::Linear(linear) => {
                add(".weight", &[linear.output_dims, linear.input_dims], 0.3);
                if linear.bias {
                    add(".bias", &[linear.output_dims], 0.3);
                }
            }
            Weight::Experts(experts) => add(".weight", &[experts.n_experts, experts.output_dims, experts.input_dims], 0.3),
            Weight::Norm(norm) => add(".weight", &[norm.dims], 1.0),
            Weight::Convolution(convolution) => {
                add(".weight", &[convolution.channels, convolution.kernel, 1], 0.3);
                if convolution.bias {
                    add(".bias", &[convolution.channels], 0.3);
                }
            }
            Weight::Tensor(tensor) => add("", &tensor.shape, 0.3),
            Weight::HeadLinear(_) => unreachable!("none of these models has any"),
        }
    }
    arrays
}

/// Factors beside every matrix whose path passes.
fn adapter(spec: &ModelSpec, rank: u32, seed: u64, is_dora: bool, wanted: impl Fn(&str) -> bool) -> BTreeMap<String, Array> {
    let mut tensors = BTreeMap::new();
    for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
        let path = weight.path();
        let (a, b, magnitudes) = match weight {
            Weight::Linear(linear) => (vec![linear.input_dims, rank], vec![rank, linear.output_dims], linear.output_dims),
            Weight::Experts(experts) => {
                let n = experts.n_experts;
                (vec![n, rank, experts.input_dims], vec![n, experts.output_dims, rank], 0)
            }
            Weight::Embedding(table) => (vec![table.vocab_size, rank], vec![rank, table.dims], table.vocab_size),
            _ => continue,
        };
        if !wanted(path) || (is_dora && magnitudes == 0) {
            continue;
        }
        let seed = seed + tensors.len() as u64;
        tensors.insert(format!("{path}.lora_a"), numbers(&a, seed, 0.2));
        tensors.insert(format!("{path}.lora_b"), numbers(&b, seed + 500, 0.2));
        if is_dora {
            let positive = numbers(&[magnitudes], seed + 900, 1.0).abs().expect("positive");
            tensors.insert(format!("{path}.m"), positive);
        }
    }
    assert!(!tensors.is_empty());
    tensors
}

/// Three of different ranks and kinds, on different matrices.
fn adapters(spec: &ModelSpec) -> Vec<(f32, BTreeMap<String, Array>)> {
    vec![
        (2.0, adapter(spec, 4, 1000, false, |_| true)),
        (0.5, adapter(spec, 7, 2000, false, |path| path.contains(".1.") || path.contains("proj"))),
        (1.5, adapter(spec, 2, 3000, true, |path| !path.ends_with("mlp.gate") && !path.contains(".0."))),
    ]
}

fn shard(spec: &ModelSpec) -> Shard {
    let weights = Weights::from_arrays(weights(spec));
    Shard::new(spec, 0..spec.n_layers(), weights, &CacheOptions::default()).expect("builds")
}

fn shard_with(spec: &ModelSpec, adapters: &[(f32, BTreeMap<String, Array>)]) -> Shard {
    let mut shard = shard(spec);
    for (id, (scale, tensors)) in (1..).zip(adapters) {
        let bytes = shard.load_adapter(AdapterId(id), AdapterWeights { scale: *scale, tensors: tensors.clone() }).expect("loads");
        assert!(bytes > 0);
    }
    shard
}

/// A sequence: its adapter, counted from 1, and its prompt.
type Asked = (Option<u64>, Vec<u32>);

/// What comes of them in one batch: the prompt's tokens and four generated ones, with log-probabilities.
fn answers(shard: &mut Shard, asked: &[Asked]) -> Vec<Vec<TokenOut>> {
    let params = SamplingParams { logprobs: Some(5), prompt_logprobs: Some(0), ..SamplingParams::default() };
    let ids = || (0..asked.len() as u64).map(SequenceId);
    let admit =
        |(sequence, (adapter, _)): (SequenceId, &Asked)| Admission { sequence, params: params.clone(), adapter: adapter.map(AdapterId) };
    let mut answers = vec![Vec::new(); asked.len()];
    for number in 0..4u32 {
        let segment = |(sequence, (_, prompt)): (SequenceId, &Asked)| {
            let (start, tokens, prompt_logprobs) = match number {
                0 => (0, prompt.clone(), true),
                _ => (prompt.len() as u32 + number - 1, vec![7 + number], false),
            };
            let tokens = tokens.into_iter().map(Token::Id).collect();
            Segment { sequence, start, tokens, output: Output { sample: Some(number), prompt_logprobs } }
        };
        let admissions = if number == 0 { ids().zip(asked).map(admit).collect() } else { Vec::new() };
        let segments = ids().zip(asked).map(segment).collect();
        let step = Step { epoch: Epoch(1), number: 1 + u64::from(number), admissions, releases: Vec::new(), segments };
        let StepOutput::Result(pending) = shard.apply(&step, None).expect("applies") else { panic!("it is the last stage") };
        for result in pending.read().expect("computes").sequences {
            let tokens = result.prompt.into_iter().flat_map(|(_, tokens)| tokens).chain(result.sampled);
            answers[result.sequence.0 as usize].extend(tokens);
        }
    }
    let releases = ids().collect();
    let over = Step { epoch: Epoch(1), number: 9, admissions: Vec::new(), releases, segments: Vec::new() };
    shard.apply(&over, None).expect("applies");
    answers
}

fn asked() -> Vec<Asked> {
    let prompt = |n: u32, from: u32| (0..n).map(|i| (from + 5 * i) % 60).collect::<Vec<_>>();
    vec![
        (None, prompt(5, 1)),
        (Some(1), prompt(3, 2)),
        (Some(3), prompt(7, 3)),
        (Some(2), prompt(1, 4)),
        (None, prompt(2, 5)),
        (Some(1), prompt(5, 1)),
    ]
}

fn difference(found: &[TokenOut], wanted: &[TokenOut]) -> f32 {
    assert_eq!(found.len(), wanted.len());
    let own = |(a, b): (&TokenOut, &TokenOut)| (a.logprob.unwrap_or(0.0) - b.logprob.unwrap_or(0.0)).abs();
    found.iter().zip(wanted).map(own).fold(0.0, f32::max)
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_rows_of_other_adapters() {
    for spec in [dense(), routed(), recurrent()] {
        let (mut bare, mut shard) = (shard(&spec), shard_with(&spec, &adapters(&spec)));
        let together = answers(&mut shard, &asked());
        for (one, wanted) in asked().into_iter().zip(&together) {
            let alone = answers(&mut shard, std::slice::from_ref(&one)).remove(0);
            assert_eq!(&alone, wanted, "{} with {:?}", spec.model_type, one.0);
            let base = answers(&mut bare, &[(None, one.1)]).remove(0);
            assert_eq!(base == *wanted, one.0.is_none(), "{} with {:?}", spec.model_type, one.0);
        }
    }
}

#[test]
fn served_factors_give_what_trained_ones_do() {
    for spec in [dense(), routed(), recurrent()] {
        let adapters = adapters(&spec);
        let mut served = shard_with(&spec, &adapters);
        for (id, (scale, tensors)) in (1..).zip(&adapters) {
            let adaption = Adaption { scale: *scale, dropout: None };
            let all = weights(&spec).into_iter().chain(tensors.clone());
            let trained = Weights::from_arrays(all).adapted(adaption);
            let mut trained = Shard::new(&spec, 0..spec.n_layers(), trained, &CacheOptions::default()).expect("builds");
            trained.disable_compilation();
            let prompt: Vec<u32> = (3..20).collect();
            let wanted = answers(&mut trained, &[(None, prompt.clone())]).remove(0);
            let found = answers(&mut served, &[(Some(id), prompt)]).remove(0);
            assert!(difference(&found, &wanted) < 2e-5, "{} {id}: {}", spec.model_type, difference(&found, &wanted));
        }
    }
}

#[test]
fn compiled_steps_compute_what_uncompiled_ones_do() {
    for spec in [dense(), routed(), recurrent()] {
        let (mut compiled, mut plain) = (shard_with(&spec, &adapters(&spec)), shard_with(&spec, &adapters(&spec)));
        plain.disable_compilation();
        for (found, wanted) in answers(&mut compiled, &asked()).iter().zip(answers(&mut plain, &asked())) {
            assert!(difference(found, &wanted) < 1e-5, "{}", spec.model_type);
        }
    }
}

#[test]
fn an_adapter_that_is_dropped_stays_until_its_last_sequence_is_released() {
    let spec = dense();
    let mut shard = shard_with(&spec, &adapters(&spec));
    let before = answers(&mut shard, &asked());
    let step = |number, admissions, releases, segments| Step { epoch: Epoch(1), number, admissions, releases, segments };
    let admission = |adapter| Admission { sequence: SequenceId(9), params: SamplingParams::default(), adapter: Some(AdapterId(adapter)) };
    let tokens = vec![Token::Id(1)];
    let segment = Segment { sequence: SequenceId(9), start: 0, tokens, output: Output { sample: Some(0), prompt_logprobs: false } };
    shard.apply(&step(1, vec![admission(1)], Vec::new(), Vec::new()), None).expect("applies");
    shard.drop_adapter(AdapterId(1)).expect("drops");
    shard.apply(&step(2, Vec::new(), Vec::new(), vec![segment]), None).expect("it is still there");
    shard.apply(&step(3, Vec::new(), vec![SequenceId(9)], Vec::new()), None).expect("applies");
    let error = shard.apply(&step(4, vec![admission(1)], Vec::new(), Vec::new()), None).err().expect("it is gone");
    assert!(matches!(error, LmError::UnknownAdapter { adapter: AdapterId(1) }), "{error}");
    // Others moved up, and are what they were.
    let asked: Vec<Asked> = asked().into_iter().filter(|(adapter, _)| *adapter != Some(1)).collect();
    let wanted: Vec<_> = [0, 2, 3, 4].map(|i| before[i].clone()).to_vec();
    for (found, wanted) in answers(&mut shard, &asked).iter().zip(&wanted) {
        assert!(difference(found, wanted) < 1e-5);
    }
    shard.drop_adapter(AdapterId(2)).and_then(|()| shard.drop_adapter(AdapterId(3))).expect("drops");
    assert_eq!(answers(&mut shard, &asked[..1]), before[..1]);
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_nothing_behind() {
    let spec = dense();
    let mut shard = shard_with(&spec, &adapters(&spec)[..1]);
    let before = answers(&mut shard, &asked()[..2]);
    let query = "model.layers.0.self_attn.q_proj";
    let tensor = |suffix: &str, shape: &[u32]| (format!("{query}.{suffix}"), numbers(shape, 1, 1.0));
    let mut refused = |tensors: Vec<(String, Array)>| {
        let weights = AdapterWeights { scale: 1.0, tensors: tensors.into_iter().collect() };
        shard.load_adapter(AdapterId(2), weights).expect_err("refused").to_string()
    };
    let message = refused(vec![tensor("lora_a", &[31, 2]), tensor("lora_b", &[2, 32])]);
    assert!(message.contains(query) && message.contains("[31, 2]"), "{message}");
    let message = refused(vec![tensor("lora_a", &[32, 2])]);
    assert!(message.contains("one of its factors is missing"), "{message}");
    let message = refused(vec![("model.layers.7.x.lora_a".into(), numbers(&[2, 2], 1, 1.0))]);
    assert!(message.contains("model.layers.7.x.lora_a"), "{message}");
    let weights = AdapterWeights { scale: 1.0, tensors: BTreeMap::new() };
    let message = shard.load_adapter(AdapterId(1), weights).expect_err("refused").to_string();
    assert!(message.contains("loaded already"), "{message}");
    assert_eq!(answers(&mut shard, &asked()[..2]), before);
}

#[test]
fn factors_of_narrow_types_are_widened() {
    let spec = dense();
    let (scale, tensors) = adapters(&spec).remove(0);
    let narrow = |(name, array): (&String, &Array)| (name.clone(), array.as_dtype(Dtype::Bfloat16).expect("casts"));
    let narrow: BTreeMap<_, _> = tensors.iter().map(narrow).collect();
    let wide = narrow.iter().map(|(name, array)| (name.clone(), array.as_dtype(Dtype::Float32).expect("casts"))).collect();
    let asked = [(Some(1), vec![1, 2, 3])];
    let found = answers(&mut shard_with(&spec, &[(scale, narrow)]), &asked);
    assert_eq!(found, answers(&mut shard_with(&spec, &[(scale, wide)]), &asked));
}
