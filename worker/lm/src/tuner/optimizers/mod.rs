//! Optimizers: new parameters from gradients, number for number as mlx.optimizers computes them.

mod adafactor;
mod adam;
mod muon;
mod sgd;
#[cfg(test)]
mod tests;

use crate::error::LmError;
use mlx_cluster_common::training::{Optimizer, Schedule};
use mlx_rs::{Array, Dtype, error::Exception, ops};
use std::collections::BTreeMap;

/// Updates named parameters; owns what the optimizer remembers of each.
#[derive(Debug, Clone)]
pub struct Updates {
    optimizer: Optimizer,
    schedule: Schedule,
    /// Updates so far.
    step: u64,
    parameters: BTreeMap<String, Remembered>,
}

/// A parameter as the optimizer knows it.
#[derive(Debug, Clone)]
struct Remembered {
    shape: Vec<i32>,
    dtype: Dtype,
    state: State,
}

/// What is remembered of a parameter, by the names of `Optimizer::state`.
#[derive(Debug, Clone)]
struct State(BTreeMap<&'static str, Array>);

/// One parameter's part of an update.
struct Update<'a> {
    /// The number of the update, 1 for the first.
    step: u64,
    learning_rate: f32,
    parameter: &'a Array,
    gradient: &'a Array,
}

impl Updates {
    /// For exactly these parameters, of which nothing is remembered yet.
    pub fn new(optimizer: Optimizer, schedule: Schedule, parameters: &BTreeMap<String, Array>) -> Result<Self, LmError> {
        let remember = |(name, parameter): (&String, &Array)| Ok((name.clone(), Remembered::new(&optimizer, parameter)?));
        let parameters = parameters.iter().map(remember).collect::<Result<_, LmError>>()?;
        Ok(Self { optimizer, schedule, step: 0, parameters })
    }

    /// Updates so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Of the last update, and before the first one of that; mlx-lm reports this.
    pub fn learning_rate(&self) -> f32 {
        self.schedule.at(self.step.saturating_sub(1))
    }

    /// New values of the parameters, lazy. Both maps have exactly the names of the parameters, with their shapes and types. After an error
    /// nothing has changed.
    pub fn apply(
        &mut self,
        parameters: &BTreeMap<String, Array>,
        gradients: &BTreeMap<String, Array>,
    ) -> Result<BTreeMap<String, Array>, LmError> {
        let (step, learning_rate) = (self.step + 1, self.schedule.at(self.step));
        self.check(step, parameters)?;
        self.check(step, gradients)?;
        let mut next = self.parameters.clone();
        let mut updated = BTreeMap::new();
        for (((name, remembered), parameter), gradient) in next.iter_mut().zip(parameters.values()).zip(gradients.values()) {
            let update = Update { step, learning_rate, parameter, gradient };
            updated.insert(name.clone(), update.apply(&self.optimizer, &mut remembered.state)?);
        }
        (self.step, self.parameters) = (step, next);
        Ok(updated)
    }

    /// All that is remembered: has to be evaluated with the parameters, else the graph grows from update to update.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.parameters.values().flat_map(|remembered| remembered.state.0.values())
    }

    /// All that is remembered, as `PARAMETER.NAME`.
    pub fn save(&self) -> BTreeMap<String, Array> {
        let state = |(parameter, remembered): (&String, &Remembered)| {
            let named = |(name, array): (&&'static str, &Array)| (format!("{parameter}.{name}"), array.clone());
            remembered.state.0.iter().map(named).collect::<Vec<_>>()
        };
        self.parameters.iter().flat_map(state).collect()
    }

    /// Goes on after `step` updates from what `save` gave then, to the same bits. Anything missing, unknown, or of another shape or type is
    /// an error, and changes nothing.
    pub fn restore(&mut self, step: u64, mut arrays: BTreeMap<String, Array>) -> Result<(), LmError> {
        let mut parameters = self.parameters.clone();
        for (parameter, remembered) in &mut parameters {
            for (name, array) in &mut remembered.state.0 {
                let name = format!("{parameter}.{name}");
                let wanted = described(array.shape(), array.dtype());
                let found = arrays.remove(&name);
                let found =
                    found.ok_or_else(|| LmError::OptimizerState { name: name.clone(), found: "missing".into(), wanted: wanted.clone() })?;
                if found.shape() != array.shape() || found.dtype() != array.dtype() {
                    return Err(LmError::OptimizerState { name, found: described(found.shape(), found.dtype()), wanted });
                }
                *array = found;
            }
        }
        if let Some((name, array)) = arrays.pop_first() {
            let found = described(array.shape(), array.dtype());
            return Err(LmError::OptimizerState { name, found, wanted: "nothing of that name".into() });
        }
        (self.step, self.parameters) = (step, parameters);
        Ok(())
    }

    /// Whether these arrays are one for each parameter, in its shape.
    fn check(&self, step: u64, arrays: &BTreeMap<String, Array>) -> Result<(), LmError> {
        if let Some((name, array)) = arrays.iter().find(|(name, _)| !self.parameters.contains_key(*name)) {
            let found = described(array.shape(), array.dtype());
            return Err(LmError::Update { step, name: name.clone(), found, wanted: "nothing of that name".into() });
        }
        for (name, remembered) in &self.parameters {
            let array = arrays.get(name);
            if array.is_none_or(|array| array.shape() != remembered.shape || array.dtype() != remembered.dtype) {
                let found = array.map_or("missing".into(), |array| described(array.shape(), array.dtype()));
                return Err(LmError::Update { step, name: name.clone(), found, wanted: described(&remembered.shape, remembered.dtype) });
            }
        }
        Ok(())
    }
}

impl Remembered {
    fn new(optimizer: &Optimizer, parameter: &Array) -> Result<Self, LmError> {
        let (shape, dtype) = (parameter.shape().to_vec(), parameter.dtype());
        let dims: Vec<u64> = shape.iter().map(|dim| *dim as u64).collect();
        let zeros = |(name, dims): (&'static str, Vec<u64>)| {
            let shape: Vec<i32> = dims.iter().map(|dim| *dim as i32).collect();
            Ok((name, ops::zeros_dtype(&shape, dtype)?))
        };
        let state = State(optimizer.state(&dims).into_iter().map(zeros).collect::<Result<_, LmError>>()?);
        Ok(Self { shape, dtype, state })
    }
}

impl State {
    fn get(&self, name: &'static str) -> Result<&Array, LmError> {
        self.0.get(name).ok_or_else(|| LmError::NotLoaded { name: name.into() })
    }

    fn set(&mut self, name: &'static str, array: &Array) {
        self.0.insert(name, array.clone());
    }
}

impl Update<'_> {
    /// The parameter's new value.
    fn apply(&self, optimizer: &Optimizer, state: &mut State) -> Result<Array, LmError> {
        match optimizer {
            Optimizer::Adam { betas, eps, bias_correction } => adam::apply(self, state, *betas, *eps, *bias_correction),
            Optimizer::AdamW { betas, eps, weight_decay, bias_correction } => {
                let parameter = adam::decayed(self, *weight_decay)?;
                adam::apply(&Update { parameter: &parameter, ..*self }, state, *betas, *eps, *bias_correction)
            }
            Optimizer::Sgd { momentum, weight_decay, dampening, nesterov } => {
                sgd::apply(self, state, *momentum, *weight_decay, *dampening, *nesterov)
            }
            Optimizer::Adafactor(adafactor) => adafactor::apply(self, state, adafactor),
            Optimizer::Muon { momentum, weight_decay, nesterov, ns_steps } => {
                muon::apply(self, state, *momentum, *weight_decay, *nesterov, *ns_steps)
            }
        }
    }

    /// The learning rate in the gradient's type, `[]`.
    fn rate(&self) -> Result<Array, Exception> {
        Array::from_f32(self.learning_rate).as_dtype(self.gradient.dtype())
    }

    /// The gradient of the loss with an L2 penalty.
    fn penalised(&self, weight_decay: f64) -> Result<Array, Exception> {
        if weight_decay == 0.0 {
            return Ok(self.gradient.clone());
        }
        self.gradient.add(times(weight_decay, self.parameter)?)
    }
}

/// `number`, as Python's MLX has it beside `x`: rounded to f32, then to `x`'s type.
fn like(number: f64, x: &Array) -> Result<Array, Exception> {
    Array::from_f32(number as f32).as_dtype(x.dtype())
}

/// `number · x`
fn times(number: f64, x: &Array) -> Result<Array, Exception> {
    like(number, x)?.multiply(x)
}

/// `x + number`
fn plus(x: &Array, number: f64) -> Result<Array, Exception> {
    x.add(like(number, x)?)
}

/// `decay · mean + (1 - decay) · new`
fn moved(decay: f64, mean: &Array, new: &Array) -> Result<Array, Exception> {
    times(decay, mean)?.add(times(1.0 - decay, new)?)
}

fn described(shape: &[i32], dtype: Dtype) -> String {
    format!("{dtype:?} {shape:?}")
}
