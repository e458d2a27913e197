//! Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the language model of each. For text the three positions of a token are one.

use super::{Architecture, Group, blocks::Source, qwen2, qwen3, vision::language_model};
use crate::{config::ConfigError, spec::ModelSpec};

pub(super) const ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "qwen2_vl", group: Group::Base, special: "text of Qwen2-VL: as qwen2", read: read_qwen2 },
    Architecture { model_type: "qwen2_5_vl", group: Group::Base, special: "text of Qwen2.5-VL: as qwen2", read: read_qwen2 },
    Architecture { model_type: "qwen3_vl", group: Group::Base, special: "text of Qwen3-VL: as qwen3", read: read_qwen3 },
];

fn read_qwen2(source: Source) -> Result<ModelSpec, ConfigError> {
    language_model(source, qwen2::read)
}

fn read_qwen3(source: Source) -> Result<ModelSpec, ConfigError> {
    language_model(source, qwen3::read)
}
