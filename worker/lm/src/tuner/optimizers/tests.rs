//! Updates that go on from a file as if nothing had been, and state that does not fit.

use super::*;
use crate::ffi::{array_from_bytes, array_to_bytes, from_mlx};
use mlx_cluster_common::{
    dtype::DType,
    training::{Decay, Warmup, optimizer::Adafactor},
};
use mlx_rs::random;
use safetensors::{Dtype as FileDtype, SafeTensors, tensor::TensorView};

type Arrays = BTreeMap<String, Array>;

fn optimizers() -> Vec<Optimizer> {
    let adafactor = |beta_1| Adafactor {
        eps: [1e-30, 1e-3],
        clip_threshold: 0.5,
        decay_rate: -0.8,
        beta_1,
        weight_decay: 0.1,
        scale_parameter: true,
        relative_step: false,
        warmup_init: false,
    };
    vec![
        Optimizer::Adam { betas: [0.8, 0.95], eps: 1e-6, bias_correction: true },
        Optimizer::AdamW { betas: [0.8, 0.95], eps: 1e-6, weight_decay: 0.2, bias_correction: false },
        Optimizer::Sgd { momentum: 0.0, weight_decay: 0.1, dampening: 0.0, nesterov: false },
        Optimizer::Sgd { momentum: 0.9, weight_decay: 0.1, dampening: 0.0, nesterov: true },
        Optimizer::Adafactor(adafactor(None)),
        Optimizer::Adafactor(adafactor(Some(0.9))),
        Optimizer::Muon { momentum: 0.9, weight_decay: 0.1, nesterov: true, ns_steps: 5 },
    ]
}

fn schedule() -> Schedule {
    Schedule { warmup: Some(Warmup { init: 1e-4, steps: 3 }), decay: Decay::Cosine { init: 0.05, steps: 8, end: 1e-3 } }
}

fn draw(seed: u64) -> Arrays {
    let shapes: [(&str, &[i32], Dtype); 5] = [
        ("a.lora_a", &[6, 4], Dtype::Float32),
        ("a.lora_b", &[4, 9], Dtype::Bfloat16),
        ("b.stack", &[3, 5, 2], Dtype::Float32),
        ("b.weight", &[8], Dtype::Bfloat16),
        ("b.scale", &[], Dtype::Float32),
    ];
    let draw = |(i, (name, shape, dtype)): (usize, &(&str, &[i32], Dtype))| {
        let key = random::key(seed * 100 + i as u64).expect("key");
        let array = random::normal::<f32>(*shape, None, None, &key).expect("draws").as_dtype(*dtype).expect("casts");
        ((*name).to_owned(), array)
    };
    shapes.iter().enumerate().map(draw).collect()
}

fn train(updates: &mut Updates, mut parameters: Arrays, steps: std::ops::Range<u64>) -> Arrays {
    for step in steps {
        parameters = updates.apply(&parameters, &draw(step + 1)).expect("updates");
        mlx_rs::transforms::eval(parameters.values().chain(updates.arrays())).expect("evaluates");
    }
    parameters
}

fn bytes(arrays: &Arrays) -> BTreeMap<String, Vec<u8>> {
    arrays.iter().map(|(name, array)| (name.clone(), array_to_bytes(array).expect("evaluates"))).collect()
}

/// Through the bytes of a file.
fn filed(arrays: &Arrays) -> Arrays {
    let data = bytes(arrays);
    let view = |(name, array): (&String, &Array)| {
        let dtype = match array.dtype() {
            Dtype::Float32 => FileDtype::F32,
            _ => FileDtype::BF16,
        };
        (name.clone(), TensorView::new(dtype, array.shape().iter().map(|dim| *dim as usize).collect(), &data[name]).expect("fits"))
    };
    let file = safetensors::serialize(arrays.iter().map(view), None).expect("serialises");
    let read = SafeTensors::deserialize(&file).expect("reads");
    let array = |(name, view): (String, TensorView<'_>)| {
        let shape: Vec<i32> = view.shape().iter().map(|dim| *dim as i32).collect();
        let dtype = if view.dtype() == FileDtype::F32 { DType::F32 } else { DType::BF16 };
        (name, array_from_bytes(view.data(), &shape, dtype).expect("fits"))
    };
    read.tensors().into_iter().map(array).collect()
}

#[test]
fn five_updates_a_restart_and_five_more_are_ten() {
    for optimizer in optimizers() {
        let name = format!("{optimizer:?}");
        let mut straight = Updates::new(optimizer.clone(), schedule(), &draw(0)).expect("makes");
        let wanted = train(&mut straight, draw(0), 0..10);
        let mut before = Updates::new(optimizer.clone(), schedule(), &draw(0)).expect("makes");
        let halfway = filed(&train(&mut before, draw(0), 0..5));
        let mut after = Updates::new(optimizer, schedule(), &halfway).expect("makes");
        after.restore(before.step(), filed(&before.save())).expect("restores");
        assert_eq!(after.learning_rate(), before.learning_rate(), "{name}");
        let parameters = train(&mut after, halfway, 5..10);
        assert_eq!(bytes(&parameters), bytes(&wanted), "{name}");
        assert_eq!(bytes(&after.save()), bytes(&straight.save()), "{name}");
        assert_eq!((after.step(), after.learning_rate()), (10, schedule().at(9)), "{name}");
        assert_ne!(bytes(&wanted), bytes(&draw(0)), "{name}");
    }
}

#[test]
fn what_is_saved_is_as_large_as_planned() {
    for optimizer in optimizers() {
        let updates = Updates::new(optimizer.clone(), schedule(), &draw(0)).expect("makes");
        let dims = |array: &Array| array.shape().iter().map(|dim| *dim as u64).collect::<Vec<_>>();
        let planned: u64 = draw(0).values().map(|array| optimizer.state_numbers(&dims(array))).sum();
        assert_eq!(updates.arrays().map(|array| array.size() as u64).sum::<u64>(), planned, "{optimizer:?}");
        assert!(updates.save().values().all(|array| from_mlx(array.dtype()).is_some()));
    }
}

#[test]
fn state_that_does_not_fit_is_named() {
    let optimizer = Optimizer::Adam { betas: [0.9, 0.999], eps: 1e-8, bias_correction: false };
    let mut updates = Updates::new(optimizer, schedule(), &draw(0)).expect("makes");
    let good = updates.save();
    let mut refused = |change: &dyn Fn(&mut Arrays)| {
        let mut arrays = good.clone();
        change(&mut arrays);
        updates.restore(3, arrays).expect_err("does not fit").to_string()
    };
    let missing = refused(&|arrays| drop(arrays.remove("a.lora_a.v")));
    assert!(missing.contains("`a.lora_a.v` is missing, needed is Float32 [6, 4]"), "{missing}");
    let unknown = refused(&|arrays| drop(arrays.insert("c.m".into(), Array::from_f32(0.0))));
    assert!(unknown.contains("`c.m` is Float32 [], needed is nothing of that name"), "{unknown}");
    let misshapen = refused(&|arrays| drop(arrays.insert("b.weight.m".into(), Array::from_f32(0.0))));
    assert!(misshapen.contains("`b.weight.m` is Float32 [], needed is Bfloat16 [8]"), "{misshapen}");
    assert_eq!(updates.step(), 0);
}

#[test]
fn gradients_that_do_not_fit_are_named() {
    let optimizer = Optimizer::Sgd { momentum: 0.9, weight_decay: 0.0, dampening: 0.0, nesterov: false };
    let mut updates = Updates::new(optimizer, schedule(), &draw(0)).expect("makes");
    let mut gradients = draw(1);
    gradients.remove("b.stack");
    let missing = updates.apply(&draw(0), &gradients).expect_err("one is missing").to_string();
    assert!(missing.contains("update 1: `b.stack` is missing, needed is Float32 [3, 5, 2]"), "{missing}");
    gradients.insert("b.stack".into(), Array::from_f32(1.0));
    let misshapen = updates.apply(&draw(0), &gradients).expect_err("a scalar").to_string();
    assert!(misshapen.contains("`b.stack` is Float32 []"), "{misshapen}");
    assert_eq!(updates.step(), 0);
}
