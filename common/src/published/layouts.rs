//! Layouts that several architectures were published with: experts one by one, fused linears, channels first, quantised by others.

use super::{
    PublishedError,
    symbolic::{QuantisedTensors, SymbolicTensor},
    tensors::{LINEAR_SUFFIXES, Tensors},
};
use crate::{dtype::DType, spec::PublishedQuantization};
use std::collections::{BTreeMap, BTreeSet};

/// Sizes of the matrix that makes keys and values of a latent (DeepSeek-V2, section 2.1): `[n_heads · (key_dims + value_dims), rank]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentUpProjection {
    pub n_heads: u32,
    /// Of a head's key without the part that carries RoPE.
    pub key_dims: u32,
    pub value_dims: u32,
    pub rank: u32,
}

/// Tensors of experts that belong together: what stands before their number and after it, and the numbers.
#[derive(Default)]
struct ExpertStack {
    name: [String; 2],
    numbers: BTreeSet<u32>,
}

/// Paths are given from the component on that tells them apart: `mlp.experts` is found in `model.layers.3.mlp.experts.0.up_proj.weight`.
impl Tensors {
    /// `<experts>.<number>.<from>.<suffix>` of all numbers become one stack `<stacked>.<to>.<suffix>`, for pairs `(from, to)` of
    /// projections and whichever suffixes of linears there are. A stack with a gap is not made.
    pub fn stack_experts(&mut self, experts: &str, stacked: &str, projections: &[(&str, &str)]) -> Result<(), PublishedError> {
        let mut stacks: BTreeMap<String, ExpertStack> = BTreeMap::new();
        for name in self.names() {
            let Some((before, after)) = split_at_path(name, experts) else { continue };
            let [number, from, suffix] = after.split('.').collect::<Vec<_>>()[..] else { continue };
            let Some((_, to)) = projections.iter().find(|(published, _)| *published == from) else { continue };
            if let (Ok(number), true) = (number.parse::<u32>(), LINEAR_SUFFIXES.contains(&suffix)) {
                let stack = stacks.entry(format!("{before}{stacked}.{to}.{suffix}")).or_default();
                stack.name = [format!("{before}{experts}"), format!("{from}.{suffix}")];
                stack.numbers.insert(number);
            }
        }
        for (name, ExpertStack { name: [before, after], numbers }) in stacks {
            if let Some(gap) = (0..).zip(&numbers).find_map(|(i, number)| (i != *number).then_some(i)) {
                self.lacks(name, format!("{before}.{gap}.{after}"));
                continue;
            }
            let tensors = numbers.iter().filter_map(|number| self.take(&format!("{before}.{number}.{after}"))).collect();
            self.put(name, SymbolicTensor::stack(tensors)?)?;
        }
        Ok(())
    }

    /// A linear whose outputs are those of several, one after the other: `(path, output_dims)`.
    pub fn split_outputs(&mut self, fused: &str, into: &[(&str, u64)]) -> Result<(), PublishedError> {
        let lengths: Vec<_> = into.iter().map(|(_, length)| *length).collect();
        let paths: Vec<_> = into.iter().map(|(path, _)| *path).collect();
        self.split_linear(fused, &paths, |tensor, axis| tensor.split(axis, &lengths))
    }

    /// A linear, or stack of linears, of which the first half of the outputs is one and the second another.
    pub fn split_halves(&mut self, fused: &str, into: [&str; 2]) -> Result<(), PublishedError> {
        self.split_linear(fused, &into, |tensor, axis| {
            let outputs = tensor.dim(axis);
            tensor.split(axis, &[outputs / 2, outputs / 2])
        })
    }

    /// A linear, or stack of linears, of which the even outputs are one and the odd ones another.
    pub fn split_interleaved(&mut self, fused: &str, into: [&str; 2]) -> Result<(), PublishedError> {
        self.split_linear(fused, &into, |tensor, axis| Ok(vec![tensor.clone().every(axis, 0, 2)?, tensor.every(axis, 1, 2)?]))
    }

    /// Takes the linears at `fused` apart along their outputs: `split` is given a tensor and its axis of outputs.
    pub fn split_linear(
        &mut self,
        fused: &str,
        into: &[&str],
        split: impl Fn(SymbolicTensor, i32) -> Result<Vec<SymbolicTensor>, PublishedError>,
    ) -> Result<(), PublishedError> {
        let named = |name: &str| {
            let (before, suffix) = split_at_path(name, fused)?;
            LINEAR_SUFFIXES.contains(&suffix).then(|| (name.to_owned(), before.to_owned(), suffix.to_owned()))
        };
        for (name, before, suffix) in self.names().filter_map(named).collect::<Vec<_>>() {
            let Some(tensor) = self.take(&name) else { continue };
            let axis = if suffix == "bias" { -1 } else { -2 };
            for (path, piece) in into.iter().zip(split(tensor, axis)?) {
                self.put(format!("{before}{path}.{suffix}"), piece)?;
            }
        }
        Ok(())
    }

    /// Kernels of depthwise convolutions `[channels, 1, width]` become `[channels, width, 1]`. `end` is how their names end.
    pub fn channels_last(&mut self, end: &str) -> Result<(), PublishedError> {
        let published = |tensor: &SymbolicTensor| tensor.shape.len() == 3 && tensor.dim(1) == 1 && tensor.dim(2) != 1;
        self.change(|name| name.ends_with(end), |tensor| if published(&tensor) { tensor.swap_last_axes() } else { Ok(tensor) })
    }

    /// `kv_b_proj` becomes a matrix a head for the keys, transposed, `embed_q` `[n_heads, rank, key_dims]`, and one for the values,
    /// `unembed_out` `[n_heads, value_dims, rank]`. Quantised ones are quantised again, in the same groups.
    pub fn split_latent_up_projection(&mut self, sizes: &LatentUpProjection) -> Result<(), PublishedError> {
        let [n_heads, keys, values, rank] = [sizes.n_heads, sizes.key_dims, sizes.value_dims, sizes.rank].map(u64::from);
        let path = |name: &str| name.strip_suffix("kv_b_proj.weight").map(str::to_owned);
        for before in self.names().filter_map(path).collect::<Vec<_>>() {
            let mut part = |suffix: &str| self.take(&format!("{before}kv_b_proj.{suffix}"));
            let (Some(weight), scales, biases) = (part("weight"), part("scales"), part("biases")) else { continue };
            let (dense, affine) = match (scales, biases) {
                (None, _) => (weight, None),
                (Some(scales), Some(biases)) => {
                    let quantised = QuantisedTensors { weight, scales, biases };
                    let affine = quantised.affine(rank)?;
                    (quantised.dequantise(rank)?, Some(affine))
                }
                (Some(_), None) => return Err(missing(format!("{before}kv_b_proj.biases"), format!("{before}kv_b_proj.scales"))),
            };
            let heads = dense.reshape(&[n_heads, keys + values, rank])?;
            let key = heads.clone().slice(1, 0, keys)?.swap_last_axes()?;
            let value = heads.slice(1, keys, keys + values)?;
            for (name, matrix) in [("embed_q", key), ("unembed_out", value)] {
                let Some(affine) = affine else {
                    self.put(format!("{before}{name}.weight"), matrix)?;
                    continue;
                };
                let QuantisedTensors { weight, scales, biases } = matrix.quantise(affine)?;
                self.put(format!("{before}{name}.weight"), weight)?;
                self.put(format!("{before}{name}.scales"), scales)?;
                self.put(format!("{before}{name}.biases"), biases)?;
            }
        }
        Ok(())
    }

    /// Layouts of quantisation that MLX has no kernel for.
    pub(super) fn convert_quantisation(&mut self, layout: PublishedQuantization) -> Result<(), PublishedError> {
        match layout {
            PublishedQuantization::Fp8Blocks { block } => self.dequantise_fp8(Some(block.map(u64::from))),
            PublishedQuantization::Fp8Tensors => self.dequantise_fp8(None),
            PublishedQuantization::Mxfp4Blocks => self.join_mxfp4_blocks(),
            PublishedQuantization::PackedInt4 { .. } => self.unpack_int4(),
        }
    }

    fn dequantise_fp8(&mut self, block: Option<[u64; 2]>) -> Result<(), PublishedError> {
        // Those are for activations in eight bits; here they keep the type of the model.
        self.drop_suffix("activation_scale");
        for (scale_name, name) in self.names_with_suffix("_scale_inv") {
            // A scale that is here without its weight stays: whoever asks for the weight is told, and so is who expects all to be used.
            if let Some(weight) = self.take(&name)
                && let Some(scales) = self.take(&scale_name)
            {
                self.put(name, weight.dequantise_fp8(scales, block)?)?;
            }
        }
        Ok(())
    }

    /// `<path>_blocks` `[.., groups, 16]` of bytes, two numbers each, and `<path>_scales` `[.., groups]`: MLX has them as words
    /// `<path>.weight` `[.., 4 · groups]` and `<path>.scales`.
    fn join_mxfp4_blocks(&mut self) -> Result<(), PublishedError> {
        for (name, path) in self.names_with_suffix("_blocks") {
            let Some(words) = self.take(&name).map(|blocks| blocks.view(DType::U32)).transpose()? else { continue };
            let [rows @ .., groups, words_of_group] = &words.shape[..] else { return Err(words.cannot("joined to rows of words")) };
            let shape: Vec<u64> = rows.iter().copied().chain([groups * words_of_group]).collect();
            self.put(format!("{path}.weight"), words.reshape(&shape)?)?;
        }
        self.rename_suffix("_scales", ".scales")
    }

    /// `<path>.weight_packed` of words, eight numbers 0 to 15 each that mean -8 to 7, and `<path>.weight_scale`.
    fn unpack_int4(&mut self) -> Result<(), PublishedError> {
        self.drop_suffix(".weight_shape");
        for (packed_name, path) in self.names_with_suffix(".weight_packed") {
            let scale_name = format!("{path}.weight_scale");
            if !self.has(&scale_name) {
                self.lacks(format!("{path}.weight"), scale_name);
                continue;
            }
            let (Some(packed), Some(scales)) = (self.take(&packed_name), self.take(&scale_name)) else { continue };
            self.put(format!("{path}.weight"), packed.view(DType::U32)?)?;
            self.put(format!("{path}.biases"), scales.clone().scale(-8.0)?)?;
            self.put(format!("{path}.scales"), scales)?;
        }
        Ok(())
    }

    /// Names that end so, each with what stands before the end.
    fn names_with_suffix(&self, suffix: &str) -> Vec<(String, String)> {
        self.names().filter_map(|name| Some((name.to_owned(), name.strip_suffix(suffix)?.to_owned()))).collect()
    }
}

fn missing(name: String, beside: String) -> PublishedError {
    PublishedError::Missing { name, beside }
}

/// What stands before a path inside a name, and after it without the dot.
fn split_at_path<'a>(name: &'a str, path: &str) -> Option<(&'a str, &'a str)> {
    let at_component = |at: &usize| (*at == 0 || name[..*at].ends_with('.')) && name[at + path.len()..].starts_with('.');
    let (at, _) = name.match_indices(path).find(|(at, _)| at_component(at))?;
    Some((&name[..at], &name[at + path.len() + 1..]))
}
