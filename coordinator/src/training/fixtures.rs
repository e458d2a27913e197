//! A script in place of engines, for tests of what stands around them.

use super::{
    checkpoint::{CheckpointState, Part, SavedTensor, SinceReport},
    reports::tests::{train, val},
    runs::{Outcome, Run, RunJob, RunnerContext},
};
use mlx_cluster_common::dtype::DType;
use tokio_util::sync::CancellationToken;

/// Runs each job by a function.
pub(crate) struct Scripted<F>(pub(crate) F);

impl<F: Fn(RunnerContext) -> Run + Send + Sync + 'static> RunJob for Scripted<F> {
    fn run(&self, context: RunnerContext) -> Run {
        (self.0)(context)
    }
}

/// Trains a single number: it is the sum of all iterations. Goes on from its checkpoint, saves when told to and at the end, and waits to be
/// stopped at `hang_at`.
pub(crate) fn summing(hang_at: u64) -> Scripted<impl Fn(RunnerContext) -> Run + Send + Sync> {
    Scripted(move |context| Box::pin(sum(context, hang_at)) as Run)
}

/// As [`summing`], and does not end when it is told to.
pub(crate) fn deaf(hang_at: u64) -> Scripted<impl Fn(RunnerContext) -> Run + Send + Sync> {
    Scripted(move |context| Box::pin(sum(RunnerContext { stop: CancellationToken::new(), ..context }, hang_at)) as Run)
}

async fn sum(context: RunnerContext, hang_at: u64) -> Outcome {
    let RunnerContext { job, checkpoints, reporter, stop, .. } = context;
    let (config, mut iteration, mut number) = (job.config, 0, 0u64);
    if let Some(checkpoint) = checkpoints.newest().unwrap().checkpoint {
        iteration = checkpoint.state.iteration;
        let tensor = checkpoint.tensors(&[Part::Adapters]).unwrap().next().unwrap().unwrap();
        number = u64::from_le_bytes(tensor.data[..].try_into().unwrap());
    }
    let save = |iteration: u64, number: u64| {
        let mut writer = checkpoints.begin(true);
        let data = number.to_le_bytes().to_vec().into();
        writer.add(SavedTensor { part: Part::Adapters, name: "sum".into(), dtype: DType::U64, shape: vec![1], data }).unwrap();
        let state = CheckpointState {
            iteration,
            updates: iteration,
            trained_tokens: iteration,
            since_report: SinceReport::default(),
            seed: config.seed,
            data_fingerprint: "data".into(),
            config: config.clone(),
        };
        writer.finish(state).unwrap().export(&config.adapter_path, Some(iteration)).unwrap();
        reporter.saved(iteration).unwrap();
    };
    reporter.start_at(iteration).unwrap();
    reporter.plan("all on one worker".into()).unwrap();
    while iteration < config.iters {
        if iteration == hang_at {
            stop.cancelled().await;
            save(iteration, number);
            return Outcome::Stopped;
        }
        if iteration == 0 {
            reporter.val(val(0)).unwrap();
        }
        iteration += 1;
        number += iteration;
        reporter.progress(iteration, config.iters, Some(0.5));
        reporter.train(train(iteration)).unwrap();
        if iteration.is_multiple_of(config.save_every) {
            save(iteration, number);
        }
    }
    save(iteration, number);
    Outcome::Finished
}
