//! From `config.json` to a [`ModelSpec`]: one file an architecture, each a pure function.

mod bailing_moe;
mod blocks;
mod cohere;
mod cohere2;
mod deepseek_v2;
mod deepseek_v3;
mod deepseek_v32;
mod dense_then_routed;
mod dots1;
mod ernie4_5;
mod ernie4_5_moe;
mod exaone;
mod exaone4;
mod exaone_moe;
mod falcon_h1;
mod gemma;
mod gemma3;
mod gemma3n;
mod gemma4;
mod glm;
mod glm4_moe;
mod glm4_moe_lite;
mod gpt_oss;
mod granite;
mod granitemoe;
mod granitemoehybrid;
mod helium;
mod hunyuan_v1_dense;
mod internlm2;
mod jamba;
mod latent;
mod lfm2;
mod llama;
mod llama4_text;
mod mamba;
mod mamba2;
mod mellum;
mod mimo;
mod minicpm;
mod minicpm3;
mod minimax;
mod ministral3;
mod mistral3;
mod mistral4;
mod mixtral;
mod mixtures;
mod nemotron_h;
mod olmo2;
mod olmo3;
mod olmoe;
mod phi3;
mod plamo2;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_5;
mod qwen3_moe;
mod qwen3_next;
mod qwen_vl;
mod seed_oss;
mod smollm3;
mod starcoder2;
mod state_spaces;
mod step3p5;
mod telechat3;
mod vision;
mod youtu_llm;

use crate::{
    config::{Config, ConfigError},
    nearest::nearest,
    spec::ModelSpec,
};
use blocks::Source;
use serde_json::Value;
use std::fmt;

/// A `model_type` of `config.json` that we can run.
pub struct Architecture {
    pub model_type: &'static str,
    pub group: Group,
    /// What sets it apart, in a few words.
    pub special: &'static str,
    read: fn(Source) -> Result<ModelSpec, ConfigError>,
}

/// Families of architectures that share most of their blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    Base,
    QwenHybrid,
    Latent,
    Experts,
    Gemma,
    StateSpace,
    Other,
}

/// Each file's architectures.
const FILES: &[&[Architecture]] = &[
    bailing_moe::ARCHITECTURES,
    cohere::ARCHITECTURES,
    cohere2::ARCHITECTURES,
    deepseek_v2::ARCHITECTURES,
    deepseek_v3::ARCHITECTURES,
    deepseek_v32::ARCHITECTURES,
    dots1::ARCHITECTURES,
    ernie4_5::ARCHITECTURES,
    ernie4_5_moe::ARCHITECTURES,
    exaone::ARCHITECTURES,
    exaone4::ARCHITECTURES,
    exaone_moe::ARCHITECTURES,
    falcon_h1::ARCHITECTURES,
    gemma::ARCHITECTURES,
    gemma3::ARCHITECTURES,
    gemma3n::ARCHITECTURES,
    gemma4::ARCHITECTURES,
    glm::ARCHITECTURES,
    glm4_moe::ARCHITECTURES,
    glm4_moe_lite::ARCHITECTURES,
    gpt_oss::ARCHITECTURES,
    granite::ARCHITECTURES,
    granitemoe::ARCHITECTURES,
    granitemoehybrid::ARCHITECTURES,
    helium::ARCHITECTURES,
    hunyuan_v1_dense::ARCHITECTURES,
    internlm2::ARCHITECTURES,
    jamba::ARCHITECTURES,
    lfm2::ARCHITECTURES,
    llama::ARCHITECTURES,
    llama4_text::ARCHITECTURES,
    mamba::ARCHITECTURES,
    mamba2::ARCHITECTURES,
    mellum::ARCHITECTURES,
    mimo::ARCHITECTURES,
    minicpm::ARCHITECTURES,
    minicpm3::ARCHITECTURES,
    minimax::ARCHITECTURES,
    ministral3::ARCHITECTURES,
    mistral3::ARCHITECTURES,
    mistral4::ARCHITECTURES,
    mixtral::ARCHITECTURES,
    nemotron_h::ARCHITECTURES,
    olmo2::ARCHITECTURES,
    olmo3::ARCHITECTURES,
    olmoe::ARCHITECTURES,
    phi3::ARCHITECTURES,
    plamo2::ARCHITECTURES,
    qwen2::ARCHITECTURES,
    qwen2_moe::ARCHITECTURES,
    qwen3::ARCHITECTURES,
    qwen3_5::ARCHITECTURES,
    qwen3_moe::ARCHITECTURES,
    qwen3_next::ARCHITECTURES,
    qwen_vl::ARCHITECTURES,
    seed_oss::ARCHITECTURES,
    smollm3::ARCHITECTURES,
    starcoder2::ARCHITECTURES,
    step3p5::ARCHITECTURES,
    telechat3::ARCHITECTURES,
    youtu_llm::ARCHITECTURES,
];

/// Every supported architecture, by group and name.
pub fn architectures() -> Vec<&'static Architecture> {
    let mut all: Vec<_> = FILES.iter().copied().flatten().collect();
    all.sort_by_key(|architecture| (architecture.group, architecture.model_type));
    all
}

/// Reads the `model_type` of a config and hands it to its architecture.
pub fn read_spec(config: &Value) -> Result<ModelSpec, ConfigError> {
    let config = Config::new(config)?;
    let model_type = config.text("model_type")?.ok_or_else(|| ConfigError::Missing { key: "model_type".into() })?;
    match architectures().into_iter().find(|architecture| architecture.model_type == model_type) {
        Some(architecture) => (architecture.read)(Source::new(config, model_type)),
        None => Err(unknown(model_type)),
    }
}

pub fn supported_model_types() -> Vec<&'static str> {
    architectures().into_iter().map(|architecture| architecture.model_type).collect()
}

fn unknown(model_type: &str) -> ConfigError {
    let nearest = nearest(model_type, supported_model_types());
    ConfigError::UnknownModelType {
        model_type: model_type.chars().take(80).collect(),
        nearest: nearest.unwrap_or_default(),
        supported: architectures().len(),
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Group::Base => "dense decoders",
            Group::QwenHybrid => "Qwen with gated delta rule",
            Group::Latent => "latent attention",
            Group::Experts => "grouped queries with experts",
            Group::Gemma => "Gemma",
            Group::StateSpace => "state spaces and convolutions",
            Group::Other => "others",
        })
    }
}

#[cfg(test)]
mod state_spaces_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::tiny;
