//! Each kind against the numbers that mlx-lm's classes give, and what mlx-lm does not promise: independence of the chunks.

use super::*;
use mlx_cluster_common::config::Config;
use mlx_rs::{Dtype, error::Exception, transforms::compile::compile};
use serde_json::{Value, json};

fn initialize(dims: u32, theta: f32, interleaved: bool, scaling: Value, context: u32) -> RopeSpec {
    let scaling = Config::new(&scaling).expect("an object");
    RopeSpec::initialize(dims, theta, interleaved, Some(&scaling), Some(context), "test").expect("valid")
}

/// `[1, 2, length, head_dim]`
fn heads(length: i32, head_dim: i32) -> Array {
    let values: Vec<f32> = (0..2 * length * head_dim).map(|i| ((i * 37) % 101 - 50) as f32 / 64.0).collect();
    Array::from_slice(&values, &[1, 2, length, head_dim])
}

fn offsets(offsets: &[i32]) -> Array {
    Array::from_slice(offsets, &[offsets.len() as i32])
}

fn to_vec(array: &Array) -> Vec<f32> {
    let array = array.as_dtype(Dtype::Float32).expect("cast");
    array.eval().expect("evaluated");
    array.to_vec_exact::<f32>().expect("values")
}

/// Checks, for the offsets 0, 5 and 5000, the second and fourth value of the second head's first token and the third of its last token.
fn check(name: &str, spec: &RopeSpec, head_dim: i32, wanted: [[f32; 3]; 3]) {
    let rope = Rope::new(spec).expect("built");
    let length = if matches!(spec.kind, RopeKind::DynamicNtk { .. }) { 1 } else { 3 };
    for (offset, wanted) in [0, 5, 5000].into_iter().zip(wanted) {
        let rotated = rope.forward(&heads(length, head_dim), &offsets(&[offset])).expect("rotated");
        let values = to_vec(&rotated);
        let (first, last) = ((length * head_dim) as usize, ((2 * length - 1) * head_dim) as usize);
        for (found, wanted) in [values[first + 1], values[first + 3], values[last + 2]].into_iter().zip(wanted) {
            // Single precision holds an angle near 5000 to about 0.0003.
            let tolerance = 1e-5 + offset as f32 * 4e-7;
            assert!((found - wanted).abs() < tolerance, "{name} at {offset}: {found}, mlx-lm has {wanted}");
        }
    }
}

#[test]
fn plain_and_linear_are_those_of_mlx_lm() {
    let plain = |dims, interleaved| RopeSpec::plain(dims, 1e4, interleaved).expect("valid");
    let wanted = [[0.71875, 0.296875, -0.853425], [-0.616776, 0.263649, -1.03289], [0.0472119, -0.00940169, 1.03135]];
    check("plain", &plain(16, false), 16, wanted);
    let wanted = [[0.71875, 0.296875, -0.676485], [0.0690335, 0.125694, -0.459137], [-0.0277649, -0.13082, 0.466623]];
    check("interleaved and partial", &plain(8, true), 16, wanted);
    let wanted = [[0.71875, 0.296875, -0.737325], [0.487993, 0.294574, -0.781711], [-0.893335, 0.347112, -0.615413]];
    check("linear", &initialize(16, 5e5, false, json!({"type": "linear", "factor": 3.0}), 1), 16, wanted);
    let wanted = [[0.71875, 0.296875, -0.764716], [-0.0203278, 0.291486, -0.865879], [-0.674994, -0.322578, -0.995174]];
    check("mrope", &initialize(16, 1e6, false, json!({"type": "mrope", "mrope_section": [2, 3, 3]}), 1), 16, wanted);
}

#[test]
fn llama3_is_that_of_mlx_lm() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192});
    let wanted = [[-0.71875, 0.4375, -0.329119], [0.416293, -0.210244, 0.250772], [0.0237502, 0.581218, -0.0968949]];
    check("llama3", &initialize(128, 5e5, false, scaling, 1), 128, wanted);
    let scaling = json!({"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 3.7});
    let wanted = [[-0.71875, 0.4375, -0.127879], [-0.47358, -0.278812, -0.167173], [-0.389033, 0.131898, -0.473862]];
    check("llama3, interleaved and partial", &initialize(64, 1e4, true, scaling, 1), 128, wanted);
}

#[test]
fn yarn_is_that_of_mlx_lm() {
    let scaling = json!({"rope_type": "yarn", "factor": 32.0, "truncate": false});
    let wanted = [[0.441844, -0.126241, 0.250498], [-0.465668, 0.722051, -0.900269], [-0.0665317, 0.680943, 1.04538]];
    check("yarn", &initialize(64, 150_000.0, false, scaling, 1), 64, wanted);
    let scaling = json!({"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.707});
    let wanted = [[0.64465, 0.186609, -0.751849], [0.166595, 0.0987303, 0.725413], [0.0829467, 0.437279, 0.204472]];
    check("yarn, interleaved and partial", &initialize(64, 1e4, true, scaling, 1), 96, wanted);
    let scaling = json!({"type": "yarn", "factor": 1.6, "mscale": 1.3, "original_max_position_embeddings": 32768});
    let wanted = [[-0.762666, 0.464231, -0.39579], [0.542026, -0.0113552, 0.433548], [-0.102741, -0.455704, 0.398858]];
    check("yarn with mscale", &initialize(128, 8e6, false, scaling, 1), 128, wanted);
    let scaling = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "beta_slow": 0.5, "beta_fast": 3});
    let wanted = [[0.81839, 0.338031, -0.860048], [0.488099, 0.32933, -0.954574], [1.06132, -0.292828, -0.17725]];
    check("yarn with a narrow ramp", &initialize(16, 1e4, false, scaling, 1), 16, wanted);
}

#[test]
fn ntk_is_that_of_mlx_lm() {
    let wanted = [[-0.421875, 0.734375, 0.15625], [0.535585, 0.626804, 0.114649], [0.272259, 0.939084, 0.0888611]];
    check("dynamic", &initialize(16, 1e4, false, json!({"type": "dynamic", "factor": 2.0}), 1024), 16, wanted);
    let wanted = [[-0.375, 0.78125, 0.203125], [-0.705701, -0.795643, 0.136246], [-0.67548, -0.696627, -0.407826]];
    check("dynamic, interleaved and partial", &initialize(64, 5e4, true, json!({"type": "dynamic", "factor": 6.0}), 2048), 128, wanted);
    let alpha = RopeSpec { kind: RopeKind::NtkAlpha { alpha: 1000.0 }, ..RopeSpec::plain(128, 1e4, false).expect("valid") };
    let wanted = [[-0.71875, 0.4375, -0.377737], [0.520943, 0.0120278, 0.423161], [0.680897, 0.119208, 0.346664]];
    check("alpha", &alpha, 128, wanted);
}

#[test]
fn longrope_is_that_of_mlx_lm() {
    let factors: Vec<f64> = (0..8).map(|i| 1.0 + f64::from(i * i) / 16.0).collect();
    let scaling = json!({"type": "longrope", "long_factor": factors, "original_max_position_embeddings": 4096});
    let wanted = [[0.855484, 0.353352, -0.986777], [-0.652186, 0.329, -1.19899], [1.07759, 0.141558, 1.15227]];
    check("longrope", &initialize(16, 1e4, false, scaling, 131_072), 16, wanted);
    let scaling = json!({"type": "su", "long_factor": factors, "original_max_position_embeddings": 32768});
    let wanted = [[0.390625, -0.03125, 0.301827], [0.0528102, -0.0287145, 0.27183], [-0.108292, -0.126593, 0.0432925]];
    check("longrope, partial", &initialize(16, 1e6, true, scaling, 32768), 24, wanted);
}

#[test]
fn proportional_is_that_of_mlx_lm() {
    let scaling = json!({"rope_type": "proportional", "partial_rotary_factor": 0.25});
    let wanted = [[0.0625, -0.359375, -0.0619269], [0.102193, -0.122685, 0.354199], [-0.126929, -0.350794, 0.026875]];
    check("proportional", &initialize(32, 1e6, false, scaling, 1), 32, wanted);
    let scaling = json!({"rope_type": "proportional", "partial_rotary_factor": 0.3, "factor": 1.7});
    let wanted = [[0.0625, -0.359375, -0.369747], [-0.163898, 0.489325, -0.300412], [-0.260295, 0.672403, 0.180677]];
    check("proportional, odd and interleaved", &initialize(32, 1e6, true, scaling, 1), 32, wanted);
}

#[test]
fn chunks_and_other_rows_do_not_change_a_token() {
    let dynamic = json!({"type": "dynamic", "factor": 2.0});
    for interleaved in [false, true] {
        let rope = Rope::new(&initialize(8, 1e4, interleaved, dynamic.clone(), 16)).expect("built");
        let x = heads(40, 12);
        let whole = to_vec(&rope.forward(&x, &offsets(&[0])).expect("rotated"));
        for cut in [1, 15, 16, 17, 39] {
            let parts = x.split_at_indices(&[cut], 2).expect("parts");
            let rotated: Vec<Array> =
                [0, cut].iter().zip(&parts).map(|(offset, part)| rope.forward(part, &offsets(&[*offset])).expect("rotated")).collect();
            assert_eq!(to_vec(&ops::concatenate(&rotated, 2).expect("whole")), whole, "cut at {cut}");
        }
        let rows = ops::concatenate(&[&x, &x], 0).expect("rows");
        let both = to_vec(&rope.forward(&rows, &offsets(&[7, 0])).expect("rotated"));
        let (other, same) = both.split_at(whole.len());
        assert_eq!(same, whole);
        assert_eq!(other, to_vec(&rope.forward(&x, &offsets(&[7])).expect("rotated")));
    }
}

#[test]
fn a_compiled_step_has_the_offsets_of_its_call() {
    let rope = Rope::new(&initialize(8, 1e4, false, json!({"type": "dynamic", "factor": 2.0}), 16)).expect("built");
    let traced = rope.clone();
    let mut step = compile(
        move |inputs: &[Array]| {
            let rotated = traced.forward(&inputs[0], &inputs[1]).map_err(|error| Exception::custom(error.to_string()))?;
            Ok::<_, Exception>(vec![rotated])
        },
        false,
    );
    let x = heads(1, 12);
    for offset in [3, 15, 16, 100] {
        let compiled = to_vec(&step(&[x.clone(), offsets(&[offset])]).expect("rotated")[0]);
        let plain = to_vec(&rope.forward(&x, &offsets(&[offset])).expect("rotated"));
        assert!(compiled.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 1e-4), "{compiled:?} {plain:?}");
    }
}

#[test]
fn the_type_of_the_heads_is_kept() {
    let scaling = json!({"type": "yarn", "factor": 4.0});
    for spec in [initialize(8, 1e4, true, scaling, 1), initialize(8, 1e4, true, json!({"type": "dynamic", "factor": 2.0}), 16)] {
        let rope = Rope::new(&spec).expect("built");
        for dtype in [Dtype::Float16, Dtype::Bfloat16] {
            let x = heads(2, 12).as_dtype(dtype).expect("cast");
            assert_eq!(rope.forward(&x, &offsets(&[20])).expect("rotated").dtype(), dtype);
        }
    }
}
