//! Conversions of what workers measure of the ways between them.

use crate::{WireError, wire};
use mlx_cluster_common::{
    ids::NodeId,
    links::{LinkFacts, Medium},
};

/// Longest name of an interface or address that is taken; systems allow 16 and 64.
const NAME_BYTES_MAX: usize = 128;

impl From<LinkFacts> for wire::LinkFacts {
    fn from(link: LinkFacts) -> Self {
        Self {
            to: link.to.0,
            interface: link.interface,
            medium: wire::Medium::from(link.medium).into(),
            address: link.address,
            round_trip_seconds: link.round_trip_seconds,
            bytes_per_second: link.bytes_per_second,
        }
    }
}

impl wire::LinkFacts {
    /// As measured by node `from`, who says it. Refuses what no measurement can give.
    pub fn into_facts(self, from: NodeId) -> Result<LinkFacts, WireError> {
        let medium = self.medium().into();
        if !(self.round_trip_seconds.is_finite() && self.round_trip_seconds >= 0.0) {
            return Err(WireError::Invalid { field: "round_trip_seconds", value: self.round_trip_seconds.to_string() });
        }
        if !(self.bytes_per_second.is_finite() && self.bytes_per_second > 0.0) {
            return Err(WireError::Invalid { field: "bytes_per_second", value: self.bytes_per_second.to_string() });
        }
        for (field, text) in [("interface", &self.interface), ("address", &self.address)] {
            if text.len() > NAME_BYTES_MAX || text.chars().any(char::is_control) {
                return Err(WireError::Invalid {
                    field,
                    value: text.chars().take(NAME_BYTES_MAX).flat_map(char::escape_default).collect(),
                });
            }
        }
        if self.address.is_empty() {
            return Err(WireError::Missing("address"));
        }
        Ok(LinkFacts {
            from,
            to: NodeId(self.to),
            interface: self.interface,
            medium,
            address: self.address,
            round_trip_seconds: self.round_trip_seconds,
            bytes_per_second: self.bytes_per_second,
        })
    }
}

impl From<Medium> for wire::Medium {
    fn from(medium: Medium) -> Self {
        match medium {
            Medium::Thunderbolt => wire::Medium::Thunderbolt,
            Medium::Ethernet => wire::Medium::Ethernet,
            Medium::WiFi => wire::Medium::WiFi,
            Medium::Loopback => wire::Medium::Loopback,
            Medium::Unknown => wire::Medium::Unknown,
        }
    }
}

impl From<wire::Medium> for Medium {
    fn from(medium: wire::Medium) -> Self {
        match medium {
            wire::Medium::Thunderbolt => Medium::Thunderbolt,
            wire::Medium::Ethernet => Medium::Ethernet,
            wire::Medium::WiFi => Medium::WiFi,
            wire::Medium::Loopback => Medium::Loopback,
            wire::Medium::Unknown => Medium::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(medium: Medium) -> LinkFacts {
        LinkFacts {
            from: "a".into(),
            to: "b".into(),
            interface: "en0".into(),
            medium,
            address: "10.0.0.2".into(),
            round_trip_seconds: 1e-4,
            bytes_per_second: 1e9,
        }
    }

    #[test]
    fn a_link_survives_the_wire() {
        for medium in [Medium::Thunderbolt, Medium::Ethernet, Medium::WiFi, Medium::Loopback, Medium::Unknown] {
            assert_eq!(wire::LinkFacts::from(link(medium)).into_facts("a".into()), Ok(link(medium)));
        }
        let newer = wire::LinkFacts { medium: 99, ..link(Medium::WiFi).into() };
        assert_eq!(newer.into_facts("a".into()).map(|link| link.medium), Ok(Medium::Unknown));
    }

    #[test]
    fn what_no_measurement_gives_is_refused() {
        let good = wire::LinkFacts::from(link(Medium::Ethernet));
        let refused = |wrong: wire::LinkFacts| assert!(wrong.clone().into_facts("a".into()).is_err(), "{wrong:?}");
        for number in [f64::NAN, f64::INFINITY, -1.0] {
            refused(wire::LinkFacts { round_trip_seconds: number, ..good.clone() });
            refused(wire::LinkFacts { bytes_per_second: number, ..good.clone() });
        }
        refused(wire::LinkFacts { bytes_per_second: 0.0, ..good.clone() });
        refused(wire::LinkFacts { address: String::new(), ..good.clone() });
        refused(wire::LinkFacts { interface: "en\u{1b}[0".into(), ..good.clone() });
        refused(wire::LinkFacts { interface: "x".repeat(1000), ..good });
    }
}
