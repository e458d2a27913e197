//! Clusters that one does not own: a `cluster.toml` names Macs and links by their kinds, and `macs.toml` knows what those can do.

use mlx_cluster_common::{
    engine::NodeFacts,
    ids::NodeId,
    links::{LinkFacts, Medium},
    units::Bytes,
};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use toml_edit::{DocumentMut, Item};

const PROFILES: &str = include_str!("macs.toml");
/// Of the published bandwidth, what a streaming kernel reads. Fitted, see docs/planner.md.
const STREAMED: f64 = 0.88;
const GIB: u64 = 1 << 30;
/// Machines of one entry, and of a file.
const NODES_MAX: usize = 64;

/// Machines and the ways between them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ClusterFacts {
    pub nodes: Vec<NodeFacts>,
    pub links: Vec<LinkFacts>,
}

/// Why a cluster.toml was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterFileError {
    #[error("it is no TOML: {0}")]
    Syntax(String),
    #[error("{0}")]
    Field(String),
    #[error("chip `{chip}` is not known, known are {known}: write bandwidth_gb and matmul_tflops too")]
    Chip { chip: String, known: String },
    #[error("link kind `{kind}` is not one of {known}")]
    Kind { kind: String, known: String },
    #[error("a link of kind {kind} needs Thunderbolt {wanted}, and {name} ({chip}) has {found}")]
    Port { kind: String, wanted: u32, name: String, chip: String, found: u32 },
    #[error("a link names `{name}`, and no [[node]] is called so")]
    Name { name: String },
    #[error("two nodes are called `{name}`")]
    Twice { name: String },
    #[error("it has no [[node]]")]
    Empty,
    #[error("it has more than {NODES_MAX} nodes")]
    TooMany,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profiles {
    mac: Vec<Mac>,
    link: Vec<LinkKind>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mac {
    chip: String,
    gpu_cores: u32,
    bandwidth_gb: f64,
    matmul_tflops: f64,
    memory_gb: Vec<u64>,
    thunderbolt: u32,
    ethernet_gb: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkKind {
    kind: String,
    /// The generation that both ends need.
    #[serde(default)]
    thunderbolt: u32,
    medium: Medium,
    bytes_per_second: f64,
    round_trip_us: f64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    /// Kind of the link between all nodes that no `[[link]]` names; the Ethernet that both have unless given.
    link_kind: Option<String>,
    #[serde(default)]
    node: Vec<FileNode>,
    #[serde(default)]
    link: Vec<FileLink>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileNode {
    name: String,
    /// Several of them are called `name-1`, `name-2` …
    #[serde(default = "one")]
    count: usize,
    chip: String,
    memory_gb: Option<u64>,
    /// For models; three quarters of the memory of a large Mac unless said.
    usable_gb: Option<u64>,
    gpu_cores: Option<u32>,
    bandwidth_gb: Option<f64>,
    matmul_tflops: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLink {
    between: [String; 2],
    kind: Option<String>,
    bytes_per_second: Option<f64>,
    round_trip_us: Option<f64>,
}

fn one() -> usize {
    1
}

/// Reads a cluster.toml.
pub fn read_cluster_file(text: &str) -> Result<ClusterFacts, ClusterFileError> {
    let profiles: Profiles = read(PROFILES)?;
    let file: File = read(text)?;
    let mut facts = ClusterFacts::default();
    for node in &file.node {
        if node.count == 0 || node.count > NODES_MAX || facts.nodes.len() + node.count > NODES_MAX {
            return Err(ClusterFileError::TooMany);
        }
        for number in 1..=node.count {
            let name = if node.count == 1 { node.name.clone() } else { format!("{}-{number}", node.name) };
            if facts.nodes.iter().any(|other| other.name == name) {
                return Err(ClusterFileError::Twice { name });
            }
            facts.nodes.push(profiles.node(node, name)?);
        }
    }
    if facts.nodes.is_empty() {
        return Err(ClusterFileError::Empty);
    }
    facts.links = profiles.links(&file, &facts.nodes)?;
    Ok(facts)
}

impl Profiles {
    fn node(&self, node: &FileNode, name: String) -> Result<NodeFacts, ClusterFileError> {
        let mac = self.mac(&node.chip);
        let unknown = || ClusterFileError::Chip {
            chip: node.chip.clone(),
            known: self.mac.iter().map(|mac| mac.chip.as_str()).collect::<Vec<_>>().join(", "),
        };
        let memory_gb = node.memory_gb.or_else(|| mac.and_then(|mac| mac.memory_gb.last().copied()));
        let memory_gb = memory_gb.ok_or_else(|| ClusterFileError::Field(format!("node `{name}` needs memory_gb")))?;
        let bandwidth_gb = node.bandwidth_gb.or(mac.map(|mac| mac.bandwidth_gb)).ok_or_else(unknown)?;
        let cores = |mac: &Mac| f64::from(node.gpu_cores.unwrap_or(mac.gpu_cores)) / f64::from(mac.gpu_cores.max(1));
        let matmul_tflops = node.matmul_tflops.or(mac.map(|mac| mac.matmul_tflops * cores(mac))).ok_or_else(unknown)?;
        let total = memory_gb.saturating_mul(GIB);
        let usable = node.usable_gb.map_or_else(|| working_set(total), |usable| usable.saturating_mul(GIB));
        Ok(NodeFacts {
            id: NodeId(name.clone()),
            name,
            version: String::new(),
            os: "macos".into(),
            chip: node.chip.clone(),
            usable_memory: Bytes(usable.min(total)),
            total_memory: Bytes(total),
            memory_bandwidth: bandwidth_gb * 1e9 * STREAMED,
            matmul_rate: matmul_tflops * 1e12,
            addresses: Vec::new(),
        })
    }

    fn links(&self, file: &File, nodes: &[NodeFacts]) -> Result<Vec<LinkFacts>, ClusterFileError> {
        let mut links: BTreeMap<(&str, &str), LinkFacts> = BTreeMap::new();
        file.link_kind.as_ref().map(|kind| self.kind(kind)).transpose()?;
        for from in nodes {
            for to in nodes.iter().filter(|to| to.name != from.name) {
                let kind = match &file.link_kind {
                    Some(kind) => self.kind_between(kind, [from, to])?,
                    None => self.kind(self.ethernet(from, to))?,
                };
                links.insert((&from.name, &to.name), link(from, to, kind.medium, kind.round_trip_us, kind.bytes_per_second));
            }
        }
        for told in &file.link {
            let find = |name: &String| nodes.iter().find(|node| node.name == *name).ok_or(ClusterFileError::Name { name: name.clone() });
            let (a, b) = (find(&told.between[0])?, find(&told.between[1])?);
            let kind = told.kind.as_ref().map(|kind| self.kind_between(kind, [a, b])).transpose()?;
            let rate = told.bytes_per_second.or(kind.map(|kind| kind.bytes_per_second));
            let round_trip = told.round_trip_us.or(kind.map(|kind| kind.round_trip_us));
            let (Some(rate), Some(round_trip)) = (rate, round_trip) else {
                let message = format!("the link between {} and {} needs a kind, or bytes_per_second and round_trip_us", a.name, b.name);
                return Err(ClusterFileError::Field(message));
            };
            let medium = kind.map_or(Medium::Unknown, |kind| kind.medium);
            for (from, to) in [(a, b), (b, a)] {
                links.insert((&from.name, &to.name), link(from, to, medium, round_trip, rate));
            }
        }
        Ok(links.into_values().collect())
    }

    fn mac(&self, chip: &str) -> Option<&Mac> {
        let chip = chip.trim_start_matches("Apple ");
        self.mac.iter().find(|mac| mac.chip.eq_ignore_ascii_case(chip))
    }

    fn ethernet(&self, a: &NodeFacts, b: &NodeFacts) -> &'static str {
        let is_fast = |node: &NodeFacts| self.mac(&node.chip).is_some_and(|mac| mac.ethernet_gb >= 10);
        if is_fast(a) && is_fast(b) { "10gbe" } else { "1gbe" }
    }

    /// Refuses what the ports of a known Mac cannot be.
    fn kind_between(&self, kind: &str, ends: [&NodeFacts; 2]) -> Result<&LinkKind, ClusterFileError> {
        let kind = self.kind(kind)?;
        for node in ends {
            if let Some(mac) = self.mac(&node.chip).filter(|mac| mac.thunderbolt < kind.thunderbolt) {
                let (name, chip) = (node.name.clone(), node.chip.clone());
                return Err(ClusterFileError::Port {
                    kind: kind.kind.clone(),
                    wanted: kind.thunderbolt,
                    name,
                    chip,
                    found: mac.thunderbolt,
                });
            }
        }
        Ok(kind)
    }

    fn kind(&self, kind: &str) -> Result<&LinkKind, ClusterFileError> {
        self.link.iter().find(|known| known.kind == kind).ok_or_else(|| ClusterFileError::Kind {
            kind: kind.to_owned(),
            known: self.link.iter().map(|known| known.kind.as_str()).collect::<Vec<_>>().join(", "),
        })
    }
}

fn link(from: &NodeFacts, to: &NodeFacts, medium: Medium, round_trip_us: f64, bytes_per_second: f64) -> LinkFacts {
    LinkFacts {
        from: from.id.clone(),
        to: to.id.clone(),
        interface: String::new(),
        medium,
        address: to.name.clone(),
        round_trip_seconds: round_trip_us / 1e6,
        bytes_per_second,
    }
}

/// What Metal recommends to use at most: two thirds of small memories, three quarters of others, as `iogpu.wired_limit_mb` = 0 leaves it.
fn working_set(total: u64) -> u64 {
    if total > 32 * GIB { total / 4 * 3 } else { total / 3 * 2 }
}

fn read<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, ClusterFileError> {
    let document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| ClusterFileError::Syntax(error.to_string()))?;
    let value = json(document.as_item())?;
    serde_json::from_value(value).map_err(|error| ClusterFileError::Field(error.to_string()))
}

/// Tables as JSON, which serde reads.
fn json(item: &Item) -> Result<Value, ClusterFileError> {
    let value = match item {
        Item::None => Value::Null,
        Item::Value(value) => plain(value)?,
        Item::Table(table) => {
            Value::Object(table.iter().map(|(key, item)| Ok((key.to_owned(), json(item)?))).collect::<Result<_, ClusterFileError>>()?)
        }
        Item::ArrayOfTables(tables) => {
            let tables = tables.iter().map(|table| json(&Item::Table(table.clone())));
            Value::Array(tables.collect::<Result<_, _>>()?)
        }
    };
    Ok(value)
}

fn plain(value: &toml_edit::Value) -> Result<Value, ClusterFileError> {
    use toml_edit::Value as Toml;
    Ok(match value {
        Toml::String(text) => Value::String(text.value().clone()),
        Toml::Integer(number) => Value::from(*number.value()),
        Toml::Float(number) => Value::from(*number.value()),
        Toml::Boolean(flag) => Value::Bool(*flag.value()),
        Toml::Array(values) => Value::Array(values.iter().map(plain).collect::<Result<_, _>>()?),
        Toml::InlineTable(table) => {
            let entries = table.iter().map(|(key, value)| Ok((key.to_owned(), plain(value)?)));
            Value::Object(entries.collect::<Result<_, ClusterFileError>>()?)
        }
        Toml::Datetime(_) => return Err(ClusterFileError::Field("a date has no place here".into())),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_are_sound() {
        let profiles: Profiles = read(PROFILES).expect("reads");
        assert!(profiles.mac.len() >= 18);
        for mac in &profiles.mac {
            let sane = mac.bandwidth_gb > 50.0 && mac.matmul_tflops > 1.0 && mac.gpu_cores >= 8 && !mac.memory_gb.is_empty();
            assert!(sane && (3..=5).contains(&mac.thunderbolt) && mac.ethernet_gb <= 10, "{mac:?}");
        }
        assert_eq!(profiles.link.len(), 6);
    }

    #[test]
    fn a_cluster_is_read_from_names_of_machines_and_links() {
        let text = "link_kind = \"10gbe\"\n[[node]]\nname = \"studio\"\ncount = 2\nchip = \"M3 Ultra\"\nmemory_gb = 512\n[[node]]\nname = \"air\"\nchip = \
                    \"Apple M2\"\nusable_gb = 12\n[[link]]\nbetween = [\"studio-1\", \"studio-2\"]\nkind = \"rdma\"\n";
        let facts = read_cluster_file(text).expect("reads");
        assert_eq!(facts.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>(), ["studio-1", "studio-2", "air"]);
        assert_eq!((facts.nodes[0].usable_memory, facts.nodes[2].usable_memory), (Bytes(384 * GIB), Bytes(12 * GIB)));
        assert_eq!(facts.links.len(), 6);
        let between = |from: &str, to: &str| facts.links.iter().find(|link| link.from.0 == from && link.to.0 == to).expect("there");
        assert_eq!((between("studio-2", "studio-1").medium, between("air", "studio-1").medium), (Medium::Thunderbolt, Medium::Ethernet));
    }

    #[test]
    fn what_is_wrong_in_a_cluster_file_is_named() {
        let message = |text: &str| read_cluster_file(text).expect_err("wrong").to_string();
        assert!(message("[[node]]\nname = \"a\"\nchip = \"M9\"\nmemory_gb = 8\n").contains("M3 Ultra"));
        assert!(message("[[node]]\nname = \"a\"\nchip = \"M1\"\ncolour = 1\n").contains("colour"));
        assert!(message("link_kind = \"string\"\n[[node]]\nname = \"a\"\nchip = \"M1\"\n").contains("thunderbolt5"));
        assert!(message("x = [").contains("no TOML"));
        assert!(message("").contains("no [[node]]"));
        let old = message("link_kind = \"rdma\"\n[[node]]\nname = \"a\"\ncount = 2\nchip = \"M1 Max\"\n");
        assert!(old.contains("needs Thunderbolt 5") && old.contains("has 4"), "{old}");
        let twice = "[[node]]\nname = \"a\"\nchip = \"M1\"\n[[node]]\nname = \"a\"\nchip = \"M1\"\n";
        assert!(message(twice).contains("two nodes"));
        assert!(message("[[node]]\nname = \"a\"\nchip = \"M1\"\n[[link]]\nbetween = [\"a\", \"b\"]\nkind = \"wifi\"\n").contains("`b`"));
    }
}
