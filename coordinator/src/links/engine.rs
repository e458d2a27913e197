//! Tells one engine who comes after it.

use crate::core::{event::Event, instance::link_timeout};
use mlx_cluster_common::{
    engine::Link,
    ids::{Epoch, InstanceId},
};
use mlx_cluster_proto::{
    net,
    wire::{LinkRequest, engine_client::EngineClient},
};

/// A call to an engine.
#[derive(Debug)]
pub(crate) struct LinkCall {
    pub(crate) instance: InstanceId,
    pub(crate) epoch: Epoch,
    pub(crate) engine: u32,
    pub(crate) name: String,
    pub(crate) addresses: Vec<String>,
    pub(crate) link: Link,
}

impl LinkCall {
    pub(super) async fn run(self) -> Event {
        let (instance, epoch, engine, name) = (self.instance, self.epoch, self.engine, self.name.clone());
        let limit = link_timeout(&self.link);
        let result = match tokio::time::timeout(limit, self.call()).await {
            Ok(result) => result,
            Err(_) => Err(format!("the engine on {name} did not answer within {} s", limit.as_secs())),
        };
        Event::Linked { instance, epoch, engine, result }
    }

    async fn call(self) -> Result<(), String> {
        let name = format!("the engine on {}", self.name);
        let channel = net::connect(&name, &self.addresses).await.map_err(|error| error.to_string())?;
        let answer = EngineClient::new(channel).link(LinkRequest::from(self.link)).await;
        answer.map(drop).map_err(|status| status.message().to_owned())
    }
}
