//! Whether an adapter holds numbers: what training that went astray leaves behind would make a model that says nothing.

use super::bad_file;
use crate::{
    failure::{Exit, Failure},
    target::interrupted,
};
use mlx_cluster_coordinator::training::checkpoint::{Part, TensorFile};
use mlx_cluster_hub::AdapterFiles;
use tokio_util::sync::CancellationToken;

/// Refuses an adapter with an infinite number or none at all, before anything is written. Reads it once, tensor by tensor.
pub(super) fn check(files: &AdapterFiles, stop: &CancellationToken) -> anyhow::Result<()> {
    for tensor in TensorFile::open(&files.weights, Part::Adapters).map_err(bad_file)? {
        if stop.is_cancelled() {
            return Err(interrupted());
        }
        let tensor = tensor.map_err(bad_file)?;
        if !tensor.is_finite() {
            let message = format!(
                "{}: `{}` has numbers that are infinite or none at all (NaN): give --adapter-path an adapter of an earlier save",
                files.weights.display(),
                tensor.name
            );
            return Err(Failure::new(Exit::BadFile, message).into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::{Dtype, tensor::TensorView};
    use std::{collections::BTreeMap, fs};

    #[test]
    fn a_tensor_without_numbers_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = r#"{"lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}"#;
        fs::write(folder.path().join("adapter_config.json"), config).expect("written");
        let check_with = |value: f32| {
            let data = [0.0, 1.0, 2.0, value].map(f32::to_le_bytes).concat();
            let view = || TensorView::new(Dtype::F32, vec![2, 2], &data).expect("a tensor");
            let tensors = BTreeMap::from(["a.lora_a", "a.lora_b"].map(|name| (name, view())));
            safetensors::serialize_to_file(tensors, None, &folder.path().join("adapters.safetensors")).expect("written");
            check(&AdapterFiles::open(folder.path()).expect("an adapter"), &CancellationToken::new())
        };
        assert!(check_with(3.0).is_ok());
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let message = check_with(value).expect_err("refused").to_string();
            assert!(message.contains("adapters.safetensors: `a.lora_a` has numbers") && message.contains("--adapter-path"), "{message}");
        }
    }
}
