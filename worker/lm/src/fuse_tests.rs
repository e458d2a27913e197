//! New values in files of awkward layouts; the arithmetic itself is compared with mlx-lm in `tests/parity/training`.

use super::*;
use crate::weights::{Weights, write_box};
use mlx_cluster_common::{
    spec::Part,
    weights::{TensorEntry, WeightMap},
};
use std::collections::BTreeMap;

/// A folder with one file of one F32 tensor `w` that counts up from 0, behind 16 bytes of something else.
fn checkpoint(test: &str, shape: &[u64]) -> (std::path::PathBuf, WeightIndex) {
    let folder = std::env::temp_dir().join(format!("mlx-cluster-fuse-{test}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let elements = shape.iter().product::<u64>();
    let data = (0..elements).flat_map(|i| (i as f32).to_le_bytes());
    std::fs::write(folder.join("model.safetensors"), [0xff; 16].into_iter().chain(data).collect::<Vec<u8>>()).expect("written");
    let entry = TensorEntry { file: "model.safetensors".into(), dtype: DType::F32, shape: shape.to_vec(), offset: 16, bytes: 4 * elements };
    (folder, WeightIndex { tensors: BTreeMap::from([("w".into(), entry)]), ..WeightIndex::default() })
}

/// Brings `value` into the file where a recipe over `w` reads it, then loads what the recipe makes, and all of `w`.
fn round(test: &str, shape: &[u64], recipe: impl FnOnce(SymbolicTensor) -> SymbolicTensor, value: f32) -> (Vec<f32>, Vec<f32>) {
    let (folder, index) = checkpoint(test, shape);
    let whole = SymbolicTensor::of_checkpoint("w", DType::F32, shape.to_vec());
    let part = recipe(whole.clone());
    let dims: Vec<i32> = part.shape.iter().map(|dim| *dim as i32).collect();
    let array = ops::add(ops::zeros::<f32>(&dims).expect("zeros"), Array::from_f32(value)).expect("a sum");
    let fusion = Fusion::new(Checkpoint { folder: &folder, index: &index }, Checkpoint { folder: &folder, index: &index });
    for assignment in part.recipe.undo().expect("a way back") {
        fusion.assign(&assignment, &array, &folder).expect("written");
    }
    let parameters = vec![Parameter::new("part".into(), part), Parameter::new("whole".into(), whole)];
    let map = WeightMap { parts: BTreeMap::from([(Part::Embedding, parameters)]), activation_dtype: None };
    let mut weights = Weights::load(&folder, &index, &map, &[Part::Embedding], |_| {}).expect("loads");
    assert!(std::fs::read(folder.join("model.safetensors")).expect("there").starts_with(&[0xff; 16]));
    std::fs::remove_dir_all(&folder).expect("removed");
    let floats = |name: &str, weights: &mut Weights| weights.take(name).expect("there").as_slice::<f32>().to_vec();
    (floats("part", &mut weights), floats("whole", &mut weights))
}

#[test]
fn a_part_of_a_tensor_is_changed_and_nothing_else() {
    let (part, whole) = round("rows", &[6, 2], |w| w.slice(0, 2, 4).expect("rows"), -1.0);
    assert_eq!(part, [-1.0; 4]);
    assert_eq!(whole, [0.0, 1.0, 2.0, 3.0, -1.0, -1.0, -1.0, -1.0, 8.0, 9.0, 10.0, 11.0]);
    let (part, whole) = round("every", &[2, 6], |w| w.every(1, 1, 2).expect("columns"), -1.0);
    assert_eq!(part, [-1.0; 6]);
    assert_eq!(whole, [0.0, -1.0, 2.0, -1.0, 4.0, -1.0, 6.0, -1.0, 8.0, -1.0, 10.0, -1.0]);
}

#[test]
fn what_was_computed_on_loading_is_undone() {
    let (part, whole) = round("computed", &[2, 3], |w| w.swap_last_axes().and_then(|w| w.plus(1.0)?.scale(2.0)).expect("valid"), 5.0);
    assert_eq!((part, whole), (vec![5.0; 6], vec![1.5; 6]));
    let (part, whole) = round("factors", &[3, 2], |w| w.scale_rows(&[(1, 2.0), (2, 4.0)]).expect("valid"), 8.0);
    assert_eq!((part, whole), (vec![8.0; 6], vec![4.0, 4.0, 2.0, 2.0, 2.0, 2.0]));
}

#[test]
fn many_short_runs_reach_their_places() {
    // More than a block of them.
    let (part, whole) = round("short", &[1300, 220], |w| w.slice(1, 7, 9).expect("columns"), -2.0);
    assert_eq!(part, vec![-2.0; 2600]);
    let wanted = (0..286_000).map(|i| if [7, 8].contains(&(i % 220)) { -2.0 } else { i as f32 });
    assert!(whole.into_iter().eq(wanted));
}

#[test]
fn a_box_takes_as_many_bytes_as_it_has() {
    let (folder, _) = checkpoint("box", &[4]);
    let whole = SymbolicTensor::of_checkpoint("w", DType::F32, vec![4]);
    let file = File::open(folder.join("model.safetensors")).expect("there");
    assert!(write_box(&file, &whole.recipe.undo().expect("a box")[0], 16, &[0; 12]).is_err());
    std::fs::remove_dir_all(&folder).expect("removed");
}
