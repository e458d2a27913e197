//! Adapters on their way from the disk to the engines.

use super::Driver;
use crate::{
    adapters::{AdapterAnswer, OpenAdapter, ServeAdapterError},
    core::{
        adapters::AdapterFailure,
        event::{EngineAt, Event},
    },
    links::adapter::LoadCall,
};
use mlx_cluster_common::ids::{AdapterId, Epoch, InstanceId};
use std::{ops::Range, path::PathBuf, sync::Arc};

impl Driver {
    /// Those that the coordinator was started with.
    pub(super) fn add_given_adapters(&mut self) {
        for adapter in std::mem::take(&mut self.parts.adapters) {
            let facts = Arc::clone(&adapter.facts);
            let adapter = self.adapters.add(Arc::new(adapter), None);
            // Nothing is planned yet, so nothing follows from it.
            self.handle(Event::LoadAdapter { adapter, facts, is_given: true });
        }
    }

    pub(super) fn load_adapter(&mut self, name: String, path: PathBuf, answer: AdapterAnswer) {
        let model = self.parts.model.as_ref().filter(|_| self.cluster.has(InstanceId::SERVED)).map(|model| Arc::clone(&model.facts));
        let there = self.cluster.adapters();
        let there: Vec<&str> = there.iter().map(|adapter| adapter.facts.name.as_str()).collect();
        let model = model.ok_or(ServeAdapterError::NothingServed);
        let reserved = model.and_then(|model| self.adapters.reserve(&name, &model, &there).map(|()| model));
        match reserved {
            Ok(model) => self.links.read_adapter(name, path, model, answer),
            Err(error) => self.adapters.owe(answer, Err(error)),
        }
    }

    pub(super) fn adapter_read(
        &mut self,
        name: &str,
        read: Result<OpenAdapter, ServeAdapterError>,
        answer: AdapterAnswer,
    ) -> Option<Event> {
        self.adapters.read(name);
        match read {
            Ok(adapter) => {
                let facts = Arc::clone(&adapter.facts);
                let adapter = self.adapters.add(Arc::new(adapter), Some(answer));
                Some(Event::LoadAdapter { adapter, facts, is_given: false })
            }
            Err(error) => {
                self.adapters.owe(answer, Err(error));
                None
            }
        }
    }

    pub(super) fn drop_adapter(&mut self, name: &str, answer: AdapterAnswer) -> Option<Event> {
        let there = self.cluster.adapters();
        let found = there.iter().find(|adapter| adapter.facts.name == name);
        let names: Vec<_> = there.iter().map(|adapter| format!("`{}`", adapter.facts.name)).collect();
        let listed = if names.is_empty() { "none is loaded".into() } else { format!("there are {}", names.join(", ")) };
        let missing = ServeAdapterError::NotThere { name: name.chars().take(80).collect(), there: listed };
        self.adapters.owe(answer, found.map(|adapter| Arc::clone(&adapter.facts)).ok_or(missing));
        found.map(|adapter| Event::DropAdapter { adapter: adapter.id })
    }

    /// An event, where the adapter is not there any more.
    pub(super) fn send_adapter(&mut self, epoch: Epoch, engine: EngineAt, layers: Range<u32>, id: AdapterId) -> Option<Event> {
        let (number, adapter) = (engine.number, self.adapters.get(id).cloned());
        match (adapter, &self.parts.model) {
            (Some(adapter), Some(model)) => {
                let model = Arc::clone(&model.facts);
                self.links.load_adapter(LoadCall { epoch, engine, layers, id, adapter, model });
                None
            }
            _ => {
                let result = Err(AdapterFailure::Unusable("it is not open any more; please report this".into()));
                Some(Event::AdapterLoaded { epoch, engine: number, adapter: id, result })
            }
        }
    }
}
