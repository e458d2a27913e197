//! Byte counts: printed for people, parsed from flags.

use serde::{Deserialize, Serialize};
use std::{fmt, iter::Sum, ops::Add, str::FromStr};

/// A number of bytes. Prints in powers of 1000 (`1.2 GB`), as disks and Apple count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Why a size on the command line was not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{0}` is not a size: write a number and a unit, such as 24GB, 1.5GiB or 800MB")]
pub struct SizeError(String);

impl Bytes {
    pub fn saturating_sub(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_sub(other.0))
    }
}

impl Add for Bytes {
    type Output = Bytes;
    fn add(self, other: Bytes) -> Bytes {
        Bytes(self.0.saturating_add(other.0))
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(items: I) -> Bytes {
        items.fold(Bytes(0), Add::add)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        let text = match self.0 {
            0..1_000 => format!("{} B", self.0),
            1_000..1_000_000 => format!("{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => format!("{:.1} MB", bytes / 1e6),
            1_000_000_000..1_000_000_000_000 => format!("{:.1} GB", bytes / 1e9),
            _ => format!("{:.2} TB", bytes / 1e12),
        };
        f.pad(&text)
    }
}

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError(text.chars().take(40).collect());
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
        let number: f64 = trimmed[..split].parse().map_err(|_| error())?;
        let unit = match trimmed[split..].trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "t" | "tb" => 1e12,
            "kib" => 1024.0,
            "mib" => 1024f64.powi(2),
            "gib" => 1024f64.powi(3),
            "tib" => 1024f64.powi(4),
            _ => return Err(error()),
        };
        let bytes = number * unit;
        if !(bytes.is_finite() && (0.0..1e18).contains(&bytes)) {
            return Err(error());
        }
        Ok(Bytes(bytes as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_printed_and_parsed() {
        for (text, bytes, shown) in [
            ("24GB", 24_000_000_000, "24.0 GB"),
            ("1.5 GiB", 1_610_612_736, "1.6 GB"),
            ("800mb", 800_000_000, "800.0 MB"),
            ("12", 12, "12 B"),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)));
            assert_eq!(Bytes(bytes).to_string(), shown);
        }
        for text in ["", "GB", "1.2.3GB", "-4GB", "4 parsecs", "1e400"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }
}
