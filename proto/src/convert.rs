//! Conversions between wire messages and nouns: what comes from outside is checked here, once.

use crate::wire;
use mlx_cluster_common::{
    PROTOCOL_VERSION, VERSION,
    cache::{CacheError, CacheOptions, CacheReservation, KvQuantization},
    engine::{EngineSpec, EngineState, EngineStatus, GroupLink, Link, ModelSource, NodeFacts, Peer, WeightPeer},
    ids::{AdapterId, EngineId, Epoch, NodeId, SequenceId},
    plan::Collective,
    request::{Delivery, EngineLoad, FinishReason, SessionCommand, Submission, TokenOut},
    sampling::SamplingParams,
    step::{Admission, Output, Segment, SegmentResult, Step, StepResult, Token},
    tensor::TensorPlace,
    training::TrainingRole,
    units::Bytes,
};
use serde_json::json;

/// A message that breaks the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("message without `{0}`")]
    Missing(&'static str),
    #[error("`{field}` is {value}")]
    Invalid { field: &'static str, value: String },
    #[error("{name} runs mlx-cluster {version} (protocol {protocol}), this node {ours} (protocol {our_protocol}): install the same version on both", ours = VERSION, our_protocol = PROTOCOL_VERSION)]
    Version { name: String, version: String, protocol: u32 },
    #[error("{name} belongs to cluster `{theirs}`, this node to `{ours}`")]
    Cluster { name: String, theirs: String, ours: String },
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Version { .. } | WireError::Cluster { .. } => tonic::Status::failed_precondition(error.to_string()),
            _ => tonic::Status::invalid_argument(error.to_string()),
        }
    }
}

impl wire::Hello {
    pub fn new(cluster: &str, node: &NodeId, name: &str) -> Self {
        Self { protocol: PROTOCOL_VERSION, version: VERSION.into(), cluster: cluster.into(), node: node.0.clone(), name: name.into() }
    }

    /// Refuses a peer of another protocol version or another cluster.
    pub fn check(&self, cluster: &str) -> Result<(), WireError> {
        if self.protocol != PROTOCOL_VERSION {
            return Err(WireError::Version { name: self.name.clone(), version: self.version.clone(), protocol: self.protocol });
        }
        if self.cluster != cluster {
            return Err(WireError::Cluster { name: self.name.clone(), theirs: self.cluster.clone(), ours: cluster.into() });
        }
        Ok(())
    }
}

// --- engines wanted and observed ---

impl From<EngineSpec> for wire::EngineSpec {
    fn from(spec: EngineSpec) -> Self {
        use wire::engine_spec::Model;
        Self {
            id: spec.id.0,
            model: Some(match spec.model {
                ModelSource::Folder(path) => Model::Folder(path),
                ModelSource::Repo { id, revision } => Model::Repo(wire::RepoSource { id, revision }),
            }),
            fingerprint: spec.fingerprint,
            stage: spec.stage,
            n_stages: spec.n_stages,
            layers_start: spec.layers.start,
            layers_end: spec.layers.end,
            context_tokens: spec.context_tokens,
            cache_tokens: spec.cache_tokens,
            memory_bytes: spec.memory.0,
            caches: Some(spec.caches.into()),
            reservation: Some(spec.reservation.into()),
            sequences: spec.sequences,
            weight_peers: spec.weight_peers.into_iter().map(wire::WeightPeer::from).collect(),
            rank: spec.place.rank,
            shares: spec.place.shares,
            collective: wire::Collective::from(spec.collective).into(),
            training_json: spec.training.map(|role| json!(role).to_string()),
        }
    }
}

impl TryFrom<wire::EngineSpec> for EngineSpec {
    type Error = WireError;

    fn try_from(spec: wire::EngineSpec) -> Result<Self, WireError> {
        use wire::engine_spec::Model;
        if spec.layers_start >= spec.layers_end || spec.stage >= spec.n_stages {
            return Err(WireError::Invalid { field: "layers", value: format!("{}..{}", spec.layers_start, spec.layers_end) });
        }
        if spec.rank as usize >= spec.shares.len() || spec.shares.contains(&0) {
            return Err(WireError::Invalid { field: "rank", value: format!("{} of shares {:?}", spec.rank, spec.shares) });
        }
        let collective = spec.collective();
        Ok(Self {
            id: EngineId(spec.id),
            model: match spec.model.ok_or(WireError::Missing("model"))? {
                Model::Folder(path) => ModelSource::Folder(path),
                Model::Repo(repo) => ModelSource::Repo { id: repo.id, revision: repo.revision },
            },
            fingerprint: spec.fingerprint,
            stage: spec.stage,
            n_stages: spec.n_stages,
            layers: spec.layers_start..spec.layers_end,
            place: TensorPlace { rank: spec.rank, shares: spec.shares },
            collective: collective.into(),
            context_tokens: spec.context_tokens,
            cache_tokens: spec.cache_tokens,
            memory: Bytes(spec.memory_bytes),
            caches: spec.caches.ok_or(WireError::Missing("caches"))?.try_into()?,
            reservation: spec.reservation.ok_or(WireError::Missing("reservation"))?.into(),
            sequences: match spec.sequences {
                0 => return Err(WireError::Missing("sequences")),
                sequences => sequences,
            },
            weight_peers: spec.weight_peers.into_iter().map(WeightPeer::from).collect(),
            training: spec.training_json.as_deref().map(training_role).transpose()?,
        })
    }
}

fn training_role(json: &str) -> Result<TrainingRole, WireError> {
    serde_json::from_str(json).map_err(|error| WireError::Invalid { field: "training_json", value: format!("no training role: {error}") })
}

impl From<WeightPeer> for wire::WeightPeer {
    fn from(peer: WeightPeer) -> Self {
        let WeightPeer { node, name, addresses, layers } = peer;
        Self { node: node.0, name, addresses, layers_start: layers.start, layers_end: layers.end }
    }
}

impl From<wire::WeightPeer> for WeightPeer {
    fn from(peer: wire::WeightPeer) -> Self {
        let wire::WeightPeer { node, name, addresses, layers_start, layers_end } = peer;
        Self { node: NodeId(node), name, addresses, layers: layers_start..layers_end }
    }
}

impl From<Collective> for wire::Collective {
    fn from(collective: Collective) -> Self {
        match collective {
            Collective::Auto => wire::Collective::Auto,
            Collective::Ring => wire::Collective::Ring,
            Collective::Jaccl => wire::Collective::Jaccl,
        }
    }
}

impl From<wire::Collective> for Collective {
    fn from(collective: wire::Collective) -> Self {
        match collective {
            wire::Collective::Auto => Collective::Auto,
            wire::Collective::Ring => Collective::Ring,
            wire::Collective::Jaccl => Collective::Jaccl,
        }
    }
}

impl From<CacheOptions> for wire::CacheOptions {
    fn from(options: CacheOptions) -> Self {
        let quantization = options.quantization.map(|quantization| wire::KvQuantization {
            bits: quantization.bits(),
            group_size: quantization.group_size(),
            start: quantization.start(),
        });
        Self { quantization, max_kv_size: options.max_kv_size }
    }
}

impl TryFrom<wire::CacheOptions> for CacheOptions {
    type Error = WireError;

    fn try_from(options: wire::CacheOptions) -> Result<Self, WireError> {
        let invalid = |error: CacheError| WireError::Invalid { field: "caches", value: error.to_string() };
        let quantization = options.quantization.map(|of| KvQuantization::new(of.bits, Some(of.group_size), Some(of.start)));
        CacheOptions::new(quantization.transpose().map_err(invalid)?, options.max_kv_size).map_err(invalid)
    }
}

impl From<CacheReservation> for wire::CacheReservation {
    fn from(reservation: CacheReservation) -> Self {
        let CacheReservation { held_max, plain_tokens, plain_percent } = reservation;
        Self { held_max, plain_tokens, plain_percent }
    }
}

impl From<wire::CacheReservation> for CacheReservation {
    fn from(reservation: wire::CacheReservation) -> Self {
        let wire::CacheReservation { held_max, plain_tokens, plain_percent } = reservation;
        Self { held_max, plain_tokens, plain_percent }
    }
}

impl From<EngineStatus> for wire::EngineStatus {
    fn from(status: EngineStatus) -> Self {
        use wire::engine_status::State;
        let state = match status.state {
            EngineState::Fetching { file, done, total } => {
                State::Fetching(wire::Fetching { file, done_bytes: done.0, total_bytes: total.0 })
            }
            EngineState::Loading { done, total } => State::Loading(wire::Loading { done_bytes: done.0, total_bytes: total.0 }),
            EngineState::Ready { port, group_port, incarnation, resident } => {
                State::Ready(wire::Ready { port, group_port, incarnation, resident_bytes: resident.0 })
            }
            EngineState::Failed { cause, output, retry_in_ms, lost } => State::Failed(wire::Failed { cause, output, retry_in_ms, lost }),
        };
        Self { id: status.id.0, state: Some(state) }
    }
}

impl TryFrom<wire::EngineStatus> for EngineStatus {
    type Error = WireError;

    fn try_from(status: wire::EngineStatus) -> Result<Self, WireError> {
        use wire::engine_status::State;
        let state = match status.state.ok_or(WireError::Missing("state"))? {
            State::Fetching(fetching) => {
                EngineState::Fetching { file: fetching.file, done: Bytes(fetching.done_bytes), total: Bytes(fetching.total_bytes) }
            }
            State::Loading(loading) => EngineState::Loading { done: Bytes(loading.done_bytes), total: Bytes(loading.total_bytes) },
            State::Ready(wire::Ready { port, group_port, incarnation, resident_bytes }) => {
                EngineState::Ready { port, group_port, incarnation, resident: Bytes(resident_bytes) }
            }
            State::Failed(wire::Failed { cause, output, retry_in_ms, lost }) => EngineState::Failed { cause, output, retry_in_ms, lost },
        };
        Ok(Self { id: EngineId(status.id), state })
    }
}

impl wire::NodeFacts {
    /// Joins what a node says of itself with who it says it is.
    pub fn into_facts(self, hello: &wire::Hello) -> NodeFacts {
        NodeFacts {
            id: NodeId(hello.node.clone()),
            name: hello.name.clone(),
            version: hello.version.clone(),
            os: self.os,
            chip: self.chip,
            usable_memory: Bytes(self.usable_memory_bytes),
            total_memory: Bytes(self.total_memory_bytes),
            memory_bandwidth: self.memory_bandwidth,
            matmul_rate: self.matmul_rate,
            addresses: self.addresses,
        }
    }
}

impl From<&NodeFacts> for wire::NodeFacts {
    fn from(facts: &NodeFacts) -> Self {
        Self {
            os: facts.os.clone(),
            chip: facts.chip.clone(),
            usable_memory_bytes: facts.usable_memory.0,
            total_memory_bytes: facts.total_memory.0,
            memory_bandwidth: facts.memory_bandwidth,
            matmul_rate: facts.matmul_rate,
            addresses: facts.addresses.clone(),
        }
    }
}

// --- linking ---

impl From<Peer> for wire::Peer {
    fn from(peer: Peer) -> Self {
        Self { node: peer.node.0, name: peer.name, addresses: peer.addresses }
    }
}

impl From<wire::Peer> for Peer {
    fn from(peer: wire::Peer) -> Self {
        Self { node: NodeId(peer.node), name: peer.name, addresses: peer.addresses }
    }
}

impl From<Link> for wire::LinkRequest {
    fn from(link: Link) -> Self {
        let group = |GroupLink { addresses, names, incarnations }| wire::GroupLink { addresses, names, incarnations };
        Self {
            epoch: link.epoch.0,
            next: link.next.map(wire::Peer::from),
            protocol: PROTOCOL_VERSION,
            version: VERSION.into(),
            ranks: link.ranks.into_iter().map(wire::Peer::from).collect(),
            group: link.group.map(group),
        }
    }
}

impl TryFrom<wire::LinkRequest> for Link {
    type Error = WireError;

    fn try_from(request: wire::LinkRequest) -> Result<Self, WireError> {
        if request.protocol != PROTOCOL_VERSION {
            return Err(WireError::Version { name: "the coordinator".into(), version: request.version, protocol: request.protocol });
        }
        Ok(Self {
            epoch: Epoch(request.epoch),
            next: request.next.map(Peer::from),
            ranks: request.ranks.into_iter().map(Peer::from).collect(),
            group: request.group.map(GroupLink::try_from).transpose()?,
        })
    }
}

impl TryFrom<wire::GroupLink> for GroupLink {
    type Error = WireError;

    fn try_from(group: wire::GroupLink) -> Result<Self, WireError> {
        let wire::GroupLink { addresses, names, incarnations } = group;
        if addresses.len() < 2 || names.len() != addresses.len() || incarnations.len() != addresses.len() {
            return Err(WireError::Invalid { field: "group", value: format!("{} addresses, {} names", addresses.len(), names.len()) });
        }
        Ok(Self { addresses, names, incarnations })
    }
}

// --- sampling ---

impl From<SamplingParams> for wire::SamplingParams {
    fn from(params: SamplingParams) -> Self {
        Self {
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            top_k: params.top_k,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params.logit_bias.into_iter().map(|(token, bias)| wire::LogitBias { token, bias }).collect(),
            seed: params.seed,
            logprobs: params.logprobs,
            prompt_logprobs: params.prompt_logprobs,
            max_tokens: params.max_tokens,
            stop_tokens: params.stop_tokens,
        }
    }
}

impl From<wire::SamplingParams> for SamplingParams {
    fn from(params: wire::SamplingParams) -> Self {
        Self {
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            top_k: params.top_k,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params.logit_bias.into_iter().map(|entry| (entry.token, entry.bias)).collect(),
            seed: params.seed,
            logprobs: params.logprobs,
            prompt_logprobs: params.prompt_logprobs,
            max_tokens: params.max_tokens,
            stop_tokens: params.stop_tokens,
        }
    }
}

// --- steps ---

impl wire::StepFrame {
    pub fn new(step: Step, activations: Vec<wire::Tensor>) -> Self {
        Self {
            epoch: step.epoch.0,
            number: step.number,
            admissions: step.admissions.into_iter().map(wire::Admission::from).collect(),
            releases: step.releases.into_iter().map(|sequence| sequence.0).collect(),
            segments: step.segments.into_iter().map(wire::Segment::from).collect(),
            activations,
            busy_ns: 0,
            sender: String::new(),
            farewell: false,
        }
    }

    pub fn into_step(self) -> Result<(Step, Vec<wire::Tensor>), WireError> {
        let step = Step {
            epoch: Epoch(self.epoch),
            number: self.number,
            admissions: self.admissions.into_iter().map(Admission::try_from).collect::<Result<_, _>>()?,
            releases: self.releases.into_iter().map(SequenceId).collect(),
            segments: self.segments.into_iter().map(Segment::from).collect(),
        };
        Ok((step, self.activations))
    }
}

impl From<Admission> for wire::Admission {
    fn from(admission: Admission) -> Self {
        let adapter = admission.adapter.map(|adapter| adapter.0);
        Self { sequence: admission.sequence.0, params: Some(admission.params.into()), adapter }
    }
}

impl TryFrom<wire::Admission> for Admission {
    type Error = WireError;

    fn try_from(admission: wire::Admission) -> Result<Self, WireError> {
        let params = admission.params.ok_or(WireError::Missing("params"))?.into();
        Ok(Self { sequence: SequenceId(admission.sequence), params, adapter: admission.adapter.map(AdapterId) })
    }
}

impl From<Segment> for wire::Segment {
    fn from(segment: Segment) -> Self {
        let previous = segment.tokens == [Token::Previous];
        let known = |token: Token| match token {
            Token::Id(id) => Some(id),
            Token::Previous => None,
        };
        Self {
            sequence: segment.sequence.0,
            start: segment.start,
            tokens: segment.tokens.into_iter().filter_map(known).collect(),
            previous,
            sample: segment.output.sample,
            prompt_logprobs: segment.output.prompt_logprobs,
        }
    }
}

impl From<wire::Segment> for Segment {
    fn from(segment: wire::Segment) -> Self {
        let tokens = match segment.previous {
            true => vec![Token::Previous],
            false => segment.tokens.into_iter().map(Token::Id).collect(),
        };
        let output = Output { sample: segment.sample, prompt_logprobs: segment.prompt_logprobs };
        Self { sequence: SequenceId(segment.sequence), start: segment.start, tokens, output }
    }
}

impl From<TokenOut> for wire::Token {
    fn from(token: TokenOut) -> Self {
        let top = token.top.into_iter().map(|(id, logprob)| wire::Alternative { id, logprob }).collect();
        Self { id: token.id, logprob: token.logprob, top }
    }
}

impl From<wire::Token> for TokenOut {
    fn from(token: wire::Token) -> Self {
        Self { id: token.id, logprob: token.logprob, top: token.top.into_iter().map(|entry| (entry.id, entry.logprob)).collect() }
    }
}

impl From<StepResult> for wire::StepResult {
    fn from(result: StepResult) -> Self {
        let sequence = |entry: SegmentResult| {
            let (prompt_start, prompt) = entry.prompt.unwrap_or_default();
            wire::SegmentResult {
                sequence: entry.sequence.0,
                sampled: entry.sampled.map(wire::Token::from),
                prompt_start,
                prompt: prompt.into_iter().map(wire::Token::from).collect(),
            }
        };
        let sequences = result.sequences.into_iter().map(sequence).collect();
        Self { epoch: result.epoch.0, number: result.number, sequences, busy_ns: 0, sender: String::new() }
    }
}

impl From<wire::StepResult> for StepResult {
    fn from(result: wire::StepResult) -> Self {
        let sequence = |entry: wire::SegmentResult| SegmentResult {
            sequence: SequenceId(entry.sequence),
            sampled: entry.sampled.map(TokenOut::from),
            prompt: (!entry.prompt.is_empty()).then(|| (entry.prompt_start, entry.prompt.into_iter().map(TokenOut::from).collect())),
        };
        Self { epoch: Epoch(result.epoch), number: result.number, sequences: result.sequences.into_iter().map(sequence).collect() }
    }
}

// --- the session ---

impl From<SessionCommand> for wire::SessionCommand {
    fn from(command: SessionCommand) -> Self {
        use wire::session_command::Command;
        let command = match command {
            SessionCommand::Submit(Submission { sequence, prompt, params, adapter }) => {
                let adapter = adapter.map(|adapter| adapter.0);
                Command::Submit(wire::Submission { sequence: sequence.0, prompt, params: Some(params.into()), adapter })
            }
            SessionCommand::Cancel(sequence) => Command::Cancel(sequence.0),
        };
        Self { command: Some(command) }
    }
}

impl TryFrom<wire::Submission> for Submission {
    type Error = WireError;

    fn try_from(submission: wire::Submission) -> Result<Self, WireError> {
        if submission.prompt.is_empty() {
            return Err(WireError::Missing("prompt"));
        }
        let params = submission.params.ok_or(WireError::Missing("params"))?.into();
        let adapter = submission.adapter.map(AdapterId);
        Ok(Self { sequence: SequenceId(submission.sequence), prompt: submission.prompt, params, adapter })
    }
}

impl From<Delivery> for wire::Delivery {
    fn from(delivery: Delivery) -> Self {
        use wire::{delivery::Delivery as Wire, finished::Reason};
        let delivery = match delivery {
            Delivery::Prompt { sequence, start, tokens } => Wire::Prompt(wire::PromptTokens {
                sequence: sequence.0,
                start,
                tokens: tokens.into_iter().map(wire::Token::from).collect(),
            }),
            Delivery::Token { sequence, token } => Wire::Token(wire::GeneratedToken { sequence: sequence.0, token: Some(token.into()) }),
            Delivery::Finished { sequence, reason } => {
                let reason = match reason {
                    FinishReason::Stop => Reason::Stop,
                    FinishReason::Length => Reason::Length,
                };
                Wire::Finished(wire::Finished { sequence: sequence.0, reason: reason.into() })
            }
            Delivery::Refused { sequence, message } => Wire::Refused(wire::Refused { sequence: sequence.0, message }),
            Delivery::Load(load) => Wire::Load(wire::EngineLoad {
                running: load.running,
                waiting: load.waiting,
                cache_tokens_used: load.cache_tokens_used,
                cache_tokens_max: load.cache_tokens_max,
                hop_ns: load.hop_ns,
                prompt_hop_ns: load.prompt_hop_ns,
                prompt_hop_bytes: load.prompt_hop_bytes,
            }),
        };
        Self { delivery: Some(delivery) }
    }
}

/// A delivery, or the end of the epoch with the node at fault and what happened.
#[derive(Debug, Clone, PartialEq)]
pub enum SessionEvent {
    Delivery(Delivery),
    Broken { node: String, message: String },
}

impl TryFrom<wire::Delivery> for SessionEvent {
    type Error = WireError;

    fn try_from(delivery: wire::Delivery) -> Result<Self, WireError> {
        use wire::{delivery::Delivery as Wire, finished::Reason};
        let delivery = match delivery.delivery.ok_or(WireError::Missing("delivery"))? {
            Wire::Prompt(prompt) => Delivery::Prompt {
                sequence: SequenceId(prompt.sequence),
                start: prompt.start,
                tokens: prompt.tokens.into_iter().map(TokenOut::from).collect(),
            },
            Wire::Token(token) => {
                Delivery::Token { sequence: SequenceId(token.sequence), token: token.token.ok_or(WireError::Missing("token"))?.into() }
            }
            Wire::Finished(finished) => {
                let reason = match finished.reason() {
                    Reason::Stop => FinishReason::Stop,
                    Reason::Length => FinishReason::Length,
                };
                Delivery::Finished { sequence: SequenceId(finished.sequence), reason }
            }
            Wire::Refused(refused) => Delivery::Refused { sequence: SequenceId(refused.sequence), message: refused.message },
            Wire::Load(load) => Delivery::Load(EngineLoad {
                running: load.running,
                waiting: load.waiting,
                cache_tokens_used: load.cache_tokens_used,
                cache_tokens_max: load.cache_tokens_max,
                hop_ns: load.hop_ns,
                prompt_hop_ns: load.prompt_hop_ns,
                prompt_hop_bytes: load.prompt_hop_bytes,
            }),
            Wire::Broken(broken) => return Ok(SessionEvent::Broken { node: broken.node, message: broken.message }),
        };
        Ok(SessionEvent::Delivery(delivery))
    }
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
