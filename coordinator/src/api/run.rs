//! One API request in the engines: all its answers side by side, as one sequence of pieces.

use super::{
    Api,
    choice::{Choice, Piece},
    error::ApiError,
    metrics::Timer,
    prompt::Prompt,
};
use crate::serving::{Admitted, RequestEvent, ServedModel};
use futures_util::{StreamExt, stream::BoxStream};
use mlx_cluster_common::{
    request::{FinishReason, TokenOut},
    sampling::SamplingParams,
};
use std::sync::Arc;
use tokio_stream::{StreamMap, wrappers::ReceiverStream};

/// One answer to be made.
pub(super) struct Task {
    pub(super) prompt: Arc<Prompt>,
    pub(super) params: SamplingParams,
    pub(super) choice: Choice,
}

/// What happens to an answer.
#[derive(Debug, PartialEq)]
pub(super) enum Progress {
    /// Log-probabilities of the prompt's tokens from `start` on.
    Prompt {
        start: u32,
        tokens: Vec<TokenOut>,
    },
    Piece(Piece),
}

/// None at the end of an event stream, so that a stream that breaks off is noticed.
type Events = BoxStream<'static, Option<RequestEvent>>;

/// Answers in the making. Dropping it cancels them in the engines.
pub(super) struct Run {
    events: StreamMap<usize, Events>,
    answers: Vec<(Choice, Timer)>,
    generated_tokens: u64,
}

impl Run {
    /// Hands all answers to the engines; when one is refused at once, none is made.
    pub(super) async fn start(api: &Api, model: &ServedModel, tasks: Vec<Task>) -> Result<Self, ApiError> {
        let mut run = Self { events: StreamMap::new(), answers: Vec::new(), generated_tokens: 0 };
        for (index, task) in tasks.into_iter().enumerate() {
            let timer = api.metrics.start(&model.id, task.prompt.ids.len());
            let request = Admitted { prompt: task.prompt.ids.clone(), params: task.params, adapter: model.adapter };
            let receiver = api.serving.submit(request).await?;
            let end = futures_util::stream::once(async { None });
            run.events.insert(index, ReceiverStream::new(receiver).map(Some).chain(end).boxed());
            run.answers.push((task.choice, timer));
        }
        Ok(run)
    }

    /// Tokens generated so far, also those whose text is held back or cut off.
    pub(super) fn generated_tokens(&self) -> u64 {
        self.generated_tokens
    }

    /// The next thing that happens to any of the answers; None when all are finished. Nothing follows an error.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, Progress), ApiError>> {
        loop {
            let (index, event) = self.events.next().await?;
            match self.take(index, event) {
                Ok(Some(progress)) => return Some(Ok((index, progress))),
                Ok(None) => {}
                Err(error) => {
                    self.events.clear();
                    return Some(Err(error));
                }
            }
        }
    }

    /// Ends an answer early, because nobody wants the rest of it.
    pub(super) fn cancel(&mut self, index: usize) {
        self.events.remove(&index);
        if let Some((_, timer)) = self.answers.get_mut(index) {
            timer.finish(FinishReason::Stop);
        }
    }

    fn take(&mut self, index: usize, event: Option<RequestEvent>) -> Result<Option<Progress>, ApiError> {
        let Some((choice, timer)) = self.answers.get_mut(index) else { return Ok(None) };
        let piece = match event {
            Some(RequestEvent::Prompt { start, tokens }) => return Ok(Some(Progress::Prompt { start, tokens })),
            Some(RequestEvent::Token(token)) => {
                self.generated_tokens += 1;
                timer.token();
                choice.push(token)
            }
            Some(RequestEvent::Finished(reason)) => choice.finish(reason),
            Some(RequestEvent::Failed(failure)) => return Err(failure.into()),
            None => return Err(ApiError::BrokeOff),
        };
        if let Some(reason) = piece.finish {
            timer.finish(reason);
            // Cancels what the engines would generate after a stop string.
            self.events.remove(&index);
        }
        Ok((!piece.is_empty()).then_some(Progress::Piece(piece)))
    }
}
