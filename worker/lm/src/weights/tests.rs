//! Every kind of recipe on small tensors, read from a file as an engine does it.

use super::*;
use mlx_cluster_common::{
    dtype::DType,
    published::{Affine, QuantisedTensors, SymbolicTensor},
    weights::{Parameter, TensorEntry},
};
use mlx_rs::{Dtype, ops};
use serde_json::json;

/// A file of tensors, removed with this.
struct Checkpoint {
    folder: std::path::PathBuf,
    index: WeightIndex,
}

impl Checkpoint {
    /// Tensors by name, with the type that the header says and their bytes.
    fn new(test: &str, tensors: &[(&str, &str, &[u64], Vec<u8>)]) -> Self {
        let folder = std::env::temp_dir().join(format!("mlx-cluster-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let (mut header, mut data, mut index) = (serde_json::Map::new(), Vec::new(), WeightIndex::default());
        for (name, dtype, shape, bytes) in tensors {
            header
                .insert(name.to_string(), json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), data.len() + bytes.len()]}));
            data.extend(bytes);
            let dtype = DType::from_safetensors(dtype).expect("known");
            let entry = TensorEntry { file: "model.safetensors".into(), dtype, shape: shape.to_vec(), bytes: bytes.len() as u64 };
            index.tensors.insert(name.to_string(), entry);
        }
        let header = serde_json::to_vec(&header).expect("JSON");
        let file = [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat();
        std::fs::write(folder.join("model.safetensors"), file).expect("written");
        Self { folder, index }
    }

    fn tensor(&self, name: &str) -> SymbolicTensor {
        let entry = &self.index.tensors[name];
        SymbolicTensor::of_checkpoint(name, entry.dtype, entry.shape.clone())
    }

    /// Loads parameters of these names and recipes, which also compares types and shapes with what was planned.
    fn load(&self, parameters: &[(&str, SymbolicTensor)]) -> Weights {
        let parameter = |(name, tensor): &(&str, SymbolicTensor)| Parameter {
            name: name.to_string(),
            recipe: tensor.recipe.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            bytes: tensor.bytes(),
            transient_bytes: tensor.transient_bytes,
        };
        let parts = BTreeMap::from([(Part::Embedding, parameters.iter().map(parameter).collect())]);
        let map = WeightMap { parts, activation_dtype: None };
        Weights::load(&self.folder, &self.index, &map, &[Part::Embedding], |_| {}).expect("loads")
    }

    fn numbers(&self, tensor: Result<SymbolicTensor, mlx_cluster_common::published::PublishedError>) -> Vec<f32> {
        let array = self.load(&[("a", tensor.expect("valid"))]).take("a").expect("there");
        floats(&array)
    }
}

impl Drop for Checkpoint {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.folder).ok();
    }
}

fn floats(array: &Array) -> Vec<f32> {
    let array = array.as_dtype(Dtype::Float32).expect("numbers");
    array.eval().expect("evaluates");
    array.as_slice::<f32>().to_vec()
}

fn f32_bytes(numbers: impl IntoIterator<Item = f32>) -> Vec<u8> {
    numbers.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// `x` is `[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]`, `y` the same plus 100.
fn small() -> Checkpoint {
    let x = f32_bytes((0..12).map(|i| i as f32));
    let y = f32_bytes((100..112).map(|i| i as f32));
    let name = format!("small-{:?}", std::thread::current().id());
    Checkpoint::new(&name, &[("x", "F32", &[3, 4], x), ("y", "F32", &[3, 4], y)])
}

#[test]
fn tensors_are_moved_about() {
    let file = small();
    let (x, y) = (file.tensor("x"), file.tensor("y"));
    let range = |from: usize, to: usize| (from..to).map(|i| i as f32).collect::<Vec<_>>();
    assert_eq!(file.numbers(Ok(x.clone())), range(0, 12));
    assert_eq!(file.numbers(SymbolicTensor::stack(vec![x.clone(), y.clone()])), [range(0, 12), range(100, 112)].concat());
    let beside = SymbolicTensor::concatenate(vec![x.clone(), y.clone()], 1);
    assert_eq!(file.numbers(beside)[..8], [0.0, 1.0, 2.0, 3.0, 100.0, 101.0, 102.0, 103.0]);
    assert_eq!(file.numbers(x.clone().slice(0, 1, 3)), range(4, 12));
    assert_eq!(file.numbers(x.clone().slice(1, 1, 3)), [1.0, 2.0, 5.0, 6.0, 9.0, 10.0]);
    assert_eq!(file.numbers(x.clone().every(-1, 1, 2)), [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]);
    assert_eq!(file.numbers(x.clone().every(0, 0, 2)), [range(0, 4), range(8, 12)].concat());
    assert_eq!(file.numbers(x.clone().reshape(&[2, 6])), range(0, 12));
    assert_eq!(file.numbers(x.clone().swap_last_axes())[..6], [0.0, 4.0, 8.0, 1.0, 5.0, 9.0]);
    let turned = x.clone().reshape(&[3, 2, 2]).and_then(|x| x.transpose(&[2, 0, 1]));
    assert_eq!(file.numbers(turned)[..6], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
    let halves = SymbolicTensor::stack(vec![x.clone().slice(0, 0, 1).expect("valid"), y.slice(0, 2, 3).expect("valid")]);
    assert_eq!(file.numbers(halves), [range(0, 4), range(108, 112)].concat());
}

#[test]
fn numbers_are_changed_in_their_own_type() {
    let file = small();
    let x = file.tensor("x");
    assert_eq!(file.numbers(x.clone().plus(1.0))[..3], [1.0, 2.0, 3.0]);
    assert_eq!(file.numbers(x.clone().scale(-8.0))[..3], [0.0, -8.0, -16.0]);
    assert_eq!(file.numbers(x.clone().scale_rows(&[(1, 2.0), (2, 10.0)]))[2..6], [4.0, 6.0, 40.0, 50.0]);
    let normed = file.numbers(x.normalise_columns(1e-7));
    assert!((normed[4] - 4.0 / 80f32.sqrt()).abs() < 1e-6 && normed[0] == 0.0, "{normed:?}");
    let file = Checkpoint::new("bf16", &[("x", "BF16", &[2, 1], vec![0x80, 0x3f, 0x00, 0x40])]);
    assert_eq!(file.numbers(file.tensor("x").plus(1.0)), [2.0, 3.0]);
    assert_eq!(file.numbers(file.tensor("x").scale(0.5)), [0.5, 1.0]);
    assert_eq!(file.numbers(file.tensor("x").scale_rows(&[(1, 4.0), (1, 1.0)])), [4.0, 2.0]);
}

#[test]
fn bytes_are_words() {
    let words = [7u32, 0xdead_beef, 1 << 31];
    let bytes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let file = Checkpoint::new("words", &[("x", "U8", &[3, 1, 4], bytes), ("e", "F8_E8M0", &[2], vec![127, 128])]);
    let viewed = file.tensor("x").view(DType::U32).and_then(|x| x.reshape(&[3])).expect("valid");
    let mut weights = file.load(&[("x", viewed), ("e", file.tensor("e"))]);
    assert_eq!(weights.take("x").expect("there").as_slice::<u32>(), words);
    assert_eq!(weights.take("e").expect("there").as_slice::<u8>(), [127, 128]);
}

#[test]
fn eight_bit_floats_are_scaled_by_blocks_tensors_or_experts() {
    // 0x38 is 1, 0x40 is 2, 0xc4 is -3 in e4m3.
    let weight: Vec<u8> = (0..15).map(|i| [0x38, 0x40, 0xc4][i % 3]).collect();
    let file = Checkpoint::new(
        "fp8",
        &[
            ("w", "F8_E4M3", &[5, 3], weight.clone()),
            ("blocks", "F32", &[3, 2], f32_bytes([1.0, 10.0, 2.0, 20.0, 4.0, 40.0])),
            ("one", "F32", &[], f32_bytes([0.5])),
            ("stack", "F8_E4M3", &[5, 1, 3], weight),
            ("each", "F32", &[5, 1, 1], f32_bytes([1.0, 2.0, 3.0, 4.0, 5.0])),
        ],
    );
    let scaled = |weight: &str, scales: &str, block| file.numbers(file.tensor(weight).dequantise_fp8(file.tensor(scales), block));
    let blocks = [1.0, 2.0, -30.0, 1.0, 2.0, -30.0, 2.0, 4.0, -60.0, 2.0, 4.0, -60.0, 4.0, 8.0, -120.0];
    assert_eq!(scaled("w", "blocks", Some([2, 2])), blocks);
    assert_eq!(scaled("w", "one", None)[..3], [0.5, 1.0, -1.5]);
    assert_eq!(scaled("stack", "each", None)[9..], [4.0, 8.0, -12.0, 5.0, 10.0, -15.0]);
}

#[test]
fn quantising_again_keeps_what_a_group_can_say() {
    let numbers: Vec<f32> = (0..4 * 64).map(|i| ((i * 7) % 16) as f32 - 8.0).collect();
    let matrix = Array::from_slice(&numbers, &[4, 64]);
    let (weight, scales, biases) = ops::quantize(&matrix, 32, 4).expect("quantised");
    let bytes = |array: &Array| ffi::array_to_bytes(array).expect("bytes");
    let file = Checkpoint::new(
        "affine",
        &[
            ("weight", "U32", &[4, 8], bytes(&weight)),
            ("scales", "F32", &[4, 2], bytes(&scales)),
            ("biases", "F32", &[4, 2], bytes(&biases)),
        ],
    );
    let quantised = QuantisedTensors { weight: file.tensor("weight"), scales: file.tensor("scales"), biases: file.tensor("biases") };
    let dense = quantised.dequantise(64).expect("valid");
    let found = file.numbers(Ok(dense.clone()));
    assert!(found.iter().zip(&numbers).all(|(found, wanted)| (found - wanted).abs() < 1e-5), "{found:?}");
    let again = dense.quantise(Affine { group_size: 32, bits: 4 }).expect("valid");
    let mut weights = file.load(&[("w", again.weight), ("s", again.scales), ("b", again.biases)]);
    let mut take = |name: &str| weights.take(name).expect("there");
    let back = ops::dequantize(take("w"), take("s"), &take("b"), 32, 4).expect("dense");
    assert!(floats(&back).iter().zip(&numbers).all(|(found, wanted)| (found - wanted).abs() < 1e-5));
}

#[test]
fn a_piece_does_not_hold_the_whole() {
    let rows = 2048u64;
    let file = Checkpoint::new("halves", &[("x", "F32", &[rows, 1024], f32_bytes((0..rows * 1024).map(|i| i as f32)))]);
    let pieces = file.tensor("x").split(0, &[rows / 4, 3 * rows / 4]).expect("valid");
    let before = memory::active_memory().expect("counted");
    let mut weights = file.load(&[("first", pieces[0].clone()), ("second", pieces[1].clone())]);
    let (first, second) = (weights.take("first").expect("there"), weights.take("second").expect("there"));
    assert_eq!(floats(&second)[0], (rows / 4 * 1024) as f32);
    drop(second);
    // Other tests of this process take a little meanwhile.
    let held = memory::active_memory().expect("counted").saturating_sub(before);
    assert!(held < 2 * first.nbytes(), "{held} bytes for {}", first.nbytes());
}

#[test]
fn a_stack_is_not_there_twice_while_it_is_made() {
    let member = vec![0x38u8; 1 << 19];
    let names: Vec<_> = (0..16).map(|i| format!("{i}")).collect();
    let list: Vec<_> = names.iter().map(|name| (name.as_str(), "F8_E4M3", &[1024u64, 512][..], member.clone())).collect();
    let scale = [("scale", "F32", &[][..], f32_bytes([2.0]))];
    let file = Checkpoint::new("stack", &[list, scale.to_vec()].concat());
    let experts = names.iter().map(|name| file.tensor(name).dequantise_fp8(file.tensor("scale"), None).expect("valid")).collect();
    let stack = SymbolicTensor::stack(experts).expect("valid");
    let (bytes, transient_bytes) = (stack.bytes() as usize, stack.transient_bytes as usize);
    let before = memory::active_memory().expect("counted");
    memory::reset_peak_memory().expect("reset");
    let made = file.load(&[("a", stack)]).take("a").expect("there");
    let peak = memory::peak_memory().expect("counted").saturating_sub(before);
    assert!(floats(&made).iter().all(|number| *number == 2.0));
    assert!(peak < bytes + transient_bytes && transient_bytes < bytes / 2, "{peak} bytes for {bytes} and {transient_bytes}");
}
