//! The layers of a stage with what stands before and after them: the forward pass over given caches, which serving and training share.

use crate::{
    activations::{Activations, heads_to_rows, rows_to_heads},
    blocks::{Entry, Exit, Flow, Layer, over_spans},
    compiled::{CompiledMix, Ends},
    error::LmError,
    ffi,
    linear::Embedding,
    packing::Packing,
    parameters::Parameters,
    sequences::{CacheSlots, StepCaches},
    served::Adaptable,
    weights::Weights,
};
use mlx_cluster_common::{
    cache::CacheOptions,
    spec::{CutTensor, ModelSpec},
};
use mlx_rs::{Array, Dtype, ops};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

/// What activations can be.
const FLOATS: [Dtype; 3] = [Dtype::Float32, Dtype::Float16, Dtype::Bfloat16];

/// A stage's part of the model, without any sequence.
pub(crate) struct Stack {
    pub(crate) spec: ModelSpec,
    /// Of the model's layers.
    pub(crate) range: Range<u32>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) ends: Ends,
    pub(crate) slots: CacheSlots,
    /// Layers whose keys and values later stages read too.
    passed_on: BTreeSet<u32>,
}

/// A step while it runs.
pub(crate) struct Run<'a> {
    pub(crate) packing: &'a Packing,
    pub(crate) caches: StepCaches,
    /// Keys and values that later stages read too.
    pub(crate) passed_on: BTreeMap<CutTensor, Array>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(packing: &'a Packing, caches: StepCaches) -> Self {
        Self { packing, caches, passed_on: BTreeMap::new() }
    }
}

impl Stack {
    /// Builds the blocks for `layers` from weights that hold exactly their parts.
    pub(crate) fn load(spec: &ModelSpec, layers: Range<u32>, mut weights: Weights, caches: &CacheOptions) -> Result<Self, LmError> {
        caches.check(spec)?;
        let (first, last) = (layers.start == 0, layers.end == spec.n_layers());
        let needed = first || (last && spec.head.may_be_tied());
        let embedding = needed.then(|| Embedding::load(&mut weights, &spec.embedding, &spec.quantization)).transpose()?;
        let mut blocks = Vec::new();
        for (number, layer) in (layers.start..).zip(spec.layers_of(layers.clone())) {
            blocks.push(Layer::load(&mut weights, &spec.quantization, layer, number, number - layers.start)?);
        }
        let exit = last.then(|| Exit::load(&mut weights, spec, embedding.as_ref())).transpose()?;
        let entry = embedding.filter(|_| first).map(|embedding| Entry::load(&mut weights, spec, embedding)).transpose()?;
        weights.finish()?;
        Ok(Self {
            slots: CacheSlots::new(spec, layers.clone(), caches)?,
            passed_on: spec.shared_across(layers.end),
            spec: spec.clone(),
            range: layers,
            layers: blocks,
            ends: Ends { entry, exit },
        })
    }

    /// Shows every matrix that adapters can sit on; a table that is a head too comes twice.
    pub(crate) fn each_matrix(&mut self, visit: &mut dyn FnMut(Adaptable<'_>)) {
        self.ends.entry.each_matrix(visit);
        for layer in &mut self.layers {
            layer.before.each_matrix(visit);
            layer.mix.each_matrix(visit);
            layer.after.each_matrix(visit);
        }
        self.ends.exit.each_matrix(visit);
    }

    pub(crate) fn is_last(&self) -> bool {
        self.ends.exit.is_some()
    }

    /// Token ids `[tokens]` on the first stage, or what the stage before made; as the layers take them: ids `[B, L]`, or hidden states
    /// `[B, L, D]` and the per-layer inputs `[B, L, layers, dims]`.
    pub(crate) fn stream(
        &self,
        ids: Option<&Array>,
        packing: &Packing,
        input: Option<&Activations>,
    ) -> Result<(Array, Option<Array>), LmError> {
        match (ids, input) {
            (Some(ids), None) => Ok((ids.reshape(&[packing.batch, packing.length])?, None)),
            (None, Some(input)) => {
                input.check(&self.spec, self.range.start, packing.tokens())?;
                let x = input.get(CutTensor::Hidden)?.reshape(&[packing.batch, packing.length, -1])?;
                let layer_inputs = self.spec.layer_inputs.as_ref().map(|inputs| {
                    let rows = input.get(CutTensor::LayerInputs)?;
                    Ok::<_, LmError>(rows.reshape(&[packing.batch, packing.length, -1, inputs.dims as i32])?)
                });
                Ok((x, layer_inputs.transpose()?))
            }
            (Some(_), Some(_)) => Err(LmError::WrongInput { wanted: "token ids".into(), found: "activations".into() }),
            (None, None) => Err(LmError::WrongInput { wanted: "activations".into(), found: "none".into() }),
        }
    }

    /// What crosses the cut before layer `cut`, as zeros.
    pub(crate) fn zeros(&self, cut: u32, tokens: i32, dtype: Dtype) -> Result<Activations, LmError> {
        let zeros = |(tensor, width): (CutTensor, u32)| Ok::<_, LmError>((tensor, ops::zeros_dtype(&[tokens, width as i32], dtype)?));
        Ok(Activations { tensors: self.spec.cut_tensors(cut).into_iter().map(zeros).collect::<Result<_, _>>()? })
    }

    /// Takes in what layers of earlier stages have put into caches that layers here read.
    pub(crate) fn append_copies(&self, input: &Activations, run: &mut Run) -> Result<(), LmError> {
        for source in self.slots.copied_layers() {
            let heads = self.spec.kv_heads(source).ok_or_else(|| LmError::Mlx(format!("layer {source} has no keys")))? as i32;
            let keys = rows_to_heads(input.get(CutTensor::Keys(source))?, heads, run.packing)?;
            let values = rows_to_heads(input.get(CutTensor::Values(source))?, heads, run.packing)?;
            run.caches.append_copy(&self.slots, source, &keys, &values, run.packing)?;
        }
        Ok(())
    }

    /// What the next stage needs.
    pub(crate) fn activations(
        &self,
        output: Option<(Array, Option<Array>)>,
        input: Option<Activations>,
        mut passed_on: BTreeMap<CutTensor, Array>,
        packing: &Packing,
    ) -> Result<Activations, LmError> {
        let (x, layer_inputs) = output.ok_or_else(|| LmError::Mlx("a stage gave nothing".into()))?;
        let mut tensors = BTreeMap::from([(CutTensor::Hidden, x.reshape(&[packing.tokens(), -1])?)]);
        if let Some(inputs) = layer_inputs {
            let own = self.layers.len() as i32;
            let rest = ffi::slice(&inputs, &[0, 0, own, 0], inputs.shape())?;
            tensors.insert(CutTensor::LayerInputs, rest.reshape(&[packing.tokens(), -1])?);
        }
        for source in &self.passed_on {
            for tensor in [CutTensor::Keys(*source), CutTensor::Values(*source)] {
                let own = passed_on.remove(&tensor);
                let array = own.or_else(|| input.as_ref().and_then(|input| input.tensors.get(&tensor).cloned()));
                tensors.insert(tensor, array.ok_or_else(|| LmError::Mlx(format!("`{}` was not made", tensor.name())))?);
            }
        }
        Ok(Activations { tensors })
    }

    /// Runs a layer's mixer over the caches of a step, and keeps what later stages need of it.
    pub(crate) fn mix(&self, run: &mut Run, layer: usize, flow: &Flow, compiled: Option<&CompiledMix>) -> Result<Vec<Array>, LmError> {
        let number = self.range.start + layer as u32;
        if let (true, [_, keys, values, ..]) = (self.passed_on.contains(&number), flow.mixed.as_slice()) {
            run.passed_on.insert(CutTensor::Keys(number), heads_to_rows(keys)?);
            run.passed_on.insert(CutTensor::Values(number), heads_to_rows(values)?);
        }
        let mut caches = run.caches.of_layer(&self.slots, layer);
        match compiled {
            Some(mix) => over_spans(&flow.mixed, run.packing, &mut caches, |rows, cache| mix.run(rows, cache)),
            None => self.layers[layer].mix(flow, run.packing, &mut caches),
        }
    }

    /// The layers one by one, for prefill and mixed steps: `[B, L, D]`.
    pub(crate) fn forward(&self, input: &Array, layer_inputs: Option<Array>, run: &mut Run) -> Result<(Array, Option<Array>), LmError> {
        self.forward_layers(input, layer_inputs, run, self.layers.len())
    }

    pub(crate) fn forward_layers(
        &self,
        input: &Array,
        layer_inputs: Option<Array>,
        run: &mut Run,
        n_layers: usize,
    ) -> Result<(Array, Option<Array>), LmError> {
        let (mut x, layer_inputs) = match &self.ends.entry {
            Some(entry) => entry.forward(input)?,
            None => (input.clone(), layer_inputs),
        };
        for (i, layer) in self.layers.iter().take(n_layers).enumerate() {
            let flow = layer.before.forward(&x, &run.packing.offsets)?;
            let mixed = self.mix(run, i, &flow, None)?;
            x = layer.after.forward(&mixed, &flow.beside, &x, layer_inputs.as_ref())?;
        }
        Ok((x, layer_inputs))
    }

    /// Logits of some rows of the hidden states `[tokens, D]`: `[rows, V]`.
    pub(crate) fn logits(&self, hidden: &Array, rows: &[i32], all_rows: bool) -> Result<Array, LmError> {
        let Some(exit) = &self.ends.exit else {
            return Err(LmError::NotLoaded { name: "head".into() });
        };
        let chosen = match (all_rows, rows) {
            (true, _) => hidden.clone(),
            (false, [row]) => ffi::slice(hidden, &[*row, 0], &[row + 1, hidden.dim(1)])?,
            (false, rows) => hidden.take_axis(Array::from_slice(rows, &[rows.len() as i32]), 0)?,
        };
        exit.forward(&chosen)
    }

    /// Zeros as another stage would send them.
    pub(crate) fn made_up_input(&self, tokens: i32) -> Result<Activations, LmError> {
        // Pieces are compiled for the type that they are given: that of activations, which norms have.
        let mut dtype = None;
        for layer in &self.layers {
            layer.before.each(&mut |array| dtype = dtype.or(Some(array.dtype()).filter(|dtype| FLOATS.contains(dtype))));
        }
        let dtype = dtype.unwrap_or(Dtype::Float32);
        self.zeros(self.range.start, tokens, dtype)
    }
}
