//! The folder for this machine's own state: node id, measurements, chat history.

use crate::failure::{Exit, Failure};
use std::path::PathBuf;

pub(crate) const HOME_VARIABLE: &str = "MLX_CLUSTER_HOME";

/// `$MLX_CLUSTER_HOME`, else `$XDG_DATA_HOME/mlx-cluster`, else `~/.local/share/mlx-cluster`.
pub(crate) fn home() -> Result<PathBuf, Failure> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    folder(HOME_VARIABLE)
        .or_else(|| folder("XDG_DATA_HOME").map(|base| base.join("mlx-cluster")))
        .or_else(|| folder("HOME").map(|base| base.join(".local/share/mlx-cluster")))
        .ok_or_else(|| Failure::new(Exit::BadFile, format!("neither {HOME_VARIABLE} nor HOME is set: set {HOME_VARIABLE} to a folder")))
}
