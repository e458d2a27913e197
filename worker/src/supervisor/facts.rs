//! What this node is: system, chip, memory, and the numbers that were measured.

use super::{local::Local, measure::Measurement};
use mlx_cluster_common::{VERSION, engine::NodeFacts, units::Bytes};
use std::net::IpAddr;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

/// What the operating system says, without measuring anything.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) os: String,
    pub(crate) chip: String,
    pub(crate) total_memory: Bytes,
    /// Free for programs now.
    available_memory: Bytes,
}

/// The machine, and what models may use of it.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) machine: Machine,
    pub(crate) usable_memory: Bytes,
    pub(crate) measurement: Measurement,
}

impl Machine {
    pub(crate) fn look() -> Self {
        let wanted = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing()).with_memory(MemoryRefreshKind::nothing().with_ram());
        let (mut chip, mut total, mut available) = (String::new(), 0, 0);
        if let Ok(system) = System::new_with_specifics(wanted) {
            chip = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).unwrap_or_default();
            (total, available) = (system.total_memory(), system.available_memory());
            // A container has less than the machine.
            if let Some(limits) = system.cgroup_limits() {
                total = total.min(limits.total_memory);
                available = available.min(limits.free_memory);
            }
        }
        if chip.is_empty() {
            chip = System::cpu_arch();
        }
        let os = System::long_os_version().unwrap_or_else(|_| std::env::consts::OS.to_owned());
        Self { os, chip, total_memory: Bytes(total), available_memory: Bytes(available) }
    }

    /// What models may use. `limit` is `--memory-limit`. On a Mac: what Metal recommends for the GPU, or 75 % of memory where that is
    /// unknown. Elsewhere 80 % of what is free now.
    fn usable_memory(&self, limit: Option<Bytes>, gpu_memory_bytes: Option<u64>) -> Bytes {
        let percent = |bytes: Bytes, percent: u64| Bytes(bytes.0 / 100 * percent);
        match (limit, gpu_memory_bytes) {
            (Some(limit), _) => limit,
            (None, Some(gpu)) => Bytes(gpu),
            (None, None) if cfg!(target_os = "macos") => percent(self.total_memory, 75),
            (None, None) => percent(self.available_memory, 80),
        }
    }
}

impl Facts {
    pub(crate) fn new(machine: Machine, limit: Option<Bytes>, measurement: Measurement) -> Self {
        let usable_memory = machine.usable_memory(limit, measurement.gpu_memory_bytes);
        Self { machine, usable_memory, measurement }
    }

    /// What a coordinator is told. `proven` is the address under which it reached this node.
    pub(crate) fn of_node(&self, local: &Local, proven: Option<IpAddr>) -> NodeFacts {
        NodeFacts {
            id: local.id.clone(),
            name: local.name.clone(),
            version: VERSION.to_owned(),
            os: self.machine.os.clone(),
            chip: self.machine.chip.clone(),
            usable_memory: self.usable_memory,
            total_memory: self.machine.total_memory,
            memory_bandwidth: self.measurement.memory_bandwidth,
            matmul_rate: self.measurement.matmul_rate,
            addresses: local.addresses(proven),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usable_memory_is_the_limit_or_what_the_gpu_or_the_system_has() {
        let gb = |gb: u64| Bytes(gb * 1_000_000_000);
        let machine = Machine { os: "os".into(), chip: "chip".into(), total_memory: gb(32), available_memory: gb(20) };
        assert_eq!(machine.usable_memory(Some(gb(40)), Some(1)), gb(40), "the user's word counts");
        assert_eq!(machine.usable_memory(None, Some(gb(24).0)), gb(24));
        let wanted = if cfg!(target_os = "macos") { gb(24) } else { gb(16) };
        assert_eq!(machine.usable_memory(None, None), wanted);
    }

    #[test]
    fn this_machine_has_memory_and_a_chip() {
        let machine = Machine::look();
        assert!(machine.total_memory > Bytes(1 << 20) && machine.available_memory > Bytes(0), "{machine:?}");
        assert!(!machine.chip.is_empty() && !machine.os.is_empty());
    }
}
