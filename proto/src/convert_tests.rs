//! What goes over the wire comes out as it went in, or is refused.

use super::*;
use mlx_cluster_common::training::{Decay, FineTune, LoraParameters, Optimizer, Parallel, Schedule, Warmup};

fn step() -> Step {
    let segment = |sequence, tokens: Vec<Token>, sample| Segment {
        sequence: SequenceId(sequence),
        start: 3,
        tokens,
        output: Output { sample, prompt_logprobs: sequence == 1 },
    };
    Step {
        epoch: Epoch(4),
        number: 9,
        admissions: vec![Admission {
            sequence: SequenceId(1),
            params: SamplingParams { logit_bias: vec![(3, -1.5)], logprobs: Some(2), ..Default::default() },
            adapter: Some(AdapterId(7)),
        }],
        releases: vec![SequenceId(7)],
        segments: vec![segment(1, vec![Token::Id(5), Token::Id(6)], None), segment(2, vec![Token::Previous], Some(8))],
    }
}

#[test]
fn a_step_survives_the_wire() {
    let tensor = wire::Tensor { name: "hidden".into(), dtype: "F32".into(), shape: vec![3, 2], data: vec![1u8; 24].into() };
    let frame = wire::StepFrame::new(step(), vec![tensor.clone()]);
    assert_eq!(frame.into_step(), Ok((step(), vec![tensor])));
}

/// With numbers that decimal digits do not hold exactly.
fn role() -> TrainingRole {
    let keys = Some(["self_attn.q_proj".to_owned()].into());
    TrainingRole {
        fine_tune: FineTune::Dora(LoraParameters { rank: 8, scale: 0.1, dropout: 1.0 / 3.0, keys }),
        num_layers: Some(4),
        optimizer: Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false },
        schedule: Schedule { warmup: Some(Warmup { init: 0.1 + 0.2, steps: 7 }), decay: Decay::Cosine { init: 1e-5, steps: 9, end: 0.0 } },
        seed: u64::MAX,
        grad_checkpoint: true,
        clear_cache_threshold: Bytes(3),
        parallel: Parallel::Data,
    }
}

#[test]
fn an_engine_survives_the_wire() {
    let quantization = KvQuantization::new(4, Some(32), Some(100)).expect("allowed");
    let spec = EngineSpec {
        id: EngineId("a".into()),
        model: ModelSource::Folder("/model".into()),
        fingerprint: 1,
        stage: 1,
        n_stages: 2,
        layers: 3..5,
        place: TensorPlace { rank: 1, shares: vec![2, 1] },
        collective: Collective::Ring,
        context_tokens: 4096,
        cache_tokens: 8192,
        memory: Bytes(7),
        caches: CacheOptions { quantization: Some(quantization), max_kv_size: Some(64) },
        reservation: CacheReservation { held_max: 64, plain_tokens: 100, plain_percent: 356 },
        sequences: 16,
        weight_peers: vec![WeightPeer { node: "n".into(), name: "mini".into(), addresses: vec!["10.0.0.1:7".into()], layers: 3..5 }],
        training: None,
    };
    assert_eq!(EngineSpec::try_from(wire::EngineSpec::from(spec.clone())), Ok(spec.clone()));
    let trains = EngineSpec { training: Some(role()), ..spec };
    let wire = wire::EngineSpec::from(trains.clone());
    assert_eq!(EngineSpec::try_from(wire.clone()), Ok(trains));
    let garbled = wire::EngineSpec { training_json: Some(r#"{"seed": 1}"#.into()), ..wire };
    let message = EngineSpec::try_from(garbled).expect_err("no role").to_string();
    assert!(message.contains("training_json") && message.contains("fine_tune"), "{message}");
}

#[test]
fn a_result_survives_the_wire() {
    let token = TokenOut { id: 3, logprob: Some(-0.5), top: vec![(3, -0.5), (4, -2.0)] };
    let result = StepResult {
        epoch: Epoch(1),
        number: 2,
        sequences: vec![SegmentResult { sequence: SequenceId(1), sampled: Some(token.clone()), prompt: Some((4, vec![token])) }],
    };
    assert_eq!(StepResult::from(wire::StepResult::from(result.clone())), result);
}

#[test]
fn another_version_and_another_cluster_are_refused_with_both_named() {
    let hello = wire::Hello { protocol: 99, version: "9.0".into(), ..wire::Hello::new("home", &"n".into(), "mini") };
    let message = hello.check("home").expect_err("too new").to_string();
    assert!(message.contains("mini") && message.contains("9.0") && message.contains(VERSION), "{message}");
    let hello = wire::Hello::new("office", &"n".into(), "mini");
    assert!(hello.check("home").expect_err("elsewhere").to_string().contains("office"));
}
