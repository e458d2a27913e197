//! Shards from folders and from a hub on loopback.

use super::*;
use mlx_cluster_common::units::Bytes;
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    dtype::DType,
    spec::{ModelSpec, Weight},
    weights::{TensorEntry, WeightIndex},
};
use mlx_cluster_hub::fake::{Access, FakeHub};
use mlx_cluster_proto::{net, wire::weights_server::WeightsServer};
use serde_json::json;
use std::net::Ipv4Addr;
use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

fn store(home: &Path) -> Store {
    store_at(home, "mini-2", "http://127.0.0.1:1")
}

fn store_at(home: &Path, name: &str, endpoint: &str) -> Store {
    let hub = HubSettings { retries: 0, ..HubSettings::new(endpoint, &home.join("cache")) }.with_home(home);
    Store::new(name.into(), name.into(), "test".into(), home.join("models"), hub)
}

fn spec(model: ModelSource) -> EngineSpec {
    EngineSpec {
        id: "a".into(),
        model,
        fingerprint: 1,
        stage: 0,
        n_stages: 1,
        layers: 0..2,
        place: mlx_cluster_common::tensor::TensorPlace::alone(),
        collective: mlx_cluster_common::plan::Collective::Auto,
        context_tokens: 128,
        cache_tokens: 1024,
        sequences: 16,
        memory: Bytes(1 << 20),
        caches: CacheOptions::default(),
        reservation: CacheReservation::default(),
        weight_peers: Vec::new(),
        training: None,
    }
}

async fn outcome(store: &Store, model: ModelSource) -> Event {
    let (events, mut received) = mpsc::channel(16);
    store.fetch(Run(1), &spec(model), events).await;
    received.recv().await.expect("an outcome")
}

#[tokio::test]
async fn a_folder_must_be_here_with_its_config() {
    let home = tempfile::tempdir().expect("a folder");
    let store = store(home.path());
    let failure = |event| match event {
        Event::FetchFailed { failure, .. } => (failure.cause, failure.hopeless),
        other => panic!("{other:?}"),
    };
    let (cause, hopeless) = failure(outcome(&store, ModelSource::Folder("/no/such/model".into())).await);
    let wanted =
        "worker mini-2 has no folder /no/such/model: copy the model there under the same path, or give the coordinator a hub repository id";
    assert_eq!((cause.as_str(), hopeless), (wanted, true));
    let folder = home.path().join("model");
    std::fs::create_dir(&folder).expect("made");
    let model = ModelSource::Folder(folder.display().to_string());
    assert!(failure(outcome(&store, model.clone()).await).0.contains("has no config.json"));
    std::fs::write(folder.join(CONFIG_FILE), "{}").expect("written");
    assert!(matches!(outcome(&store, model).await, Event::Fetched { folder: found, .. } if found == folder));
}

#[tokio::test]
async fn a_repository_with_a_bad_name_is_hopeless() {
    let home = tempfile::tempdir().expect("a folder");
    let repo = |id: &str| ModelSource::Repo { id: id.into(), revision: "main".into() };
    let event = outcome(&store(home.path()), repo("../x")).await;
    assert!(matches!(event, Event::FetchFailed { failure: Failure { hopeless: true, .. }, .. }), "{event:?}");
}

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 4, "intermediate_size": 8, "num_attention_heads": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 16, "tie_word_embeddings": false}"#;

fn file_of(layer: Option<u32>) -> &'static str {
    match layer {
        None | Some(0..2) => "model-00001-of-00002.safetensors",
        Some(_) => "model-00002-of-00002.safetensors",
    }
}

/// The tensors of the model: embedding, head and the first two layers in one file, the others in a second one.
fn index_of(spec: &ModelSpec) -> WeightIndex {
    let mut index = WeightIndex::default();
    for weight in spec.parts().into_iter().flat_map(|part| spec.weights(part)) {
        let (path, shape): (&str, Vec<u64>) = match &weight {
            Weight::Norm(norm) => (&norm.path, vec![norm.dims.into()]),
            Weight::Embedding(embedding) => (&embedding.path, vec![embedding.vocab_size.into(), embedding.dims.into()]),
            Weight::Linear(linear) => (&linear.path, vec![linear.output_dims.into(), linear.input_dims.into()]),
            _ => panic!("none in this model"),
        };
        let layer = path.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        let bytes = 4 * shape.iter().product::<u64>();
        index
            .tensors
            .insert(format!("{path}.weight"), TensorEntry { file: file_of(layer).to_owned(), dtype: DType::F32, shape, offset: 0, bytes });
    }
    index
}

/// A safetensors file of zeros.
fn weight_file(index: &WeightIndex, file: &str) -> Vec<u8> {
    let (mut header, mut offset) = (serde_json::Map::new(), 0);
    for (name, entry) in index.tensors.iter().filter(|(_, entry)| entry.file == file) {
        header.insert(name.clone(), json!({"dtype": "F32", "shape": entry.shape, "data_offsets": [offset, offset + entry.bytes]}));
        offset += entry.bytes;
    }
    let header = serde_json::to_vec(&header).expect("JSON");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.resize(bytes.len() + offset as usize, 0);
    bytes
}

/// A hub with the model, and the fingerprint that a coordinator computes for it.
fn hub_with_model() -> (FakeHub, u64) {
    let spec = read_spec(&serde_json::from_str(CONFIG).expect("JSON")).expect("a spec");
    let index = index_of(&spec);
    let weight_map: serde_json::Map<_, _> = index.tensors.iter().map(|(name, entry)| (name.clone(), json!(entry.file))).collect();
    let hub = FakeHub::start().expect("a hub");
    let files = [
        (CONFIG_FILE, CONFIG.as_bytes().to_vec()),
        (mlx_cluster_hub::WEIGHT_INDEX_FILE, serde_json::to_vec(&json!({"weight_map": weight_map})).expect("JSON")),
        (file_of(Some(0)), weight_file(&index, file_of(Some(0)))),
        (file_of(Some(3)), weight_file(&index, file_of(Some(3)))),
    ];
    hub.add("a/b", Access::Public, files);
    (hub, index.fingerprint(CONFIG.as_bytes()))
}

async fn fetch(store: &Store, spec: &EngineSpec) -> (Event, Vec<Event>) {
    let (events, mut received) = mpsc::channel(1000);
    store.fetch(Run(1), spec, events).await;
    let mut all = Vec::new();
    while let Some(event) = received.recv().await {
        all.push(event);
    }
    (all.pop().expect("an outcome"), all)
}

fn folder_of(outcome: Event) -> PathBuf {
    let Event::Fetched { folder, .. } = outcome else { panic!("{outcome:?}") };
    folder
}

fn cause_of(outcome: &Event) -> (&str, bool) {
    let Event::FetchFailed { failure, .. } = outcome else { panic!("{outcome:?}") };
    (&failure.cause, failure.hopeless)
}

/// The layers whose tensors are in the folder of a shard.
fn layers_in(folder: &Path) -> BTreeSet<u32> {
    let index = mlx_cluster_hub::partial_weight_index(folder).expect("weights");
    index.tensors.keys().filter_map(|name| name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()).collect()
}

#[tokio::test]
async fn a_worker_fetches_the_tensors_of_its_layers_and_needs_no_hub_to_start_again() {
    let home = tempfile::tempdir().expect("a folder");
    let (mut hub, fingerprint) = hub_with_model();
    let revision = hub.commit("a/b").expect("a commit");
    let mut store = store_at(home.path(), "mini-2", &hub.endpoint());
    let model = ModelSource::Repo { id: "a/b".into(), revision };
    let middle = EngineSpec { layers: 2..3, fingerprint, ..spec(model.clone()) };
    let (outcome, progress) = fetch(&store, &middle).await;
    assert_eq!(layers_in(&folder_of(outcome)), BTreeSet::from([2]));
    let last = progress.last().expect("progress");
    assert!(
        matches!(last, Event::Fetching { file, done, total, .. } if file == file_of(Some(3)) && done == total && done.0 > 0),
        "{last:?}"
    );

    let stranger = EngineSpec { fingerprint: 7, ..middle.clone() };
    let (outcome, _) = fetch(&store, &stranger).await;
    let (cause, hopeless) = cause_of(&outcome);
    assert!(hopeless && cause.contains("planned with"), "{cause}");

    hub.stop();
    folder_of(fetch(&store, &middle).await.0);
    let first = EngineSpec { layers: 0..2, ..middle.clone() };
    let (outcome, _) = fetch(&store, &first).await;
    assert!(!cause_of(&outcome).1, "{outcome:?}");
    store.hub.offline = true;
    folder_of(fetch(&store, &middle).await.0);
    let (outcome, _) = fetch(&store, &first).await;
    assert!(cause_of(&outcome).0.contains("HF_HUB_OFFLINE"), "{outcome:?}");
}

/// Workers that reach each other on loopback, each with a store and a cache of its own.
struct Workers {
    stores: Vec<Arc<Store>>,
    homes: Vec<tempfile::TempDir>,
    peers: Vec<WeightPeer>,
    servers: Vec<JoinHandle<()>>,
    model: ModelSource,
    fingerprint: u64,
}

impl Workers {
    async fn start(hub: &FakeHub, fingerprint: u64, layers: &[Range<u32>]) -> Self {
        let model = ModelSource::Repo { id: "a/b".into(), revision: hub.commit("a/b").expect("a commit") };
        let mut workers = Self { stores: Vec::new(), homes: Vec::new(), peers: Vec::new(), servers: Vec::new(), model, fingerprint };
        for (number, layers) in layers.iter().enumerate() {
            let (home, name) = (tempfile::tempdir().expect("a folder"), format!("mini-{number}"));
            let mut store = store_at(home.path(), &name, &hub.endpoint());
            store.hub.retries = 3;
            store.hub.retry_delay = Duration::from_millis(1);
            store.patience =
                Patience { unreachable: Duration::from_millis(300), idle: Duration::from_secs(20), description: Duration::from_secs(2) };
            let store = Arc::new(store);
            let listener = net::listen((Ipv4Addr::LOCALHOST, 0).into()).await.expect("a port");
            let address = listener.local_addr().expect("an address").to_string();
            let service = WeightsServer::new(WeightsService::new(store.clone(), TaskTracker::new(), CancellationToken::new()));
            let serving = net::server().add_service(service).serve_with_incoming(net::incoming(listener));
            workers.servers.push(tokio::spawn(async move { serving.await.expect("serves") }));
            workers.peers.push(WeightPeer { node: name.as_str().into(), name, addresses: vec![address], layers: layers.clone() });
            workers.homes.push(home);
            workers.stores.push(store);
        }
        workers
    }

    fn spec(&self, number: usize) -> EngineSpec {
        let layers = self.peers[number].layers.clone();
        EngineSpec { layers, fingerprint: self.fingerprint, weight_peers: self.peers.clone(), ..spec(self.model.clone()) }
    }

    /// All fetch at the same time.
    async fn fetch(&self) -> Vec<PathBuf> {
        let fetches: Vec<_> = self
            .stores
            .iter()
            .enumerate()
            .map(|(number, store)| {
                let (store, spec) = (store.clone(), self.spec(number));
                tokio::spawn(async move { fetch(&store, &spec).await.0 })
            })
            .collect();
        let mut folders = Vec::new();
        for fetch in fetches {
            folders.push(folder_of(fetch.await.expect("no panic")));
        }
        folders
    }
}

/// How often bytes of weight files were served beyond the first time, and all bytes served over those of the weights.
fn counted(hub: &FakeHub) -> (usize, f64) {
    let (mut again, mut served, mut all) = (0, 0, 0);
    for (file, ranges) in hub.take_served() {
        served += ranges.iter().map(ExactSizeIterator::len).sum::<usize>();
        if !file.ends_with(".safetensors") {
            continue;
        }
        let mut times = vec![0usize; ranges.iter().map(|range| range.end).max().unwrap_or(0)];
        ranges.into_iter().flatten().for_each(|byte| times[byte] += 1);
        // Everybody reads the head of a file who is first to ask what the model is.
        again += times.iter().filter(|times| **times > 1).map(|times| times - 1).sum::<usize>();
        all += times.len();
    }
    (again, served as f64 / all as f64)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_byte_comes_from_the_hub_once_whatever_the_layout() {
    for layers in [[0..2, 2..3, 3..4], [0..4, 0..4, 0..4], [0..2, 0..2, 2..4]] {
        let (hub, fingerprint) = hub_with_model();
        let workers = Workers::start(&hub, fingerprint, &layers).await;
        let folders = workers.fetch().await;
        for (folder, layers) in folders.iter().zip(&layers) {
            assert_eq!(layers_in(folder), layers.clone().collect());
        }
        let (again, ratio) = counted(&hub);
        println!("{layers:?}: served / weights = {ratio:.3}");
        assert_eq!(again, 0, "{layers:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_worker_has_the_others_take_from_it() {
    let (mut hub, fingerprint) = hub_with_model();
    let workers = Workers::start(&hub, fingerprint, &[0..4, 1..3, 0..4]).await;
    // The last one in the list has all of it in the shared cache.
    let store = &workers.stores[2];
    let ModelSource::Repo { id, revision } = &workers.model else { panic!("a repository") };
    let repo = ModelRef::Repo(format!("{id}@{revision}").parse().expect("a commit"));
    let snapshot = Snapshot::open(&repo, &store.hub, &|_| {}).await.expect("open");
    let files = [file_of(Some(0)), file_of(Some(3))].map(str::to_owned);
    snapshot.fetch_weights(&files, &|_| {}).await.expect("fetched");
    snapshot.describe().await.expect("described");
    hub.stop();
    let folders = workers.fetch().await;
    assert_eq!(layers_in(&folders[0]), (0..4).collect());
    assert_eq!(layers_in(&folders[1]), (1..3).collect());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_part_of_a_worker_that_is_gone_is_fetched_by_the_next() {
    let (hub, fingerprint) = hub_with_model();
    let workers = Workers::start(&hub, fingerprint, &[0..4, 0..4, 0..4]).await;
    workers.servers[0].abort();
    let mut folders = Vec::new();
    for number in [1, 2] {
        let (store, spec) = (workers.stores[number].clone(), workers.spec(number));
        folders.push(tokio::spawn(async move { folder_of(fetch(&store, &spec).await.0) }));
    }
    for folder in folders {
        assert_eq!(layers_in(&folder.await.expect("no panic")), (0..4).collect());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_tensor_of_another_worker_is_not_taken() {
    let (hub, fingerprint) = hub_with_model();
    let workers = Workers::start(&hub, fingerprint, &[0..4, 0..4]).await;
    let first = EngineSpec { weight_peers: Vec::new(), ..workers.spec(0) };
    let folder = folder_of(fetch(&workers.stores[0], &first).await.0);
    let good = std::fs::read_dir(&folder).expect("files").map(|entry| entry.expect("an entry").path());
    let mut flipped = 0;
    for path in good.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors")) {
        let mut bytes = std::fs::read(&path).expect("read");
        *bytes.last_mut().expect("some") ^= 1;
        std::fs::write(&path, bytes).expect("written");
        flipped += 1;
    }
    hub.take_served();
    let folder = folder_of(fetch(&workers.stores[1], &workers.spec(1)).await.0);
    assert_eq!(layers_in(&folder), (0..4).collect());
    let own = workers.stores[1].live().values().next().cloned().expect("a model");
    assert!(own.store.verify(&own.description).expect("read").is_empty());
    let (_, ratio) = counted(&hub);
    assert!(flipped > 0 && ratio > 0.0, "what was damaged came from the hub");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_must_not_ask_the_hub_gets_all_from_the_others() {
    let (hub, fingerprint) = hub_with_model();
    let mut workers = Workers::start(&hub, fingerprint, &[0..4, 0..4]).await;
    workers.servers.remove(1).abort();
    let mut offline = store_at(workers.homes[1].path(), "mini-1", &hub.endpoint());
    offline.hub.offline = true;
    workers.stores[1] = Arc::new(offline);
    for folder in workers.fetch().await {
        assert_eq!(layers_in(&folder), (0..4).collect());
    }
    assert_eq!(counted(&hub).0, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_answers_late_is_waited_for_before_a_tensor_is_nowhere() {
    let (hub, fingerprint) = hub_with_model();
    let mut workers = Workers::start(&hub, fingerprint, &[0..2, 2..4]).await;
    for (number, other) in [(0, 1), (1, 0)] {
        // Each has what the other one needs, and nobody may ask the hub.
        let whole = EngineSpec { weight_peers: Vec::new(), ..workers.spec(other) };
        folder_of(fetch(&workers.stores[number], &whole).await.0);
        let mut offline = store_at(workers.homes[number].path(), &format!("mini-{number}"), &hub.endpoint());
        offline.hub.offline = true;
        offline.patience.unreachable = Duration::from_secs(20);
        workers.stores[number] = Arc::new(offline);
    }
    workers.servers.remove(1).abort();
    let address = workers.peers[1].addresses[0].clone();
    let (store, served) = (Arc::clone(&workers.stores[0]), Arc::clone(&workers.stores[1]));
    let spec = workers.spec(0);
    let first = tokio::spawn(async move { fetch(&store, &spec).await.0 });
    // By then the first one has asked several times, and was refused.
    sleep(Duration::from_secs(1)).await;
    assert!(!first.is_finished(), "it did not wait");
    let listener = net::listen(address.parse().expect("an address")).await.expect("the port again");
    let service = WeightsServer::new(WeightsService::new(served, TaskTracker::new(), CancellationToken::new()));
    workers.servers.push(tokio::spawn(async move {
        net::server().add_service(service).serve_with_incoming(net::incoming(listener)).await.expect("serves");
    }));
    assert_eq!(layers_in(&folder_of(first.await.expect("no panic"))), (0..2).collect());
}
