//! Measures the way to one address of another worker, with messages that travel as those between engines do: from thread to thread,
//! over one gRPC stream.

use mlx_cluster_proto::{
    net,
    wire::{self, worker_client::WorkerClient},
};
use std::time::{Duration, Instant};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;

/// For the connection, and then for all that is sent over it.
const CONNECT_DEADLINE: Duration = Duration::from_millis(700);
const DEADLINE: Duration = Duration::from_secs(3);
const SMALL_BYTES: usize = 16;
/// Before a small message, about as long as a step computes: a hop finds both ends at rest, and waking them is most of its time.
const REST: Duration = Duration::from_millis(10);
const WARM_UPS: usize = 1;
const ROUND_TRIPS: usize = 7;
/// Fewer round trips will do over a way that takes long.
const ROUND_TRIPS_MIN: usize = 3;
const ROUND_TRIPS_WITHIN: Duration = Duration::from_millis(200);
/// Large messages grow by a factor of 4 from the first to the last size, as long as one takes less than this.
const LARGE_BYTES_FIRST: usize = 32 << 10;
pub(super) const LARGE_BYTES_LAST: usize = 2 << 20;
const GROW_WITHIN: Duration = Duration::from_millis(15);
/// What took longer, and the last size, is sent so often, if that is soon done. The shortest counts: whatever else goes on can only make
/// them longer.
const LARGE_TRIPS: usize = 3;
const REPEAT_WITHIN: Duration = Duration::from_millis(100);
/// Shorter differences are no throughput but chance.
const TRANSFER_MIN: Duration = Duration::from_micros(1);

/// What a way is like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Figures {
    pub(super) round_trip_seconds: f64,
    pub(super) bytes_per_second: f64,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProbeError {
    #[error(transparent)]
    Connect(#[from] net::ConnectError),
    #[error("{0}")]
    Refused(String),
    #[error("{}", .0.message())]
    Status(Box<tonic::Status>),
    #[error("it takes too long")]
    TooSlow,
    #[error("the stream ended")]
    Ended,
}

impl From<tonic::Status> for ProbeError {
    fn from(status: tonic::Status) -> Self {
        match status.code() {
            tonic::Code::ResourceExhausted => ProbeError::Refused(status.message().to_owned()),
            _ => ProbeError::Status(Box::new(status)),
        }
    }
}

/// `name` is for messages.
pub(super) async fn probe(hello: wire::Hello, name: &str, address: &str) -> Result<Figures, ProbeError> {
    let addresses = [address.to_owned()];
    let channel = timeout(CONNECT_DEADLINE, net::connect(name, &addresses)).await.map_err(|_| ProbeError::TooSlow)??;
    timeout(DEADLINE, exchange(WorkerClient::new(channel), hello)).await.map_err(|_| ProbeError::TooSlow)?
}

async fn exchange(mut client: WorkerClient<tonic::transport::Channel>, hello: wire::Hello) -> Result<Figures, ProbeError> {
    let (frames, outgoing) = mpsc::channel(1);
    let first = wire::ProbeFrame { hello: Some(hello), ..Default::default() };
    frames.send(first).await.map_err(|_| ProbeError::Ended)?;
    let mut inbound = client.probe(ReceiverStream::new(outgoing)).await?.into_inner();
    let (echoes, mut heard) = mpsc::channel(1);
    let forwarding = async {
        while inbound.message().await?.is_some() {
            if echoes.send(()).await.is_err() {
                return Err(ProbeError::Ended);
            }
        }
        Err::<(), _>(ProbeError::Ended)
    };
    let measuring = tokio::task::spawn_blocking(move || {
        heard.blocking_recv()?;
        figures(|bytes| {
            if bytes == SMALL_BYTES {
                std::thread::sleep(REST);
            }
            let frame = wire::ProbeFrame { hello: None, data: vec![0; bytes].into() };
            let sent = Instant::now();
            frames.blocking_send(frame).ok()?;
            heard.blocking_recv()?;
            Some(sent.elapsed())
        })
    });
    // When this is dropped, the thread ends too, since both its channels do.
    tokio::select! {
        Err(error) = forwarding => Err(error),
        figures = measuring => figures.ok().flatten().ok_or(ProbeError::Ended),
    }
}

/// From the times that messages of so many bytes take until their echo is there.
fn figures(mut trip: impl FnMut(usize) -> Option<Duration>) -> Option<Figures> {
    let mut round_trips = Vec::with_capacity(ROUND_TRIPS);
    let mut together = Duration::ZERO;
    for number in 0..WARM_UPS + ROUND_TRIPS {
        let time = trip(SMALL_BYTES)?;
        together += time;
        if number >= WARM_UPS || together > ROUND_TRIPS_WITHIN {
            round_trips.push(time);
        }
        if together > ROUND_TRIPS_WITHIN && round_trips.len() >= ROUND_TRIPS_MIN {
            break;
        }
    }
    let round_trip = median(round_trips)?;
    let (bytes, time) = largest(&mut trip)?;
    let transfer = time.saturating_sub(round_trip).max(TRANSFER_MIN);
    Some(Figures { round_trip_seconds: round_trip.as_secs_f64(), bytes_per_second: bytes as f64 / transfer.as_secs_f64() })
}

/// The largest message that does not take too long, and its time.
fn largest(mut trip: impl FnMut(usize) -> Option<Duration>) -> Option<(usize, Duration)> {
    let mut bytes = LARGE_BYTES_FIRST;
    loop {
        let (mut time, mut together, mut trips) = (Duration::MAX, Duration::ZERO, 0);
        while trips == 0 || (time >= GROW_WITHIN || bytes == LARGE_BYTES_LAST) && trips < LARGE_TRIPS && together < REPEAT_WITHIN {
            let next = trip(bytes)?;
            (time, together, trips) = (time.min(next), together + next, trips + 1);
        }
        if time >= GROW_WITHIN || bytes == LARGE_BYTES_LAST {
            return Some((bytes, time));
        }
        bytes *= 4;
    }
}

fn median(mut times: Vec<Duration>) -> Option<Duration> {
    times.sort_unstable();
    times.get(times.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Figures of a way like this, and the bytes and the time that it took to get them.
    fn measured(round_trip: Duration, bytes_per_second: f64) -> (Figures, usize, Duration) {
        let (mut sent, mut took) = (0, Duration::ZERO);
        let figures = figures(|bytes| {
            let time = round_trip + Duration::from_secs_f64(bytes as f64 / bytes_per_second);
            sent += bytes;
            took += time;
            Some(time)
        });
        (figures.expect("measured"), sent, took)
    }

    #[test]
    fn ways_of_all_kinds_are_measured_with_little_traffic_and_time() {
        for (microseconds, megabits_per_second) in [(30.0, 40_000.0), (150.0, 1000.0), (300.0, 50.0), (3000.0, 300.0), (90_000.0, 20.0)] {
            let (round_trip, bytes_per_second) = (microseconds / 1e6, megabits_per_second * 1e6 / 8.0);
            let (figures, sent, took) = measured(Duration::from_secs_f64(round_trip), bytes_per_second);
            let off = |a: f64, b: f64| (a / b - 1.0).abs();
            assert!(off(figures.round_trip_seconds, round_trip) < 0.05, "{figures:?}");
            assert!(off(figures.bytes_per_second, bytes_per_second) < 0.05, "{figures:?}");
            assert!(sent < 20 << 20 && took < Duration::from_millis(700), "{sent} bytes in {took:?}");
        }
    }

    #[test]
    fn a_way_that_breaks_has_no_figures() {
        let mut left = 10;
        let figures = figures(|_| {
            left -= 1;
            (left > 0).then_some(Duration::from_millis(1))
        });
        assert_eq!(figures, None);
    }
}
