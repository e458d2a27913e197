//! The decisions of the coordinator as pure code: no clock, no tasks, no network; `now` is an argument.

pub mod adapters;
mod addresses;
pub mod cluster;
mod deployment;
pub mod event;
pub mod instance;
mod life_cycle;
mod members;
pub mod placement;
mod planning;
mod requests;
pub mod settings;
mod status;
mod wiring;

#[cfg(test)]
mod adapters_tests;
#[cfg(test)]
mod cluster_tests;
#[cfg(test)]
mod instances_tests;
#[cfg(test)]
mod simulation;
#[cfg(test)]
pub(crate) mod world;

use std::time::Duration;

/// Time since the coordinator started. The core never asks a clock.
pub type Now = Duration;
