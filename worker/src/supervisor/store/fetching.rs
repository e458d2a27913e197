//! Brings the missing tensors of a shard here: from workers that hold them, and from the hub those that this worker has to fetch for all.

use super::{
    StoreError,
    live::LiveModel,
    owners::{Candidate, owners},
    peers::{Inventory, PeerClient, PeerError},
    report::{ALL, Report},
};
use mlx_cluster_hub::{Batch, BatchWriter, HubError, Snapshot, StoreLock, TensorSlot};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::mpsc,
    task::{JoinError, JoinSet},
    time::{Instant, interval, sleep},
};

/// Requests to the hub, and streams from each worker, at the same time.
const HUB_JOBS_MAX: usize = 4;
const PEER_JOBS_MAX: usize = 2;
const INVENTORIES_MAX: usize = 64;
/// How often others are asked what they have.
const POLL: Duration = Duration::from_millis(200);
/// For a worker that failed, twice as long after each further failure.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// Of one worker in one fetch, such as damaged tensors; then another one asks the hub in its place.
const FAILURES_MAX: u32 = 3;

/// How long to wait for a worker before another one does its part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// One that cannot be reached.
    pub(crate) unreachable: Duration,
    /// One that answers, but gets no further.
    pub(crate) idle: Duration,
    /// The first worker of the plan, which finds out what the model consists of; then the others ask the hub too.
    pub(crate) description: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { unreachable: Duration::from_secs(10), idle: Duration::from_secs(90), description: Duration::from_secs(30) }
    }
}

/// Where a tensor comes from now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Hub,
    Peer(usize),
    /// From whoever fetches it, once it is there.
    Later,
}

/// Another worker, as far as it was heard.
#[derive(Debug)]
struct PeerState {
    /// Its place in the list that all workers of the plan share.
    number: usize,
    client: Arc<PeerClient>,
    inventory: Option<Inventory>,
    held: BTreeSet<String>,
    /// When it last got further, or when we began to wait for it.
    moved: Instant,
    answers: bool,
    heard_once: bool,
    jobs: usize,
    failures: u32,
    avoid_until: Instant,
}

/// One shard's missing tensors.
pub(super) struct Fetching {
    pub(super) live: Arc<LiveModel>,
    pub(super) report: Arc<Report>,
    /// None where the hub must not be asked.
    pub(super) hub: Option<Arc<Snapshot>>,
    pub(super) patience: Patience,
    /// This worker's place in the list that all workers of the plan share.
    me: usize,
    peers: Vec<PeerState>,
    candidates: BTreeMap<String, Candidate>,
    missing: BTreeSet<String>,
    in_flight: BTreeSet<String>,
    hub_jobs: usize,
    jobs: JoinSet<Done>,
    lock: Arc<StoreLock>,
    /// Whether there may be something to start.
    changed: bool,
    owners: Option<Owners>,
}

/// Who fetches what from the hub, as long as nobody comes or goes.
struct Owners {
    away: BTreeSet<usize>,
    /// Of whom it is not yet known what they hold.
    unheard: BTreeSet<usize>,
    of: BTreeMap<String, usize>,
}

struct Done {
    source: Source,
    batch: Batch,
    ending: Ending,
}

/// How a batch ended.
enum Ending {
    Complete,
    /// It is not complete, and can be gone on with.
    Stopped(JobError, Box<BatchWriter>),
    /// It could not be brought to the disk.
    Failed(HubError),
}

#[derive(Debug, thiserror::Error)]
enum JobError {
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Peer(#[from] PeerError),
}

/// What is to be fetched, and from among whom.
pub(super) struct Order {
    pub(super) me: usize,
    /// All others, with their places.
    pub(super) peers: Vec<(usize, PeerClient)>,
    /// For each place the tensors that it needs.
    pub(super) wanted: Vec<BTreeSet<String>>,
    pub(super) lock: StoreLock,
}

enum Input {
    Heard(usize, Option<Inventory>),
    Done(Result<Done, JoinError>),
    Poll,
}

impl Fetching {
    pub(super) fn new(live: Arc<LiveModel>, report: Arc<Report>, hub: Option<Arc<Snapshot>>, patience: Patience, order: Order) -> Self {
        let now = Instant::now();
        let files: BTreeMap<_, _> = live.description.files.keys().zip(0..).collect();
        let candidate = |(name, (file, slot)): (&str, (&str, &TensorSlot))| {
            let wanted_by = order.wanted.iter().enumerate().filter(|(_, wanted)| wanted.contains(name)).map(|(place, _)| place);
            let place = (files.get(&file.to_owned()).copied().unwrap_or_default(), slot.offset);
            (name.to_owned(), Candidate { place, bytes: slot.bytes, wanted_by: wanted_by.collect() })
        };
        let candidates = live.description.tensors().into_iter().map(candidate).collect();
        let missing = {
            let contents = live.contents();
            let mine = order.wanted.get(order.me).into_iter().flatten();
            mine.filter(|name| !contents.tensors.contains_key(*name)).cloned().collect()
        };
        let state = |(number, client): (usize, PeerClient)| PeerState {
            number,
            client: Arc::new(client),
            inventory: None,
            held: BTreeSet::new(),
            moved: now,
            answers: false,
            heard_once: false,
            jobs: 0,
            failures: 0,
            avoid_until: now,
        };
        let peers = order.peers.into_iter().map(state).collect();
        let (in_flight, jobs) = (BTreeSet::new(), JoinSet::new());
        let (me, lock) = (order.me, Arc::new(order.lock));
        let (changed, owners) = (true, None);
        Self { live, report, hub, patience, me, peers, candidates, missing, in_flight, hub_jobs: 0, jobs, lock, changed, owners }
    }

    /// Ends when all is here. Ending it earlier loses nothing that was complete.
    pub(super) async fn run(mut self) -> Result<Arc<StoreLock>, StoreError> {
        if self.missing.is_empty() {
            return Ok(self.lock);
        }
        let (heard, mut inventories) = mpsc::channel(INVENTORIES_MAX);
        // Asked for as long as this runs: they end with the set.
        let mut watches = JoinSet::new();
        for (index, peer) in self.peers.iter().enumerate() {
            watches.spawn(watch(index, peer.client.clone(), heard.clone()));
        }
        let mut poll = interval(POLL);
        let mut took_up = false;
        while !self.missing.is_empty() {
            if self.peers.iter().all(|peer| peer.heard_once) {
                self.choose_owners();
                if !took_up {
                    took_up = true;
                    self.take_up()?;
                }
                self.start_jobs()?;
            }
            let input = tokio::select! {
                Some(done) = self.jobs.join_next() => Input::Done(done),
                Some((index, inventory)) = inventories.recv() => Input::Heard(index, inventory),
                _ = poll.tick() => Input::Poll,
            };
            match input {
                Input::Heard(index, inventory) => self.heard(index, inventory),
                Input::Done(done) => {
                    self.changed = true;
                    self.done(done.map_err(|error| HubError::Task { cause: error.to_string() })?)?;
                }
                Input::Poll => {}
            }
        }
        Ok(self.lock)
    }

    fn heard(&mut self, index: usize, inventory: Option<Inventory>) {
        let now = Instant::now();
        let Some(peer) = self.peers.get_mut(index) else { return };
        peer.heard_once = true;
        let Some(inventory) = inventory else {
            if peer.answers {
                (peer.answers, peer.moved) = (false, now);
            }
            return;
        };
        if !peer.answers || peer.inventory.as_ref() != Some(&inventory) {
            peer.moved = now;
        }
        if !peer.answers || peer.inventory.as_ref().is_none_or(|known| known.held != inventory.held) {
            peer.held = self.live.names_of(&inventory.held);
            self.changed = true;
        }
        (peer.answers, peer.inventory) = (true, Some(inventory));
    }

    /// Places whose part others have to do.
    fn away(&self) -> BTreeSet<usize> {
        let now = Instant::now();
        let is_away = |peer: &&PeerState| match (&peer.inventory, peer.answers) {
            _ if peer.failures >= FAILURES_MAX => true,
            (Some(inventory), true) => !inventory.reaches_hub || now > peer.moved + self.patience.idle,
            _ => now > peer.moved + self.patience.unreachable,
        };
        let others = self.peers.iter().filter(is_away).map(|peer| peer.number);
        others.chain(self.hub.is_none().then_some(self.me)).collect()
    }

    /// Places whose workers may hold something, though they have not said so: one that does not answer yet, as a busy machine may not, or
    /// one that is still finding out what the model consists of.
    fn unheard(&self) -> BTreeSet<usize> {
        let now = Instant::now();
        let is_unheard = |peer: &&PeerState| {
            let told = peer.answers && peer.inventory.as_ref().is_some_and(|inventory| inventory.described);
            !told && peer.failures < FAILURES_MAX && now <= peer.moved + self.patience.unreachable
        };
        self.peers.iter().filter(is_unheard).map(|peer| peer.number).collect()
    }

    /// The peer to read a tensor from, if one has it: the least busy one.
    fn holder(&self, name: &str) -> Option<usize> {
        let now = Instant::now();
        let usable = |peer: &PeerState| peer.answers && peer.avoid_until <= now && peer.held.contains(name);
        let holders = self.peers.iter().enumerate().filter(|(_, peer)| usable(peer));
        holders.min_by_key(|(_, peer)| peer.jobs).map(|(index, _)| index)
    }

    /// Chooses anew who fetches what, when somebody came or went.
    fn choose_owners(&mut self) {
        let (away, unheard) = (self.away(), self.unheard());
        if self.owners.as_ref().is_some_and(|known| known.away == away && known.unheard == unheard) {
            return;
        }
        let all: Vec<_> = self.candidates.values().cloned().collect();
        let chosen = self.candidates.keys().cloned().zip(owners(&all, &away));
        self.owners = Some(Owners { away, unheard, of: chosen.filter_map(|(name, owner)| Some((name, owner?))).collect() });
        self.changed = true;
    }

    /// Where each missing tensor that is not on its way comes from.
    ///
    /// # Errors
    /// When a tensor can come from nowhere.
    fn sources(&self) -> Result<BTreeMap<String, Source>, StoreError> {
        let owner_of = |name: &String| self.owners.as_ref().and_then(|owners| owners.of.get(name)).copied();
        let some_are_unheard = self.owners.as_ref().is_some_and(|owners| !owners.unheard.is_empty());
        let mut sources = BTreeMap::new();
        for name in self.missing.difference(&self.in_flight) {
            let source = match (self.holder(name), owner_of(name)) {
                (Some(holder), _) => Source::Peer(holder),
                (None, Some(owner)) if owner == self.me => Source::Hub,
                (None, Some(_)) => Source::Later,
                // Somebody may have it.
                (None, None) if some_are_unheard => Source::Later,
                // Somebody has it, and failed just now.
                (None, None) if self.peers.iter().any(|peer| peer.held.contains(name)) => Source::Later,
                (None, None) => {
                    let model = self.live.repo.to_string();
                    return Err(StoreError::Nowhere { tensor: name.clone(), model });
                }
            };
            sources.insert(name.clone(), source);
        }
        Ok(sources)
    }

    /// Goes on with what was begun in an earlier life where that can go on, and ends the rest with its complete tensors.
    fn take_up(&mut self) -> Result<(), StoreError> {
        let begun = self.live.store.begun(&self.live.description)?;
        for batch in begun {
            let sources = self.sources()?;
            let writer = self.live.store.writer(batch)?;
            let names: Vec<_> = writer.batch().tensors.iter().map(|(name, _)| name.clone()).collect();
            let mut remaining = writer.remaining().iter().map(|(name, _)| sources.get(name));
            let first = remaining.next().flatten().copied();
            let goes_on = names.iter().all(|name| sources.contains_key(name)) && remaining.all(|source| source.copied() == first);
            match first {
                Some(source @ (Source::Hub | Source::Peer(_))) if goes_on => {
                    self.report.add(&writer.batch().file, writer.position());
                    self.start(source, writer);
                }
                _ => writer.settle()?,
            }
        }
        self.live.look_again()?;
        let here: Vec<_> = {
            let contents = self.live.contents();
            self.missing.iter().filter(|name| contents.tensors.contains_key(*name)).cloned().collect()
        };
        for name in here {
            self.missing.remove(&name);
            self.report.add(ALL, self.candidates.get(&name).map_or(0, |candidate| candidate.bytes));
        }
        Ok(())
    }

    /// As many as may run at the same time.
    fn start_jobs(&mut self) -> Result<(), StoreError> {
        // A worker that failed is asked again after a pause, without anything else having changed.
        let now = Instant::now();
        let pause_over = self.peers.iter().any(|peer| peer.failures > 0 && peer.avoid_until <= now && peer.jobs == 0);
        if !(self.changed || pause_over) || self.missing.len() == self.in_flight.len() {
            return Ok(());
        }
        self.changed = false;
        let sources = self.sources()?;
        let live = Arc::clone(&self.live);
        let of: BTreeSet<Source> = sources.values().copied().filter(|source| *source != Source::Later).collect();
        for source in of {
            let names = sources.iter().filter(|(_, of)| **of == source).map(|(name, _)| name.as_str()).collect();
            let room = match source {
                Source::Hub => HUB_JOBS_MAX.saturating_sub(self.hub_jobs),
                Source::Peer(index) => self.peers.get(index).map_or(0, |peer| PEER_JOBS_MAX.saturating_sub(peer.jobs)),
                Source::Later => 0,
            };
            for batch in Batch::cut(&live.description, &names).into_iter().take(room) {
                let writer = live.store.writer(batch)?;
                self.report.add(&writer.batch().file, writer.position());
                self.start(source, writer);
            }
        }
        Ok(())
    }

    fn start(&mut self, source: Source, writer: BatchWriter) {
        let from = match source {
            Source::Hub => self.hub.clone().map(From::Hub),
            Source::Peer(index) => self.peers.get(index).map(|peer| From::Peer(Arc::clone(&peer.client))),
            Source::Later => None,
        };
        let Some(from) = from else { return };
        self.count_job(source, true);
        self.in_flight.extend(writer.batch().tensors.iter().map(|(name, _)| name.clone()));
        let (live, report, lock) = (Arc::clone(&self.live), Arc::clone(&self.report), Arc::clone(&self.lock));
        self.jobs.spawn(Job { source, writer, from, live, report, lock }.run());
    }

    fn count_job(&mut self, source: Source, begins: bool) {
        let jobs = match source {
            Source::Hub => Some(&mut self.hub_jobs),
            Source::Peer(index) => self.peers.get_mut(index).map(|peer| &mut peer.jobs),
            Source::Later => None,
        };
        if let Some(jobs) = jobs {
            *jobs = if begins { *jobs + 1 } else { jobs.saturating_sub(1) };
        }
    }

    fn done(&mut self, done: Done) -> Result<(), StoreError> {
        let Done { source, batch, ending } = done;
        for (name, _) in &batch.tensors {
            self.in_flight.remove(name);
        }
        self.count_job(source, false);
        match ending {
            Ending::Complete => {
                self.live.contents().add_batch(&self.live.store, &batch);
                for (name, _) in &batch.tensors {
                    self.missing.remove(name);
                }
                Ok(())
            }
            Ending::Failed(error) | Ending::Stopped(JobError::Hub(error) | JobError::Peer(PeerError::Disk(error)), _) => Err(error.into()),
            Ending::Stopped(JobError::Peer(error), writer) => {
                tracing::warn!(%error, "a part of the weights did not come; it is taken from somewhere else, or tried again");
                if let Source::Peer(index) = source {
                    self.avoid(index);
                }
                self.settle(*writer)
            }
        }
    }

    fn avoid(&mut self, index: usize) {
        let Some(peer) = self.peers.get_mut(index) else { return };
        peer.avoid_until = Instant::now() + PAUSE.saturating_mul(1 << peer.failures.min(6)).min(PAUSE_MAX);
        peer.failures += 1;
    }

    /// Keeps the complete tensors of a batch that did not end well.
    fn settle(&mut self, writer: BatchWriter) -> Result<(), StoreError> {
        self.report.take_back(writer.position() - writer.sealed_bytes());
        let n_sealed = writer.batch().tensors.len() - writer.remaining().len();
        let sealed: Vec<_> = writer.batch().tensors.iter().take(n_sealed).map(|(name, _)| name.clone()).collect();
        writer.settle()?;
        self.live.look_again()?;
        for name in sealed {
            self.missing.remove(&name);
        }
        Ok(())
    }
}

/// One batch on its way.
struct Job {
    source: Source,
    writer: BatchWriter,
    from: From,
    live: Arc<LiveModel>,
    report: Arc<Report>,
    /// Held until the batch is at rest, however the fetch ends.
    lock: Arc<StoreLock>,
}

enum From {
    Hub(Arc<Snapshot>),
    Peer(Arc<PeerClient>),
}

impl Job {
    /// Completes the batch and brings it to the disk.
    async fn run(mut self) -> Done {
        let (source, batch) = (self.source, self.writer.batch().clone());
        let (start, came) = (self.writer.position(), AtomicU64::new(0));
        if let Err(error) = self.fill(&batch, &came).await {
            let lost = (start + came.into_inner()).saturating_sub(self.writer.position());
            self.report.take_back(lost);
            return Done { source, batch, ending: Ending::Stopped(error, Box::new(self.writer)) };
        }
        let (writer, lock) = (self.writer, self.lock);
        let finished = tokio::task::spawn_blocking(move || {
            let finished = writer.finish();
            drop(lock);
            finished
        });
        let finished = finished.await.map_err(|error| HubError::Task { cause: error.to_string() });
        let ending = match finished.and_then(|finished| finished) {
            Ok(()) => Ending::Complete,
            Err(error) => Ending::Failed(error),
        };
        Done { source, batch, ending }
    }

    async fn fill(&mut self, batch: &Batch, came: &AtomicU64) -> Result<(), JobError> {
        let label = match &self.from {
            From::Hub(_) => batch.file.clone(),
            From::Peer(client) => format!("{} (from worker {})", batch.file, client.peer.name),
        };
        let (live, report) = (&self.live, &self.report);
        let progress = |bytes: u64| {
            came.fetch_add(bytes, Ordering::Relaxed);
            live.fetched(bytes);
            report.add(&label, bytes);
        };
        match &self.from {
            From::Peer(client) => Ok(client.fill(&mut self.writer, &progress).await?),
            From::Hub(hub) => {
                let unknown = || HubError::BadFileName { file: batch.file.clone() };
                let (ranges, file) = hub.ranges().zip(live.description.files.get(&batch.file)).ok_or_else(unknown)?;
                Ok(ranges.fill(&mut self.writer, file, &progress).await?)
            }
        }
    }
}

/// Asks a worker again and again what it has; tells None when it does not answer.
async fn watch(index: usize, client: Arc<PeerClient>, heard: mpsc::Sender<(usize, Option<Inventory>)>) {
    let mut connection = None;
    loop {
        if connection.is_none() {
            connection = client.connect().await.ok();
        }
        let inventory = match &mut connection {
            Some(connection) => client.inventory(connection).await.ok(),
            None => None,
        };
        if inventory.is_none() {
            connection = None;
        }
        if heard.send((index, inventory)).await.is_err() {
            return;
        }
        sleep(POLL).await;
    }
}
