//! The engine process: one shard of one model, fed with steps by its neighbours.

pub mod boot;
