//! `trueup init`

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::Session;
use super::output::{Style, emit};
use crate::fault::configuration;

#[derive(Debug, Args)]
pub struct InitArguments {
    /// The folder to write to; it is created if needed.
    #[arg(default_value = ".")]
    folder: PathBuf,
}

/// The files of a small job, with the paths they get.
const FILES: [(&str, &str); 6] = [
    ("job.yaml", include_str!("../../fixtures/init/job.yaml")),
    ("customers.csv", include_str!("../../fixtures/init/customers.csv")),
    ("subscriptions.csv", include_str!("../../fixtures/init/subscriptions.csv")),
    ("meters.yaml", include_str!("../../fixtures/init/meters.yaml")),
    ("prices.yaml", include_str!("../../fixtures/init/prices.yaml")),
    ("events/2026-01-01.ndjson", include_str!("../../fixtures/init/events/2026-01-01.ndjson")),
];

pub fn execute(_: &Session, arguments: &InitArguments) -> Result<u8> {
    let folder = &arguments.folder;
    if let Some((name, _)) = FILES.iter().find(|(name, _)| folder.join(name).exists()) {
        return Err(configuration(format!(
            "{} exists already: nothing was written; name another folder",
            folder.join(name).display()
        )));
    }
    let style = Style::for_stdout();
    let mut out = String::new();
    for (name, content) in FILES {
        let path = folder.join(name);
        let context = || format!("cannot write {}", path.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(context)?;
        }
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path).with_context(context)?;
        file.write_all(content.as_bytes()).with_context(context)?;
        writeln!(out, "wrote {}", path.display())?;
    }
    let job = folder.join("job.yaml");
    writeln!(out, "\n  trueup run {}  {}", job.display(), style.dim("# compute usage and cost of its eight events"))?;
    emit(&out)?;
    Ok(0)
}
