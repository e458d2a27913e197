//! Element types of tensors, by the names that safetensors files use.

use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum DType {
    Bool,
    U8,
    U16,
    U32,
    U64,
    I8,
    I16,
    I32,
    I64,
    F16,
    BF16,
    F32,
    F64,
}

impl DType {
    const ALL: [(DType, &'static str, u64); 13] = [
        (DType::Bool, "BOOL", 1),
        (DType::U8, "U8", 1),
        (DType::U16, "U16", 2),
        (DType::U32, "U32", 4),
        (DType::U64, "U64", 8),
        (DType::I8, "I8", 1),
        (DType::I16, "I16", 2),
        (DType::I32, "I32", 4),
        (DType::I64, "I64", 8),
        (DType::F16, "F16", 2),
        (DType::BF16, "BF16", 2),
        (DType::F32, "F32", 4),
        (DType::F64, "F64", 8),
    ];

    /// The type that MLX reads a tensor of this type in a safetensors header as; None for one that it cannot read. Floats of eight bits
    /// are bytes to it, and so they are here: what their bits mean is up to who uses them.
    pub fn from_safetensors(name: &str) -> Option<DType> {
        if ["F8_E4M3", "F8_E8M0"].contains(&name) {
            return Some(DType::U8);
        }
        Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(dtype, _, _)| *dtype)
    }

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(dtype, _, _)| *dtype == self).map_or("?", |(_, name, _)| name)
    }

    /// Bytes of one element.
    pub fn size(self) -> u64 {
        Self::ALL.iter().find(|(dtype, _, _)| *dtype == self).map_or(0, |(_, _, size)| *size)
    }

    /// Whether activations and unquantised weights may have this type.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::BF16 | DType::F32)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
