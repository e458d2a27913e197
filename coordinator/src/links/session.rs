//! The session with the lead engine: sequences in, tokens out, for one epoch.

use super::Note;
use crate::core::{event::Event, instance::LINK_TIMEOUT};
use mlx_cluster_common::{
    ids::{Epoch, InstanceId},
    request::SessionCommand,
};
use mlx_cluster_proto::{
    convert::SessionEvent,
    net,
    wire::{self, engine_client::EngineClient, session_command::Command},
};
use std::{convert::Infallible, time::Duration};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Streaming;

/// The lead tells its load each second; one that says nothing for so long is gone.
const SILENCE_MAX: Duration = Duration::from_secs(10);
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// Commands on their way to the lead. More than may wait: a lead that takes none of them is broken.
const COMMANDS: usize = 1024;
const OUTGOING: usize = 16;
const DELIVERY_BYTES_MAX: usize = 64 << 20;

#[derive(Debug)]
pub(crate) struct SessionCall {
    pub(crate) epoch: Epoch,
    pub(crate) name: String,
    pub(crate) addresses: Vec<String>,
}

/// An open session; dropping it closes it.
pub(crate) struct SessionHandle {
    pub(crate) epoch: Epoch,
    commands: mpsc::Sender<SessionCommand>,
    _stop: DropGuard,
}

impl SessionHandle {
    /// False when the lead does not take commands any more.
    pub(crate) fn send(&self, command: SessionCommand) -> bool {
        self.commands.try_send(command).is_ok()
    }
}

/// Why a session ended: whom the lead blames, and what happened.
struct Broken {
    node: Option<String>,
    message: String,
}

enum Next {
    Command(Option<SessionCommand>),
    Heard(Result<Option<wire::Delivery>, tonic::Status>),
    KeepAlive,
    Silence,
}

impl SessionCall {
    pub(super) fn start(
        self,
        notes: mpsc::Sender<Note>,
        stop: CancellationToken,
    ) -> (SessionHandle, impl Future<Output = ()> + Send + use<>) {
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let handle = SessionHandle { epoch: self.epoch, commands, _stop: stop.clone().drop_guard() };
        let work = async move {
            let epoch = self.epoch;
            let Some(Err(broken)) = stop.run_until_cancelled(self.run(receiver, &notes)).await else { return };
            let Broken { node, message } = broken;
            let event = Event::SessionBroken { instance: InstanceId::SERVED, epoch, node, message };
            // Fails only when the driver has ended.
            drop(notes.send(Note::Event(event)).await);
        };
        (handle, work)
    }

    async fn run(self, commands: mpsc::Receiver<SessionCommand>, notes: &mpsc::Sender<Note>) -> Result<Infallible, Broken> {
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        let opened = timeout(LINK_TIMEOUT, self.open(&outgoing, messages)).await;
        let late = || broken(format!("it did not open a session within {} s", LINK_TIMEOUT.as_secs()));
        let mut deliveries = opened.map_err(|_| late())??;
        // The lead speaks first; before it does, the epoch may turn out to be broken already.
        let first = timeout(LINK_TIMEOUT, deliveries.message()).await.map_err(|_| late())?;
        let first = self.event(first)?;
        tell(notes, Event::SessionOpened { epoch: self.epoch }).await?;
        tell(notes, first).await?;
        self.converse(commands, outgoing, deliveries, notes).await
    }

    async fn open(
        &self,
        outgoing: &mpsc::Sender<wire::SessionCommand>,
        messages: mpsc::Receiver<wire::SessionCommand>,
    ) -> Result<Streaming<wire::Delivery>, Broken> {
        let name = format!("the lead engine on {}", self.name);
        let channel = net::connect(&name, &self.addresses).await.map_err(|error| broken(error.to_string()))?;
        let mut client = EngineClient::new(channel).max_decoding_message_size(DELIVERY_BYTES_MAX);
        send(outgoing, Command::Open(self.epoch.0)).await?;
        let answer = client.session(ReceiverStream::new(messages)).await;
        Ok(answer.map_err(|status| broken(status.message().to_owned()))?.into_inner())
    }

    async fn converse(
        &self,
        mut commands: mpsc::Receiver<SessionCommand>,
        outgoing: mpsc::Sender<wire::SessionCommand>,
        mut deliveries: Streaming<wire::Delivery>,
        notes: &mpsc::Sender<Note>,
    ) -> Result<Infallible, Broken> {
        let mut ticks = interval(KEEP_ALIVE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut silent_at = tokio::time::Instant::now() + SILENCE_MAX;
        loop {
            let next = tokio::select! {
                heard = deliveries.message() => Next::Heard(heard),
                command = commands.recv() => Next::Command(command),
                _ = ticks.tick() => Next::KeepAlive,
                () = tokio::time::sleep_until(silent_at) => Next::Silence,
            };
            match next {
                Next::Heard(heard) => {
                    silent_at = tokio::time::Instant::now() + SILENCE_MAX;
                    tell(notes, self.event(heard)?).await?;
                }
                Next::Command(Some(command)) => send_message(&outgoing, command.into()).await?,
                Next::Command(None) => return Err(broken("the coordinator closed the session".into())),
                Next::KeepAlive => send(&outgoing, Command::KeepAlive(self.epoch.0)).await?,
                Next::Silence => return Err(broken(format!("the lead said nothing for {} s", SILENCE_MAX.as_secs()))),
            }
        }
    }

    fn event(&self, heard: Result<Option<wire::Delivery>, tonic::Status>) -> Result<Event, Broken> {
        let delivery = heard.map_err(|status| broken(format!("connection to its engine lost: {}", status.message())))?;
        let delivery = delivery.ok_or_else(|| broken("its engine closed the session".into()))?;
        match SessionEvent::try_from(delivery).map_err(|error| broken(error.to_string()))? {
            SessionEvent::Delivery(delivery) => Ok(Event::Delivered { epoch: self.epoch, delivery }),
            SessionEvent::Broken { node, message } => Err(Broken { node: Some(node), message }),
        }
    }
}

fn broken(message: String) -> Broken {
    Broken { node: None, message }
}

async fn send(outgoing: &mpsc::Sender<wire::SessionCommand>, command: Command) -> Result<(), Broken> {
    send_message(outgoing, wire::SessionCommand { command: Some(command) }).await
}

/// The lead takes what is sent within the time in which it must say something anyway.
async fn send_message(outgoing: &mpsc::Sender<wire::SessionCommand>, message: wire::SessionCommand) -> Result<(), Broken> {
    match timeout(SILENCE_MAX, outgoing.send(message)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(broken("its engine closed the session".into())),
        Err(_) => Err(broken(format!("the lead took nothing for {} s", SILENCE_MAX.as_secs()))),
    }
}

async fn tell(notes: &mpsc::Sender<Note>, event: Event) -> Result<(), Broken> {
    notes.send(Note::Event(event)).await.map_err(|_| broken("the coordinator is stopping".into()))
}
