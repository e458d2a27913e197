//! Spec pieces that many architectures share, with the names that Llama gave them.

use crate::{
    config::{Config, ConfigError},
    published::Published,
    spec::{
        Activation, AttentionSpec, EmbeddingSpec, ExpertInputs, ExpertMlpSpec, ExpertsSpec, FeedForward, HeadNorms, HeadSpec, LayerSpec,
        LinearSpec, LogitsSpec, Mixer, MlpInputs, MlpSpec, ModelSpec, NormKind, NormSpec, Projections, Quantization, Residual, RopeSpec,
    },
};

/// What an architecture reads from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// The whole `config.json`.
    pub(super) root: Config<'a>,
    /// The part that describes the language model: the same, or an object inside it.
    pub(super) config: Config<'a>,
    /// For messages.
    pub(super) model_type: &'a str,
    /// What stands before every name of the language model's tensors: empty, or `language_model.`.
    pub(super) prefix: &'a str,
}

/// The sizes that nearly every decoder's config has.
#[derive(Clone, Copy)]
pub(super) struct Decoder<'a> {
    pub(super) source: Source<'a>,
    pub(super) config: Config<'a>,
    pub(super) hidden_size: u32,
    pub(super) n_layers: u32,
    pub(super) n_heads: u32,
    pub(super) n_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) vocab_size: u32,
    pub(super) norm_eps: f32,
    /// Of every norm that `norm` makes.
    pub(super) norm_kind: NormKind,
}

/// Sizes of a config that may leave them out.
#[derive(Default)]
pub(super) struct Defaults {
    pub(super) hidden_size: Option<u32>,
    pub(super) n_layers: Option<u32>,
    pub(super) n_heads: Option<u32>,
    /// As many as heads when there is none here.
    pub(super) n_kv_heads: Option<u32>,
    /// The hidden size over the heads when there is none here.
    pub(super) head_dim: Option<u32>,
    pub(super) vocab_size: Option<u32>,
    /// What `eps` is, whatever the config says under `rms_norm_eps`.
    pub(super) norm_eps: Option<f32>,
}

/// Which linears of an attention carry a bias.
#[derive(Clone, Copy)]
pub(super) struct AttentionBias {
    pub(super) qkv: bool,
    pub(super) output: bool,
}

impl AttentionBias {
    pub(super) const NONE: AttentionBias = AttentionBias { qkv: false, output: false };

    pub(super) fn all(bias: bool) -> Self {
        Self { qkv: bias, output: bias }
    }
}

impl<'a> Source<'a> {
    pub(super) fn new(root: Config<'a>, model_type: &'a str) -> Self {
        Self { root, config: root, model_type, prefix: "" }
    }

    /// The language model of a model that also sees: its config is the object `text_config`, its tensors' names begin with `prefix`.
    pub(super) fn text(self, prefix: &'a str) -> Result<Self, ConfigError> {
        let config = self.config.object("text_config", "text_config.")?;
        let config = config.ok_or_else(|| ConfigError::Missing { key: "text_config".into() })?;
        Ok(Self { config, prefix, ..self })
    }

    /// The same where the first releases had the keys of `text_config` at the top.
    pub(super) fn text_or_root(self, prefix: &'a str) -> Result<Self, ConfigError> {
        if self.config.get("text_config").is_some() { self.text(prefix) } else { Ok(Self { prefix, ..self }) }
    }

    /// A feature that the config asks for and that is not there.
    pub(super) fn unsupported(&self, feature: impl Into<String>) -> ConfigError {
        ConfigError::Unsupported { model_type: self.model_type.into(), feature: feature.into() }
    }

    /// Refuses a config in which one of these flags is true.
    pub(super) fn refuse_flags(&self, keys: &[&str]) -> Result<(), ConfigError> {
        keys.iter().try_for_each(|key| match self.config.bool_or(key, false)? {
            true => Err(self.unsupported(format!("`{key}`"))),
            false => Ok(()),
        })
    }

    /// Refuses a config that names another nonlinearity of its MLPs than SiLU.
    pub(super) fn only_silu(&self) -> Result<(), ConfigError> {
        self.only("hidden_act", &["silu", "swish"])
    }

    /// Refuses a config whose `key` names another kind than these; it may be absent.
    pub(super) fn only(&self, key: &str, known: &[&str]) -> Result<(), ConfigError> {
        match self.config.text(key)?.filter(|found| !known.contains(found)) {
            Some(found) => Err(self.unsupported(format!("`{key}` of `{found}`"))),
            None => Ok(()),
        }
    }
}

impl<'a> Decoder<'a> {
    /// Reads the sizes by the names of most configs; the norms' `eps` under `rms_norm_eps`.
    pub(super) fn read(source: Source<'a>) -> Result<Self, ConfigError> {
        Self::read_with_eps(source, source.config.f32("rms_norm_eps", 0.0, 1.0)?)
    }

    pub(super) fn read_with_eps(source: Source<'a>, norm_eps: f32) -> Result<Self, ConfigError> {
        Self::read_with_defaults(source, &Defaults { norm_eps: Some(norm_eps), ..Defaults::default() })
    }

    /// `n_layers` is the key under which the number of layers stands.
    pub(super) fn read_named(source: Source<'a>, n_layers: &str, norm_eps: f32) -> Result<Self, ConfigError> {
        let n_layers = source.config.u32(n_layers, 1, 4096)?;
        let defaults = Defaults { n_layers: Some(n_layers), norm_eps: Some(norm_eps), ..Defaults::default() };
        Ok(Self { n_layers, ..Self::read_with_defaults(source, &defaults)? })
    }

    /// A decoder none of whose layers has attention: the sizes of heads are zero.
    pub(super) fn without_attention(source: Source<'a>, n_layers: u32, norm_eps: f32) -> Result<Self, ConfigError> {
        let config = source.config;
        Ok(Self {
            source,
            config,
            hidden_size: config.u32("hidden_size", 1, 1 << 20)?,
            n_layers,
            n_heads: 0,
            n_kv_heads: 0,
            head_dim: 0,
            vocab_size: config.u32("vocab_size", 1, 1 << 24)?,
            norm_eps,
            norm_kind: NormKind::Rms { offset: 0.0 },
        })
    }

    /// The same where the config may leave sizes out.
    pub(super) fn read_with_defaults(source: Source<'a>, defaults: &Defaults) -> Result<Self, ConfigError> {
        let config = source.config;
        let size = |key, max, default: Option<u32>| match default {
            Some(default) => Ok(config.maybe_u32(key, 1, max)?.unwrap_or(default)),
            None => config.u32(key, 1, max),
        };
        let hidden_size = size("hidden_size", 1 << 20, defaults.hidden_size)?;
        let n_heads = size("num_attention_heads", 1 << 14, defaults.n_heads)?;
        let n_kv_heads = size("num_key_value_heads", 1 << 14, Some(defaults.n_kv_heads.unwrap_or(n_heads)))?;
        let contradiction = |message| Err(ConfigError::Contradiction { message });
        if n_heads % n_kv_heads != 0 {
            return contradiction(format!("num_attention_heads {n_heads} is no multiple of num_key_value_heads {n_kv_heads}"));
        }
        let head_dim = match config.maybe_u32("head_dim", 1, 1 << 14)?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size % n_heads == 0 => hidden_size / n_heads,
            None => return contradiction(format!("hidden_size {hidden_size} is no multiple of num_attention_heads {n_heads}")),
        };
        Ok(Self {
            source,
            config,
            hidden_size,
            n_layers: size("num_hidden_layers", 4096, defaults.n_layers)?,
            n_heads,
            n_kv_heads,
            head_dim,
            vocab_size: size("vocab_size", 1 << 24, defaults.vocab_size)?,
            norm_eps: defaults.norm_eps.map_or_else(|| config.f32("rms_norm_eps", 0.0, 1.0), Ok)?,
            norm_kind: NormKind::Rms { offset: 0.0 },
        })
    }

    /// A name of the model: the prefix of wrappers, then `name`.
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.source.prefix)
    }

    pub(super) fn norm(&self, path: String, dims: u32) -> NormSpec {
        NormSpec { path, dims, eps: self.norm_eps, kind: self.norm_kind }
    }

    /// `{q,k,v,o}_proj` under `path`, without RoPE and norms.
    pub(super) fn attention(&self, path: &str, bias: AttentionBias) -> AttentionSpec {
        let (q_dims, kv_dims) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let linear = |name: &str, input, output, bias| LinearSpec::new(format!("{path}.{name}"), input, output, bias);
        AttentionSpec {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f32).powf(-0.5),
            projections: Projections::Separate {
                query: linear("q_proj", self.hidden_size, q_dims, bias.qkv),
                key: linear("k_proj", self.hidden_size, kv_dims, bias.qkv),
                value: linear("v_proj", self.hidden_size, kv_dims, bias.qkv),
            },
            output: linear("o_proj", q_dims, self.hidden_size, bias.output),
            head_norms: HeadNorms::None,
            value_norm: None,
            rope: None,
            temperature: None,
            window: None,
            sinks: None,
            softcap: None,
            widens_f16: false,
            gate: None,
        }
    }

    /// The same with one linear, `qkv_proj`, for queries, keys and values.
    pub(super) fn fused_attention(&self, path: &str, bias: AttentionBias) -> AttentionSpec {
        let output_dims = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim;
        let fused = LinearSpec::new(format!("{path}.qkv_proj"), self.hidden_size, output_dims, bias.qkv);
        AttentionSpec { projections: Projections::Fused(fused), ..self.attention(path, bias) }
    }

    /// `q_norm` and `k_norm` under `path`, over all heads together.
    pub(super) fn whole_norms(&self, path: &str) -> HeadNorms {
        let norm = |name: &str, n_heads| self.norm(format!("{path}.{name}"), n_heads * self.head_dim);
        HeadNorms::Whole { query: norm("q_norm", self.n_heads), key: norm("k_norm", self.n_kv_heads) }
    }

    /// `q_norm` and `k_norm` under `path`, over each head.
    pub(super) fn head_norms(&self, path: &str) -> HeadNorms {
        let norm = |name: &str| self.norm(format!("{path}.{name}"), self.head_dim);
        HeadNorms::PerHead { query: norm("q_norm"), key: norm("k_norm") }
    }

    /// RoPE over the whole head, with the keys that most configs have.
    pub(super) fn rope(&self, default_theta: Option<f32>) -> Result<RopeSpec, ConfigError> {
        RopeSpec::from_config(&self.config, self.source.model_type, self.head_dim, default_theta)
    }

    /// RoPE's theta and scaling: at the top and in `rope_scaling`, or both in the `rope_parameters` of transformers 5.
    pub(super) fn rope_table(&self, default_theta: f32) -> Result<(f32, Option<Config<'a>>), ConfigError> {
        let theta = |config: &Config| config.maybe_f32("rope_theta", 1.0, 1e12);
        let parameters = self.config.object("rope_parameters", "rope_parameters.")?;
        let nested = parameters.as_ref().map_or(Ok(None), theta)?;
        let scaling = self.config.object("rope_scaling", "rope_scaling.")?.or(parameters);
        Ok((theta(&self.config)?.or(nested).unwrap_or(default_theta), scaling))
    }

    /// `{gate,up,down}_proj` under `path`, with SiLU.
    pub(super) fn mlp(&self, path: &str, intermediate_size: u32, bias: bool) -> MlpSpec {
        let linear = |name: &str, input, output| LinearSpec::new(format!("{path}.{name}"), input, output, bias);
        MlpSpec {
            inputs: MlpInputs::Gated {
                gate: linear("gate_proj", self.hidden_size, intermediate_size),
                up: linear("up_proj", self.hidden_size, intermediate_size),
            },
            activation: Activation::Silu,
            down: linear("down_proj", intermediate_size, self.hidden_size),
        }
    }

    /// The same with one linear, `gate_up_proj`, for gate and `up`.
    pub(super) fn fused_mlp(&self, path: &str, intermediate_size: u32, bias: bool) -> MlpSpec {
        let fused = LinearSpec::new(format!("{path}.gate_up_proj"), self.hidden_size, 2 * intermediate_size, bias);
        MlpSpec { inputs: MlpInputs::GatedFused(fused), ..self.mlp(path, intermediate_size, bias) }
    }

    /// A pre-norm layer with Llama's names of the norms.
    pub(super) fn pre_norm_layer(&self, layer: &str, mixer: Mixer, feed_forward: FeedForward) -> LayerSpec {
        let norm = |name: &str| self.norm(format!("{layer}.{name}"), self.hidden_size);
        LayerSpec::pre_norm(norm("input_layernorm"), mixer, norm("post_attention_layernorm"), feed_forward)
    }

    /// A layer with norms of what attention and feed-forward give and of nothing else, named as in OLMo 2.
    pub(super) fn output_norm_layer(&self, layer: &str, mixer: Mixer, feed_forward: FeedForward) -> LayerSpec {
        let norm = |name: &str| Some(self.norm(format!("{layer}.{name}"), self.hidden_size));
        LayerSpec {
            before_mixer: None,
            mixer,
            after_mixer: norm("post_attention_layernorm"),
            before_feed_forward: None,
            feed_forward,
            after_feed_forward: norm("post_feedforward_layernorm"),
            residual: Residual::PLAIN,
            layer_input: None,
            output_scale: None,
        }
    }

    /// A whole model of Llama's layers, each from what `parts` says of its number and path.
    pub(super) fn dense(
        &self,
        tied_by_default: bool,
        mut parts: impl FnMut(u32, &str) -> Result<(AttentionSpec, MlpSpec), ConfigError>,
    ) -> Result<ModelSpec, ConfigError> {
        let layers = self.layers(|i, path| {
            let (attention, mlp) = parts(i, path)?;
            Ok(self.pre_norm_layer(path, Mixer::Attention(Box::new(attention)), FeedForward::Mlp(mlp)))
        })?;
        self.model(layers, tied_by_default)
    }

    /// The same of layers that are all alike, with Llama's names.
    pub(super) fn uniform(
        &self,
        bias: AttentionBias,
        mlp_bias: bool,
        rope: &RopeSpec,
        tied_by_default: bool,
    ) -> Result<ModelSpec, ConfigError> {
        self.source.only_silu()?;
        let intermediate_size = self.intermediate_size()?;
        self.dense(tied_by_default, |_, path| {
            let mut attention = self.attention(&format!("{path}.self_attn"), bias);
            attention.rope = Some(rope.clone());
            Ok((attention, self.mlp(&format!("{path}.mlp"), intermediate_size, mlp_bias)))
        })
    }

    /// The layers, each from its number and its path `model.layers.<number>`.
    pub(super) fn layers(&self, layer: impl FnMut(u32, &str) -> Result<LayerSpec, ConfigError>) -> Result<Vec<LayerSpec>, ConfigError> {
        self.layers_under("model.layers", layer)
    }

    pub(super) fn layers_under(
        &self,
        path: &str,
        mut layer: impl FnMut(u32, &str) -> Result<LayerSpec, ConfigError>,
    ) -> Result<Vec<LayerSpec>, ConfigError> {
        (0..self.n_layers).map(|i| layer(i, &self.path(&format!("{path}.{i}")))).collect()
    }

    /// `model.embed_tokens`, these layers, `model.norm` and `lm_head`.
    pub(super) fn model(&self, layers: Vec<LayerSpec>, tied_by_default: bool) -> Result<ModelSpec, ConfigError> {
        // Of a wrapper's two configs the inner one counts; the outer one's `true` may be no more than a default of the library that wrote it.
        let tied_by_default = tied_by_default && self.source.root.bool_or("tie_word_embeddings", true)?;
        let head = match self.config.bool_or("tie_word_embeddings", tied_by_default)? {
            true => HeadSpec::Tied,
            false => HeadSpec::Linear(LinearSpec::new(self.path("lm_head"), self.hidden_size, self.vocab_size, false)),
        };
        Ok(ModelSpec {
            model_type: self.source.model_type.into(),
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            embedding: EmbeddingSpec { path: self.path("model.embed_tokens"), vocab_size: self.vocab_size, dims: self.hidden_size },
            embedding_scale: 1.0,
            layer_inputs: None,
            streams: None,
            layers,
            final_norm: self.norm(self.path("model.norm"), self.hidden_size),
            head,
            logits: LogitsSpec::PLAIN,
            quantization: Quantization::from_config(&self.source.root, self.source.model_type)?,
            max_position_embeddings: self.config.maybe_u32("max_position_embeddings", 1, u32::MAX)?,
            eos_token_ids: eos_token_ids(&self.source, self.vocab_size)?,
            published: Published::default(),
        })
    }

    pub(super) fn intermediate_size(&self) -> Result<u32, ConfigError> {
        self.config.u32("intermediate_size", 1, 1 << 22)
    }
}

/// A wrapper's config may have them outside or inside.
fn eos_token_ids(source: &Source, vocab_size: u32) -> Result<Vec<u32>, ConfigError> {
    let outer = source.root.eos_token_ids(vocab_size)?;
    if outer.is_empty() { source.config.eos_token_ids(vocab_size) } else { Ok(outer) }
}

/// `{gate,up,down}_proj` of `n_experts` gated MLPs with SiLU, stacked under `path`.
pub(super) fn experts(path: &str, n_experts: u32, hidden_size: u32, intermediate_size: u32) -> ExpertMlpSpec {
    experts_with_bias(path, n_experts, hidden_size, intermediate_size, false)
}

pub(super) fn experts_with_bias(path: &str, n_experts: u32, hidden_size: u32, intermediate_size: u32, bias: bool) -> ExpertMlpSpec {
    let experts =
        |name: &str, input_dims, output_dims| ExpertsSpec { path: format!("{path}.{name}"), n_experts, input_dims, output_dims, bias };
    ExpertMlpSpec {
        inputs: ExpertInputs::Gated {
            gate: experts("gate_proj", hidden_size, intermediate_size),
            up: experts("up_proj", hidden_size, intermediate_size),
        },
        activation: Activation::Silu,
        down: experts("down_proj", intermediate_size, hidden_size),
    }
}

/// The sliding window of each layer, from `layer_types`; None where the config has no such list.
pub(super) fn windows(config: &Config, n_layers: u32) -> Result<Option<Vec<Option<u32>>>, ConfigError> {
    let Some(types) = config.texts("layer_types")? else {
        return Ok(None);
    };
    if types.len() != n_layers as usize {
        return Err(ConfigError::Contradiction {
            message: format!("layer_types has {} entries for num_hidden_layers {n_layers}", types.len()),
        });
    }
    let window = || config.u32("sliding_window", 1, u32::MAX);
    types.into_iter().map(|kind| window_of_type(kind, window)).collect::<Result<_, _>>().map(Some)
}

/// The sliding window of a layer of this type.
pub(super) fn window_of_type(kind: &str, window: impl FnOnce() -> Result<u32, ConfigError>) -> Result<Option<u32>, ConfigError> {
    match kind {
        "full_attention" => Ok(None),
        "sliding_attention" => window().map(Some),
        other => Err(ConfigError::Invalid {
            key: "layer_types".into(),
            wanted: "full_attention or sliding_attention".into(),
            found: other.into(),
        }),
    }
}

/// The same head under another path.
pub(super) fn head_under(path: String, head: HeadSpec) -> HeadSpec {
    match head {
        HeadSpec::Tied => HeadSpec::Tied,
        HeadSpec::Linear(linear) => HeadSpec::Linear(LinearSpec { path, ..linear }),
        HeadSpec::LinearOrTied(linear) => HeadSpec::LinearOrTied(LinearSpec { path, ..linear }),
    }
}

/// Each `period`th layer sees all, the others a window.
pub(super) fn windows_by_period(n_layers: u32, period: u32, window: u32) -> Vec<Option<u32>> {
    (1..=n_layers).map(|number| (number % period != 0).then_some(window)).collect()
}

/// Which layers have RoPE, by `no_rope_layers`: a list that has, for all its name, a 1 for those.
pub(super) fn roped_layers(config: &Config) -> Result<Option<Vec<bool>>, ConfigError> {
    let Some(listed) = config.u32s("no_rope_layers")? else { return Ok(None) };
    let n_layers = config.u32("num_hidden_layers", 1, 4096)?;
    match listed.len() == n_layers as usize {
        true => Ok(Some(listed.into_iter().map(|entry| entry != 0).collect())),
        false => Err(ConfigError::Contradiction {
            message: format!("no_rope_layers has {} entries for num_hidden_layers {n_layers}", listed.len()),
        }),
    }
}

/// Refuses a `layer_types` that contradicts windows which were read from other keys.
pub(super) fn check_layer_types(config: &Config, expected: &[Option<u32>]) -> Result<(), ConfigError> {
    let Some(types) = config.texts("layer_types")? else { return Ok(()) };
    let is_sliding = |kind: &&str| *kind == "sliding_attention";
    match types.len() == expected.len() && types.iter().zip(expected).all(|(kind, window)| is_sliding(kind) == window.is_some()) {
        true => Ok(()),
        false => Err(ConfigError::Contradiction { message: "layer_types and sliding_window_pattern name other layers".into() }),
    }
}

/// The part of a head that RoPE turns: at the top, or in the `rope_parameters` of transformers 5.
pub(super) fn partial_rotary_factor(config: &Config) -> Result<Option<f64>, ConfigError> {
    match config.maybe_f64("partial_rotary_factor", 0.0, 1.0)? {
        Some(factor) => Ok(Some(factor)),
        None => match config.object("rope_parameters", "rope_parameters.")? {
            Some(parameters) => parameters.maybe_f64("partial_rotary_factor", 0.0, 1.0),
            None => Ok(None),
        },
    }
}
