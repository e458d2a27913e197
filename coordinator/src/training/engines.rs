//! The streams to the engines of a job, for one epoch: orders out, reports in.

use super::{
    checkpoint::SavedTensor,
    data::{MicroLimits, divide},
};
use crate::core::event::EngineAt;
use futures_util::future::try_join_all;
use mlx_cluster_common::{
    ids::Epoch,
    training::{MicroBatch, PIECE_TOKENS_MIN, Parallel, Row, TrainingPlan},
};
use mlx_cluster_proto::{
    net,
    wire::{self, train_order::Order, train_report::Report, trainer_client::TrainerClient},
};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};
use tokio::{
    sync::mpsc,
    time::{sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

/// An engine says something each second; one that says nothing for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// One that is at work and gets no micro-batch done for so long hangs.
const STANDSTILL_MAX: Duration = Duration::from_secs(200);
const OPEN_MAX: Duration = Duration::from_secs(10);
/// Orders on their way to an engine.
const ORDERS: usize = 16;

/// Why an epoch cannot go on: who is blamed, by its worker's name, and what happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) node: Option<String>,
    pub(super) message: String,
}

/// What batches came to that were worked on without a pause.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Done {
    /// By batch: the mean loss over the targets that count.
    pub(super) losses: BTreeMap<u64, f64>,
    /// Of all engines together.
    pub(super) busy: Duration,
    pub(super) waiting: Duration,
    /// By worker: most bytes that MLX had in use.
    pub(super) peaks: BTreeMap<String, u64>,
}

/// How rows are spread over the engines.
#[derive(Debug, Clone)]
pub(super) struct Spread {
    pub(super) parallel: Parallel,
    /// Of the ranks of a stage.
    pub(super) shares: Vec<u32>,
    pub(super) limits: MicroLimits,
}

impl Spread {
    /// Shares of a batch of so many tokens: of a small one only the largest shares take part.
    fn busy(&self, tokens: u64) -> Vec<u32> {
        let n = (tokens / u64::from(PIECE_TOKENS_MIN)).max(1) as usize;
        let mut largest: Vec<usize> = (0..self.shares.len()).collect();
        largest.sort_by_key(|rank| (std::cmp::Reverse(self.shares[*rank]), *rank));
        let mut shares = self.shares.clone();
        largest.into_iter().skip(n).for_each(|rank| shares[rank] = 0);
        shares
    }

    pub(super) fn new(plan: &TrainingPlan, shares: Vec<u32>) -> Self {
        let rows = plan.micro_batch_rows.max(1);
        let tokens = u64::from(rows) * u64::from(plan.tokens_per_row.max(1));
        Self { parallel: plan.parallel, shares, limits: MicroLimits { rows: rows as usize, tokens } }
    }

    /// The micro-batches of each rank.
    fn divided(&self, rows: Vec<Row>, batch: u64) -> Vec<Vec<MicroBatch>> {
        let tokens = rows.iter().map(|row| row.tokens.len() as u64).sum();
        match self.parallel {
            Parallel::Data => divide(rows, batch, &self.busy(tokens), self.limits),
            Parallel::Tensor => {
                let all = divide(rows, batch, &[1], self.limits).into_iter().next().unwrap_or_default();
                vec![all; self.shares.len()]
            }
        }
    }
}

/// Open streams to all engines.
pub(super) struct Engines {
    all: Vec<EngineStream>,
    spread: Spread,
}

struct EngineStream {
    at: EngineAt,
    orders: mpsc::Sender<wire::TrainOrder>,
    reports: Streaming<wire::TrainReport>,
    /// The last progress that it told, and when it was another one before.
    progress: (u64, Instant),
}

impl Engines {
    pub(super) async fn open(epoch: Epoch, engines: &[EngineAt], spread: Spread) -> Result<Self, Fault> {
        let mut all = Vec::with_capacity(engines.len());
        for at in engines {
            let opened = timeout(OPEN_MAX, EngineStream::open(epoch, at.clone())).await;
            all.push(opened.unwrap_or_else(|_| Err(fault(at, format!("it took no orders within {} s", OPEN_MAX.as_secs()))))?);
        }
        Ok(Self { all, spread })
    }

    /// Gives every engine what a checkpoint holds, and starts the optimizer where it was. Gives how many numbers are trained.
    pub(super) async fn begin(&mut self, restored: &[SavedTensor], updates: u64, has_optimizer: bool) -> Result<u64, Fault> {
        let mut trained = 0;
        for engine in &mut self.all {
            for tensor in restored {
                let tensor = wire::SavedTensor::try_from(tensor.clone()).map_err(|error| fault(&engine.at, error.to_string()))?;
                engine.order(Order::Restore(tensor)).await?;
            }
            engine.order(Order::Begin(wire::Begin { updates, has_optimizer })).await?;
        }
        for (engine, report) in self.reports().await? {
            let Report::Begun(begun) = report else { return Err(fault(&engine.at, "it did not say that it began")) };
            if engine.at.rank == 0 {
                trained += begun.trained;
            }
        }
        Ok(trained)
    }

    /// Sends batches, by number, on their way, to be worked on without a pause. `update_of`: after them comes an update from the gradients of so
    /// many batches.
    pub(super) async fn send(&mut self, batches: Vec<(u64, Vec<Row>)>, update_of: u32) -> Result<(), Fault> {
        let number = batches.last().map_or(0, |(number, _)| *number);
        self.send_as(batches, |micro_batches| Order::Iteration(wire::Iteration { number, micro_batches, update_of })).await
    }

    pub(super) async fn send_evaluation(&mut self, number: u64, rows: Vec<Row>) -> Result<(), Fault> {
        self.send_as(vec![(number, rows)], |micro_batches| Order::Evaluate(wire::Iteration { number, micro_batches, update_of: 0 })).await
    }

    async fn send_as(&mut self, batches: Vec<(u64, Vec<Row>)>, order: impl Fn(Vec<wire::TrainRows>) -> Order) -> Result<(), Fault> {
        let mut by_rank: Vec<Vec<wire::TrainRows>> = vec![Vec::new(); self.spread.shares.len()];
        for (number, rows) in batches {
            for (own, micro_batches) in by_rank.iter_mut().zip(self.spread.divided(rows, number)) {
                own.extend(micro_batches.into_iter().map(wire::TrainRows::from));
            }
        }
        for engine in &mut self.all {
            let own = by_rank.get(engine.at.rank as usize).cloned().unwrap_or_default();
            engine.order(order(own)).await?;
        }
        Ok(())
    }

    /// Waits for batches that were sent, by the number of the last one; they come back in the order in which they were sent.
    pub(super) async fn done(&mut self, number: u64) -> Result<Done, Fault> {
        let zero = Duration::ZERO;
        let mut all = Done { losses: BTreeMap::new(), busy: zero, waiting: zero, peaks: BTreeMap::new() };
        let is_split = self.spread.parallel == Parallel::Tensor;
        for (engine, report) in self.reports().await? {
            let done = match report {
                Report::Done(done) if done.number == number => done,
                _ => return Err(fault(&engine.at, format!("it reported something else than batch {number}"))),
            };
            // Ranks that see the same rows have the same loss.
            if !is_split || engine.at.rank == 0 {
                for (batch, loss) in done.losses {
                    *all.losses.entry(batch).or_default() += loss;
                }
            }
            all.busy += Duration::from_nanos(done.busy_ns);
            all.waiting += Duration::from_nanos(done.waiting_ns);
            all.peaks.insert(engine.at.name.clone(), done.peak_bytes);
        }
        Ok(all)
    }

    /// One of each engine. All are listened to at once: a rank that hangs shows by its own silence, while the others wait for it and say so.
    async fn reports(&mut self) -> Result<Vec<(&EngineStream, Report)>, Fault> {
        let reports = try_join_all(self.all.iter_mut().map(EngineStream::report)).await?;
        Ok(self.all.iter().zip(reports).collect())
    }

    /// What is trained, and what the optimizer remembers, tensor by tensor, each once.
    pub(super) async fn save(&mut self, number: u64, mut take: impl FnMut(SavedTensor) -> Result<(), String>) -> Result<(), SaveError> {
        for engine in &mut self.all {
            engine.order(Order::Save(wire::Save { number, has_optimizer: true })).await?;
        }
        for engine in &mut self.all {
            loop {
                match engine.report().await? {
                    Report::Saved(saved) => {
                        let saved = SavedTensor::try_from(saved).map_err(|error| fault(&engine.at, error.to_string()))?;
                        take(saved).map_err(SaveError::Kept)?;
                    }
                    Report::SaveEnded(ended) if ended == number => break,
                    _ => return Err(fault(&engine.at, "it reported something else than what it saves").into()),
                }
            }
        }
        Ok(())
    }
}

/// Why nothing was saved.
#[derive(Debug)]
pub(super) enum SaveError {
    Engine(Fault),
    /// What came could not be kept.
    Kept(String),
}

impl From<Fault> for SaveError {
    fn from(fault: Fault) -> Self {
        SaveError::Engine(fault)
    }
}

fn fault(at: &EngineAt, message: impl Into<String>) -> Fault {
    Fault { node: Some(at.name.clone()), message: message.into() }
}

impl EngineStream {
    async fn open(epoch: Epoch, at: EngineAt) -> Result<Self, Fault> {
        let name = format!("the engine on {}", at.name);
        let channel = net::connect(&name, &at.addresses).await.map_err(|error| fault(&at, error.to_string()))?;
        let mut client =
            TrainerClient::new(channel).max_decoding_message_size(net::MESSAGE_BYTES_MAX).max_encoding_message_size(net::MESSAGE_BYTES_MAX);
        let (orders, stream) = mpsc::channel(ORDERS);
        // The channel is empty, so there is room.
        drop(orders.try_send(wire::TrainOrder { order: Some(Order::Open(epoch.0)) }));
        let answer = client.train(ReceiverStream::new(stream)).await;
        let reports = answer.map_err(|status| fault(&at, status.message()))?.into_inner();
        Ok(Self { at, orders, reports, progress: (0, Instant::now()) })
    }

    /// Waits while the engine is behind with its orders.
    async fn order(&mut self, order: Order) -> Result<(), Fault> {
        match timeout(STANDSTILL_MAX, self.orders.send(wire::TrainOrder { order: Some(order) })).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(fault(&self.at, "its engine closed the stream")),
            Err(_) => Err(fault(&self.at, format!("its engine took no order for {} s", STANDSTILL_MAX.as_secs()))),
        }
    }

    /// The next report that is not about progress.
    async fn report(&mut self) -> Result<Report, Fault> {
        self.progress.1 = Instant::now();
        loop {
            let silent_at = tokio::time::Instant::now() + SILENCE_MAX;
            let heard = tokio::select! {
                heard = self.reports.message() => heard,
                () = sleep_until(silent_at) => return Err(fault(&self.at, format!("its engine said nothing for {} s", SILENCE_MAX.as_secs()))),
            };
            let report = heard.map_err(|status| fault(&self.at, format!("connection to its engine lost: {}", net::cause_of(&status))))?;
            match report.and_then(|report| report.report) {
                None => return Err(fault(&self.at, "its engine closed the stream")),
                Some(Report::Broken(wire::Broken { node, message })) => return Err(Fault { node: Some(node), message }),
                Some(Report::Progress(progress)) => self.check_progress(progress)?,
                Some(report) => return Ok(report),
            }
        }
    }

    fn check_progress(&mut self, progress: u64) -> Result<(), Fault> {
        let now = Instant::now();
        if progress != self.progress.0 {
            self.progress = (progress, now);
        }
        match now - self.progress.1 > STANDSTILL_MAX {
            true => Err(fault(&self.at, format!("its engine got nothing done for {} s", STANDSTILL_MAX.as_secs()))),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: usize, tokens: u32) -> Vec<Row> {
        (0..n).map(|_| Row { tokens: vec![1; tokens as usize], targets: vec![1; tokens as usize], counted: 0..tokens }).collect()
    }

    fn spread(parallel: Parallel) -> Spread {
        Spread { parallel, shares: vec![2, 3, 1], limits: MicroLimits { rows: 4, tokens: 4096 } }
    }

    fn dealt(spread: &Spread, rows: Vec<Row>) -> Vec<usize> {
        spread.divided(rows, 1).iter().map(|micro_batches| micro_batches.iter().map(|micro| micro.rows.len()).sum()).collect()
    }

    #[test]
    fn small_batches_are_not_cut_into_pieces() {
        let spread = spread(Parallel::Data);
        assert_eq!(dealt(&spread, rows(6, 10)), [0, 6, 0], "60 tokens are for one");
        assert_eq!(dealt(&spread, rows(10, 110)), [4, 6, 0], "1100 are for two");
        assert_eq!(dealt(&spread, rows(12, 200)), [4, 6, 2], "2400 are for all, by their shares");
    }

    #[test]
    fn ranks_of_split_matrices_see_all_rows() {
        assert_eq!(dealt(&spread(Parallel::Tensor), rows(6, 10)), [6, 6, 6]);
    }
}
