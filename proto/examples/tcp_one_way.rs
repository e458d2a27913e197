//! Half the round trip of so many bytes over a bare TCP connection on this machine: what a hop between engines is compared with.
//!
//! `tcp_one_way BYTES [ROUNDS]` prints the median in nanoseconds.

use std::{
    error::Error,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::Instant,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let bytes: usize = arguments.next().ok_or("usage: tcp_one_way BYTES [ROUNDS]")?.parse()?;
    let rounds: usize = arguments.next().map_or(Ok(2000), |text| text.parse())?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let echo = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut buffer = vec![0; bytes];
        while stream.read_exact(&mut buffer).is_ok() {
            stream.write_all(&buffer)?;
        }
        Ok(())
    });
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut buffer = vec![1; bytes];
    let mut times = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        let start = Instant::now();
        stream.write_all(&buffer)?;
        stream.read_exact(&mut buffer)?;
        times.push(start.elapsed().as_nanos() as u64 / 2);
    }
    drop(stream);
    echo.join().map_err(|_| "the echo thread panicked")??;
    times.sort_unstable();
    println!("{}", times[times.len() / 2]);
    Ok(())
}
