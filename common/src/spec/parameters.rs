//! Groups of parameters as a checkpoint names them: linears, norms, embeddings, stacks of experts, convolutions, single tensors.

/// `y = x Wᵀ + b` with `W` of shape `[output_dims, input_dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearSpec {
    pub path: String,
    pub input_dims: u32,
    pub output_dims: u32,
    pub bias: bool,
}

/// One linear an expert, stacked: `[n_experts, output_dims, input_dims]`, biases `[n_experts, output_dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    pub path: String,
    pub n_experts: u32,
    pub input_dims: u32,
    pub output_dims: u32,
    pub bias: bool,
}

/// One matrix a head: `[n_heads, output_dims, input_dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadLinearSpec {
    pub path: String,
    pub n_heads: u32,
    pub input_dims: u32,
    pub output_dims: u32,
}

/// Rows of a table, one a token: `[vocab_size, dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct EmbeddingSpec {
    pub path: String,
    pub vocab_size: u32,
    pub dims: u32,
}

/// A norm over the last axis, whose weight is `[dims]`.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    pub path: String,
    pub dims: u32,
    pub eps: f32,
    pub kind: NormKind,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) · (offset + w)` (Zhang and Sennrich 2019); Gemma's offset is 1, most others' 0.
    Rms { offset: f32 },
    /// The same without a weight.
    RmsUnweighted,
    /// `(x - mean(x)) / sqrt(var(x) + eps) · w + b` (Ba et al. 2016).
    Layer { bias: bool },
    /// The same without a weight and a bias.
    LayerUnweighted,
}

impl NormKind {
    pub fn has_weight(self) -> bool {
        !matches!(self, NormKind::RmsUnweighted | NormKind::LayerUnweighted)
    }
}

/// A causal depthwise convolution over time: `<path>.weight` `[channels, kernel, 1]`, `<path>.bias` `[channels]`.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvolutionSpec {
    pub path: String,
    pub channels: u32,
    pub kernel: u32,
    pub bias: bool,
}

/// A tensor by its full name, for parameters that belong to none of the other groups.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<u32>,
}

/// A group of parameters that one block needs, borrowed from the spec.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Weight<'a> {
    Embedding(&'a EmbeddingSpec),
    Linear(&'a LinearSpec),
    Experts(&'a ExpertsSpec),
    HeadLinear(&'a HeadLinearSpec),
    Norm(&'a NormSpec),
    Convolution(&'a ConvolutionSpec),
    Tensor(&'a TensorSpec),
}

impl<'a> Weight<'a> {
    /// The module's path, or the tensor's name.
    pub fn path(&self) -> &'a str {
        match self {
            Weight::Embedding(embedding) => &embedding.path,
            Weight::Linear(linear) => &linear.path,
            Weight::Experts(experts) => &experts.path,
            Weight::HeadLinear(linear) => &linear.path,
            Weight::Norm(norm) => &norm.path,
            Weight::Convolution(convolution) => &convolution.path,
            Weight::Tensor(tensor) => &tensor.name,
        }
    }
}

impl LinearSpec {
    pub fn new(path: impl Into<String>, input_dims: u32, output_dims: u32, bias: bool) -> Self {
        Self { path: path.into(), input_dims, output_dims, bias }
    }
}

impl NormSpec {
    /// The plain root-mean-square norm.
    pub fn rms(path: impl Into<String>, dims: u32, eps: f32) -> Self {
        Self { path: path.into(), dims, eps, kind: NormKind::Rms { offset: 0.0 } }
    }

    /// Root-mean-square norm without parameters.
    pub fn rms_unweighted(dims: u32, eps: f32) -> Self {
        Self { path: String::new(), dims, eps, kind: NormKind::RmsUnweighted }
    }

    /// Layer norm without parameters.
    pub fn layer_unweighted(dims: u32, eps: f32) -> Self {
        Self { path: String::new(), dims, eps, kind: NormKind::LayerUnweighted }
    }
}

impl TensorSpec {
    pub fn new(name: impl Into<String>, shape: &[u32]) -> Self {
        Self { name: name.into(), shape: shape.to_vec() }
    }
}
