//! An adapter's folder, as mlx-lm writes it: `adapter_config.json` and `adapters.safetensors`.

use crate::{
    headers::{WeightFileError, read_header},
    json_file::{JsonFileError, read_config},
};
use mlx_cluster_common::{
    training::{Adapter, AdapterConfig, AdapterError},
    weights::{TensorEntry, WeightIndex},
};
use std::path::{Path, PathBuf};

pub const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
pub const ADAPTER_WEIGHTS_FILE: &str = "adapters.safetensors";

/// An adapter whose config and header were checked.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFiles {
    pub folder: PathBuf,
    /// In that folder.
    pub weights: PathBuf,
    pub adapter: Adapter,
}

/// Why a folder holds no adapter that can be used.
#[derive(Debug, thiserror::Error)]
pub enum AdapterFileError {
    #[error("{} holds no adapter, it has no {file}: give the folder that `adapter_path` named when it was trained", folder.display())]
    NotThere { folder: PathBuf, file: &'static str },
    #[error(transparent)]
    Json(#[from] JsonFileError),
    #[error(transparent)]
    Weights(#[from] WeightFileError),
    #[error("{}: {cause}", folder.display())]
    Adapter { folder: PathBuf, cause: AdapterError },
}

impl AdapterFiles {
    /// Reads the config and the header; not the tensors. `path` is the folder, or a file of weights in it, as training leaves them at every
    /// save. Blocks on the disk.
    pub fn open(path: &Path) -> Result<Self, AdapterFileError> {
        let (folder, weights) = match path.is_file() {
            true => (path.parent().unwrap_or(path), path.to_path_buf()),
            false => (path, path.join(ADAPTER_WEIGHTS_FILE)),
        };
        let not_there = |file| AdapterFileError::NotThere { folder: folder.to_path_buf(), file };
        if !folder.join(ADAPTER_CONFIG_FILE).is_file() {
            return Err(not_there(ADAPTER_CONFIG_FILE));
        }
        if !weights.is_file() {
            return Err(not_there(ADAPTER_WEIGHTS_FILE));
        }
        let named = |cause| AdapterFileError::Adapter { folder: folder.to_path_buf(), cause };
        let config = AdapterConfig::from_json(&read_config(&folder.join(ADAPTER_CONFIG_FILE))?).map_err(named)?;
        let header = read_header(&weights)?;
        let file = weights.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let entries = header.tensors.into_iter().map(|(name, slot)| {
            (name, TensorEntry { file: file.clone(), dtype: slot.dtype, shape: slot.shape, offset: slot.offset, bytes: slot.bytes })
        });
        let tensors = WeightIndex { tensors: entries.collect(), ..WeightIndex::default() };
        let adapter = Adapter::new(config, tensors).map_err(named)?;
        Ok(Self { folder: folder.to_path_buf(), weights, adapter })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LORA: &str = r#"{"lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}"#;

    fn folder(config: &str, tensors: &[(&str, &[usize])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(ADAPTER_CONFIG_FILE), config).unwrap();
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in tensors {
            let start = end;
            end += 4 * shape.iter().product::<usize>();
            header.insert(name.to_string(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}));
        }
        let header = serde_json::to_vec(&header).unwrap();
        let file = [&(header.len() as u64).to_le_bytes()[..], &header, &vec![0; end]].concat();
        std::fs::write(folder.path().join(ADAPTER_WEIGHTS_FILE), file).unwrap();
        folder
    }

    fn message(folder: &Path) -> String {
        AdapterFiles::open(folder).unwrap_err().to_string()
    }

    #[test]
    fn an_adapter_is_read_from_its_two_files() {
        let folder = folder(LORA, &[("x.lora_a", &[4, 2]), ("x.lora_b", &[2, 8])]);
        let files = AdapterFiles::open(folder.path()).unwrap();
        assert_eq!(files.adapter.changes().keys().collect::<Vec<_>>(), ["x"]);
        assert_eq!(files.adapter.tensors.tensors["x.lora_b"].shape, [2, 8]);
    }

    #[test]
    fn what_is_wrong_is_named_with_the_folder() {
        let empty = tempfile::tempdir().unwrap();
        assert!(message(empty.path()).contains("holds no adapter, it has no adapter_config.json"));
        let half = folder(LORA, &[("x.lora_a", &[4, 2])]);
        let text = message(half.path());
        assert!(text.contains("no `lora_b`") && text.contains(&half.path().display().to_string()), "{text}");
        assert!(message(folder("{", &[]).path()).contains("adapter_config.json:1:"));
        let alpha = r#"{"lora_parameters": {"rank": 2, "alpha": 1.0}}"#;
        assert!(message(folder(alpha, &[]).path()).contains("`alpha`"));
        let nan = r#"{"lora_parameters": {"rank": 2, "scale": NaN}}"#;
        assert!(message(folder(nan, &[]).path()).contains("a finite number"));
        let cut = folder(LORA, &[("x.lora_a", &[4, 2]), ("x.lora_b", &[2, 8])]);
        let path = cut.path().join(ADAPTER_WEIGHTS_FILE);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert!(message(cut.path()).contains("incomplete"));
    }
}
