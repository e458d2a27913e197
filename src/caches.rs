//! The flags that say how keys and values are kept; with mlx-lm's names.

use crate::failure::{Exit, Failure};
use mlx_cluster_common::cache::{CacheOptions, KvQuantization};

/// Flags of everything that starts or plans an instance.
#[derive(clap::Args)]
pub(crate) struct CacheArgs {
    /// Keep keys and values in 2, 3, 4, 5, 6 or 8 bits; latent vectors (DeepSeek and its like) stay as they are
    #[arg(long, value_name = "BITS")]
    kv_bits: Option<u32>,
    /// Numbers that share a scale: 32, 64 or 128; 64 unless given
    #[arg(long, value_name = "N", requires = "kv_bits")]
    kv_group_size: Option<u32>,
    /// Tokens from this position on see keys and values in those bits, tokens before it see them as they are; 0 unless given
    #[arg(long, value_name = "TOKENS", requires = "kv_bits")]
    quantized_kv_start: Option<u32>,
    /// Let attention that has no window see the first 4 tokens and the most recent ones, so many in all; the rest is forgotten
    #[arg(long, value_name = "TOKENS")]
    max_kv_size: Option<u32>,
}

impl CacheArgs {
    /// What they mean, or which of them cannot be.
    pub(crate) fn options(&self) -> anyhow::Result<CacheOptions> {
        let quantization = self.kv_bits.map(|bits| KvQuantization::new(bits, self.kv_group_size, self.quantized_kv_start));
        let options = quantization.transpose().and_then(|quantization| CacheOptions::new(quantization, self.max_kv_size));
        options.map_err(|error| Failure::new(Exit::Usage, error.to_string()).into())
    }

    /// For those who find a coordinator that has decided already.
    pub(crate) fn given(&self) -> Option<&'static str> {
        if self.kv_bits.is_some() { Some("--kv-bits") } else { self.max_kv_size.map(|_| "--max-kv-size") }
    }
}
