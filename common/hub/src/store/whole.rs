//! Published files of which every tensor is here are compared with the SHA-256 that the hub gives for the whole.

use super::{Contents, DIGESTS, Digest, ModelStore, batch::hexadecimal, verify::read};
use crate::{
    description::{Description, WeightFile, write_whole},
    error::HubError,
};
use sha2::{Digest as _, Sha256};
use std::{collections::BTreeSet, fs, io, path::PathBuf};

impl ModelStore {
    /// Checks what became whole since the last time. A file that is not what the hub says is thrown away. Needs the lock. Blocks on the
    /// disk, for as long as reading those files takes.
    ///
    /// # Errors
    /// [`HubError::WrongHash`] names the first such file.
    pub fn check_whole_files(&self, description: &Description, contents: &Contents) -> Result<(), HubError> {
        let done = self.folder().join("whole");
        for (name, file) in &description.files {
            let mark = done.join(name);
            let is_ours =
                !contents.whole_files.contains(name) && file.header.tensors.keys().all(|tensor| contents.tensors.contains_key(tensor));
            let Some(expected) = file.sha256().filter(|_| is_ours && !mark.exists()) else { continue };
            let disk = |source| HubError::Disk { action: "check", path: self.folder().to_path_buf(), source };
            let got = whole_digest(file, contents).map_err(disk)?;
            if !expected.eq_ignore_ascii_case(&hexadecimal(&got)) {
                let paths: BTreeSet<&PathBuf> = file.header.tensors.keys().map(|tensor| &contents.tensors[tensor].path).collect();
                for path in paths {
                    fs::remove_file(path).map_err(disk)?;
                    // It may never have been written.
                    drop(fs::remove_file(path.with_extension(DIGESTS)));
                }
                return Err(HubError::WrongHash { file: name.clone(), got: hexadecimal(&got), expected: expected.to_owned() });
            }
            fs::create_dir_all(&done).and_then(|()| write_whole(&mark, b"")).map_err(disk)?;
        }
        Ok(())
    }
}

/// The SHA-256 of a published file, put together from its head and its tensors.
fn whole_digest(file: &WeightFile, contents: &Contents) -> io::Result<Digest> {
    let mut hash = Sha256::new();
    hash.update(&file.head);
    let mut slots: Vec<_> = file.header.tensors.iter().collect();
    slots.sort_by_key(|(_, slot)| slot.offset);
    for (name, _) in slots {
        read(&contents.tensors[name], |data| hash.update(data))?;
    }
    Ok(hash.finalize().into())
}
