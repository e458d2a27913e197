//! The gRPC service of an engine that trains: turns calls and streams into what the thread that owns the arrays is told.

use super::{CHANNEL, Control, exchange};
use crate::engine::{
    inbound::{HEARTBEAT, SILENCE_MAX},
    ranks::{JOINING, Join},
    watchdog::Watchdog,
};
use mlx_cluster_common::{
    engine::{EngineSpec, GroupLink, Link},
    ids::Epoch,
};
use mlx_cluster_proto::wire::{self, engine_server::Engine, train_order::Order, train_report::Report, trainer_server::Trainer};
use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{interval, timeout},
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

type Outbound<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Clones are the same service.
#[derive(Clone)]
pub(super) struct Service(Arc<Inner>);

struct Inner {
    control: mpsc::Sender<Control>,
    spec: EngineSpec,
    watchdog: Watchdog,
    progress: watch::Receiver<u64>,
    /// For messages.
    node_name: String,
    /// Ends the tasks of the epoch that is over. A mutex, because two Link calls may come at once; never held across an await.
    epoch_tasks: Mutex<CancellationToken>,
    epoch: watch::Sender<Epoch>,
    tasks: TaskTracker,
}

impl Service {
    pub(super) fn new(
        control: mpsc::Sender<Control>,
        spec: EngineSpec,
        watchdog: Watchdog,
        progress: watch::Receiver<u64>,
        node_name: String,
    ) -> Self {
        let (epoch_tasks, epoch) = (Mutex::new(CancellationToken::new()), watch::Sender::new(Epoch(0)));
        Self(Arc::new(Inner { control, spec, watchdog, progress, node_name, epoch_tasks, epoch, tasks: TaskTracker::new() }))
    }

    /// A token that ends with this epoch; ends everything of the epoch before.
    fn begin_epoch(&self, epoch: Epoch) -> CancellationToken {
        let fresh = CancellationToken::new();
        let mut current = self.0.epoch_tasks.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *current, fresh.clone()).cancel();
        self.0.watchdog.epoch_over(&format!("it was linked for epoch {epoch}"));
        self.0.epoch.send_replace(epoch);
        fresh
    }

    fn epoch_token(&self) -> CancellationToken {
        self.0.epoch_tasks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn tell(&self, control: Control) -> Result<(), Status> {
        self.0.control.send(control).await.map_err(|_| Status::unavailable("the engine is stopping"))
    }
}

/// Whether a link names the neighbours that an engine of this place has.
fn check_link(spec: &EngineSpec, link: &Link) -> Result<(), Status> {
    let fits = link.next.is_some() != spec.is_last()
        && link.ranks.is_empty()
        && link.group.as_ref().map_or(1, |group| group.names.len()) == spec.place.ranks();
    match fits {
        true => Ok(()),
        false => Err(Status::invalid_argument(format!("stage {} of {} was linked as another one would be", spec.stage, spec.n_stages))),
    }
}

fn only_trains<T>() -> Result<T, Status> {
    Err(Status::failed_precondition("this engine trains, and serves no requests"))
}

#[tonic::async_trait]
impl Engine for Service {
    type StepsStream = Outbound<wire::Heartbeat>;
    type ResultsStream = Outbound<wire::Heartbeat>;
    type SessionStream = Outbound<wire::Delivery>;

    async fn link(&self, request: Request<wire::LinkRequest>) -> Result<Response<wire::LinkReply>, Status> {
        let link = Link::try_from(request.into_inner())?;
        let Inner { spec, watchdog, node_name, tasks, .. } = &*self.0;
        check_link(spec, &link)?;
        if let Some(GroupLink { names, .. }) = &link.group {
            watchdog.meet(names);
        }
        let epoch = link.epoch;
        let cancelled = self.begin_epoch(epoch);
        let next = match link.next {
            None => None,
            Some(peer) => {
                let (passages, task) = exchange::connect(node_name, epoch, peer, cancelled).await?;
                tasks.spawn(task);
                Some(passages)
            }
        };
        let (join, joined) = match link.group {
            None => (None, None),
            Some(link) => {
                let (joined, answer) = oneshot::channel();
                (Some(Join { link, joined }), Some(answer))
            }
        };
        self.tell(Control::Link { epoch, next, join }).await?;
        if let Some(joined) = joined {
            let joined = timeout(JOINING, joined).await.map_err(|_| Status::deadline_exceeded("the group did not form in time"))?;
            joined.map_err(|_| Status::unavailable("the engine is stopping"))?.map_err(Status::failed_precondition)?;
        }
        Ok(Response::new(wire::LinkReply {}))
    }

    async fn steps(&self, _: Request<Streaming<wire::StepFrame>>) -> Result<Response<Self::StepsStream>, Status> {
        only_trains()
    }

    async fn results(&self, _: Request<Streaming<wire::StepResult>>) -> Result<Response<Self::ResultsStream>, Status> {
        only_trains()
    }

    async fn session(&self, _: Request<Streaming<wire::SessionCommand>>) -> Result<Response<Self::SessionStream>, Status> {
        only_trains()
    }

    async fn load_adapter(&self, _: Request<Streaming<wire::AdapterPart>>) -> Result<Response<wire::AdapterLoaded>, Status> {
        only_trains()
    }

    async fn drop_adapter(&self, _: Request<wire::DropAdapterRequest>) -> Result<Response<wire::AdapterDropped>, Status> {
        only_trains()
    }
}

#[tonic::async_trait]
impl Trainer for Service {
    type TrainStream = Outbound<wire::TrainReport>;
    type ExchangeStream = Outbound<wire::Passage>;

    async fn train(&self, request: Request<Streaming<wire::TrainOrder>>) -> Result<Response<Self::TrainStream>, Status> {
        let mut stream = request.into_inner();
        let first = timeout(SILENCE_MAX, stream.next()).await.map_err(|_| Status::deadline_exceeded("no order came"))?;
        let Some(Ok(wire::TrainOrder { order: Some(Order::Open(epoch)) })) = first else {
            return Err(Status::invalid_argument("orders start with the epoch that they belong to"));
        };
        let (epoch, own) = (Epoch(epoch), *self.0.epoch.borrow());
        if epoch != own {
            return Err(Status::failed_precondition(format!("epoch {epoch} is over, this is {own}")));
        }
        let (orders, order_queue) = mpsc::channel(CHANNEL);
        let (reports, report_queue) = mpsc::channel(CHANNEL);
        let (outbound, answers) = mpsc::channel(CHANNEL);
        let cancelled = self.epoch_token();
        self.tell(Control::Open { epoch, orders: order_queue, reports }).await?;
        self.0.tasks.spawn(take_orders(stream, orders, cancelled.clone()));
        self.0.tasks.spawn(give_reports(report_queue, outbound, self.0.progress.clone(), cancelled));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn exchange(&self, request: Request<Streaming<wire::Passage>>) -> Result<Response<Self::ExchangeStream>, Status> {
        if self.0.spec.is_first() {
            return Err(Status::failed_precondition("the first stage takes nothing from another one"));
        }
        let (outbound, task) =
            exchange::accept(request.into_inner(), self.0.control.clone(), self.0.epoch.subscribe(), CancellationToken::new()).await?;
        self.0.tasks.spawn(task);
        Ok(Response::new(Box::pin(outbound)))
    }
}

/// Orders of the coordinator, until it or the epoch is gone.
async fn take_orders(mut stream: Streaming<wire::TrainOrder>, orders: mpsc::Sender<Order>, cancelled: CancellationToken) {
    loop {
        let next = tokio::select! {
            () = cancelled.cancelled() => return,
            () = orders.closed() => return,
            next = stream.next() => next,
        };
        let Some(Ok(wire::TrainOrder { order: Some(order) })) = next else { return };
        let sent = tokio::select! {
            () = cancelled.cancelled() => return,
            sent = orders.send(order) => sent,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Reports with the progress in between, so that the coordinator hears something each second.
async fn give_reports(
    mut reports: mpsc::Receiver<wire::TrainReport>,
    outbound: mpsc::Sender<Result<wire::TrainReport, Status>>,
    progress: watch::Receiver<u64>,
    cancelled: CancellationToken,
) {
    let mut ticks = interval(HEARTBEAT);
    loop {
        let report = tokio::select! {
            () = cancelled.cancelled() => return,
            report = reports.recv() => match report {
                Some(report) => report,
                None => return,
            },
            _ = ticks.tick() => wire::TrainReport { report: Some(Report::Progress(*progress.borrow())) },
        };
        // A coordinator that hangs takes nothing; the next epoch frees the thread that waits to report.
        let sent = tokio::select! {
            () = cancelled.cancelled() => return,
            sent = outbound.send(Ok(report)) => sent,
        };
        if sent.is_err() {
            return;
        }
    }
}
