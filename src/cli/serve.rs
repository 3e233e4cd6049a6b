//! `trueup serve`

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::Session;
use crate::schedule::{Settings, serve};

#[derive(Debug, Args)]
pub struct ServeArguments {
    /// The job files; each needs a schedule.
    #[arg(required = true)]
    jobs: Vec<PathBuf>,

    /// Where `/health` and `/metrics` are answered.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9464")]
    listen: SocketAddr,
}

pub fn execute(session: &Session, arguments: &ServeArguments) -> Result<u8> {
    serve(Settings {
        jobs: arguments.jobs.clone(),
        environment: session.environment.clone(),
        listen: arguments.listen,
        threads: session.threads,
    })
}
