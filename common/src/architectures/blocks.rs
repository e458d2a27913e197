//! Spec pieces that many architectures share, with the names that Llama gave them.

use crate::{
    config::{Config, ConfigError},
    published::Published,
    spec::{
        AttentionSpec, EmbeddingSpec, ExpertsSpec, HeadSpec, LayerSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec, Quantization, RopeSpec,
    },
};

/// The sizes that nearly every decoder's config has.
pub(super) struct Decoder<'a> {
    pub(super) config: &'a Config<'a>,
    pub(super) model_type: &'static str,
    pub(super) hidden_size: u32,
    pub(super) n_layers: u32,
    pub(super) n_heads: u32,
    pub(super) n_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) vocab_size: u32,
    pub(super) norm_eps: f32,
}

/// Which linears of an attention carry a bias.
#[derive(Clone, Copy)]
pub(super) struct AttentionBias {
    pub(super) qkv: bool,
    pub(super) output: bool,
}

impl<'a> Decoder<'a> {
    pub(super) fn read(config: &'a Config<'a>, model_type: &'static str) -> Result<Self, ConfigError> {
        let hidden_size = config.u32("hidden_size", 1, 1 << 20)?;
        let n_heads = config.u32("num_attention_heads", 1, 1 << 14)?;
        let n_kv_heads = config.maybe_u32("num_key_value_heads", 1, 1 << 14)?.unwrap_or(n_heads);
        let contradiction = |message| Err(ConfigError::Contradiction { message });
        if n_heads % n_kv_heads != 0 {
            return contradiction(format!("num_attention_heads {n_heads} is no multiple of num_key_value_heads {n_kv_heads}"));
        }
        let head_dim = match config.maybe_u32("head_dim", 1, 1 << 14)? {
            Some(head_dim) => head_dim,
            None if hidden_size % n_heads == 0 => hidden_size / n_heads,
            None => return contradiction(format!("hidden_size {hidden_size} is no multiple of num_attention_heads {n_heads}")),
        };
        Ok(Self {
            config,
            model_type,
            hidden_size,
            n_layers: config.u32("num_hidden_layers", 1, 4096)?,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size: config.u32("vocab_size", 1, 1 << 24)?,
            norm_eps: config.f32("rms_norm_eps", 0.0, 1.0)?,
        })
    }

    pub(super) fn linear(&self, path: String, input_dims: u32, output_dims: u32, bias: bool) -> LinearSpec {
        LinearSpec { path, input_dims, output_dims, bias }
    }

    pub(super) fn norm(&self, path: String, dims: u32) -> NormSpec {
        NormSpec { path, dims, eps: self.norm_eps }
    }

    /// `self_attn.{q,k,v,o}_proj` with RoPE over the whole head.
    pub(super) fn attention(&self, layer: &str, bias: AttentionBias, default_theta: Option<f32>) -> Result<AttentionSpec, ConfigError> {
        let (q_dims, kv_dims) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let linear = |name: &str, input, output, bias| self.linear(format!("{layer}.self_attn.{name}"), input, output, bias);
        Ok(AttentionSpec {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f32).powf(-0.5),
            query: linear("q_proj", self.hidden_size, q_dims, bias.qkv),
            key: linear("k_proj", self.hidden_size, kv_dims, bias.qkv),
            value: linear("v_proj", self.hidden_size, kv_dims, bias.qkv),
            output: linear("o_proj", q_dims, self.hidden_size, bias.output),
            query_norm: None,
            key_norm: None,
            rope: Some(RopeSpec::from_config(self.config, self.model_type, self.head_dim, default_theta)?),
            window: None,
        })
    }

    /// The same with `q_norm` and `k_norm` over each head.
    pub(super) fn attention_with_head_norms(
        &self,
        layer: &str,
        bias: AttentionBias,
        default_theta: Option<f32>,
    ) -> Result<AttentionSpec, ConfigError> {
        let norm = |name: &str| Some(self.norm(format!("{layer}.self_attn.{name}"), self.head_dim));
        Ok(AttentionSpec { query_norm: norm("q_norm"), key_norm: norm("k_norm"), ..self.attention(layer, bias, default_theta)? })
    }

    /// `mlp.{gate,up,down}_proj`.
    pub(super) fn mlp(&self, layer: &str, intermediate_size: u32, bias: bool) -> MlpSpec {
        let linear = |name: &str, input, output| self.linear(format!("{layer}.mlp.{name}"), input, output, bias);
        MlpSpec {
            gate: linear("gate_proj", self.hidden_size, intermediate_size),
            up: linear("up_proj", self.hidden_size, intermediate_size),
            down: linear("down_proj", intermediate_size, self.hidden_size),
        }
    }

    /// A pre-norm layer's two norms.
    pub(super) fn pre_norms(&self, layer: &str) -> (Option<NormSpec>, Option<NormSpec>) {
        let norm = |name: &str| Some(self.norm(format!("{layer}.{name}"), self.hidden_size));
        (norm("input_layernorm"), norm("post_attention_layernorm"))
    }

    /// `model.embed_tokens`, these layers, `model.norm` and `lm_head`.
    pub(super) fn model(&self, layers: Vec<LayerSpec>, tied_by_default: bool) -> Result<ModelSpec, ConfigError> {
        let head = match self.config.bool_or("tie_word_embeddings", tied_by_default)? {
            true => HeadSpec::Tied,
            false => HeadSpec::Linear(self.linear("lm_head".into(), self.hidden_size, self.vocab_size, false)),
        };
        Ok(ModelSpec {
            model_type: self.model_type.into(),
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            embedding: EmbeddingSpec { path: "model.embed_tokens".into(), vocab_size: self.vocab_size, dims: self.hidden_size },
            layers,
            final_norm: self.norm("model.norm".into(), self.hidden_size),
            head,
            quantization: Quantization::from_config(self.config, self.model_type)?,
            max_position_embeddings: self.config.maybe_u32("max_position_embeddings", 1, u32::MAX)?,
            eos_token_ids: self.config.eos_token_ids(self.vocab_size)?,
            published: Published::default(),
        })
    }

    pub(super) fn intermediate_size(&self) -> Result<u32, ConfigError> {
        self.config.u32("intermediate_size", 1, 1 << 22)
    }
}

/// Gate, up and down projection of `n_experts` gated MLPs, stacked under `path`.
pub(super) fn experts(path: &str, n_experts: u32, hidden_size: u32, intermediate_size: u32) -> [ExpertsSpec; 3] {
    let projections = [
        ("gate_proj", hidden_size, intermediate_size),
        ("up_proj", hidden_size, intermediate_size),
        ("down_proj", intermediate_size, hidden_size),
    ];
    projections.map(|(name, input_dims, output_dims)| ExpertsSpec { path: format!("{path}.{name}"), n_experts, input_dims, output_dims })
}
