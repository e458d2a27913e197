//! A stage of a model while it is trained: forward, backward, and the update of what it owns.
//!
//! Blocks are built anew for each pass, from frozen arrays and from those that are differentiated, inside the function that MLX traces. So
//! whatever a block makes of its parameters when it is loaded is part of the function, and no block knows of training.

use super::{
    batch::Lot,
    load::{Magnitudes, magnitude},
    losses::cross_entropy,
    optimizers::Updates,
    state::{Saved, TrainState},
};
use crate::{
    activations::Activations,
    adapter::{Adaption, Dropout},
    error::LmError,
    ffi::Deferred,
    group::{Group, in_order},
    sequences::StepCaches,
    stack::{Run, Stack},
    weights::Weights,
};
use mlx_cluster_common::{
    cache::CacheOptions,
    spec::{CutTensor, ModelSpec},
    training::{MicroBatch, Parallel, TrainingRole},
};
use mlx_rs::{Array, Dtype, error::Exception, ops, transforms, transforms::fallible_vjp};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    rc::Rc,
};

/// Consecutive layers that are differentiated together.
pub struct Segment {
    pub layers: Range<u32>,
    /// Parameters of its parts, but those that are trained.
    pub frozen: Weights,
    /// Names of those that are.
    pub trained: Vec<String>,
}

/// What a stage is trained with.
pub struct Training {
    pub role: TrainingRole,
    /// Replicas of this stage, or ranks that have a part of each matrix; None when it is alone.
    pub group: Option<Group>,
    /// Something of the stages before this one is trained: they want gradients.
    pub gives_gradients: bool,
}

pub struct TrainedStage {
    spec: ModelSpec,
    segments: Vec<Segment>,
    training: Training,
    state: TrainState,
    /// Magnitudes that are still to be measured.
    magnitudes: Magnitudes,
}

/// What a forward pass leaves, evaluated.
pub enum Passed {
    /// On the last stage, which has been backward too: its part of the batch's loss, and what the stage before wants.
    Loss { loss: f32, gradients: Option<Activations> },
    /// For the next stage; `pending` waits for what that gives back.
    Activations { output: Activations, pending: Pending },
}

/// A micro-batch that went forward and has to go backward.
pub struct Pending(Inner);

impl Pending {
    /// Whether [`TrainedStage::backward`] needs what the next stage gives back.
    pub fn wants_gradients(&self) -> bool {
        !matches!(self.0, Inner::Nothing)
    }
}

enum Inner {
    /// Nothing here or before is trained.
    Nothing,
    /// The whole graph, built already.
    Graph { outputs: Vec<(CutTensor, Deferred)>, gradients: Vec<Array>, inputs: Vec<(CutTensor, Array)> },
    /// The inputs of each segment.
    Inputs { lot: Lot, inputs: Vec<Option<Activations>>, micro: MicroBatch },
}

impl TrainedStage {
    /// `segments` tile the stage's layers, and name what is in `state`.
    pub(super) fn new(spec: ModelSpec, segments: Vec<Segment>, state: TrainState, magnitudes: Magnitudes, training: Training) -> Self {
        if let (Some(group), Parallel::Tensor) = (&training.group, training.role.parallel) {
            group.train();
        }
        Self { spec, segments, training, state, magnitudes }
    }

    pub fn is_first(&self) -> bool {
        self.layers().start == 0
    }

    pub fn is_last(&self) -> bool {
        self.layers().end == self.spec.n_layers()
    }

    fn layers(&self) -> Range<u32> {
        let start = self.segments.first().map_or(0, |segment| segment.layers.start);
        start..self.segments.last().map_or(start, |segment| segment.layers.end)
    }

    /// What is trained, as this rank has it.
    pub fn parameters(&self) -> &BTreeMap<String, Array> {
        self.state.parameters()
    }

    /// How many numbers are trained, over all ranks of the stage.
    pub fn trained_numbers(&self) -> u64 {
        self.state.numbers()
    }

    pub fn updates(&self) -> &Updates {
        self.state.updates()
    }

    /// Measures what is left to measure of the start; the group has to have formed.
    pub fn prepare(&mut self) -> Result<(), LmError> {
        in_order(|| {
            let split = self.training.group.as_ref().filter(|_| self.training.role.parallel == Parallel::Tensor);
            for (name, module) in std::mem::take(&mut self.magnitudes) {
                let owner = self.segments.iter().find(|segment| segment.trained.contains(&name));
                let owner = owner.ok_or_else(|| LmError::NotLoaded { name: name.clone() })?;
                let measured = magnitude(&owner.frozen, &self.spec, &module, split)?;
                self.state.start(name, measured);
            }
            Ok(transforms::eval(self.parameters().values())?)
        })
    }

    /// Forward, and on the last stage backward: gradients are added to those since the last update.
    pub fn forward(&mut self, micro: &MicroBatch, input: Option<Activations>) -> Result<Passed, LmError> {
        in_order(|| match self.segments.as_slice() {
            [_] => self.forward_whole(micro, input),
            _ => self.forward_by_segments(micro, input),
        })
    }

    /// What the next stage gave back for a micro-batch; gives what the stage before wants.
    pub fn backward(&mut self, pending: Pending, gradients: Option<Activations>) -> Result<Option<Activations>, LmError> {
        in_order(|| match pending.0 {
            Inner::Nothing => Ok(None),
            Inner::Graph { outputs, gradients: own, inputs } => {
                let given = gradients.ok_or_else(|| LmError::WrongInput { wanted: "gradients".into(), found: "none".into() })?;
                for (tensor, deferred) in outputs {
                    deferred.fill(given.get(tensor)?)?;
                }
                self.add(0, own)?;
                self.finished(inputs)
            }
            Inner::Inputs { lot, inputs, micro } => self.backward_by_segments(&lot, &micro, inputs, gradients),
        })
    }

    /// Forward alone, as in evaluation: nothing is dropped, nothing is differentiated.
    pub fn evaluate(&self, micro: &MicroBatch, input: Option<Activations>) -> Result<Passed, LmError> {
        in_order(|| {
            let (lot, mut stream) = (Lot::new(micro)?, input);
            for index in 0..self.segments.len() {
                let trained = self.trained(index);
                let outputs = self.run(index, &trained, stream.as_ref(), &lot, None)?;
                match self.segments[index].layers.end == self.spec.n_layers() {
                    true => return Ok(Passed::Loss { loss: read(&outputs[0])?, gradients: None }),
                    false => stream = Some(self.named(index, outputs)?),
                }
            }
            let output = stream.ok_or_else(|| LmError::Mlx("a stage without layers".into()))?;
            output.wait()?;
            Ok(Passed::Activations { output, pending: Pending(Inner::Nothing) })
        })
    }

    /// Goes on from what a checkpoint holds.
    pub fn restore(
        &mut self,
        parameters: BTreeMap<String, Array>,
        step: u64,
        remembered: Option<BTreeMap<String, Array>>,
    ) -> Result<(), LmError> {
        self.state.restore(parameters, step, remembered)
    }

    /// Adds the gradients up over the group, whose ranks all have to do so; nothing where there is none.
    pub fn reduce(&mut self) -> Result<(), LmError> {
        self.state.reduce()
    }

    /// One update from the gradients of `accumulated` batches, which the group has added up; its ranks all have to do so.
    pub fn update(&mut self, accumulated: u32) -> Result<(), LmError> {
        self.state.update(accumulated)
    }

    /// What is trained, whole, and on request what the optimizer remembers, as a checkpoint holds them. The ranks of a group all have to ask.
    pub fn saved(&self, has_optimizer: bool) -> Result<Saved, LmError> {
        self.state.saved(has_optimizer)
    }

    /// Drops what an unfinished batch left.
    pub fn forget_gradients(&mut self) {
        self.state.forget_gradients();
    }

    fn trained(&self, index: usize) -> Vec<Array> {
        self.segments[index].trained.iter().filter_map(|name| self.parameters().get(name).cloned()).collect()
    }

    /// Whether something before a segment wants gradients.
    fn passes_gradients(&self, index: usize) -> bool {
        self.training.gives_gradients || self.segments[..index].iter().any(|segment| !segment.trained.is_empty())
    }

    fn dropout(&self, micro: &MicroBatch, lot: &Lot) -> Option<Rc<Dropout>> {
        let probability = self.training.role.fine_tune.lora().map_or(0.0, |lora| lora.dropout);
        (probability > 0.0).then(|| {
            Rc::new(Dropout {
                probability,
                seed: self.training.role.seed,
                batch: micro.batch,
                first_row: micro.first_row,
                lengths: lot.lengths.clone(),
            })
        })
    }

    /// A segment as a function of what is trained and of what comes in: the loss on the last one, else what crosses the cut after it.
    fn run(
        &self,
        index: usize,
        trained: &[Array],
        input: Option<&Activations>,
        lot: &Lot,
        dropout: Option<Rc<Dropout>>,
    ) -> Result<Vec<Array>, LmError> {
        let Segment { layers, frozen, trained: names } = &self.segments[index];
        let mut weights = frozen.with(names.iter().cloned().zip(trained.iter().cloned()));
        if let Some(lora) = self.training.role.fine_tune.lora() {
            weights = weights.adapted(Adaption { scale: lora.scale, dropout });
        }
        let stack = Stack::load(&self.spec, layers.clone(), weights, &CacheOptions::default())?;
        let caches = StepCaches::fresh(lot.packing.spans.iter().map(|span| span.sequence), &stack.slots);
        let mut run = Run::new(&lot.packing, caches);
        let ids = (layers.start == 0).then_some(&lot.ids);
        let (x, layer_inputs) = stack.stream(ids, &lot.packing, input)?;
        if let Some(input) = input {
            stack.append_copies(input, &mut run)?;
        }
        let output = stack.forward(&x, layer_inputs, &mut run)?;
        if !stack.is_last() {
            let Run { passed_on, .. } = run;
            let activations = stack.activations(Some(output), input.cloned(), passed_on, &lot.packing)?;
            return Ok(activations.tensors.into_values().collect());
        }
        let (x, _) = output;
        let hidden = x.reshape(&[-1, x.dim(-1)])?;
        let logits = stack.logits(&hidden, &lot.counted, lot.counted.len() == lot.packing.tokens() as usize)?;
        let losses = cross_entropy(&logits, &lot.targets)?.as_dtype(Dtype::Float32)?;
        Ok(vec![ops::divide(losses.sum(false)?, Array::from_f32(lot.batch_targets as f32))?])
    }

    /// Outputs of a segment by name.
    fn named(&self, index: usize, outputs: Vec<Array>) -> Result<Activations, LmError> {
        let names: BTreeSet<_> = self.spec.cut_tensors(self.segments[index].layers.end).into_iter().map(|(tensor, _)| tensor).collect();
        Ok(Activations { tensors: names.into_iter().zip(outputs).collect() })
    }

    /// Differentiates a segment: its outputs, the gradients of what is trained, and those of its inputs where they are wanted.
    fn differentiated(
        &self,
        index: usize,
        lot: &Lot,
        micro: &MicroBatch,
        input: Option<&Activations>,
        cotangents: &[Array],
    ) -> Result<Differentiated, LmError> {
        let names: Vec<CutTensor> = match input.filter(|_| self.passes_gradients(index)) {
            Some(input) => input.tensors.keys().copied().collect(),
            None => Vec::new(),
        };
        let mut primals = self.trained(index);
        let n_trained = primals.len();
        primals.extend(input.iter().flat_map(|input| names.iter().filter_map(|name| input.tensors.get(name).cloned())));
        let dropout = self.dropout(micro, lot);
        if primals.is_empty() {
            return Ok(Differentiated { outputs: self.run(index, &[], input, lot, dropout)?, trained: Vec::new(), inputs: Vec::new() });
        }
        let function = |arrays: &[Array]| {
            let (trained, given) = arrays.split_at(n_trained);
            let input = input.map(|input| {
                let mut tensors = input.tensors.clone();
                tensors.extend(names.iter().copied().zip(given.iter().cloned()));
                Activations { tensors }
            });
            self.run(index, trained, input.as_ref(), lot, dropout.clone()).map_err(|error| Exception::custom(error.to_string()))
        };
        let (outputs, mut gradients) = fallible_vjp(function, &primals, cotangents)?;
        let inputs = gradients.split_off(n_trained);
        Ok(Differentiated { outputs, trained: gradients, inputs: names.into_iter().zip(inputs).collect() })
    }

    /// The derivative of the loss by itself. With parts of matrices on several ranks each has the same loss, and gradients go through the
    /// collectives as those of the sum of all.
    fn one(&self) -> Array {
        let ranks = match (&self.training.group, self.training.role.parallel) {
            (Some(group), Parallel::Tensor) => group.size(),
            _ => 1,
        };
        Array::from_f32(1.0 / ranks as f32)
    }

    fn forward_whole(&mut self, micro: &MicroBatch, input: Option<Activations>) -> Result<Passed, LmError> {
        let lot = Lot::new(micro)?;
        if self.is_last() {
            let done = self.differentiated(0, &lot, micro, input.as_ref(), &[self.one()])?;
            self.add(0, done.trained)?;
            let loss = done.outputs.into_iter().next().ok_or_else(|| LmError::Mlx("no loss".into()))?;
            transforms::async_eval(self.state.gradients().chain([&loss]))?;
            let gradients = self.finished(done.inputs)?;
            return Ok(Passed::Loss { loss: read(&loss)?, gradients });
        }
        // Only for shapes and types: nothing of it is evaluated, nor may anything that is wait for it.
        let outputs = in_order(|| self.run(0, &self.trained(0), input.as_ref(), &lot, None))?;
        let outputs = self.named(0, outputs)?;
        let deferred = |(tensor, array): (&CutTensor, &Array)| Ok::<_, LmError>((*tensor, Deferred::new(array.shape(), array.dtype())?));
        let deferred = outputs.tensors.iter().map(deferred).collect::<Result<Vec<_>, _>>()?;
        let cotangents: Vec<Array> = deferred.iter().map(|(_, deferred)| deferred.array().clone()).collect();
        let done = self.differentiated(0, &lot, micro, input.as_ref(), &cotangents)?;
        let output = self.named(0, done.outputs)?;
        output.wait()?;
        let inner = match done.trained.is_empty() && done.inputs.is_empty() {
            true => Inner::Nothing,
            false => Inner::Graph { outputs: deferred, gradients: done.trained, inputs: done.inputs },
        };
        Ok(Passed::Activations { output, pending: Pending(inner) })
    }

    fn forward_by_segments(&mut self, micro: &MicroBatch, input: Option<Activations>) -> Result<Passed, LmError> {
        let lot = Lot::new(micro)?;
        let (mut inputs, mut stream) = (Vec::with_capacity(self.segments.len()), input);
        let last = self.segments.len() - 1;
        for index in 0..self.segments.len() {
            inputs.push(stream.clone());
            if self.is_last() && index == last {
                break;
            }
            let trained = self.trained(index);
            let outputs = self.run(index, &trained, stream.as_ref(), &lot, self.dropout(micro, &lot))?;
            let output = self.named(index, outputs)?;
            output.wait()?;
            stream = Some(output);
        }
        if !self.is_last() {
            let output = stream.ok_or_else(|| LmError::Mlx("a stage without layers".into()))?;
            let is_trained = self.training.gives_gradients || !self.parameters().is_empty();
            let inner = if is_trained { Inner::Inputs { lot, inputs, micro: micro.clone() } } else { Inner::Nothing };
            return Ok(Passed::Activations { output, pending: Pending(inner) });
        }
        let input = inputs.pop().flatten();
        let done = self.differentiated(last, &lot, micro, input.as_ref(), &[self.one()])?;
        self.add(last, done.trained)?;
        let loss = done.outputs.into_iter().next().ok_or_else(|| LmError::Mlx("no loss".into()))?;
        let gradients = self.finished(done.inputs)?;
        let loss = read(&loss)?;
        let gradients = match inputs.is_empty() {
            true => gradients,
            false => self.backward_by_segments(&lot, micro, inputs, gradients)?,
        };
        Ok(Passed::Loss { loss, gradients })
    }

    fn backward_by_segments(
        &mut self,
        lot: &Lot,
        micro: &MicroBatch,
        mut inputs: Vec<Option<Activations>>,
        gradients: Option<Activations>,
    ) -> Result<Option<Activations>, LmError> {
        let mut gradients = gradients;
        while let Some(input) = inputs.pop() {
            let index = inputs.len();
            let Some(given) = gradients.take() else { break };
            let cotangents: Vec<Array> = given.tensors.into_values().collect();
            let done = self.differentiated(index, lot, micro, input.as_ref(), &cotangents)?;
            self.add(index, done.trained)?;
            gradients = self.finished(done.inputs)?;
        }
        Ok(gradients)
    }

    fn add(&mut self, index: usize, gradients: Vec<Array>) -> Result<(), LmError> {
        self.segments[index].trained.iter().zip(gradients).try_for_each(|(name, gradient)| self.state.add(name, gradient))
    }

    /// Evaluates the gradients so far and those of inputs.
    fn finished(&self, inputs: Vec<(CutTensor, Array)>) -> Result<Option<Activations>, LmError> {
        transforms::eval(self.state.gradients().chain(inputs.iter().map(|(_, array)| array)))?;
        Ok((!inputs.is_empty()).then(|| Activations { tensors: inputs.into_iter().collect() }))
    }
}

struct Differentiated {
    outputs: Vec<Array>,
    trained: Vec<Array>,
    inputs: Vec<(CutTensor, Array)>,
}

fn read(loss: &Array) -> Result<f32, LmError> {
    transforms::eval([loss])?;
    loss.try_item_exact::<f32>().map_err(|error| LmError::Mlx(format!("a loss cannot be read: {error}")))
}
