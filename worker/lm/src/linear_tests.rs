//! Matrices of every scheme beside their dense twins.

use super::*;
use mlx_cluster_common::spec::QuantizationMode;
use mlx_rs::Dtype;

fn schemes() -> Vec<QuantizationScheme> {
    let affine = [2, 3, 4, 5, 6, 8].into_iter().flat_map(|bits| {
        [32, 64, 128].map(|group_size| QuantizationScheme::new(QuantizationMode::Affine, Some(group_size), Some(bits)).expect("allowed"))
    });
    let floats = [QuantizationMode::Mxfp4, QuantizationMode::Nvfp4, QuantizationMode::Mxfp8]
        .map(|mode| QuantizationScheme::new(mode, None, None).expect("allowed"));
    affine.chain(floats).collect()
}

fn numbers(shape: &[i32], seed: u64) -> Array {
    mlx_rs::random::normal::<f32>(shape, None, None, &mlx_rs::random::key(seed).expect("a key")).expect("random numbers")
}

fn quantised(weight: &Array, scheme: QuantizationScheme) -> Matrix {
    let (weight, scales, biases) = ffi::quantize(weight, scheme).expect("quantises");
    Matrix::Quantised { weight, scales, biases, scheme }
}

fn dense(matrix: &Matrix) -> Array {
    let Matrix::Quantised { weight, scales, biases, scheme } = matrix else { panic!("quantised") };
    let whole = Quantised { weight, scales, biases: biases.as_ref(), scheme: *scheme };
    ffi::dequantize(&whole).expect("dequantises").as_dtype(Dtype::Float32).expect("casts")
}

fn assert_close(found: &Array, wanted: &Array, what: &str) {
    assert_eq!(found.shape(), wanted.shape(), "{what}");
    assert!(found.all_close(wanted, 1e-4, 1e-4, None).expect("compares"), "{what}");
}

fn assert_same(found: &Array, wanted: &Array, what: &str) {
    assert_eq!(ffi::array_to_bytes(found).expect("bytes"), ffi::array_to_bytes(wanted).expect("bytes"), "{what}");
}

#[test]
fn shapes_are_those_of_the_scheme() {
    for scheme in schemes() {
        let Matrix::Quantised { weight, scales, biases, .. } = quantised(&numbers(&[8, 256], 1), scheme) else { panic!("quantised") };
        assert_eq!(weight.dim(1) as u64, scheme.packed_columns(256u32).expect("divides"), "{scheme:?}");
        assert_eq!(scales.dim(1) as u64, scheme.groups(256u32).expect("divides"), "{scheme:?}");
        assert_eq!(scales.dtype() == Dtype::Uint8, scheme.scales_are_bytes(), "{scheme:?}");
        assert_eq!(biases.is_some(), scheme.has_biases(), "{scheme:?}");
    }
}

#[test]
fn products_are_those_of_the_dequantised_matrix() {
    let (weight, x) = (numbers(&[64, 256], 1), numbers(&[3, 256], 2));
    for scheme in schemes() {
        let matrix = quantised(&weight, scheme);
        let same = ops::matmul(&x, dense(&matrix).t()).expect("multiplies");
        assert_close(&matrix.apply(&x).expect("multiplies"), &same, &format!("{scheme:?}"));
    }
}

#[test]
fn affine_products_are_bit_for_bit_those_of_mlx_rs() {
    let (weight, x) = (numbers(&[64, 256], 1), numbers(&[3, 256], 2));
    for scheme in schemes().into_iter().filter(|scheme| scheme.mode == QuantizationMode::Affine) {
        let matrix = quantised(&weight, scheme);
        let Matrix::Quantised { weight, scales, biases: Some(biases), .. } = &matrix else { panic!("affine") };
        let (group_size, bits) = (scheme.group_size as i32, scheme.bits as i32);
        let wanted = ops::quantized_matmul(&x, weight, scales, biases, true, group_size, bits).expect("multiplies");
        assert_same(&matrix.apply(&x).expect("multiplies"), &wanted, &format!("{scheme:?}"));
    }
}

#[test]
fn rows_are_those_of_the_dequantised_matrix() {
    let (weight, ids) = (numbers(&[64, 256], 1), Array::from_slice(&[5u32, 0, 63], &[1, 3]));
    for scheme in schemes() {
        let matrix = quantised(&weight, scheme);
        let rows = matrix.rows(&ids).expect("rows");
        assert_eq!(rows.dtype() == Dtype::Bfloat16, scheme.scales_are_bytes(), "{scheme:?}");
        let wanted = dense(&matrix).take_axis(&ids, 0).expect("rows");
        assert_same(&rows.as_dtype(Dtype::Float32).expect("casts"), &wanted, &format!("{scheme:?}"));
    }
}

fn experts_of(matrix: Matrix, bias: Option<Array>) -> Experts {
    Experts { matrix, bias, low_rank: None, site: Site::of(&Weights::default(), "experts"), stacks: None }
}

#[test]
fn experts_add_the_bias_of_each() {
    let (weight, bias) = (numbers(&[4, 64, 256], 1), numbers(&[4, 64], 2));
    let (x, indices) = (numbers(&[1, 2, 1, 1, 256], 3), Array::from_slice(&[3u32, 1, 0, 3], &[1, 2, 2]));
    for scheme in schemes() {
        let experts = experts_of(quantised(&weight, scheme), Some(bias.clone()));
        let found = experts.forward(&x, &indices, false).expect("multiplies");
        let plain = experts_of(Matrix::Dense { weight: dense(&experts.matrix) }, None);
        let own = bias.take_axis(&indices, 0).and_then(|own| own.expand_dims(-2)).expect("biases");
        let wanted = ops::add(plain.forward(&x, &indices, false).expect("multiplies"), own).expect("adds");
        assert_eq!(found.shape(), [1, 2, 2, 1, 64]);
        assert_close(&found, &wanted, &format!("{scheme:?}"));
    }
}

#[test]
fn heads_multiply_in_both_directions() {
    let weight = numbers(&[2, 64, 256], 1);
    for scheme in schemes() {
        let heads = HeadLinear { matrix: quantised(&weight, scheme) };
        let plain = HeadLinear { matrix: Matrix::Dense { weight: dense(&heads.matrix) } };
        for (transpose, input, output) in [(true, 256, 64), (false, 64, 256)] {
            let x = numbers(&[1, 2, 3, input], 2);
            let found = heads.forward(&x, transpose).expect("multiplies");
            assert_eq!(found.shape(), [1, 2, 3, output]);
            assert_close(&found, &plain.forward(&x, transpose).expect("multiplies"), &format!("{scheme:?} {transpose}"));
        }
    }
}

#[test]
fn loading_takes_what_the_scheme_has() {
    let mxfp4 = QuantizationScheme::new(QuantizationMode::Mxfp4, None, None).expect("allowed");
    for (scheme, parameters) in [(mxfp4, 3), (schemes()[0], 4)] {
        let (weight, scales, biases) = ffi::quantize(&numbers(&[64, 256], 1), scheme).expect("quantises");
        let arrays = [("weight", Some(weight)), ("scales", Some(scales)), ("biases", biases), ("bias", Some(numbers(&[64], 2)))];
        let arrays = arrays.into_iter().filter_map(|(suffix, array)| Some((format!("a.{suffix}"), array?)));
        let mut weights = Weights::from_arrays(arrays);
        let spec = LinearSpec { path: "a".into(), input_dims: 256, output_dims: 64, bias: true };
        let quantization = Quantization { default: Some(scheme), ..Quantization::default() };
        let linear = Linear::load(&mut weights, &spec, &quantization).expect("loads");
        weights.finish().expect("nothing is left");
        let mut count = 0;
        linear.each(&mut |_| count += 1);
        assert_eq!(count, parameters);
    }
}

#[test]
fn a_misshapen_matrix_is_an_error_with_its_shapes() {
    let matrix = quantised(&numbers(&[64, 256], 1), schemes()[0]);
    let error = matrix.apply(&numbers(&[3, 128], 2)).expect_err("refused").to_string();
    assert!(error.contains("[3, 128]") && error.contains("[64, 16]"), "{error}");
}
