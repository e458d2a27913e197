//! CPU kernels that MLX compiled, shared between engines without the risk of reading a file that another one still writes.
//!
//! MLX keeps them under one name in the temporary folder, written in place: an engine that loads one at that moment fails. Engines that are
//! alone warm up one after the other. Ranks of a group warm up together, so each has a temporary folder of its own, which starts with what
//! is known to be whole and gives back what it made.

use std::{
    fs::{self, DirEntry},
    io,
    path::Path,
    time::{Duration, SystemTime},
};

/// A file that was written longer ago than this is whole: the compiler is done with it, or was killed, which breaks every engine alike.
const SETTLED: Duration = Duration::from_secs(10);

/// Fills the temporary folder `own` with the whole kernels of `common`, and nothing else.
pub(crate) fn take(common: &Path, own: &Path) -> io::Result<()> {
    match fs::remove_dir_all(own.join("mlx")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => link(common, own, SETTLED),
    }
}

/// Puts what was compiled in the temporary folder `own`, all of which is whole, into `common`.
pub(crate) fn give(own: &Path, common: &Path) -> io::Result<()> {
    link(own, common, Duration::ZERO)
}

fn link(from: &Path, to: &Path, age_min: Duration) -> io::Result<()> {
    for version in entries(&from.join("mlx"))? {
        let folder = Path::new("mlx").join(version.file_name()).join("cpu");
        fs::create_dir_all(to.join(&folder))?;
        for kernel in entries(&from.join(&folder))? {
            let is_library = kernel.path().extension().is_some_and(|extension| extension == "so");
            if !is_library || !is_older(&kernel, age_min) {
                continue;
            }
            put(&kernel.path(), &to.join(&folder).join(kernel.file_name()))?;
        }
    }
    Ok(())
}

/// As a whole file, or not at all; one that is there already stays. Other file systems take no links.
fn put(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(_) => {
            let temporary = to.with_extension(format!("{}.tmp", std::process::id()));
            fs::copy(from, &temporary)?;
            fs::rename(&temporary, to)
        }
    }
}

fn entries(folder: &Path) -> io::Result<Vec<DirEntry>> {
    match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.collect(),
    }
}

fn is_older(kernel: &DirEntry, age: Duration) -> bool {
    let modified = kernel.metadata().and_then(|metadata| metadata.modified());
    let elapsed = modified.ok().and_then(|modified| SystemTime::now().duration_since(modified).ok());
    elapsed.is_some_and(|elapsed| elapsed >= age)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn names(folder: &Path) -> Vec<String> {
        let folder = folder.join("mlx/1/cpu");
        let mut names: Vec<_> =
            entries(&folder).expect("a folder").iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn only_whole_kernels_are_taken_and_all_are_given_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let (common, own) = (folder.path().join("common"), folder.path().join("own"));
        take(&common, &own).expect("nothing is there yet");
        for place in [&common, &own] {
            fs::create_dir_all(place.join("mlx/1/cpu")).expect("made");
        }
        let write = |path: &Path, age: u64| {
            let file = File::create(path).expect("made");
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).expect("set");
        };
        write(&common.join("mlx/1/cpu/libwhole.so"), 60);
        write(&common.join("mlx/1/cpu/libfresh.so"), 0);
        write(&common.join("mlx/1/cpu/whole.cpp"), 60);
        write(&own.join("mlx/1/cpu/libbroken.so"), 60);
        take(&common, &own).expect("taken");
        assert_eq!(names(&own), ["libwhole.so"]);
        write(&own.join("mlx/1/cpu/libmade.so"), 0);
        give(&own, &common).expect("given");
        assert_eq!(names(&common), ["libfresh.so", "libmade.so", "libwhole.so", "whole.cpp"]);
    }
}
