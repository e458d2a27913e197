//! Which examples each iteration and each evaluation sees, in the order that mlx-lm draws them in.
//!
//! As `iterate_batches` and `train` of `mlx_lm/tuner/trainer.py`: examples are sorted by the number of fields of their row, cut into
//! batches without the last, partial one, and visited in a permutation for each epoch. All permutations, of training, of validation
//! and of the test, come from one generator, so their order matters: the first of an epoch is drawn when its first batch is asked
//! for, before the evaluation of the same iteration.

use super::{DataSet, numpy_random::NumpyRandom};

/// Why there are no batches.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    #[error("{set} has {examples} examples, fewer than the batch size {batch_size}: add examples, or lower batch_size")]
    TooFewExamples { set: String, examples: usize, batch_size: usize },
    #[error(
        "the {examples} examples of {set} fill {rows} packed rows, fewer than the batch size {batch_size}: add examples, lower \
         batch_size, or turn packing off"
    )]
    TooFewRows { set: String, examples: usize, rows: usize, batch_size: usize },
    #[error(
        "{batches} of the batches to be trained on have no target that counts, the first of their examples is number {example} of {set}: \
         with mask_prompt, an answer must begin within max_seq_length = {max_seq_length}; raise that, or shorten or remove such examples"
    )]
    NothingToLearn { set: String, batches: usize, example: u64, max_seq_length: usize },
    #[error(
        "no target of {set} counts, so that it has no loss: with mask_prompt, an answer must begin within max_seq_length = \
         {max_seq_length}; raise that, or replace its examples"
    )]
    NothingToEvaluate { set: String, max_seq_length: usize },
    #[error("{name} is 0: give at least 1")]
    Zero { name: &'static str },
    #[error("{set} has {examples} examples: at most {} are accepted", u32::MAX)]
    TooMany { set: String, examples: usize },
}

/// The examples of each batch, by their places in the data set, in the order before shuffling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grouped(Vec<Vec<u32>>);

/// Numbers of the configuration that decide the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlan {
    pub iters: u64,
    pub steps_per_eval: u64,
    /// Batches of an evaluation; None: the whole validation set.
    pub val_batches: Option<u64>,
    /// NumPy takes no larger one.
    pub seed: u32,
}

/// What one iteration is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Iteration {
    /// From 1.
    pub iteration: u64,
    /// Batches of the validation set to be evaluated before the step, where it is time for that.
    pub evaluation: Option<Vec<Vec<u32>>>,
    pub batch: Vec<u32>,
}

/// All iterations from the current one on; a function of the data and the plan alone.
#[derive(Debug, Clone)]
pub struct Batches {
    train: Grouped,
    valid: Option<Grouped>,
    plan: BatchPlan,
    random: NumpyRandom,
    /// The permutation of the current epoch.
    epoch: Vec<u32>,
    /// Iterations that are over.
    done: u64,
}

impl Grouped {
    /// Batches of single examples, as mlx-lm makes them.
    ///
    /// # Errors
    /// Fewer examples than `batch_size`, or a batch size of 0.
    pub fn new(set: &DataSet, batch_size: usize) -> Result<Self, BatchError> {
        let examples = set.examples.len();
        let count = u32::try_from(examples).map_err(|_| BatchError::TooMany { set: set.name.clone(), examples })?;
        if batch_size == 0 {
            return Err(BatchError::Zero { name: "batch_size" });
        }
        if examples < batch_size {
            return Err(BatchError::TooFewExamples { set: set.name.clone(), examples, batch_size });
        }
        let mut sorted: Vec<u32> = (0..count).collect();
        sorted.sort_by_key(|index| set.examples[*index as usize].order);
        Ok(Self(sorted.chunks_exact(batch_size).map(<[u32]>::to_vec).collect()))
    }

    /// Batches of `batch_size` packed rows; `rows` are [`pack`](super::pack)'s.
    ///
    /// # Errors
    /// Fewer rows than `batch_size`, or a batch size of 0.
    pub fn packed(set: &DataSet, rows: &[Vec<u32>], batch_size: usize) -> Result<Self, BatchError> {
        if batch_size == 0 {
            return Err(BatchError::Zero { name: "batch_size" });
        }
        if rows.len() < batch_size {
            let (set, examples) = (set.name.clone(), set.examples.len());
            return Err(BatchError::TooFewRows { set, examples, rows: rows.len(), batch_size });
        }
        Ok(Self(rows.chunks_exact(batch_size).map(<[Vec<u32>]>::concat).collect()))
    }

    /// Number of batches of an epoch.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// An evaluation needs something to evaluate.
    ///
    /// # Errors
    /// No target of any batch counts.
    pub fn check_evaluated(&self, set: &DataSet) -> Result<(), BatchError> {
        match self.0.iter().any(|batch| has_targets(set, batch)) {
            true => Ok(()),
            false => Err(BatchError::NothingToEvaluate { set: set.name.clone(), max_seq_length: set.max_seq_length }),
        }
    }

    /// The first `limit` batches of one pass. mlx-lm draws nothing when it asks for none.
    fn evaluation(&self, limit: Option<u64>, random: &mut NumpyRandom) -> Vec<Vec<u32>> {
        if limit == Some(0) {
            return Vec::new();
        }
        let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let order = random.permutation(self.0.len() as u32);
        order.into_iter().take(limit).map(|batch| self.0[batch as usize].clone()).collect()
    }
}

impl Batches {
    /// At the start. Without a validation set nothing is evaluated.
    ///
    /// # Errors
    /// [`BatchError::Zero`].
    pub fn new(train: Grouped, valid: Option<Grouped>, plan: BatchPlan) -> Result<Self, BatchError> {
        if plan.steps_per_eval == 0 {
            return Err(BatchError::Zero { name: "steps_per_eval" });
        }
        if train.is_empty() {
            return Err(BatchError::Zero { name: "the number of training batches" });
        }
        Ok(Self { train, valid, plan, random: NumpyRandom::new(plan.seed), epoch: Vec::new(), done: 0 })
    }

    /// Each batch that is trained on needs something to learn; `set` is what they are made of. Those that no iteration comes to do not
    /// matter.
    ///
    /// # Errors
    /// Batches of which no target counts.
    pub fn check_trained(&self, set: &DataSet) -> Result<(), BatchError> {
        // The first epoch's permutation is the first that is drawn, and a later epoch has no other batches.
        let order = NumpyRandom::new(self.plan.seed).permutation(self.train.len() as u32);
        let visited = order.iter().take(usize::try_from(self.plan.iters).unwrap_or(usize::MAX));
        let idle: Vec<&[u32]> =
            visited.map(|batch| self.train.0[*batch as usize].as_slice()).filter(|batch| !has_targets(set, batch)).collect();
        match idle.iter().copied().flatten().min() {
            None => Ok(()),
            Some(first) => Err(BatchError::NothingToLearn {
                set: set.name.clone(),
                batches: idle.len(),
                example: u64::from(*first) + 1,
                max_seq_length: set.max_seq_length,
            }),
        }
    }

    /// Iterations that are over.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Number of batches after which the training set begins anew.
    pub fn epoch_len(&self) -> u64 {
        self.train.len() as u64
    }

    /// Goes to where `iteration` iterations are over, forwards or backwards, as if run from the start.
    pub fn go_to(&mut self, iteration: u64) {
        if iteration < self.done {
            (self.random, self.epoch, self.done) = (NumpyRandom::new(self.plan.seed), Vec::new(), 0);
        }
        while self.done < iteration.min(self.plan.iters) {
            self.begin();
            if self.evaluates()
                && self.plan.val_batches != Some(0)
                && let Some(valid) = &self.valid
            {
                self.random.skip_permutation(valid.len() as u32);
            }
        }
    }

    /// Batches of the test, which mlx-lm draws after the last iteration, or at once where nothing is trained.
    pub fn test(&mut self, set: &Grouped, test_batches: Option<u64>) -> Vec<Vec<u32>> {
        self.go_to(self.plan.iters);
        set.evaluation(test_batches, &mut self.random)
    }

    /// Counts one iteration, and gives the batch of it.
    fn begin(&mut self) -> usize {
        let within = (self.done % self.epoch_len()) as usize;
        if within == 0 {
            self.epoch = self.random.permutation(self.train.len() as u32);
        }
        self.done += 1;
        self.epoch[within] as usize
    }

    fn evaluates(&self) -> bool {
        self.done == 1 || self.done.is_multiple_of(self.plan.steps_per_eval) || self.done == self.plan.iters
    }
}

impl Iterator for Batches {
    type Item = Iteration;

    fn next(&mut self) -> Option<Iteration> {
        if self.done >= self.plan.iters {
            return None;
        }
        let batch = self.begin();
        let due = self.evaluates();
        let evaluation = self.valid.as_ref().filter(|_| due).map(|valid| valid.evaluation(self.plan.val_batches, &mut self.random));
        Some(Iteration { iteration: self.done, evaluation, batch: self.train.0[batch].clone() })
    }
}

fn has_targets(set: &DataSet, batch: &[u32]) -> bool {
    batch.iter().any(|index| set.examples[*index as usize].has_targets(set.max_seq_length))
}

/// Batches of a test without training before it.
///
/// # Errors
/// See [`Grouped::new`].
pub fn test_only(set: &DataSet, batch_size: usize, test_batches: Option<u64>, seed: u32) -> Result<Vec<Vec<u32>>, BatchError> {
    Ok(Grouped::new(set, batch_size)?.evaluation(test_batches, &mut NumpyRandom::new(seed)))
}

#[cfg(test)]
mod tests;
