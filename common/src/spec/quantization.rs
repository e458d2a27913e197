//! How a checkpoint is quantised: one scheme for all, exceptions by path, and layouts that only published files have.

use crate::config::{Config, ConfigError};
use serde_json::Value;
use std::collections::BTreeMap;

/// What the numbers of a group are, as MLX names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum QuantizationMode {
    /// Whole numbers with a scale and a bias a group: `w = scale · q + bias`.
    Affine,
    /// Floats e2m1 with one scale e8m0 a group (OCP Microscaling Formats 1.0).
    Mxfp4,
    /// Floats e2m1 with one scale e4m3 a group.
    Nvfp4,
    /// Floats e4m3 with one scale e8m0 a group (OCP Microscaling Formats 1.0).
    Mxfp8,
}

impl QuantizationMode {
    const ALL: [Self; 4] = [Self::Affine, Self::Mxfp4, Self::Nvfp4, Self::Mxfp8];

    pub fn name(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
            Self::Mxfp8 => "mxfp8",
        }
    }

    /// The group sizes and bits that MLX has kernels for.
    fn allowed(self) -> (&'static [u32], &'static [u32]) {
        match self {
            Self::Affine => (&[32, 64, 128], &[2, 3, 4, 5, 6, 8]),
            Self::Mxfp4 => (&[32], &[4]),
            Self::Nvfp4 => (&[16], &[4]),
            Self::Mxfp8 => (&[32], &[8]),
        }
    }

    /// Group size and bits where a config names neither, as mlx-lm has them.
    fn defaults(self) -> (u32, u32) {
        match self {
            Self::Affine => (64, 4),
            Self::Mxfp4 => (32, 4),
            Self::Nvfp4 => (16, 4),
            Self::Mxfp8 => (32, 8),
        }
    }
}

/// Groups of `group_size` numbers along the input, `bits` each, packed into words of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuantizationScheme {
    pub mode: QuantizationMode,
    pub group_size: u32,
    pub bits: u32,
}

impl QuantizationScheme {
    /// None takes the mode's default. An error names the key `group_size` or `bits`.
    pub fn new(mode: QuantizationMode, group_size: Option<u32>, bits: Option<u32>) -> Result<Self, ConfigError> {
        let (group_sizes, all_bits) = mode.allowed();
        let (default_group_size, default_bits) = mode.defaults();
        Ok(Self {
            mode,
            group_size: one_of("group_size", mode, group_sizes, group_size.unwrap_or(default_group_size))?,
            bits: one_of("bits", mode, all_bits, bits.unwrap_or(default_bits))?,
        })
    }

    /// Groups of a row, the last axis of the scales; None when the group size does not divide `input_dims`.
    pub fn groups(&self, input_dims: impl Into<u64>) -> Option<u64> {
        let (input_dims, group_size) = (input_dims.into(), u64::from(self.group_size));
        (input_dims > 0 && input_dims % group_size == 0).then_some(input_dims / group_size)
    }

    /// Words of a row, the last axis of the packed weight; None when the group size does not divide `input_dims`.
    pub fn packed_columns(&self, input_dims: impl Into<u64>) -> Option<u64> {
        // A group is always whole words: 32 numbers of any width, or 16 of 4 bits.
        self.groups(input_dims)?.checked_mul(u64::from(self.group_size * self.bits / 32))
    }

    /// Whether a group has a bias beside its scale.
    pub fn has_biases(&self) -> bool {
        self.mode == QuantizationMode::Affine
    }

    /// Whether scales are stored as single bytes (U8) and not as floats of the model's type.
    pub fn scales_are_bytes(&self) -> bool {
        self.mode != QuantizationMode::Affine
    }
}

fn one_of(key: &str, mode: QuantizationMode, allowed: &[u32], found: u32) -> Result<u32, ConfigError> {
    if allowed.contains(&found) {
        return Ok(found);
    }
    let allowed: Vec<_> = allowed.iter().map(u32::to_string).collect();
    Err(ConfigError::Invalid { key: key.into(), wanted: format!("{} for {}", allowed.join(", "), mode.name()), found: found.to_string() })
}

/// A layout of published files that MLX has no kernel for: loading turns it into dense or quantised matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishedQuantization {
    /// Bytes e4m3 `<path>.weight`, one scale `<path>.weight_scale_inv` a block of `[rows, columns]`: becomes dense.
    Fp8Blocks { block: [u32; 2] },
    /// Bytes e4m3 with one scale a tensor: becomes dense.
    Fp8Tensors,
    /// Stacked experts as bytes of two e2m1 numbers `<path>_blocks` with scales `<path>_scales`: is mxfp4 in another shape.
    Mxfp4Blocks,
    /// `<path>.weight_packed`, `.weight_scale` and `.weight_shape`, whole numbers 0 to 15 that stand for -8 to 7: becomes affine with
    /// `bias = -8 · scale`.
    PackedInt4 { group_size: u32 },
}

/// The `quantization` (or `quantization_config`) of a config.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Quantization {
    pub default: Option<QuantizationScheme>,
    /// Layers with a scheme of their own, by their full path in the model; None leaves the layer unquantised.
    pub by_path: BTreeMap<String, Option<QuantizationScheme>>,
    /// Set when the files have to be converted on loading; the schemes are those after that.
    pub published: Option<PublishedQuantization>,
}

impl Quantization {
    /// The scheme of the layer at `path`, if the checkpoint holds it quantised.
    pub fn scheme(&self, path: &str) -> Option<QuantizationScheme> {
        self.by_path.get(path).copied().unwrap_or(self.default)
    }

    /// Reads `quantization`, else `quantization_config`, else the `quantization_config` of `text_config`, as mlx-lm does.
    pub fn from_config(config: &Config, model_type: &str) -> Result<Quantization, ConfigError> {
        let reader = Reader { model_type };
        let quantization = match config.object("quantization", "quantization.")? {
            Some(section) => reader.mlx(&section, "quantization.")?,
            None => match published_section(config)? {
                Some(section) => reader.published(&section)?,
                None => return Ok(Quantization::default()),
            },
        };
        match config.bool_or("quantize_activations", false)? {
            true => Err(reader.unsupported("`quantize_activations`")),
            false => Ok(quantization),
        }
    }
}

fn published_section<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>, ConfigError> {
    if let Some(section) = config.object("quantization_config", "quantization_config.")? {
        return Ok(Some(section));
    }
    match config.object("text_config", "text_config.")? {
        Some(text) => text.object("quantization_config", "text_config.quantization_config."),
        None => Ok(None),
    }
}

struct Reader<'a> {
    model_type: &'a str,
}

impl Reader<'_> {
    fn unsupported(&self, feature: impl Into<String>) -> ConfigError {
        ConfigError::Unsupported { model_type: self.model_type.into(), feature: feature.into() }
    }

    /// A checkpoint in MLX's own layout.
    fn mlx(&self, section: &Config, prefix: &str) -> Result<Quantization, ConfigError> {
        if let Some(method) = section.text("quant_method")? {
            return Err(self.unsupported(format!("a checkpoint quantised by `{method}`")));
        }
        let default = self.scheme(section).map_err(|error| under(prefix, error))?;
        let mut by_path = BTreeMap::new();
        for (key, value) in section.entries() {
            let scheme = match value {
                Value::Object(_) => Some(self.exception(value).map_err(|error| under(&format!("{prefix}{key}."), error))?),
                Value::Bool(true) => Some(default),
                Value::Bool(false) => None,
                _ => continue,
            };
            by_path.insert(key.to_owned(), scheme);
        }
        Ok(Quantization { default: Some(default), by_path, published: None })
    }

    /// A layer's own scheme. It inherits nothing: what it leaves out takes the mode's defaults, and the mode is affine.
    fn exception(&self, value: &Value) -> Result<QuantizationScheme, ConfigError> {
        let section = Config::new(value)?;
        let known = |key: &str| ["group_size", "bits", "mode"].contains(&key);
        // `quantize_input` and `global_scale` change the numbers.
        match section.entries().find(|(key, value)| !known(key) && **value != Value::Bool(false)) {
            Some((key, _)) => Err(self.unsupported(format!("`{key}` of a quantised layer"))),
            None => self.scheme(&section),
        }
    }

    fn scheme(&self, section: &Config) -> Result<QuantizationScheme, ConfigError> {
        let name = section.get("mode").map_or(Ok("affine"), |value| value.as_str().ok_or_else(|| invalid("mode", "a text", value)))?;
        let mode = QuantizationMode::ALL.into_iter().find(|mode| mode.name() == name);
        let mode = mode.ok_or_else(|| self.unsupported(format!("quantisation mode `{name}`")))?;
        let number = |key: &str| match section.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64().and_then(|number| u32::try_from(number).ok()) {
                Some(number) => Ok(Some(number)),
                None => Err(invalid(key, "a whole number", value)),
            },
        };
        QuantizationScheme::new(mode, number("group_size")?, number("bits")?)
    }

    /// A `quantization_config`: MLX's own when it names no method, else what Hugging Face knows the method by.
    fn published(&self, section: &Config) -> Result<Quantization, ConfigError> {
        let only = |published| Quantization { published: Some(published), ..Quantization::default() };
        match section.text("quant_method")? {
            None => self.mlx(section, "quantization_config."),
            Some("mxfp4") => Ok(Quantization {
                default: Some(QuantizationScheme::new(QuantizationMode::Mxfp4, None, None)?),
                ..only(PublishedQuantization::Mxfp4Blocks)
            }),
            Some("fp8") => self.fp8(section).map(only),
            Some("compressed-tensors") => {
                let group_size = self.packed_int4(section)?;
                Ok(Quantization {
                    default: Some(QuantizationScheme::new(QuantizationMode::Affine, Some(group_size), Some(4))?),
                    ..only(PublishedQuantization::PackedInt4 { group_size })
                })
            }
            Some(method) => Err(self.unsupported(format!("a checkpoint quantised by `{method}`"))),
        }
    }

    fn fp8(&self, section: &Config) -> Result<PublishedQuantization, ConfigError> {
        if let Some(format) = section.text("fmt")?.filter(|format| !["e4m3", "float8_e4m3fn"].contains(format)) {
            return Err(self.unsupported(format!("fp8 of format `{format}`")));
        }
        let Some(block) = section.u32s("weight_block_size")? else {
            return Ok(PublishedQuantization::Fp8Tensors);
        };
        let block = <[u32; 2]>::try_from(block).ok().filter(|block| !block.contains(&0)).ok_or_else(|| ConfigError::Invalid {
            key: "quantization_config.weight_block_size".into(),
            wanted: "two sizes above 0".into(),
            found: section.get("weight_block_size").map(Value::to_string).unwrap_or_default(),
        })?;
        // Scales that are bytes: the file is mxfp8 then, in a layout of its own.
        if section.text("scale_fmt")? == Some("ue8m0") && block == [32, 32] {
            return Err(self.unsupported("fp8 with ue8m0 scales of blocks of 32"));
        }
        Ok(PublishedQuantization::Fp8Blocks { block })
    }

    /// The group size of `compressed-tensors` in format `pack-quantized`, which must be that of symmetric whole numbers of 4 bits.
    fn packed_int4(&self, section: &Config) -> Result<u32, ConfigError> {
        let format = section.text("format")?.unwrap_or("none");
        if format != "pack-quantized" {
            return Err(self.unsupported(format!("compressed-tensors of format `{format}`")));
        }
        let missing = || ConfigError::Missing { key: "quantization_config.config_groups".into() };
        let groups = section.object("config_groups", "quantization_config.config_groups.")?.ok_or_else(missing)?;
        let mut found = None;
        for (_, group) in groups.entries() {
            let group = Config::new(group)?;
            let weights = group.object("weights", "quantization_config.config_groups.weights.")?.ok_or_else(missing)?;
            let (bits, kind) = (weights.maybe_u32("num_bits", 1, 32)?.unwrap_or(8), weights.text("type")?.unwrap_or("int"));
            let strategy = weights.text("strategy")?.unwrap_or("group");
            let plain = weights.bool_or("symmetric", true)? && weights.get("actorder").is_none_or(|order| order == &Value::Bool(false));
            if (bits, kind, strategy, plain) != (4, "int", "group", true) {
                return Err(self.unsupported(format!("compressed-tensors of other than symmetric int4 in groups ({kind} of {bits} bits)")));
            }
            let group_size = weights.u32("group_size", 1, 1024)?;
            if found.replace(group_size).is_some_and(|before| before != group_size) {
                return Err(self.unsupported("compressed-tensors with several group sizes"));
            }
        }
        found.ok_or_else(missing)
    }
}

fn invalid(key: &str, wanted: &str, found: &Value) -> ConfigError {
    ConfigError::Invalid { key: key.into(), wanted: wanted.into(), found: found.to_string().chars().take(80).collect() }
}

/// An error of a nested object, with the path to it in front of its key.
fn under(prefix: &str, error: ConfigError) -> ConfigError {
    match error {
        ConfigError::Invalid { key, wanted, found } => ConfigError::Invalid { key: format!("{prefix}{key}"), wanted, found },
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use QuantizationMode::{Affine, Mxfp4, Mxfp8, Nvfp4};
    use serde_json::json;

    fn read(value: Value) -> Result<Quantization, ConfigError> {
        Quantization::from_config(&Config::new(&value)?, "llama")
    }

    fn message(value: Value) -> String {
        read(value).expect_err("refused").to_string()
    }

    fn scheme(mode: QuantizationMode, group_size: u32, bits: u32) -> Option<QuantizationScheme> {
        Some(QuantizationScheme { mode, group_size, bits })
    }

    #[test]
    fn either_key_and_exceptions_by_path() {
        for key in ["quantization", "quantization_config"] {
            let section =
                json!({"group_size": 64, "bits": 4, "a.b": {"group_size": 32, "bits": 8}, "c": false, "d": true, "e": {"mode": "nvfp4"}});
            let read = read(json!({key: section})).expect("valid");
            assert_eq!(read.scheme("x"), scheme(Affine, 64, 4));
            assert_eq!(read.scheme("a.b"), scheme(Affine, 32, 8));
            assert_eq!(read.scheme("c"), None);
            assert_eq!(read.scheme("d"), scheme(Affine, 64, 4));
            assert_eq!(read.scheme("e"), scheme(Nvfp4, 16, 4));
            assert_eq!(read.published, None);
        }
        assert_eq!(read(json!({})).expect("none").scheme("x"), None);
    }

    #[test]
    fn modes_have_defaults() {
        for (section, wanted) in [
            (json!({}), scheme(Affine, 64, 4)),
            (json!({"bits": 8}), scheme(Affine, 64, 8)),
            (json!({"mode": "mxfp4"}), scheme(Mxfp4, 32, 4)),
            (json!({"mode": "nvfp4", "group_size": 16}), scheme(Nvfp4, 16, 4)),
            (json!({"mode": "mxfp8", "bits": 8}), scheme(Mxfp8, 32, 8)),
        ] {
            assert_eq!(read(json!({"quantization": section})).expect("valid").default, wanted);
        }
        let mixed = read(json!({"quantization": {"mode": "mxfp4", "router": {"bits": 8}}})).expect("valid");
        assert_eq!(mixed.scheme("router"), scheme(Affine, 64, 8), "an exception does not inherit the mode");
    }

    #[test]
    fn published_layouts() {
        let read = |section: Value| read(json!({"quantization_config": section})).expect("valid");
        let mxfp4 = read(json!({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}));
        assert_eq!((mxfp4.default, mxfp4.published), (scheme(Mxfp4, 32, 4), Some(PublishedQuantization::Mxfp4Blocks)));
        let fp8 = read(json!({"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}));
        assert_eq!((fp8.default, fp8.published), (None, Some(PublishedQuantization::Fp8Blocks { block: [128, 128] })));
        let fp8 = read(json!({"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": null}));
        assert_eq!(fp8.published, Some(PublishedQuantization::Fp8Tensors));
        let int4 = json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": {"weights":
            {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": true, "type": "int", "actorder": null}}}});
        let packed = read(int4.clone());
        assert_eq!((packed.default, packed.published), (scheme(Affine, 32, 4), Some(PublishedQuantization::PackedInt4 { group_size: 32 })));
        let nested = super::Quantization::from_config(
            &Config::new(&json!({"text_config": {"quantization_config": int4}})).expect("an object"),
            "kimi_k25",
        );
        assert_eq!(nested.expect("valid"), packed);
        let both = json!({"quantization": {"bits": 8}, "quantization_config": {"quant_method": "mxfp4"}});
        assert_eq!(super::tests::read(both).expect("the first counts").published, None);
    }

    #[test]
    fn shapes_of_a_scheme() {
        let of = |mode, group_size, bits| scheme(mode, group_size, bits).expect("given");
        assert_eq!(of(Affine, 64, 3).packed_columns(192u32), Some(18));
        assert_eq!(of(Affine, 64, 3).groups(192u64), Some(3));
        assert_eq!(of(Affine, 64, 4).packed_columns(96u32), None);
        assert_eq!(of(Affine, 64, 4).packed_columns(0u32), None);
        assert_eq!(of(Affine, 128, 4).packed_columns(u64::MAX - 127), Some((u64::MAX - 127) / 8));
        assert_eq!((of(Nvfp4, 16, 4).packed_columns(48u32), of(Nvfp4, 16, 4).groups(48u32)), (Some(6), Some(3)));
        assert_eq!((of(Mxfp8, 32, 8).packed_columns(96u32), of(Mxfp8, 32, 8).groups(96u32)), (Some(24), Some(3)));
        assert!(of(Affine, 64, 4).has_biases() && !of(Affine, 64, 4).scales_are_bytes());
        assert!(!of(Mxfp4, 32, 4).has_biases() && of(Mxfp4, 32, 4).scales_are_bytes());
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for section in [
            json!({"group_size": 7, "bits": 4}),
            json!({"group_size": 64, "bits": 7}),
            json!({"mode": "mxfp4", "group_size": 64}),
            json!({"mode": "nvfp4", "bits": 8}),
            json!({"mode": "mxfp8", "group_size": 16}),
            json!({"mode": "int3"}),
            json!({"mode": 4}),
            json!({"quant_method": "gptq", "bits": 4}),
            json!({"bits": 4, "a": {"mode": "nvfp4", "quantize_input": true}}),
        ] {
            assert!(read(json!({"quantization": section})).is_err(), "{section}");
        }
        for section in [
            json!({"quant_method": "awq", "bits": 4}),
            json!({"quant_method": "gptq", "bits": 4}),
            json!({"quant_method": "bitnet"}),
            json!({"quant_method": "modelopt"}),
            json!({"quant_method": "fp8", "fmt": "e5m2"}),
            json!({"quant_method": "fp8", "weight_block_size": [128]}),
            json!({"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}),
            json!({"quant_method": "compressed-tensors", "format": "float-quantized"}),
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 8, "group_size": 32}}}}),
        ] {
            assert!(read(json!({"quantization_config": section})).is_err(), "{section}");
        }
        assert!(message(json!({"quantization": {"bits": 4}, "quantize_activations": true})).contains("`quantize_activations`"));
        assert!(
            message(json!({"quantization": {"a.b": {"bits": 9}}})).contains("`quantization.a.b.bits` must be 2, 3, 4, 5, 6, 8 for affine")
        );
    }
}
