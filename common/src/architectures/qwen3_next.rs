//! Qwen3-Next: layers with the gated delta rule, every few layers one with gated attention; routed experts beside a gated shared one.

use super::{
    Architecture, Group,
    blocks::{AttentionBias, Decoder, Source, experts},
};
use crate::{
    config::ConfigError,
    published::{Published, PublishedError, Tensors},
    spec::{
        AttentionGate, AttentionSpec, ConvolutionSpec, FeedForward, GatedDeltaProjections, GatedDeltaSpec, LinearSpec, Mixer, ModelSpec,
        MoeSpec, NormSpec, Projections, RopeSpec, RouterSpec, SharedExpertSpec, TensorSpec, rotary_dims,
    },
};

pub(super) const ARCHITECTURES: &[Architecture] = &[Architecture {
    model_type: "qwen3_next",
    group: Group::QwenHybrid,
    special: "gated delta rule beside gated attention, gated shared expert",
    read,
}];

/// Sizes of the layers with the gated delta rule.
pub(super) struct DeltaSizes {
    pub(super) n_key_heads: u32,
    pub(super) n_value_heads: u32,
    pub(super) key_dim: u32,
    pub(super) value_dim: u32,
    pub(super) kernel: u32,
}

fn read(source: Source) -> Result<ModelSpec, ConfigError> {
    let decoder = Decoder::read(source)?;
    let config = decoder.config;
    let sizes = DeltaSizes::read(&decoder, &DeltaSizes { n_key_heads: 16, n_value_heads: 32, key_dim: 128, value_dim: 128, kernel: 4 })?;
    let full = full_attention(&decoder)?;
    let rope = partial_rope(&decoder, None)?;
    let n_experts = config.u32("num_experts", 0, 1 << 16)?;
    let dense_layers = config.u32s("mlp_only_layers")?.unwrap_or_default();
    let sparse_step = config.maybe_u32("decoder_sparse_step", 1, 4096)?.unwrap_or(1);
    let layers = decoder.layers(|i, path| {
        let mixer = match full.contains(&i) {
            true => Mixer::Attention(Box::new(attention(&decoder, &format!("{path}.self_attn"), rope.clone())?)),
            false => Mixer::GatedDelta(Box::new(sizes.mixer(&decoder, &format!("{path}.linear_attn"), projections_by_key_head))),
        };
        let path_of_mlp = format!("{path}.mlp");
        let is_routed = !dense_layers.contains(&i) && n_experts > 0 && (i + 1) % sparse_step == 0;
        let feed_forward = match is_routed {
            true => FeedForward::Experts(Box::new(moe(&decoder, &path_of_mlp, n_experts, false)?)),
            false => FeedForward::Mlp(decoder.mlp(&path_of_mlp, decoder.intermediate_size()?, false)),
        };
        Ok(decoder.pre_norm_layer(path, mixer, feed_forward))
    })?;
    Ok(ModelSpec { published: Published::new(published), ..decoder.model(layers, false)? })
}

impl DeltaSizes {
    /// What the config leaves out is as in `defaults`.
    pub(super) fn read(decoder: &Decoder, defaults: &DeltaSizes) -> Result<Self, ConfigError> {
        let or = |key, max, default| Ok::<u32, ConfigError>(decoder.config.maybe_u32(key, 1, max)?.unwrap_or(default));
        let sizes = Self {
            n_key_heads: or("linear_num_key_heads", 1 << 14, defaults.n_key_heads)?,
            n_value_heads: or("linear_num_value_heads", 1 << 14, defaults.n_value_heads)?,
            key_dim: or("linear_key_head_dim", 1 << 14, defaults.key_dim)?,
            value_dim: or("linear_value_head_dim", 1 << 14, defaults.value_dim)?,
            kernel: or("linear_conv_kernel_dim", 1 << 10, defaults.kernel)?,
        };
        if !sizes.n_value_heads.is_multiple_of(sizes.n_key_heads) {
            let (values, keys) = (sizes.n_value_heads, sizes.n_key_heads);
            let message = format!("linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}");
            return Err(ConfigError::Contradiction { message });
        }
        Ok(sizes)
    }

    pub(super) fn keys(&self) -> u32 {
        self.n_key_heads * self.key_dim
    }

    pub(super) fn values(&self) -> u32 {
        self.n_value_heads * self.value_dim
    }

    pub(super) fn mixer(
        &self,
        decoder: &Decoder,
        path: &str,
        projections: impl Fn(&Self, &Decoder, &str) -> GatedDeltaProjections,
    ) -> GatedDeltaSpec {
        let channels = 2 * self.keys() + self.values();
        GatedDeltaSpec {
            n_key_heads: self.n_key_heads,
            n_value_heads: self.n_value_heads,
            key_dim: self.key_dim,
            value_dim: self.value_dim,
            projections: projections(self, decoder, path),
            convolution: ConvolutionSpec { path: format!("{path}.conv1d"), channels, kernel: self.kernel, bias: false },
            dt_bias: TensorSpec::new(format!("{path}.dt_bias"), &[self.n_value_heads]),
            a_log: TensorSpec::new(format!("{path}.A_log"), &[self.n_value_heads]),
            norm: NormSpec::rms(format!("{path}.norm"), self.value_dim, decoder.norm_eps),
            output: LinearSpec::new(format!("{path}.out_proj"), self.values(), decoder.hidden_size, false),
        }
    }
}

fn projections_by_key_head(sizes: &DeltaSizes, decoder: &Decoder, path: &str) -> GatedDeltaProjections {
    let linear = |name: &str, outputs| LinearSpec::new(format!("{path}.{name}"), decoder.hidden_size, outputs, false);
    GatedDeltaProjections::ByKeyHead {
        qkvz: linear("in_proj_qkvz", 2 * (sizes.keys() + sizes.values())),
        ba: linear("in_proj_ba", 2 * sizes.n_value_heads),
    }
}

/// Layers with attention: those that `layer_types` says, else every `full_attention_interval`-th.
pub(super) fn full_attention(decoder: &Decoder) -> Result<Vec<u32>, ConfigError> {
    let Some(types) = decoder.config.texts("layer_types")? else {
        let interval = decoder.config.maybe_u32("full_attention_interval", 1, 4096)?.unwrap_or(4);
        return Ok((0..decoder.n_layers).filter(|i| (i + 1) % interval == 0).collect());
    };
    if types.len() != decoder.n_layers as usize {
        let message = format!("layer_types has {} entries for num_hidden_layers {}", types.len(), decoder.n_layers);
        return Err(ConfigError::Contradiction { message });
    }
    if let Some(other) = types.iter().find(|kind| !["full_attention", "linear_attention"].contains(kind)) {
        return Err(decoder.source.unsupported(format!("layers of type `{other}`")));
    }
    Ok((0..).zip(types).filter(|(_, kind)| *kind == "full_attention").map(|(i, _)| i).collect())
}

/// RoPE of the first `partial_rotary_factor` of each head, a quarter when the config does not say.
pub(super) fn partial_rope(decoder: &Decoder, default_theta: Option<f32>) -> Result<RopeSpec, ConfigError> {
    let config = decoder.config;
    let nested = match config.object("rope_parameters", "rope_parameters.")? {
        Some(parameters) => parameters.maybe_f64("partial_rotary_factor", 0.0, 1.0)?,
        None => None,
    };
    let factor = nested.or(config.maybe_f64("partial_rotary_factor", 0.0, 1.0)?).unwrap_or(0.25);
    let dims = rotary_dims(decoder.head_dim, factor)?;
    RopeSpec::read(&config, decoder.source.model_type, dims, default_theta, false)
}

/// Attention with a norm over each head of queries and keys, whose query projection gives the gate of the output too.
pub(super) fn attention(decoder: &Decoder, path: &str, rope: RopeSpec) -> Result<AttentionSpec, ConfigError> {
    let mut attention = decoder.attention(path, AttentionBias::all(decoder.config.bool_or("attention_bias", false)?));
    if let Projections::Separate { query, .. } = &mut attention.projections {
        query.output_dims *= 2;
    }
    Ok(AttentionSpec { head_norms: decoder.head_norms(path), rope: Some(rope), gate: Some(AttentionGate::InQuery), ..attention })
}

pub(super) fn moe(decoder: &Decoder, path: &str, n_experts: u32, renormalise_by_default: bool) -> Result<MoeSpec, ConfigError> {
    let (config, hidden_size) = (decoder.config, decoder.hidden_size);
    let size = |key| config.u32(key, 1, 1 << 22);
    let linear = |name: &str, outputs| LinearSpec::new(format!("{path}.{name}"), hidden_size, outputs, false);
    let top_k = config.u32("num_experts_per_tok", 1, n_experts)?;
    Ok(MoeSpec {
        router: RouterSpec::softmax(linear("gate", n_experts), top_k, config.bool_or("norm_topk_prob", renormalise_by_default)?),
        experts: experts(&format!("{path}.switch_mlp"), n_experts, hidden_size, size("moe_intermediate_size")?),
        shared: Some(SharedExpertSpec {
            mlp: decoder.mlp(&format!("{path}.shared_expert"), size("shared_expert_intermediate_size")?, false),
            gate: Some(linear("shared_expert_gate", 1)),
        }),
        latent: None,
    })
}

fn published(_: &ModelSpec, tensors: &mut Tensors) -> Result<(), PublishedError> {
    tensors.drop_containing("mtp.");
    if tensors.model_has(|name| name.contains(".mlp.experts.")) {
        published_layout(tensors)?;
    }
    let projections = ["gate_proj", "up_proj", "down_proj"].map(|name| (name, name));
    tensors.stack_experts("mlp.experts", "mlp.switch_mlp", &projections)
}

/// Kernels have their channels first, and one is added to the weights of all norms but the delta rule's.
pub(super) fn published_layout(tensors: &mut Tensors) -> Result<(), PublishedError> {
    const NORMS: [&str; 5] =
        [".input_layernorm.weight", ".post_attention_layernorm.weight", "model.norm.weight", ".q_norm.weight", ".k_norm.weight"];
    tensors.channels_last("conv1d.weight")?;
    tensors.change(|name| NORMS.iter().any(|norm| name.ends_with(norm)), |weight| weight.plus(1.0))
}
