//! Counted randomness: a draw depends on the seed and on what it is for alone, never on what was drawn before, so it is the same in every
//! layout and after every restart.

use crate::error::LmError;
use mlx_rs::{Array, random};

/// New factors: uniform in `low..high`, `shape`, f32.
pub fn uniform(seed: u64, name: &str, shape: &[i32], low: f32, high: f32) -> Result<Array, LmError> {
    Ok(random::uniform::<_, f32>(low, high, shape, &key(seed, name, (0, 0))?)?)
}

/// True where an input is kept, which it is with `1 - probability`; `place` is the number of a batch and of a row in it.
pub fn kept(seed: u64, name: &str, place: (u64, u32), shape: &[i32], probability: f32) -> Result<Array, LmError> {
    Ok(random::bernoulli(&Array::from_f32(1.0 - probability), shape, &key(seed, name, place)?)?)
}

fn key(seed: u64, name: &str, (batch, row): (u64, u32)) -> Result<Array, LmError> {
    let parts = [seed, hash(name), batch, u64::from(row)];
    Ok(random::key(parts.into_iter().fold(0, |state, part| mixed(state ^ part)))?)
}

/// FNV-1a.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |state, byte| (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// SplitMix64's step (Steele, Lea and Flood 2014).
fn mixed(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
