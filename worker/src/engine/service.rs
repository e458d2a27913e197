//! The engine's gRPC service: turns streams into commands for the thread that owns the arrays.

use super::{
    CHANNEL, Command, Outgoing,
    adapters::{self, Change, Order},
    downstream::{Call, Downstream, Target},
    inbound::{Frame, HEARTBEAT, Inbound, SILENCE_MAX},
    lead::Pulse,
    ranks::{JOINING, Join, STEP_DEADLINE},
    relay::Fault,
    watchdog::Watchdog,
};
use mlx_cluster_common::{
    engine::{EngineSpec, GroupLink, Link},
    ids::{AdapterId, Epoch, SequenceId},
    request::{Delivery, SessionCommand, Submission},
};
use mlx_cluster_proto::wire::{self, engine_server::Engine, session_command::Command as WireCommand};
use std::{pin::Pin, sync::Mutex, time::Instant};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{interval, timeout},
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

/// Tokens that wait for the coordinator to read them; when it is further behind, the engine waits for it.
const DELIVERIES: usize = 4096;

type Outbound<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct Service {
    commands: mpsc::Sender<Command>,
    /// For messages.
    node_name: String,
    spec: EngineSpec,
    watchdog: Watchdog,
    pulse: watch::Receiver<Pulse>,
    faults: watch::Receiver<Fault>,
    /// Ends the tasks of the epoch that is over. A mutex, because two Link calls may come at once; never held across an await.
    epoch_tasks: Mutex<CancellationToken>,
    epoch: watch::Sender<Epoch>,
    tasks: TaskTracker,
}

impl Service {
    pub(super) fn new(
        commands: mpsc::Sender<Command>,
        spec: EngineSpec,
        watchdog: Watchdog,
        pulse: watch::Receiver<Pulse>,
        faults: watch::Receiver<Fault>,
        node_name: String,
    ) -> Self {
        Self {
            node_name,
            commands,
            spec,
            watchdog,
            pulse,
            faults,
            epoch_tasks: Mutex::new(CancellationToken::new()),
            epoch: watch::Sender::new(Epoch(0)),
            tasks: TaskTracker::new(),
        }
    }

    async fn command(&self, command: Command) -> Result<(), Status> {
        self.commands.send(command).await.map_err(|_| Status::unavailable("the engine is stopping"))
    }

    /// A token that ends with this epoch; ends everything of the epoch before.
    fn begin_epoch(&self, epoch: Epoch) -> CancellationToken {
        let fresh = CancellationToken::new();
        let mut current = self.epoch_tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::mem::replace(&mut *current, fresh.clone()).cancel();
        self.watchdog.epoch_over(&format!("it was linked for epoch {epoch}"));
        self.epoch.send_replace(epoch);
        fresh
    }

    fn current_epoch_token(&self) -> CancellationToken {
        self.epoch_tasks.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Takes the frames of a neighbour, and answers with heartbeats as long as its epoch lives here.
    fn take<F: Frame>(&self, frames: Streaming<F>, group: Option<Watchdog>) -> Outbound<wire::Heartbeat> {
        let (sender, receiver) = mpsc::channel(2);
        let inbound =
            Inbound { frames, commands: self.commands.clone(), epoch: self.epoch.subscribe(), faults: self.faults.clone(), group };
        self.tasks.spawn(inbound.run(sender));
        Box::pin(ReceiverStream::new(receiver))
    }

    /// Connects to another engine for as long as the epoch lives; what is sent into the channel goes there.
    async fn connect(&self, call: Call<'_>, cancelled: &CancellationToken) -> Result<mpsc::Sender<Outgoing>, Status> {
        let downstream = Downstream::connect(call).await?;
        let (sender, outgoing) = mpsc::channel(CHANNEL);
        self.tasks.spawn(downstream.run(outgoing, self.commands.clone(), cancelled.clone()));
        Ok(sender)
    }

    fn check_neighbour(&self, is_wanted: bool, what: &'static str) -> Result<(), Status> {
        if is_wanted { Ok(()) } else { Err(Status::failed_precondition(format!("this engine takes no {what}"))) }
    }
}

/// Whether a link names the neighbours that an engine of this place has.
fn check_link(spec: &EngineSpec, link: &Link) -> Result<(), Status> {
    let (rank, ranks) = (spec.place.rank, spec.place.ranks());
    let sends = rank == 0;
    let fits = link.next.is_some() == (sends && spec.n_stages > 1)
        && link.ranks.len() == if sends { ranks - 1 } else { 0 }
        && link.group.as_ref().map_or(1, |group| group.names.len()) == ranks;
    match fits {
        true => Ok(()),
        false => Err(Status::invalid_argument(format!(
            "rank {rank} of {ranks} of stage {} of {} was linked as another one would be",
            spec.stage, spec.n_stages
        ))),
    }
}

#[tonic::async_trait]
impl Engine for Service {
    type StepsStream = Outbound<wire::Heartbeat>;
    type ResultsStream = Outbound<wire::Heartbeat>;
    type SessionStream = Outbound<wire::Delivery>;

    async fn link(&self, request: Request<wire::LinkRequest>) -> Result<Response<wire::LinkReply>, Status> {
        let link = Link::try_from(request.into_inner())?;
        check_link(&self.spec, &link)?;
        if let Some(GroupLink { names, .. }) = &link.group {
            self.watchdog.meet(names);
        }
        let epoch = link.epoch;
        let cancelled = self.begin_epoch(epoch);
        let call = |target, peer| Call { from: &self.node_name, epoch, target, peer };
        let output = match link.next {
            None => None,
            Some(peer) => {
                let target = if self.spec.is_last() { Target::Lead } else { Target::NextStage };
                Some(self.connect(call(target, peer), &cancelled).await?)
            }
        };
        let mut ranks = Vec::new();
        for (rank, peer) in (1..).zip(link.ranks) {
            ranks.push(self.connect(call(Target::Rank(rank, self.watchdog.clone()), peer), &cancelled).await?);
        }
        let (join, joined) = match link.group {
            None => (None, None),
            Some(link) => {
                let (joined, answer) = oneshot::channel();
                (Some(Join { link, joined }), Some(answer))
            }
        };
        self.command(Command::Link { epoch, output, ranks, join }).await?;
        if let Some(joined) = joined {
            let joined = timeout(JOINING, joined).await.map_err(|_| Status::deadline_exceeded("the group did not form in time"))?;
            joined.map_err(|_| Status::unavailable("the engine is stopping"))?.map_err(Status::failed_precondition)?;
        }
        Ok(Response::new(wire::LinkReply {}))
    }

    async fn steps(&self, request: Request<Streaming<wire::StepFrame>>) -> Result<Response<Self::StepsStream>, Status> {
        self.check_neighbour(!self.spec.is_lead(), "steps")?;
        let group = (self.spec.place.rank > 0).then(|| self.watchdog.clone());
        Ok(Response::new(self.take(request.into_inner(), group)))
    }

    async fn results(&self, request: Request<Streaming<wire::StepResult>>) -> Result<Response<Self::ResultsStream>, Status> {
        self.check_neighbour(self.spec.is_lead(), "results")?;
        Ok(Response::new(self.take(request.into_inner(), None)))
    }

    async fn load_adapter(&self, request: Request<Streaming<wire::AdapterPart>>) -> Result<Response<wire::AdapterLoaded>, Status> {
        let (epoch, adapter, received) = adapters::receive(request.into_inner()).await?;
        let (done, loaded) = oneshot::channel();
        self.command(Command::Adapter(Order { epoch, adapter, change: Change::Load { received, done } })).await?;
        let loaded = loaded.await.map_err(|_| Status::aborted("the epoch is over"))?;
        // What this engine cannot use, it will never be able to.
        let bytes = loaded.map_err(Status::invalid_argument)?;
        Ok(Response::new(wire::AdapterLoaded { bytes }))
    }

    async fn drop_adapter(&self, request: Request<wire::DropAdapterRequest>) -> Result<Response<wire::AdapterDropped>, Status> {
        let wire::DropAdapterRequest { epoch, adapter } = request.into_inner();
        let (done, dropped) = oneshot::channel();
        let order = Order { epoch: Epoch(epoch), adapter: AdapterId(adapter), change: Change::Drop { done } };
        self.command(Command::Adapter(order)).await?;
        dropped.await.map_err(|_| Status::aborted("the epoch is over"))?;
        Ok(Response::new(wire::AdapterDropped {}))
    }

    async fn session(&self, request: Request<Streaming<wire::SessionCommand>>) -> Result<Response<Self::SessionStream>, Status> {
        self.check_neighbour(self.spec.is_lead(), "sessions")?;
        let mut commands = request.into_inner();
        let first = timeout(SILENCE_MAX, commands.next()).await.map_err(|_| Status::deadline_exceeded("no command came"))?;
        let Some(Ok(wire::SessionCommand { command: Some(WireCommand::Open(epoch)) })) = first else {
            return Err(Status::invalid_argument("a session starts with the epoch that it belongs to"));
        };
        let epoch = Epoch(epoch);
        if *self.epoch.borrow() != epoch {
            return Err(Status::failed_precondition(format!("epoch {epoch} is over, this is {}", *self.epoch.borrow())));
        }
        let (deliveries, receiver) = mpsc::channel(DELIVERIES);
        let (outbound, stream) = mpsc::channel(DELIVERIES);
        self.command(Command::Open { epoch, deliveries }).await?;
        let cancelled = self.current_epoch_token();
        self.tasks.spawn(take_session(commands, self.commands.clone(), outbound.downgrade(), cancelled.clone()));
        self.tasks.spawn(give_deliveries(
            receiver,
            outbound,
            self.pulse.clone(),
            self.commands.clone(),
            epoch,
            cancelled,
            self.node_name.clone(),
        ));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Commands of the coordinator, until it goes away.
///
/// `refusals` is weak, because the stream to the coordinator ends when nobody else holds it.
async fn take_session(
    mut session: Streaming<wire::SessionCommand>,
    commands: mpsc::Sender<Command>,
    refusals: mpsc::WeakSender<Result<wire::Delivery, Status>>,
    cancelled: CancellationToken,
) {
    loop {
        let next = tokio::select! {
            () = cancelled.cancelled() => return,
            next = timeout(SILENCE_MAX, session.next()) => next,
        };
        let Ok(Some(Ok(wire::SessionCommand { command: Some(command) }))) = next else { break };
        let command = match command {
            WireCommand::Submit(submission) => {
                let sequence = SequenceId(submission.sequence);
                match Submission::try_from(submission) {
                    Ok(submission) => SessionCommand::Submit(submission),
                    Err(error) => {
                        let refused = Delivery::Refused { sequence, message: error.to_string() };
                        let Some(refusals) = refusals.upgrade() else { break };
                        if refusals.send(Ok(refused.into())).await.is_err() {
                            break;
                        }
                        continue;
                    }
                }
            }
            WireCommand::Cancel(sequence) => SessionCommand::Cancel(SequenceId(sequence)),
            WireCommand::KeepAlive(_) | WireCommand::Open(_) => continue,
        };
        if commands.send(Command::Session(command)).await.is_err() {
            return;
        }
    }
    drop(commands.send(Command::Close).await);
}

/// Deliveries with the load in between, so that the coordinator hears something each second; watches that steps end.
async fn give_deliveries(
    mut deliveries: mpsc::Receiver<wire::Delivery>,
    outbound: mpsc::Sender<Result<wire::Delivery, Status>>,
    pulse: watch::Receiver<Pulse>,
    commands: mpsc::Sender<Command>,
    epoch: Epoch,
    cancelled: CancellationToken,
    node_name: String,
) {
    let mut ticks = interval(HEARTBEAT / 2);
    let (mut progress, mut since) = (0, Instant::now());
    loop {
        let message = tokio::select! {
            () = cancelled.cancelled() => return,
            delivery = deliveries.recv() => match delivery {
                Some(delivery) => delivery,
                None => return,
            },
            _ = ticks.tick() => {
                let now = *pulse.borrow();
                if now.progress != progress || now.under_way == 0 {
                    (progress, since) = (now.progress, Instant::now());
                }
                Delivery::Load(now.load).into()
            }
        };
        if since.elapsed() > STEP_DEADLINE {
            let message = format!("a step did not end within {} s, on this worker or on one of a later stage", STEP_DEADLINE.as_secs());
            // The thread may be what hangs, so the coordinator is told from here, and a full queue is not waited for.
            drop(commands.try_send(Command::Broken { epoch, node: node_name.clone(), message: message.clone() }));
            let broken = wire::Broken { node: node_name, message };
            drop(outbound.send(Ok(wire::Delivery { delivery: Some(wire::delivery::Delivery::Broken(broken)) })).await);
            return;
        }
        if outbound.send(Ok(message)).await.is_err() {
            return;
        }
    }
}
