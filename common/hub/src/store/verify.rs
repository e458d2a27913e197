//! Compares what is stored with what was noted when it came.

use super::{Held, ModelStore};
use crate::{description::Description, error::HubError};
use sha2::{Digest as _, Sha256};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

const BUFFER_BYTES: u64 = 1 << 20;

impl ModelStore {
    /// The stored tensors whose data is not what it was. Blocks on the disk, for as long as reading everything takes.
    pub fn verify(&self, description: &Description) -> Result<Vec<String>, HubError> {
        let mut damaged = Vec::new();
        for (name, held) in self.contents(description, None)?.tensors {
            let mut hash = Sha256::new();
            let read = read(&held, |data| hash.update(data));
            read.map_err(|source| HubError::Disk { action: "read", path: held.path.clone(), source })?;
            if held.digest.is_some_and(|digest| digest != <super::Digest>::from(hash.finalize())) {
                damaged.push(name);
            }
        }
        Ok(damaged)
    }
}

/// Reads a tensor piece by piece.
pub(super) fn read(held: &Held, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut data = File::open(&held.path)?;
    data.seek(SeekFrom::Start(held.offset))?;
    let (mut buffer, mut left) = (Vec::new(), held.bytes);
    while left > 0 {
        buffer.resize(left.min(BUFFER_BYTES) as usize, 0);
        data.read_exact(&mut buffer)?;
        take(&buffer);
        left -= buffer.len() as u64;
    }
    Ok(())
}
