//! How keys and values are kept: what a user may ask for, which layers it concerns, and what a sequence then takes.

use crate::{
    dtype::DType,
    spec::{LatentUp, Mixer, ModelSpec, QuantizationMode, QuantizationScheme},
};
use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range};

/// Tokens at the start of a sequence that a cache of limited size never drops, since attention leans on them (Xiao et al. 2024).
pub const KEPT_TOKENS: u32 = 4;
const DEFAULT_GROUP_SIZE: u32 = 64;

/// What the caches of an instance shall be; with mlx-lm's names and meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CacheOptions {
    /// For keys and values of softmax attention, with and without window. Latent vectors and the keys of indexers are left as they are, as
    /// all else follows from them.
    pub quantization: Option<KvQuantization>,
    /// Attention that has no window of its own sees the first [`KEPT_TOKENS`] tokens and the most recent ones, so many in all.
    pub max_kv_size: Option<u32>,
}

/// A token from position `start` on sees all keys and values, its own included, in `bits` bits; a token before it sees them as they are,
/// and so does the first token of all, as mlx-lm quantises after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvQuantization {
    bits: u32,
    group_size: u32,
    start: u32,
}

/// Options that cannot be, or not for this model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    #[error("--kv-bits {bits} with --kv-group-size {group_size} is not possible: bits are 2, 3, 4, 5, 6 or 8, groups of 32, 64 or 128")]
    Scheme { bits: u32, group_size: u32 },
    #[error("--max-kv-size {size} is too small: the first {KEPT_TOKENS} tokens are kept and others have to move on, give at least {}", KEPT_TOKENS + 1)]
    TooSmall { size: u32 },
    #[error(
        "layer {layer} has keys or values of {dim} numbers a head, which groups of {group_size} do not divide: give another --kv-group-size, or \
         leave --kv-bits out"
    )]
    HeadDim { layer: u32, dim: u32, group_size: u32 },
    #[error("no layer of this model has keys and values that can be quantised: leave --kv-bits out")]
    NothingToQuantise,
    #[error("no layer of this model has attention over all tokens, so that nothing is there to limit: leave --max-kv-size out")]
    NothingToLimit,
}

impl KvQuantization {
    /// `group_size` is 64 and `start` 0 unless given.
    pub fn new(bits: u32, group_size: Option<u32>, start: Option<u32>) -> Result<Self, CacheError> {
        let group_size = group_size.unwrap_or(DEFAULT_GROUP_SIZE);
        match QuantizationScheme::new(QuantizationMode::Affine, Some(group_size), Some(bits)) {
            Ok(_) => Ok(Self { bits, group_size, start: start.unwrap_or(0) }),
            Err(_) => Err(CacheError::Scheme { bits, group_size }),
        }
    }

    pub fn bits(&self) -> u32 {
        self.bits
    }

    pub fn group_size(&self) -> u32 {
        self.group_size
    }

    pub fn start(&self) -> u32 {
        self.start
    }

    pub fn scheme(&self) -> QuantizationScheme {
        QuantizationScheme { mode: QuantizationMode::Affine, group_size: self.group_size, bits: self.bits }
    }

    /// Bytes of `dim` numbers of a token, with a scale and a bias in `dtype` for each group.
    fn bytes(&self, dim: u32, dtype: DType) -> u64 {
        let scheme = self.scheme();
        4 * scheme.packed_columns(dim).unwrap_or(0) + 2 * dtype.size() * scheme.groups(dim).unwrap_or(0)
    }
}

/// What one softmax attention keeps of a token.
struct Kept {
    n_heads: u32,
    /// Of a key and of a value.
    dims: [u32; 2],
    window: Option<u32>,
}

impl CacheOptions {
    pub fn new(quantization: Option<KvQuantization>, max_kv_size: Option<u32>) -> Result<Self, CacheError> {
        match max_kv_size {
            Some(size) if size <= KEPT_TOKENS => Err(CacheError::TooSmall { size }),
            _ => Ok(Self { quantization, max_kv_size }),
        }
    }

    /// Whether a model can be served so, and whether every option means something for it.
    pub fn check(&self, spec: &ModelSpec) -> Result<(), CacheError> {
        let layers = || (0u32..).zip(&spec.layers);
        if let Some(quantization) = &self.quantization {
            let group_size = quantization.group_size;
            let dims = layers().flat_map(|(layer, of)| kept(&of.mixer).into_iter().flat_map(move |kept| kept.dims.map(|dim| (layer, dim))));
            let mut dims = dims.peekable();
            dims.peek().ok_or(CacheError::NothingToQuantise)?;
            if let Some((layer, dim)) = dims.find(|(_, dim)| dim % group_size != 0) {
                return Err(CacheError::HeadDim { layer, dim, group_size });
            }
        }
        let is_limited = |mixer: &Mixer| kept(mixer).iter().any(|kept| kept.window.is_none()) || latents(mixer) > 0;
        if self.max_kv_size.is_some() && !layers().any(|(_, of)| is_limited(&of.mixer)) {
            return Err(CacheError::NothingToLimit);
        }
        Ok(())
    }

    /// Bytes that the caches of these layers take for each token that they hold: quantised where they will be.
    pub fn bytes_per_token(&self, spec: &ModelSpec, layers: Range<u32>, dtype: DType) -> u64 {
        spec.layers_of(layers).iter().map(|layer| self.mixer_bytes(&layer.mixer, dtype)).sum()
    }

    fn mixer_bytes(&self, mixer: &Mixer, dtype: DType) -> u64 {
        let of_dim = |dim| self.quantization.map_or(u64::from(dim) * dtype.size(), |quantization| quantization.bytes(dim, dtype));
        let of_kept = |kept: &Kept| u64::from(kept.n_heads) * kept.dims.map(of_dim).iter().sum::<u64>();
        kept(mixer).iter().map(of_kept).sum::<u64>() + latents(mixer) * dtype.size()
    }

    /// What sequences count for against the tokens that the caches may hold.
    pub fn reservation(&self, spec: &ModelSpec, dtype: DType) -> CacheReservation {
        let windows = || spec.layers.iter().flat_map(|layer| kept(&layer.mixer)).filter_map(|kept| kept.window);
        let plain = Self::default();
        let percent =
            spec.layers.iter().map(|layer| match (plain.mixer_bytes(&layer.mixer, dtype), self.mixer_bytes(&layer.mixer, dtype)) {
                (_, 0) => 100,
                (as_is, quantised) => (100 * as_is).div_ceil(quantised) as u32,
            });
        CacheReservation {
            held_max: self.max_kv_size.map_or(u32::MAX, |size| windows().fold(size, u32::max)),
            plain_tokens: self.quantization.map_or(0, |quantization| quantization.start),
            plain_percent: percent.fold(100, u32::max),
        }
    }
}

/// By layer and mixer: keys and values of its own.
fn kept(mixer: &Mixer) -> Vec<Kept> {
    match mixer {
        Mixer::Attention(spec) if spec.source_layer().is_none() => {
            vec![Kept { n_heads: spec.n_kv_heads, dims: spec.cached_dims(), window: spec.window }]
        }
        Mixer::Latent(spec) if matches!(spec.up, LatentUp::Expanded(_)) => {
            vec![Kept { n_heads: spec.n_heads, dims: [spec.nope_dim + spec.rope_dim, spec.value_dim], window: None }]
        }
        Mixer::Parallel(mixers) => mixers.iter().flat_map(kept).collect(),
        _ => Vec::new(),
    }
}

/// Elements of a token in caches that are never quantised.
fn latents(mixer: &Mixer) -> u64 {
    match mixer {
        Mixer::Latent(spec) if !matches!(spec.up, LatentUp::Expanded(_)) => mixer.cache_elements_per_token(),
        Mixer::Parallel(mixers) => mixers.iter().map(latents).sum(),
        _ => 0,
    }
}

/// What a sequence counts for against the tokens that the caches of an instance may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheReservation {
    /// More than this no layer holds of a sequence.
    pub held_max: u32,
    /// A sequence up to this length is not quantised yet, and each of its tokens takes `plain_percent` of what it is reckoned with.
    pub plain_tokens: u32,
    pub plain_percent: u32,
}

impl Default for CacheReservation {
    fn default() -> Self {
        Self { held_max: u32::MAX, plain_tokens: 0, plain_percent: 100 }
    }
}

impl CacheReservation {
    /// For a sequence of so many tokens in all; it never falls as they become more.
    pub fn of(&self, tokens: u32) -> u64 {
        let held = tokens.min(self.held_max);
        let plain = u64::from(held.min(self.plain_tokens)) * u64::from(self.plain_percent);
        u64::from(held).max(plain.div_ceil(100))
    }

    /// The longest sequence that counts for no more than this.
    pub fn longest(&self, cache_tokens: u64) -> u32 {
        let (mut fits, mut too_long) = (0u64, u64::from(u32::MAX) + 1);
        while too_long - fits > 1 {
            let middle = fits + (too_long - fits) / 2;
            match self.of(middle as u32) <= cache_tokens {
                true => fits = middle,
                false => too_long = middle,
            }
        }
        fits as u32
    }
}

impl fmt::Display for CacheOptions {
    /// As a part of a sentence; empty where nothing was asked for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(KvQuantization { bits, group_size, start }) = &self.quantization {
            write!(f, "keys and values in {bits} bits and groups of {group_size}")?;
            if *start > 0 {
                write!(f, " from token {start} on")?;
            }
        }
        if let Some(size) = self.max_kv_size {
            let separator = if self.quantization.is_some() { ", " } else { "" };
            write!(f, "{separator}at most {size} tokens of a sequence where attention has no window")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::architectures::read_spec;
    use serde_json::json;

    fn llama(head_dim: u32, window: Option<u32>) -> ModelSpec {
        let kind = if window.is_some() { "sliding_attention" } else { "full_attention" };
        read_spec(&json!({"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 512,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "rms_norm_eps": 1e-5,
            "layer_types": [kind, "full_attention"], "sliding_window": window}))
        .expect("a valid config")
    }

    fn quantised(bits: u32, start: u32) -> CacheOptions {
        let quantization = KvQuantization::new(bits, None, Some(start)).expect("allowed");
        CacheOptions::new(Some(quantization), None).expect("allowed")
    }

    #[test]
    fn what_cannot_be_is_said_with_numbers() {
        let message = |error: CacheError| error.to_string();
        assert!(KvQuantization::new(7, None, None).map_err(message).is_err_and(|message| message.contains("--kv-bits 7")));
        assert!(KvQuantization::new(8, Some(48), None).is_err());
        assert_eq!(CacheOptions::new(None, Some(4)), Err(CacheError::TooSmall { size: 4 }));
        let wide = CacheError::HeadDim { layer: 0, dim: 96, group_size: 64 };
        assert_eq!(quantised(8, 0).check(&llama(96, None)), Err(wide));
        assert_eq!(quantised(8, 0).check(&llama(128, None)), Ok(()));
    }

    #[test]
    fn bytes_are_those_of_words_scales_and_biases() {
        let spec = llama(128, None);
        let bytes = |options: CacheOptions| options.bytes_per_token(&spec, 0..2, DType::BF16);
        assert_eq!(bytes(CacheOptions::default()), 2 * 2 * 2 * 128 * 2);
        // 128 numbers of 4 bits, and 2 groups with a scale and a bias each.
        assert_eq!(bytes(quantised(4, 0)), 2 * 2 * 2 * (64 + 8));
        assert_eq!(bytes(quantised(3, 0)), 2 * 2 * 2 * (48 + 8));
    }

    #[test]
    fn a_sequence_counts_for_what_it_takes_at_most() {
        let spec = llama(128, Some(1000));
        let reserved = |options: CacheOptions, tokens| options.reservation(&spec, DType::BF16).of(tokens);
        assert_eq!(reserved(CacheOptions::default(), 5000), 5000);
        let limited = |size| CacheOptions::new(None, Some(size)).expect("allowed");
        assert_eq!([500, 1500, 5000].map(|tokens| reserved(limited(2000), tokens)), [500, 1500, 2000]);
        // The window of the other layer is longer.
        assert_eq!(reserved(limited(16), 5000), 1000);
        // 256 bytes a head as it is, 72 in 4 bits: 3.56 times as much, up to the start.
        assert_eq!([10, 100, 300, 400].map(|tokens| reserved(quantised(4, 100), tokens)), [36, 356, 356, 400]);
    }

    #[test]
    fn the_longest_sequence_is_found() {
        let reservation = CacheReservation { held_max: 2000, plain_tokens: 100, plain_percent: 356 };
        assert_eq!(reservation.longest(35), 9);
        assert_eq!(reservation.longest(400), 400);
        assert_eq!(reservation.longest(2000), u32::MAX);
        assert_eq!(CacheReservation::default().longest(u64::MAX), u32::MAX);
    }
}
