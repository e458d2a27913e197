//! What is trained of a stage: its parameters, their gradients since the last update, and what the optimizer remembers of them.
//!
//! Factors are whole on every rank of a group. Parameters of a model whose matrices are split are in parts, each on the ranks that have it; then
//! whatever leaves a rank, or comes from a checkpoint, is whole.

use super::{buckets::summed, optimizers::Updates, pieces::Pieces};
use crate::{
    error::LmError,
    group::{Group, in_order},
};
use mlx_cluster_common::training::{Optimizer, Schedule};
use mlx_rs::{Array, ops, transforms};
use std::collections::BTreeMap;

type Arrays = BTreeMap<String, Array>;

/// By name.
pub struct Saved {
    pub parameters: Arrays,
    pub optimizer: Arrays,
}

/// Whom gradients are added up with.
pub(super) enum Others {
    None,
    /// Who have the same parameters, and gradients of other rows or of other parts of the model.
    Same(Group),
    /// Who have other parts of the parameters.
    Parts(Pieces),
}

pub(super) struct TrainState {
    optimizer: Optimizer,
    schedule: Schedule,
    others: Others,
    parameters: Arrays,
    /// Sums since the last update.
    gradients: Arrays,
    updates: Updates,
}

impl TrainState {
    /// `parameters` are the rank's own.
    pub(super) fn new(parameters: Arrays, optimizer: Optimizer, schedule: Schedule, others: Others) -> Result<Self, LmError> {
        let updates = updates(&optimizer, &schedule, &others, &parameters)?;
        Ok(Self { optimizer, schedule, others, parameters, gradients: Arrays::new(), updates })
    }

    pub(super) fn parameters(&self) -> &Arrays {
        &self.parameters
    }

    pub(super) fn updates(&self) -> &Updates {
        &self.updates
    }

    /// How many numbers are trained, over all ranks.
    pub(super) fn numbers(&self) -> u64 {
        let numbers = |(name, own): (&String, &Array)| self.others.whole_shape(name, own).iter().map(|dim| *dim as u64).product::<u64>();
        self.parameters.iter().map(numbers).sum()
    }

    /// What a parameter starts as.
    pub(super) fn start(&mut self, name: String, parameter: Array) {
        self.parameters.insert(name, parameter);
    }

    /// Adds to the gradient of a parameter; not evaluated.
    pub(super) fn add(&mut self, name: &str, gradient: Array) -> Result<(), LmError> {
        let sum = match self.gradients.remove(name) {
            Some(sum) => ops::add(&sum, &gradient)?,
            None => gradient,
        };
        self.gradients.insert(name.to_owned(), sum);
        Ok(())
    }

    pub(super) fn gradients(&self) -> impl Iterator<Item = &Array> {
        self.gradients.values()
    }

    pub(super) fn forget_gradients(&mut self) {
        self.gradients.clear();
    }

    /// Goes on from what a checkpoint holds.
    pub(super) fn restore(&mut self, parameters: Arrays, step: u64, remembered: Option<Arrays>) -> Result<(), LmError> {
        for (name, array) in &parameters {
            let own = self.parameters.get(name).ok_or_else(|| LmError::NotLoaded { name: name.clone() })?;
            let wanted = self.others.whole_shape(name, own);
            if wanted != array.shape() {
                return Err(LmError::WrongInput { wanted: format!("`{name}` {wanted:?}"), found: format!("{:?}", array.shape()) });
            }
        }
        for (name, array) in parameters {
            let own = self.others.own(&name, array)?;
            self.parameters.insert(name, own);
        }
        self.gradients.clear();
        match remembered {
            Some(remembered) if self.updates_whole() => self.updates.restore(step, remembered),
            Some(remembered) => {
                let own = remembered.into_iter().map(|(name, array)| {
                    let own = self.others.own(parameter_of(&name), array)?;
                    Ok((name, own))
                });
                self.updates.restore(step, own.collect::<Result<_, LmError>>()?)
            }
            None => {
                self.updates = updates(&self.optimizer, &self.schedule, &self.others, &self.parameters)?;
                Ok(())
            }
        }
    }

    /// Completes the gradients with those of the others, who all have to do so.
    pub(super) fn reduce(&mut self) -> Result<(), LmError> {
        if matches!(self.others, Others::None) {
            return Ok(());
        }
        in_order(|| {
            // A replica may have had no rows.
            let gradients = self.all_gradients()?;
            self.gradients = match &self.others {
                Others::None => gradients,
                Others::Same(group) => summed(group, gradients)?,
                Others::Parts(pieces) => pieces.summed(gradients)?,
            };
            Ok(transforms::eval(self.gradients.values())?)
        })
    }

    /// One update from the gradients of `accumulated` batches, completed before; the others all have to do so too.
    pub(super) fn update(&mut self, accumulated: u32) -> Result<(), LmError> {
        let mut gradients = self.all_gradients()?;
        if accumulated > 1 {
            for gradient in gradients.values_mut() {
                *gradient = ops::divide(&*gradient, Array::from_f32(accumulated as f32).as_dtype(gradient.dtype())?)?;
            }
        }
        let is_whole = self.updates_whole();
        self.parameters = match &self.others {
            Others::Parts(pieces) if is_whole => in_order(|| {
                let (whole, gradients) = (pieces.all_whole(&self.parameters)?, pieces.all_whole(&gradients)?);
                let updated = self.updates.apply(&whole, &gradients)?;
                let own = updated.into_iter().map(|(name, whole)| {
                    let own = self.others.own(&name, whole)?;
                    Ok((name, own))
                });
                own.collect::<Result<_, LmError>>()
            })?,
            _ => self.updates.apply(&self.parameters, &gradients)?,
        };
        Ok(transforms::eval(self.parameters.values().chain(self.updates.arrays()))?)
    }

    /// What is trained, and on request what the optimizer remembers, as a checkpoint holds them. The others all have to ask.
    pub(super) fn saved(&self, has_optimizer: bool) -> Result<Saved, LmError> {
        let optimizer = if has_optimizer { self.updates.save() } else { Arrays::new() };
        let Others::Parts(pieces) = &self.others else { return Ok(Saved { parameters: self.parameters.clone(), optimizer }) };
        in_order(|| {
            let parameters = pieces.all_whole(&self.parameters)?;
            let whole = |(name, own): (String, Array)| {
                let whole = pieces.whole(parameter_of(&name), &own)?;
                Ok((name, whole))
            };
            let optimizer = match self.updates_whole() {
                true => optimizer,
                false => optimizer.into_iter().map(whole).collect::<Result<_, LmError>>()?,
            };
            transforms::eval(parameters.values().chain(optimizer.values()))?;
            Ok(Saved { parameters, optimizer })
        })
    }

    /// Of every parameter, zeros where there are none; none are left.
    fn all_gradients(&mut self) -> Result<Arrays, LmError> {
        let mut gradients = std::mem::take(&mut self.gradients);
        for (name, parameter) in &self.parameters {
            if !gradients.contains_key(name) {
                gradients.insert(name.clone(), ops::zeros_dtype(parameter.shape(), parameter.dtype())?);
            }
        }
        Ok(gradients)
    }

    fn updates_whole(&self) -> bool {
        self.others.updates_whole(&self.optimizer)
    }
}

impl Others {
    /// Whether an update needs matrices that are put together for it; else each rank updates its parts by itself.
    fn updates_whole(&self, optimizer: &Optimizer) -> bool {
        matches!(self, Others::Parts(_)) && !optimizer.is_by_number()
    }

    fn whole_shape(&self, name: &str, own: &Array) -> Vec<i32> {
        match self {
            Others::Parts(pieces) => pieces.whole_shape(name, own),
            Others::None | Others::Same(_) => own.shape().to_vec(),
        }
    }

    /// What of a parameter, or of something in its shape, this rank has.
    fn own(&self, parameter: &str, whole: Array) -> Result<Array, LmError> {
        match self {
            // In a buffer of its own, so that the whole can go.
            Others::Parts(pieces) => Ok(pieces.own(parameter, &whole)?.contiguous()?),
            Others::None | Others::Same(_) => Ok(whole),
        }
    }
}

/// An optimizer that remembers nothing yet, of parts or of wholes.
fn updates(optimizer: &Optimizer, schedule: &Schedule, others: &Others, parameters: &Arrays) -> Result<Updates, LmError> {
    if !others.updates_whole(optimizer) {
        return Updates::new(optimizer.clone(), schedule.clone(), parameters);
    }
    let whole = |(name, own): (&String, &Array)| Ok((name.clone(), ops::zeros_dtype(&others.whole_shape(name, own), own.dtype())?));
    Updates::new(optimizer.clone(), schedule.clone(), &parameters.iter().map(whole).collect::<Result<_, LmError>>()?)
}

/// Of something that an optimizer remembers, `PARAMETER.NAME`.
fn parameter_of(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(parameter, _)| parameter)
}
