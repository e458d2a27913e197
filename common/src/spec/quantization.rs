//! How a checkpoint is quantised: one scheme for all, exceptions by path.

use crate::config::{Config, ConfigError};
use serde_json::Value;
use std::collections::BTreeMap;

/// Affine quantisation as MLX does it: groups of `group_size` along the input, `bits` a weight, a scale and a bias a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuantizationScheme {
    pub group_size: u32,
    pub bits: u32,
}

/// The `quantization` (or `quantization_config`) of a config.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Quantization {
    pub default: Option<QuantizationScheme>,
    /// Layers with a scheme of their own; None leaves the layer unquantised.
    pub by_path: BTreeMap<String, Option<QuantizationScheme>>,
}

impl Quantization {
    /// The scheme of the layer at `path`, if the checkpoint holds it quantised.
    pub fn scheme(&self, path: &str) -> Option<QuantizationScheme> {
        self.by_path.get(path).copied().unwrap_or(self.default)
    }

    pub fn from_config(config: &Config, model_type: &str) -> Result<Quantization, ConfigError> {
        let Some(section) = (match config.object("quantization", "quantization.")? {
            Some(section) => Some(section),
            None => config.object("quantization_config", "quantization_config.")?,
        }) else {
            return Ok(Quantization::default());
        };
        if let Some(method) = section.text("quant_method")? {
            return Err(ConfigError::Unsupported {
                model_type: model_type.into(),
                feature: format!("a checkpoint quantised by `{method}`"),
            });
        }
        let mut by_path = BTreeMap::new();
        for (key, value) in section.entries() {
            match value {
                Value::Object(_) => {
                    by_path.insert(key.to_owned(), Some(scheme(&Config::new(value)?, model_type)?));
                }
                Value::Bool(false) => {
                    by_path.insert(key.to_owned(), None);
                }
                _ => {}
            }
        }
        Ok(Quantization { default: Some(scheme(&section, model_type)?), by_path })
    }
}

fn scheme(section: &Config, model_type: &str) -> Result<QuantizationScheme, ConfigError> {
    match section.text("mode")? {
        None | Some("affine") => {}
        Some(mode) => {
            return Err(ConfigError::Unsupported { model_type: model_type.into(), feature: format!("quantisation mode `{mode}`") });
        }
    }
    let (group_size, bits) = (section.u32("group_size", 1, 1024)?, section.u32("bits", 1, 32)?);
    if ![32, 64, 128].contains(&group_size) {
        return Err(ConfigError::Invalid {
            key: "quantization.group_size".into(),
            wanted: "32, 64 or 128".into(),
            found: group_size.to_string(),
        });
    }
    if ![2, 3, 4, 5, 6, 8].contains(&bits) {
        return Err(ConfigError::Invalid { key: "quantization.bits".into(), wanted: "2, 3, 4, 5, 6 or 8".into(), found: bits.to_string() });
    }
    Ok(QuantizationScheme { group_size, bits })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(value: Value) -> Result<Quantization, ConfigError> {
        Quantization::from_config(&Config::new(&value)?, "llama")
    }

    #[test]
    fn either_key_and_exceptions_by_path() {
        let four = Some(QuantizationScheme { group_size: 64, bits: 4 });
        for key in ["quantization", "quantization_config"] {
            let read = read(json!({key: {"group_size": 64, "bits": 4, "a.b": {"group_size": 32, "bits": 8}, "c": false}})).expect("valid");
            assert_eq!(read.scheme("x"), four);
            assert_eq!(read.scheme("a.b"), Some(QuantizationScheme { group_size: 32, bits: 8 }));
            assert_eq!(read.scheme("c"), None);
        }
        assert_eq!(read(json!({})).expect("none").scheme("x"), None);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for section in [
            json!({"group_size": 7, "bits": 4}),
            json!({"group_size": 64, "bits": 7}),
            json!({"bits": 4}),
            json!({"quant_method": "gptq", "bits": 4}),
        ] {
            assert!(read(json!({"quantization": section})).is_err());
        }
    }
}
