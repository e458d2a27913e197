//! Prometheus figures, under vLLM's names where it has one. The recorder belongs to one server, nothing is installed globally.

use crate::serving::ClusterStatus;
use metrics::{Key, KeyName, Label, Level, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use mlx_cluster_common::{engine::EngineState, request::FinishReason};
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

const RUNNING: &str = "vllm:num_requests_running";
const WAITING: &str = "vllm:num_requests_waiting";
const CACHE_USAGE: &str = "vllm:kv_cache_usage_perc";
const PROMPT_TOKENS: &str = "vllm:prompt_tokens_total";
const GENERATION_TOKENS: &str = "vllm:generation_tokens_total";
const SUCCESS: &str = "vllm:request_success_total";
const FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
const INTER_TOKEN: &str = "vllm:inter_token_latency_seconds";
const WHOLE: &str = "vllm:e2e_request_latency_seconds";
const READY: &str = "mlx_cluster_model_ready";
const WORKERS: &str = "mlx_cluster_workers";
const ENGINE_RESIDENT: &str = "mlx_cluster_engine_resident_bytes";
const ENGINE_UP: &str = "mlx_cluster_engine_ready";

const GAUGES: [(&str, &str); 7] = [
    (RUNNING, "Requests that the engines work on."),
    (WAITING, "Requests that wait for room."),
    (CACHE_USAGE, "Share of the KV cache that is in use, 1 is all of it."),
    (READY, "1 while the model can answer."),
    (WORKERS, "Workers by whether they are connected."),
    (ENGINE_RESIDENT, "Resident memory of the engine on a worker."),
    (ENGINE_UP, "1 while the engine on a worker is ready."),
];
const COUNTERS: [(&str, &str); 3] = [
    (PROMPT_TOKENS, "Prompt tokens that were read."),
    (GENERATION_TOKENS, "Tokens that were generated."),
    (SUCCESS, "Requests that ended, by how."),
];
/// With the bounds of their buckets in seconds, as in vLLM.
const HISTOGRAMS: [(&str, &str, &[f64]); 3] = [
    (
        FIRST_TOKEN,
        "Seconds from a request to its first token.",
        &[
            0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
            2560.0,
        ],
    ),
    (
        INTER_TOKEN,
        "Seconds from one token of a request to its next.",
        &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0],
    ),
    (
        WHOLE,
        "Seconds from a request to its end.",
        &[0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0],
    ),
];

/// Generated tokens are counted over so long for `tokens_per_second`.
const RATE_WINDOW: Duration = Duration::from_secs(10);

const METADATA: Metadata<'static> = Metadata::new("mlx_cluster", Level::INFO, None);

/// The figures of one server.
pub(super) struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    rate: Mutex<Rate>,
}

impl Metrics {
    pub(super) fn new() -> Result<Self, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, _, bounds) in HISTOGRAMS {
            builder = builder.set_buckets_for_metric(Matcher::Full(name.into()), bounds)?;
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        let text = |text: &'static str| (KeyName::from_const_str(text), SharedString::const_str(text));
        for (name, about) in GAUGES {
            recorder.describe_gauge(text(name).0, None, text(about).1);
        }
        for (name, about) in COUNTERS {
            recorder.describe_counter(text(name).0, None, text(about).1);
        }
        for (name, about, _) in HISTOGRAMS {
            recorder.describe_histogram(text(name).0, Some(Unit::Seconds), text(about).1);
        }
        Ok(Self { recorder, handle, rate: Mutex::default() })
    }

    /// Moves what was measured out of its buffers; without this they would grow until somebody asks for the figures.
    pub(super) fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// The text of `GET /metrics`.
    pub(super) fn render(&self, status: &ClusterStatus, model: Option<&str>) -> String {
        let labels = model_label(model.unwrap_or_default());
        let load = status.load;
        let usage = if load.cache_tokens_max == 0 { 0.0 } else { load.cache_tokens_used as f64 / load.cache_tokens_max as f64 };
        self.gauge(RUNNING, labels.clone(), load.running.into());
        self.gauge(WAITING, labels.clone(), load.waiting.into());
        self.gauge(CACHE_USAGE, labels.clone(), usage);
        let ready = status.instance == crate::serving::InstanceState::Ready;
        self.gauge(READY, labels, f64::from(u8::from(ready)));
        let connected = status.workers.iter().filter(|worker| worker.connected).count();
        for (state, count) in [("connected", connected), ("lost", status.workers.len() - connected)] {
            self.gauge(WORKERS, vec![Label::new("state", state)], count as f64);
        }
        for worker in &status.workers {
            let label = vec![Label::new("worker", worker.facts.name.clone())];
            let resident = match worker.served_engine() {
                Some(EngineState::Ready { resident, .. }) => Some(resident.0),
                _ => None,
            };
            self.gauge(ENGINE_UP, label.clone(), f64::from(u8::from(resident.is_some())));
            self.gauge(ENGINE_RESIDENT, label, resident.unwrap_or(0) as f64);
        }
        self.handle.render()
    }

    /// Generated tokens a second, of all requests together, over the last seconds.
    pub(super) fn tokens_per_second(&self) -> f64 {
        self.rate.lock().unwrap_or_else(PoisonError::into_inner).per_second(Instant::now())
    }

    /// Begins to measure one answer to a prompt.
    pub(super) fn start(self: &Arc<Self>, model: &str, prompt_tokens: usize) -> Timer {
        let now = Instant::now();
        Timer { metrics: Arc::clone(self), model: model.into(), prompt_tokens, started: now, last_token: None, ended: false }
    }

    fn gauge(&self, name: &'static str, labels: Vec<Label>, value: f64) {
        self.recorder.register_gauge(&Key::from_parts(name, labels), &METADATA).set(value);
    }

    fn count(&self, name: &'static str, labels: Vec<Label>, more: u64) {
        self.recorder.register_counter(&Key::from_parts(name, labels), &METADATA).increment(more);
    }

    fn measure(&self, name: &'static str, labels: Vec<Label>, passed: Duration) {
        self.recorder.register_histogram(&Key::from_parts(name, labels), &METADATA).record(passed.as_secs_f64());
    }
}

fn model_label(model: &str) -> Vec<Label> {
    vec![Label::new("model_name", model.to_owned())]
}

/// Measures one answer; one that ends without being finished counts as given up.
pub(super) struct Timer {
    metrics: Arc<Metrics>,
    model: String,
    prompt_tokens: usize,
    started: Instant,
    last_token: Option<Instant>,
    ended: bool,
}

impl Timer {
    pub(super) fn token(&mut self) {
        let now = Instant::now();
        let labels = model_label(&self.model);
        match self.last_token.replace(now) {
            Some(last) => self.metrics.measure(INTER_TOKEN, labels.clone(), now - last),
            None => {
                self.metrics.count(PROMPT_TOKENS, labels.clone(), self.prompt_tokens as u64);
                self.metrics.measure(FIRST_TOKEN, labels.clone(), now - self.started);
            }
        }
        self.metrics.count(GENERATION_TOKENS, labels, 1);
        self.metrics.rate.lock().unwrap_or_else(PoisonError::into_inner).add(now);
    }

    pub(super) fn finish(&mut self, reason: FinishReason) {
        self.end(match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        });
    }

    fn end(&mut self, reason: &'static str) {
        if !std::mem::replace(&mut self.ended, true) {
            let mut labels = model_label(&self.model);
            self.metrics.measure(WHOLE, labels.clone(), self.started.elapsed());
            labels.push(Label::new("finished_reason", reason));
            self.metrics.count(SUCCESS, labels, 1);
        }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.end("abort");
    }
}

/// Counts by the tenth of a second.
#[derive(Default)]
struct Rate {
    slots: VecDeque<(Instant, u64)>,
}

impl Rate {
    fn add(&mut self, now: Instant) {
        self.forget(now);
        match self.slots.back_mut() {
            Some((start, count)) if now.saturating_duration_since(*start) < RATE_WINDOW / 100 => *count += 1,
            _ => self.slots.push_back((now, 1)),
        }
    }

    fn per_second(&mut self, now: Instant) -> f64 {
        self.forget(now);
        let (Some((first, _)), Some((last, _))) = (self.slots.front(), self.slots.back()) else { return 0.0 };
        let total: u64 = self.slots.iter().map(|(_, count)| count).sum();
        // From the first token to now while it runs; a pause counts as time too.
        let span = now.saturating_duration_since(*first).max(last.saturating_duration_since(*first));
        total as f64 / span.as_secs_f64().max(1.0)
    }

    fn forget(&mut self, now: Instant) {
        while self.slots.pop_front_if(|(start, _)| now.saturating_duration_since(*start) > RATE_WINDOW).is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_of_the_last_seconds() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(start), 0.0);
        for i in 0..400 {
            rate.add(at(f64::from(i) * 0.01));
        }
        assert!((rate.per_second(at(4.0)) - 100.0).abs() < 1.0);
        assert_eq!(rate.per_second(at(20.0)), 0.0);
    }
}
