//! The life of an engine process: told what to be, load, serve, end with its worker.

use super::{
    CHANNEL, Command,
    boot::{Boot, BootLine},
    lead::{Lead, Pulse},
    load::{Loaded, load},
    ranks::{Ranks, Seat},
    relay::{Fault, Relay},
    scheduler::Limits,
    service::Service,
    training,
    watchdog::{End, Watchdog},
};
use mlx_cluster_lm::{ffi, probe as measure};
use mlx_cluster_proto::{net, wire::engine_server::EngineServer};
use std::{
    io::{self, BufRead, Read, Write},
    net::SocketAddr,
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tonic::transport::{Server, server::Router};

/// Longest line that tells an engine what to be.
const BOOT_LINE_BYTES_MAX: u64 = 1 << 20;
/// Prompt tokens of a step, at most.
const PREFILL_TOKENS: u32 = 512;
const SCORED_TOKENS: u32 = 128;
/// A process that is ending gets this long.
const ORDERLY_END: Duration = Duration::from_millis(500);

/// Runs the hidden `engine` verb until stdin closes. Exit code 3: the model cannot be served; 4: no address to serve on; 5: its group is lost.
pub fn run() -> ExitCode {
    let boot = match read_boot() {
        Ok(boot) => boot,
        Err(cause) => return fail(cause, 2),
    };
    end_with_stdin();
    if let Some(role) = boot.spec.training.clone() {
        return match training::run(boot, role) {
            Ok(()) => ExitCode::SUCCESS,
            Err((cause, code)) => fail(cause, code),
        };
    }
    let report = |done_bytes, total_bytes| say(&BootLine::Loading { done_bytes, total_bytes });
    let loaded = match load(&boot, report) {
        Ok(loaded) => loaded,
        Err(cause) => return fail(cause, 3),
    };
    match serve(boot, loaded) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => fail(cause, 4),
    }
}

/// Runs `engine --probe`: prints what this machine can do as one line of JSON.
pub fn probe() -> ExitCode {
    let rate = match measure::matmul_rate() {
        Ok(rate) => rate,
        Err(error) => return fail(error.to_string(), 1),
    };
    let bandwidth = measure::memory_bandwidth();
    println!("{}", serde_json::json!({"matmul_rate": rate, "memory_bandwidth": bandwidth, "gpu_memory_bytes": ffi::gpu_memory_bytes()}));
    ExitCode::SUCCESS
}

fn read_boot() -> Result<Boot, String> {
    let mut line = String::new();
    io::stdin().lock().take(BOOT_LINE_BYTES_MAX).read_line(&mut line).map_err(|error| format!("cannot read stdin: {error}"))?;
    serde_json::from_str(&line).map_err(|error| format!("this verb is for workers, which say on stdin what to be: {error}"))
}

/// Ends the process when stdin closes, which the system does for us when the worker dies, however it dies.
fn end_with_stdin() {
    thread::spawn(|| {
        let mut rest = [0u8; 64];
        while matches!(io::stdin().lock().read(&mut rest), Ok(read) if read > 0) {}
        std::process::exit(0);
    });
}

fn fail(cause: String, code: u8) -> ExitCode {
    eprintln!("{cause}");
    say(&BootLine::Failed { cause, hopeless: true, lost: None });
    ExitCode::from(code)
}

/// Ends the process of a rank whose group is lost. What runs at an orderly end may wait for the thread that hangs.
pub(super) fn end_lost(end: End) {
    eprintln!("{}", end.cause);
    say(&end.into());
    thread::spawn(|| {
        thread::sleep(ORDERLY_END);
        std::process::abort();
    });
    std::process::exit(5);
}

pub(super) fn say(line: &BootLine) {
    let text = serde_json::to_string(line).unwrap_or_default();
    // A worker that does not listen any more is gone, and then so are we.
    drop(writeln!(io::stdout().lock(), "{text}"));
}

/// Serves from a small runtime while one thread steps. Ends only when that thread does.
fn serve(boot: Boot, loaded: Loaded) -> Result<(), String> {
    let Loaded { shard, group, part_multiple } = loaded;
    let (commands, receiver) = mpsc::channel::<Command>(CHANNEL);
    let (pulse, pulse_receiver) = watch::channel(Pulse::default());
    let (faults, fault_receiver) = watch::channel::<Fault>(None);
    let spec = boot.spec.clone();
    let is_alone = spec.place.is_alone();
    let watchdog = if is_alone { Watchdog::idle() } else { Watchdog::start(spec.place.rank, end_lost) };
    let service = Service::new(commands, spec.clone(), watchdog.clone(), pulse_receiver, fault_receiver, boot.node_name.clone());
    let seat = (!is_alone).then(|| Seat::take(boot.listen.ip())).transpose();
    let seat = seat.map_err(|error| format!("cannot keep a port of {} for the group: {error}", boot.listen.ip()))?;
    let server =
        EngineServer::new(service).max_decoding_message_size(net::MESSAGE_BYTES_MAX).max_encoding_message_size(net::MESSAGE_BYTES_MAX);
    let group_port = seat.as_ref().map_or(0, |seat| seat.port);
    let _runtime = listen_and_serve(boot.listen, group_port, |mut builder| builder.add_service(server))?;
    let ranks = Ranks::new(group, spec.collective, seat, watchdog);
    match spec.is_lead() {
        true => Lead::new(shard, ranks, limits(&boot, part_multiple), receiver, Arc::new(pulse), boot.node_name).run(),
        false => Relay::new(shard, ranks, spec, receiver, faults, boot.node_name).run(),
    }
    Ok(())
}

/// Serves from a small runtime that lives as long as what is given back, and says to the worker where. The process ends with the server.
pub(super) fn listen_and_serve(listen: SocketAddr, group_port: u16, add: impl FnOnce(Server) -> Router) -> Result<Runtime, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start the network runtime: {error}"))?;
    let listener = runtime.block_on(net::listen(listen)).map_err(|error| format!("cannot listen on {listen}: {error}"))?;
    let port = listener.local_addr().map_err(|error| error.to_string())?.port();
    let router = add(net::server());
    runtime.spawn(async move {
        let served = router.serve_with_incoming(net::incoming(listener)).await;
        eprintln!("the engine's server ended: {served:?}");
        std::process::exit(4);
    });
    say(&BootLine::Ready { port, group_port });
    Ok(runtime)
}

fn limits(boot: &Boot, part_multiple: u32) -> Limits {
    let spec = &boot.spec;
    Limits {
        n_stages: spec.n_stages,
        context_tokens: spec.context_tokens,
        cache_tokens: spec.cache_tokens,
        reservation: spec.reservation,
        sequences: spec.sequences as usize,
        prefill_tokens: PREFILL_TOKENS,
        scored_tokens: SCORED_TOKENS,
        part_multiple,
    }
}
