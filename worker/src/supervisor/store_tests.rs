//! Shards from folders and from a hub on loopback.

use super::*;
use mlx_cluster_common::{
    cache::{CacheOptions, CacheReservation},
    dtype::DType,
    spec::{ModelSpec, Weight},
    weights::{TensorEntry, WeightIndex},
};
use mlx_cluster_hub::fake::{Access, FakeHub};
use serde_json::json;

fn store(home: &Path) -> Store {
    Store { worker: "mini-2".into(), home: home.to_path_buf(), hub: HubSettings::new("http://127.0.0.1:1", &home.join("cache")) }
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
        memory: Bytes(1 << 20),
        caches: CacheOptions::default(),
        reservation: CacheReservation::default(),
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

#[test]
fn progress_counts_all_files_together() {
    let mut tally = Tally::default();
    tally.expect("a", 90);
    tally.expect("a", 5);
    tally.expect("b", 50);
    assert_eq!(tally.add(&Progress { file: "a", done_bytes: 10, total_bytes: 100 }), (Bytes(10), Bytes(150)));
    assert_eq!(tally.add(&Progress { file: "b", done_bytes: 52, total_bytes: 52 }), (Bytes(62), Bytes(152)));
}

#[test]
fn a_shard_of_a_commit_is_remembered() {
    let home = tempfile::tempdir().expect("a folder");
    let pinned: RepoRef = "a/b@0123456789abcdef0123456789abcdef01234567".parse().expect("a commit");
    let record = ShardRecord::of(home.path(), &pinned, &(0..3), 7).expect("pinned");
    assert_eq!(record.read(), None);
    record.write(&["model.safetensors".into()]);
    assert_eq!(record.read(), Some(vec!["model.safetensors".to_owned()]));
    let branch: RepoRef = "a/b".parse().expect("a branch");
    assert!(ShardRecord::of(home.path(), &branch, &(0..3), 7).is_none());
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

#[tokio::test]
async fn a_worker_fetches_the_files_of_its_layers_and_needs_no_hub_to_start_again() {
    let home = tempfile::tempdir().expect("a folder");
    let (mut hub, fingerprint) = hub_with_model();
    let revision = hub.commit("a/b").expect("a commit");
    let settings = HubSettings { retries: 0, ..HubSettings::new(&hub.endpoint(), &home.path().join("cache")) };
    let mut store = Store { hub: settings, ..store(home.path()) };
    let model = ModelSource::Repo { id: "a/b".into(), revision };
    let middle = EngineSpec { layers: 2..3, fingerprint, ..spec(model.clone()) };
    let fetch = async |store: &Store, spec: &EngineSpec| {
        let (events, mut received) = mpsc::channel(100);
        store.fetch(Run(1), spec, events).await;
        let mut all = Vec::new();
        while let Some(event) = received.recv().await {
            all.push(event);
        }
        (all.pop().expect("an outcome"), all)
    };
    let (outcome, progress) = fetch(&store, &middle).await;
    let Event::Fetched { folder, .. } = outcome else { panic!("{outcome:?}") };
    assert!(folder.join(file_of(Some(3))).is_file() && !folder.join(file_of(Some(0))).exists());
    assert!(
        progress
            .iter()
            .any(|event| matches!(event, Event::Fetching { file, done, total, .. } if file == file_of(Some(3)) && done == total))
    );

    let stranger = EngineSpec { fingerprint: 7, ..middle.clone() };
    let (outcome, _) = fetch(&store, &stranger).await;
    assert!(
        matches!(&outcome, Event::FetchFailed { failure, .. } if failure.hopeless && failure.cause.contains("planned with")),
        "{outcome:?}"
    );

    hub.stop();
    assert!(matches!(fetch(&store, &middle).await.0, Event::Fetched { .. }), "all files are here");
    let first = EngineSpec { layers: 0..2, ..middle.clone() };
    let (outcome, _) = fetch(&store, &first).await;
    assert!(matches!(&outcome, Event::FetchFailed { failure, .. } if !failure.hopeless), "{outcome:?}");
    store.hub.offline = true;
    assert!(matches!(fetch(&store, &middle).await.0, Event::Fetched { .. }), "offline too");
}
