//! `mlx-cluster models`: what can be run, and what of it is on this machine.

mod held;
mod pull;
mod supported;

/// What can be run, and what of it is on this machine.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  mlx-cluster models supported
  mlx-cluster models pull mlx-community/Qwen3-30B-A3B-4bit --layers 0-23
  mlx-cluster models list

Environment: HF_HOME, HF_HUB_CACHE (the cache that all tools share), HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE; MLX_CLUSTER_HOME (the weight store).")]
pub(crate) struct ModelsArgs {
    #[command(subcommand)]
    verb: ModelsVerb,
}

#[derive(clap::Subcommand)]
enum ModelsVerb {
    Supported(supported::SupportedArgs),
    List(held::ListArgs),
    Pull(pull::PullArgs),
    Remove(held::RemoveArgs),
    Verify(held::VerifyArgs),
}

pub(crate) async fn run(args: ModelsArgs) -> anyhow::Result<()> {
    match args.verb {
        ModelsVerb::Supported(args) => {
            supported::run(&args);
            Ok(())
        }
        ModelsVerb::List(args) => held::list(&args),
        ModelsVerb::Pull(args) => pull::run(args).await,
        ModelsVerb::Remove(args) => held::remove(&args).await,
        ModelsVerb::Verify(args) => held::verify(&args),
    }
}
