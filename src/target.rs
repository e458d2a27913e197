//! Which cluster `generate` and `chat` talk to: the one at `--url`, or a cluster of one that they start for themselves.

use crate::{
    caches::CacheArgs,
    client::Client,
    failure::{Exit, Failure},
    local_cluster::LocalCluster,
    progress::{self, Detail},
};
use serde_json::Value;
use std::path::Path;
use tokio_util::sync::CancellationToken;

/// Where the API listens unless told otherwise; also where tools look for it.
pub(crate) const DEFAULT_HTTP: &str = "127.0.0.1:8080";
pub(crate) const DEFAULT_URL: &str = "http://127.0.0.1:8080";

/// The flags by which a tool finds its cluster.
#[derive(clap::Args)]
pub(crate) struct TargetArgs {
    /// A folder or a repository on the Hugging Face hub: with no coordinator running, this machine alone serves it for as long as needed. Of a
    /// coordinator that runs, the model that it serves, or that and an adapter of it as MODEL:ADAPTER
    #[arg(long, value_name = "PATH|REPO")]
    model: Option<String>,
    /// The coordinator to talk to
    #[arg(long, env = "MLX_CLUSTER_URL", default_value = DEFAULT_URL)]
    url: String,
    /// Longest sequence, prompt and answer together, when a cluster of one is started
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    #[command(flatten)]
    caches: CacheArgs,
}

/// A cluster that is ready to answer.
pub(crate) struct Target {
    pub(crate) client: Client,
    /// The served model's id.
    pub(crate) model: String,
    local: Option<LocalCluster>,
}

impl Target {
    /// Finds or starts a cluster, and waits until its model can answer.
    pub(crate) async fn reach(args: &TargetArgs, stop: &CancellationToken) -> anyhow::Result<Self> {
        let client = Client::new(&args.url)?;
        let found = client.cluster().await;
        let caches = args.caches.options()?;
        if let (Ok(_), Some(flag)) = (&found, args.caches.given()) {
            let message = format!(
                "the coordinator at {} has decided already how keys and values are kept: leave {flag} out, or start it so",
                args.url
            );
            return Err(Failure::new(Exit::Usage, message).into());
        }
        let mut target = match (found, &args.model) {
            (Ok(_), _) => Self { client, model: String::new(), local: None },
            (Err(_), Some(model)) if adapter_of(model).is_some() => {
                let message = format!("no coordinator runs that could serve {model}: start one, or give a model without an adapter");
                return Err(Failure::new(Exit::Usage, message).into());
            }
            (Err(_), Some(model)) => {
                let local = LocalCluster::start(Some(model), args.context, caches).await?;
                Self { client: Client::new(local.url())?, model: String::new(), local: Some(local) }
            }
            (Err(cause), None) => {
                let hint =
                    "start one with `mlx-cluster coordinator --model …`, say where it is with --url, or give a --model to serve it here";
                return Err(Failure::new(Exit::Network, format!("{cause}: {hint}")).into());
            }
        };
        match target.become_ready(args, stop).await {
            Ok(model) => {
                target.model = model;
                Ok(target)
            }
            Err(error) => {
                let failed = target.close().await;
                Err(failed.err().unwrap_or(error))
            }
        }
    }

    async fn become_ready(&mut self, args: &TargetArgs, stop: &CancellationToken) -> anyhow::Result<String> {
        // Of a cluster of one, only what takes time is worth a line.
        let detail = if self.local.is_some() { Detail::Transfers } else { Detail::All };
        let ready = progress::until_ready(&self.client, detail);
        let status = match &mut self.local {
            None => tokio::select! {
                status = ready => status?,
                () = stop.cancelled() => return Err(interrupted()),
            },
            Some(local) => tokio::select! {
                status = ready => status?,
                ended = local.ended() => return Err(ended),
                () = stop.cancelled() => return Err(interrupted()),
            },
        };
        let served = status.pointer("/model/id").and_then(Value::as_str).unwrap_or_default().to_owned();
        match &args.model {
            Some(wanted)
                if let Some((base, adapter)) = adapter_of(wanted)
                    && is_same_model(base, &served) =>
            {
                Ok(format!("{served}:{adapter}"))
            }
            Some(wanted) if self.local.is_none() && !is_same_model(wanted, &served) => {
                let message = format!("the coordinator at {} serves {served}, not {wanted}: leave --model out, or stop it first", args.url);
                Err(Failure::new(Exit::Usage, message).into())
            }
            _ => Ok(served),
        }
    }

    /// Stops what was started.
    pub(crate) async fn close(self) -> anyhow::Result<()> {
        match self.local {
            Some(local) => local.stop().await,
            None => Ok(()),
        }
    }
}

pub(crate) fn interrupted() -> anyhow::Error {
    Failure::new(Exit::Interrupted, "stopped").into()
}

/// Base and adapter of `MODEL:ADAPTER`; a folder may have such a name itself.
fn adapter_of(model: &str) -> Option<(&str, &str)> {
    let (base, adapter) = model.rsplit_once(':')?;
    (!base.is_empty() && !adapter.is_empty() && !adapter.contains('/') && !Path::new(model).is_dir()).then_some((base, adapter))
}

/// A folder is served under its own name.
fn is_same_model(wanted: &str, served: &str) -> bool {
    wanted == served || Path::new(wanted).file_name().is_some_and(|name| name == served)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapter_stands_behind_a_colon() {
        assert_eq!(adapter_of("org/base:mine"), Some(("org/base", "mine")));
        assert_eq!(adapter_of("./base:mine"), Some(("./base", "mine")));
        for model in ["org/base", ":mine", "base:", "http://host/base", "org/base@main"] {
            assert_eq!(adapter_of(model), None, "{model}");
        }
    }
}
