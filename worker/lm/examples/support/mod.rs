//! What the examples have in common: a model's folder, opened, and groups of ranks, a process each.

use mlx_cluster_common::{
    architectures::read_spec,
    spec::ModelSpec,
    tensor::TensorPlace,
    weights::{WeightIndex, WeightMap},
};
use mlx_cluster_lm::group::{HOSTFILE_VARIABLE, RANK_VARIABLE};
use std::{
    error::Error,
    ffi::OsStr,
    io::{Read, Write},
    net::TcpListener,
    ops::Range,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Of all ranks together: a little less than whoever runs this gives it, so that none is left behind.
const DEADLINE: Duration = Duration::from_secs(270);
/// How often it is asked whether a rank has ended.
const POLL: Duration = Duration::from_millis(50);

/// What all layouts are made of.
pub(crate) struct Model {
    pub(crate) folder: PathBuf,
    pub(crate) spec: ModelSpec,
    pub(crate) index: WeightIndex,
    pub(crate) map: WeightMap,
}

impl Model {
    pub(crate) fn open(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let spec = read_spec(&mlx_cluster_hub::read_config(&folder.join("config.json"))?)?;
        let index = mlx_cluster_hub::folder_weight_index(folder)?;
        let map = WeightMap::assign(&spec, &index)?;
        Ok(Self { folder: folder.to_path_buf(), spec, index, map })
    }

    /// The layers of each stage; `cuts` are the first layers of all but the first.
    pub(crate) fn stages(&self, cuts: &[u32]) -> Vec<Range<u32>> {
        let starts = [0].iter().chain(cuts).copied();
        let ends = cuts.iter().copied().chain([self.spec.n_layers()]);
        starts.zip(ends).map(|(start, end)| start..end).collect()
    }
}

/// Starts this program once for each rank, with `folder`, the rank's place and all addresses in JSON and `further` as its arguments and `request`
/// on stdin; gives what rank 0 prints. When a rank fails, or they take too long, all are ended.
pub(crate) fn run_ranks(folder: &str, request: &str, shares: &[u32], further: &[&str]) -> Result<String, Box<dyn Error>> {
    let free = |_: &u32| Ok::<_, std::io::Error>(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string());
    let addresses = serde_json::to_string(&shares.iter().map(free).collect::<Result<Vec<_>, _>>()?)?;
    let mut ranks = Vec::new();
    let mut hostfiles = Vec::new();
    for rank in 0..shares.len() {
        let hostfile = std::env::temp_dir().join(format!("ranks-{}-{rank}.json", std::process::id()));
        let place = serde_json::to_string(&TensorPlace { rank: rank as u32, shares: shares.to_vec() })?;
        let number = rank.to_string();
        let variables: [(&str, &OsStr); 2] = [(HOSTFILE_VARIABLE, hostfile.as_os_str()), (RANK_VARIABLE, number.as_ref())];
        let mut process = Command::new(std::env::current_exe()?)
            .args([folder, &place, &addresses])
            .args(further)
            .envs(variables)
            .stdin(Stdio::piped())
            .stdout(if rank == 0 { Stdio::piped() } else { Stdio::null() })
            .spawn()?;
        process.stdin.take().ok_or("no stdin")?.write_all(request.as_bytes())?;
        ranks.push(process);
        hostfiles.push(hostfile);
    }
    let reading = ranks.first_mut().and_then(|first| first.stdout.take()).map(|mut stdout| {
        std::thread::spawn(move || {
            let mut output = String::new();
            stdout.read_to_string(&mut output).map(|_| output)
        })
    });
    let failed = wait(&mut ranks)?;
    hostfiles.iter().for_each(|hostfile| drop(std::fs::remove_file(hostfile)));
    let output = reading.ok_or("no rank")?.join().map_err(|_| "nobody read what rank 0 said")??;
    failed.map_or_else(|| Ok(output.trim().to_owned()), |failed| Err(format!("{failed} of shares {shares:?}").into()))
}

/// Until all have ended well, or one has not: it is named, and none runs on.
fn wait(ranks: &mut [Child]) -> Result<Option<String>, Box<dyn Error>> {
    let failed = watch(ranks)?;
    if failed.is_some() {
        for rank in ranks {
            // It may have ended by now.
            drop(rank.kill());
            rank.wait()?;
        }
    }
    Ok(failed)
}

fn watch(ranks: &mut [Child]) -> Result<Option<String>, Box<dyn Error>> {
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        let mut n_running = 0;
        for (number, rank) in ranks.iter_mut().enumerate() {
            match rank.try_wait()? {
                None => n_running += 1,
                Some(status) if status.success() => {}
                Some(status) => return Ok(Some(format!("rank {number} ended with {status}"))),
            }
        }
        if n_running == 0 {
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
    Ok(Some(format!("a rank did not end within {} s", DEADLINE.as_secs())))
}
