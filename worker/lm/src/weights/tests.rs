//! Every kind of recipe on small tensors, read from a file as an engine does it.

// Lists of one range are meant.
#![allow(clippy::single_range_in_vec_init)]

use super::*;
use mlx_cluster_common::{
    dtype::DType,
    published::{Affine, QuantisedTensors, SymbolicTensor},
    weights::{Parameter, TensorEntry},
};
use mlx_rs::{Dtype, ops};
use serde_json::json;
use std::ops::Range;

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
            let offset = (data.len() - bytes.len()) as u64;
            let entry = TensorEntry { file: "model.safetensors".into(), dtype, shape: shape.to_vec(), offset, bytes: bytes.len() as u64 };
            index.tensors.insert(name.to_string(), entry);
        }
        let header = serde_json::to_vec(&header).expect("JSON");
        index.tensors.values_mut().for_each(|entry| entry.offset += 8 + header.len() as u64);
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

/// MLX counts memory for the whole process, so what measures it takes turns.
static MEASURING: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[test]
fn a_piece_does_not_hold_the_whole() {
    let _turn = MEASURING.lock();
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
    let _turn = MEASURING.lock();
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

/// `[rows, columns]` of the numbers 0, 1, 2, ...
fn counted(test: &str, rows: u64, columns: u64) -> Checkpoint {
    Checkpoint::new(test, &[("x", "F32", &[rows, columns], f32_bytes((0..rows * columns).map(|i| i as f32)))])
}

/// What the entries of both axes are in `counted`.
fn picked(rows: &[Range<u64>], columns: &[Range<u64>], width: u64) -> Vec<f32> {
    let columns: Vec<u64> = columns.iter().cloned().flatten().collect();
    rows.iter().cloned().flatten().flat_map(|row| columns.iter().map(move |column| (row * width + column) as f32)).collect()
}

#[test]
fn selections_read_what_they_need() {
    // Rows of 6,000 numbers, so that columns are read one by one, or, where they are near one another, in blocks.
    let (rows, width) = (700, 6000);
    let file = counted("selections", rows, width);
    let all = |dim: u64| vec![0..dim];
    let cases = [
        (vec![100..350], all(width), 1.0),
        (vec![500..700, 3..4, 10..20], all(width), 1.0),
        (all(rows), vec![0..3000], 2.0),
        (all(rows), vec![3000..6000], 2.0),
        (all(rows), vec![5..1005, 4000..5000], 2.0),
        (all(rows), vec![5990..6000], 1.0),
        (vec![1..2, 40..640], vec![7..4007], 2.0),
    ];
    for (rows, columns, most) in cases {
        let x = file.tensor("x").select(0, &rows).and_then(|x| x.select(1, &columns)).expect("inside");
        let bytes = x.bytes();
        let mut weights = file.load(&[("a", x)]);
        assert!(floats(&weights.take("a").expect("there")) == picked(&rows, &columns, width), "{rows:?} {columns:?}");
        let read = weights.bytes_read() as f64 / bytes as f64;
        assert!((1.0..=most).contains(&read), "{rows:?} {columns:?}: {read}");
    }
}

#[test]
fn parts_are_put_side_by_side_as_they_are_read() {
    let file = small();
    let (x, y) = (file.tensor("x"), file.tensor("y"));
    let left = |tensor: &SymbolicTensor| tensor.clone().slice(1, 0, 2).expect("inside");
    let wide = SymbolicTensor::concatenate(vec![left(&x), y.clone().every(1, 1, 2).expect("inside")], 1).expect("fits");
    assert_eq!(file.numbers(Ok(wide.clone()))[..8], [0.0, 1.0, 101.0, 103.0, 4.0, 5.0, 105.0, 107.0]);
    let stack = SymbolicTensor::stack(vec![wide.clone(), wide]).and_then(|stack| stack.select(2, &[3..4, 0..1]));
    assert_eq!(file.numbers(stack)[..6], [103.0, 0.0, 107.0, 4.0, 111.0, 8.0]);
    assert_eq!(file.load(&[("x", x), ("half", left(&y))]).bytes_read(), 48 + 40);
}

#[test]
fn quantised_columns_are_cut_at_groups() {
    let numbers: Vec<f32> = (0..6 * 128).map(|i| ((i * 5) % 23) as f32 / 4.0).collect();
    let (weight, scales, biases) = ops::quantize(Array::from_slice(&numbers, &[6, 128]), 32, 4).expect("quantised");
    let bytes = |array: &Array| ffi::array_to_bytes(array).expect("bytes");
    let file = Checkpoint::new(
        "affine-columns",
        &[
            ("weight", "U32", &[6, 16], bytes(&weight)),
            ("scales", "F32", &[6, 4], bytes(&scales)),
            ("biases", "F32", &[6, 4], bytes(&biases)),
        ],
    );
    let own = |name: &str, ranges: &[Range<u64>]| file.tensor(name).select(1, ranges).expect("inside");
    let groups = [3..4, 0..2];
    let mut weights = file.load(&[("w", own("weight", &[12..16, 0..8])), ("s", own("scales", &groups)), ("b", own("biases", &groups))]);
    let mut take = |name: &str| weights.take(name).expect("there");
    let own = floats(&ops::dequantize(take("w"), take("s"), &take("b"), 32, 4).expect("dense"));
    let whole = floats(&ops::dequantize(&weight, &scales, &biases, 32, 4).expect("dense"));
    let wanted = whole.chunks(128).flat_map(|row| row[96..].iter().chain(&row[..64]).copied().collect::<Vec<_>>());
    assert_eq!(own, wanted.collect::<Vec<_>>());
}

#[test]
fn a_file_that_is_another_since_is_named() {
    let file = small();
    let path = file.folder.join("model.safetensors");
    let load = || {
        let parameter = Parameter::new("a".into(), file.tensor("x"));
        let map = WeightMap { parts: BTreeMap::from([(Part::Embedding, vec![parameter])]), activation_dtype: None };
        Weights::load(&file.folder, &file.index, &map, &[Part::Embedding], |_| {}).expect_err("refused").to_string()
    };
    let bytes = std::fs::read(&path).expect("there");
    std::fs::write(&path, &bytes[..bytes.len() - 1]).expect("written");
    let message = load();
    assert!(message.contains("`x`") && message.contains("model.safetensors") && message.contains("changed"), "{message}");
    std::fs::remove_file(&path).expect("removed");
    assert!(load().contains("cannot read the weights in model.safetensors"));
}

/// Set for the process that the next test measures.
#[cfg(target_os = "linux")]
const MEASURED_FOLDER: &str = "MLX_CLUSTER_TEST_MEASURED_FOLDER";

#[cfg(target_os = "linux")]
#[test]
fn half_a_model_takes_half_its_memory_while_it_loads() {
    if let Some(folder) = std::env::var_os(MEASURED_FOLDER) {
        return print_growth(Path::new(&folder));
    }
    let names = ["a", "b", "c", "d"];
    let tensors = names.map(|name| (name, "F32", &[2048u64, 3072][..], vec![1u8; 2048 * 3072 * 4]));
    let file = Checkpoint::new("peak", &tensors);
    // A process of its own, because tests of one process share its memory.
    let output = std::process::Command::new(std::env::current_exe().expect("this"))
        .args(["--exact", "weights::tests::half_a_model_takes_half_its_memory_while_it_loads", "--nocapture"])
        .env(MEASURED_FOLDER, &file.folder)
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    let grown = text.split_once("grew by ").and_then(|(_, rest)| rest.split_whitespace().next()).expect("measured");
    let (grown, model) = (grown.parse::<u64>().expect("a number"), 4 * 2048 * 3072 * 4);
    assert!(grown > model / 2 && grown < model * 55 / 100 + (8 << 20), "{grown} bytes for half of {model}");
}

/// Loads half of each tensor, rows of the first two and columns of the others.
#[cfg(target_os = "linux")]
fn print_growth(folder: &Path) {
    let index = mlx_cluster_hub::folder_weight_index(folder).expect("a checkpoint");
    let parameter = |(i, (name, entry)): (usize, (&String, &TensorEntry))| {
        let whole = Parameter::new(name.clone(), SymbolicTensor::of_checkpoint(name, entry.dtype, entry.shape.clone()));
        let axis = i / 2;
        whole.select(axis, &[entry.shape[axis] / 2..entry.shape[axis]]).expect("inside")
    };
    let parameters = index.tensors.iter().enumerate().map(parameter).collect();
    let map = WeightMap { parts: BTreeMap::from([(Part::Embedding, parameters)]), activation_dtype: None };
    // What MLX takes for itself.
    floats(&Array::from_slice(&[1.0f32, 2.0], &[2]));
    let before = resident_bytes("VmRSS:");
    let mut weights = Weights::load(folder, &index, &map, &[Part::Embedding], |_| {}).expect("loads");
    println!("grew by {} bytes", resident_bytes("VmHWM:") - before);
    assert_eq!(weights.take("d").expect("there").shape(), [2048, 1536]);
}

/// A size of this process, as Linux counts it.
#[cfg(target_os = "linux")]
fn resident_bytes(label: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let size = status.lines().find_map(|line| line.strip_prefix(label)).expect("there");
    size.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}
