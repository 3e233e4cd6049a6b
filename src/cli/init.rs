//! `trueup init`

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::output::{Style, emit, emit_json};
use super::range::shell_path;
use super::{Format, Session};
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

#[derive(Debug, Serialize)]
struct Document<'d> {
    schema: &'static str,
    job: String,
    files: &'d [String],
}

pub fn execute(session: &Session, arguments: &InitArguments) -> Result<u8> {
    let folder = &arguments.folder;
    let is_there = |path: &Path| path.symlink_metadata().is_ok();
    if let Some((name, _)) = FILES.iter().find(|(name, _)| is_there(&folder.join(name))) {
        return Err(configuration(format!(
            "{} exists already: nothing was written; name another folder",
            folder.join(name).display()
        )));
    }
    let taken = [folder.clone(), folder.join("events")].into_iter().find(|path| is_there(path) && !path.is_dir());
    if let Some(path) = taken {
        return Err(configuration(format!("{} is no folder: nothing was written; name another one", path.display())));
    }
    let mut written: Vec<PathBuf> = Vec::new();
    for (name, content) in FILES {
        let path = folder.join(name);
        if let Err(error) = write(&path, content) {
            // Half a job would only be in the way; what somebody else made meanwhile is theirs.
            let is_ours = error.kind() != std::io::ErrorKind::AlreadyExists;
            for path in written.iter().chain(is_ours.then_some(&path)) {
                let _ = fs::remove_file(path);
            }
            return Err(error).with_context(|| format!("cannot write {}: nothing was written", path.display()));
        }
        written.push(path);
    }
    let job = folder.join("job.yaml");
    let files: Vec<_> = written.iter().map(|path| path.display().to_string()).collect();
    if session.format == Format::Json {
        emit_json(&Document { schema: "trueup.init/1", job: job.display().to_string(), files: &files })?;
        return Ok(0);
    }
    let mut out = String::new();
    for file in &files {
        writeln!(out, "wrote {file}")?;
    }
    let remark = Style::for_stdout().dim("# compute usage and cost of its eight events");
    writeln!(out, "\n  trueup run {}  {remark}", shell_path(&job))?;
    emit(&out)?;
    Ok(0)
}

fn write(path: &Path, content: &str) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    OpenOptions::new().write(true).create_new(true).open(path)?.write_all(content.as_bytes())
}
