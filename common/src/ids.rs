//! Names and numbers that identify things in a cluster, one type each so that they cannot be mixed up.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    };
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

text_id! {
    /// A Mac (or other machine) as long as its data folder lives; random, never derived from the host's name.
    NodeId
}
text_id! {
    /// The cluster that a node belongs to. Nodes of other names do not see each other.
    ClusterName
}
text_id! {
    /// One engine process that a coordinator wants: stays the same when the process is restarted.
    EngineId
}
number_id! {
    /// One sequence of tokens inside an instance, numbered by the coordinator.
    SequenceId
}
number_id! {
    /// One model that the cluster runs: the served one, or the one of a training job.
    InstanceId
}

impl InstanceId {
    /// The model that answers requests; training jobs have other numbers.
    pub const SERVED: Self = Self(0);
}

number_id! {
    /// One adapter of a served model, numbered by the coordinator; a number is never used again.
    AdapterId
}
number_id! {
    /// One linking-up of an instance's engines. Raised whenever an engine is replaced; what carries an older one is refused.
    Epoch
}
