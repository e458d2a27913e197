//! Multi-head latent attention as configs say it, with the names that DeepSeek gave its parts, and how it is published.

use super::{
    blocks::{Decoder, Defaults, Source},
    mixtures::published_with_prediction,
};
use crate::{
    config::{Config, ConfigError},
    published::{LatentUpProjection, PublishedError, Tensors},
    spec::{
        HeadLinearSpec, LatentAttentionSpec, LatentQuery, LatentUp, LinearSpec, Mixer, ModelSpec, NormSpec, RopeSpec, yarn_attention_factor,
    },
};

/// What the latent attentions of a model have in common.
pub(super) struct LatentAttention {
    hidden_size: u32,
    n_heads: u32,
    nope_dim: u32,
    rope_dim: u32,
    value_dim: u32,
    latent_dim: u32,
    /// None where queries are projected at once.
    query_rank: Option<u32>,
    /// Of the linears into the latent space and out of attention.
    bias: bool,
    pub(super) norm_eps: f32,
    /// Factor on the scores.
    scale: f64,
    rope: RopeSpec,
}

/// A decoder whose heads have the sizes of latent attention; the norms' `eps` may be left out.
pub(super) fn decoder(source: Source, default_eps: f32) -> Result<Decoder, ConfigError> {
    let config = source.config;
    source.only_silu()?;
    let norm_eps = config.maybe_f32("rms_norm_eps", 0.0, 1.0)?.unwrap_or(default_eps);
    let head_dim = config.u32("qk_nope_head_dim", 1, 1 << 14)? + rope_dim(&config)?;
    let defaults = Defaults { head_dim: Some(head_dim), norm_eps: Some(norm_eps), ..Defaults::default() };
    let decoder = Decoder::read_with_defaults(source, &defaults)?;
    // `head_dim` of such a config is something else, and each head has its own keys.
    Ok(Decoder { head_dim, n_kv_heads: decoder.n_heads, ..decoder })
}

/// The part of a head that carries the position.
pub(super) fn rope_dim(config: &Config) -> Result<u32, ConfigError> {
    config.u32("qk_rope_head_dim", 1, 1 << 14)
}

/// `rope_scaling`, or the `rope_parameters` that transformers 5 has instead.
pub(super) fn rope_scaling<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>, ConfigError> {
    match config.object("rope_scaling", "rope_scaling.")? {
        Some(scaling) => Ok(Some(scaling)),
        None => config.object("rope_parameters", "rope_parameters."),
    }
}

impl LatentAttention {
    /// Reads the sizes, and a RoPE whose pairs are neighbours unless `rope_interleave` says no; the factor on the scores has YaRN's part in
    /// it. `default_rank` is that of the queries where the config does not speak of it: null means none.
    pub(super) fn read(decoder: &Decoder, default_rank: Option<u32>, default_theta: Option<f32>) -> Result<Self, ConfigError> {
        let config = decoder.config;
        let interleaved = config.bool_or("rope_interleave", true)?;
        let rope = RopeSpec::read(&config, decoder.source.model_type, rope_dim(&config)?, default_theta, interleaved)?;
        let yarn = yarn_attention_factor(rope_scaling(&config)?.as_ref())?;
        Self::with_rope(decoder, default_rank, config.u32("v_head_dim", 1, 1 << 14)?, rope, yarn)
    }

    /// The same with a RoPE that was read otherwise; `factor` is multiplied into that on the scores. The norms' `eps` is that of DeepSeek's
    /// own.
    pub(super) fn with_rope(
        decoder: &Decoder,
        default_rank: Option<u32>,
        value_dim: u32,
        rope: RopeSpec,
        factor: f64,
    ) -> Result<Self, ConfigError> {
        let config = decoder.config;
        let says_rank = config.entries().any(|(key, _)| key == "q_lora_rank");
        Ok(Self {
            hidden_size: decoder.hidden_size,
            n_heads: decoder.n_heads,
            nope_dim: decoder.head_dim - rope.dims,
            rope_dim: rope.dims,
            value_dim,
            latent_dim: config.u32("kv_lora_rank", 1, 1 << 20)?,
            query_rank: if says_rank { config.maybe_u32("q_lora_rank", 1, 1 << 20)? } else { default_rank },
            bias: config.bool_or("attention_bias", false)?,
            norm_eps: 1e-6,
            scale: f64::from(decoder.head_dim).powf(-0.5) * factor,
            rope,
        })
    }

    /// With keys and values in full, `kv_b_proj` under `path`.
    pub(super) fn expanded(&self, path: &str) -> LatentAttentionSpec {
        let up_dims = self.n_heads * (self.nope_dim + self.value_dim);
        self.with_up(path, LatentUp::Expanded(LinearSpec::new(format!("{path}.kv_b_proj"), self.latent_dim, up_dims, false)))
    }

    /// With the latent vector in the cache, `embed_q` and `unembed_out` under `path`.
    pub(super) fn absorbed(&self, path: &str, joined_keys: bool) -> LatentAttentionSpec {
        let by_head = |name: &str, input_dims, output_dims| HeadLinearSpec {
            path: format!("{path}.{name}"),
            n_heads: self.n_heads,
            input_dims,
            output_dims,
        };
        let embed_query = by_head("embed_q", self.nope_dim, self.latent_dim);
        let unembed_output = by_head("unembed_out", self.latent_dim, self.value_dim);
        self.with_up(path, LatentUp::Absorbed { embed_query, unembed_output, joined_keys })
    }

    fn with_up(&self, path: &str, up: LatentUp) -> LatentAttentionSpec {
        let linear = |name: &str, input, output, bias| LinearSpec::new(format!("{path}.{name}"), input, output, bias);
        let norm = |name: &str, dims| NormSpec::rms(format!("{path}.{name}"), dims, self.norm_eps);
        let query_dims = self.n_heads * (self.nope_dim + self.rope_dim);
        let query = match self.query_rank {
            None => LatentQuery::Direct(linear("q_proj", self.hidden_size, query_dims, false)),
            Some(rank) => LatentQuery::LowRank {
                down: linear("q_a_proj", self.hidden_size, rank, self.bias),
                norm: norm("q_a_layernorm", rank),
                up: linear("q_b_proj", rank, query_dims, false),
            },
        };
        LatentAttentionSpec {
            n_heads: self.n_heads,
            nope_dim: self.nope_dim,
            rope_dim: self.rope_dim,
            value_dim: self.value_dim,
            latent_dim: self.latent_dim,
            scale: self.scale as f32,
            query,
            down: linear("kv_a_proj_with_mqa", self.hidden_size, self.latent_dim + self.rope_dim, self.bias),
            latent_norm: norm("kv_a_layernorm", self.latent_dim),
            up,
            output: linear("o_proj", self.n_heads * self.value_dim, self.hidden_size, self.bias),
            rope: self.rope.clone(),
            temperature: None,
            indexer: None,
        }
    }
}

/// Checkpoints with the fused projection to keys and values, with layers that only predict further tokens, and with experts one by one.
pub(super) fn published(spec: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    published_with_prediction(spec, tensors)?;
    let absorbed = spec.layers.iter().find_map(|layer| match &layer.mixer {
        Mixer::Latent(latent) => matches!(latent.up, LatentUp::Absorbed { .. }).then_some(latent),
        _ => None,
    });
    absorbed.map_or(Ok(()), |latent| {
        tensors.split_latent_up_projection(&LatentUpProjection {
            n_heads: latent.n_heads,
            key_dims: latent.nope_dim,
            value_dims: latent.value_dim,
            rank: latent.latent_dim,
        })
    })
}

#[cfg(test)]
mod tests {
    use crate::{
        architectures::{read_spec, tests::tiny},
        spec::{LatentAttentionSpec, LatentQuery, LatentUp, Mixer},
    };
    use serde_json::{Value, json};

    fn read(model_type: &str, changes: Value) -> Result<LatentAttentionSpec, String> {
        let mut config = tiny(model_type);
        config.as_object_mut().expect("an object").extend(changes.as_object().expect("an object").clone());
        let spec = read_spec(&config).map_err(|error| error.to_string())?;
        match &spec.layers[0].mixer {
            Mixer::Latent(latent) => Ok((**latent).clone()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn queries_have_the_rank_that_the_config_says() {
        let low_rank = read("deepseek_v3", json!({})).expect("valid");
        assert_eq!((low_rank.query_rank(), low_rank.latent_dim, low_rank.value_dim), (Some(24), 32, 24));
        let direct = read("deepseek_v3", json!({"q_lora_rank": null})).expect("valid");
        assert!(matches!(&direct.query, LatentQuery::Direct(linear) if linear.output_dims == 4 * 24));
        assert!(read("deepseek_v32", json!({"q_lora_rank": null})).expect_err("an indexer").contains("q_lora_rank"));
        let mut config = tiny("deepseek_v3");
        config.as_object_mut().expect("an object").remove("q_lora_rank");
        let Mixer::Latent(default) = read_spec(&config).expect("valid").layers[0].mixer.clone() else { panic!("latent") };
        assert_eq!(default.query_rank(), Some(1536));
    }

    #[test]
    fn yarn_has_its_part_in_the_scale_of_the_scores() {
        let yarn = json!({"rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}});
        let plain = f64::from(24).powf(-0.5);
        let stretched = plain * (0.1 * 40f64.ln() + 1.0).powi(2);
        for (model_type, wanted) in [("deepseek_v2", stretched), ("deepseek_v3", stretched), ("youtu_llm", plain)] {
            assert_eq!(read(model_type, yarn.clone()).expect("valid").scale, wanted as f32, "{model_type}");
        }
    }

    #[test]
    fn what_is_cached() {
        let cached = |model_type| Mixer::Latent(Box::new(read(model_type, json!({})).expect("valid"))).cache_elements_per_token();
        assert_eq!(cached("deepseek_v2"), 4 * (24 + 24));
        assert_eq!(cached("deepseek_v3"), 32 + 8);
        assert_eq!(cached("deepseek_v32"), 32 + 8 + 128);
        assert!(matches!(read("mistral4", json!({})).expect("valid").up, LatentUp::Absorbed { joined_keys: true, .. }));
    }

    #[test]
    fn what_would_change_the_numbers_is_refused() {
        for (model_type, changes) in [
            ("deepseek_v2", json!({"scoring_func": "sigmoid"})),
            ("deepseek_v2", json!({"topk_method": "noaux_tc"})),
            ("deepseek_v2", json!({"norm_topk_prob": true})),
            ("deepseek_v3", json!({"scoring_func": "softmax"})),
            ("deepseek_v3", json!({"topk_method": "greedy"})),
            ("deepseek_v3", json!({"hidden_act": "gelu"})),
            ("deepseek_v32", json!({"index_head_dim": 4})),
            ("glm4_moe_lite", json!({"partial_rotary_factor": 0.5})),
            ("mistral4", json!({"rope_parameters": null})),
        ] {
            assert!(read(model_type, changes.clone()).is_err(), "{model_type} {changes}");
        }
    }
}
