//! Saved plans: the exact changes, with the fingerprints of everything they rest on.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::Request;
use super::draft::Draft;
use super::incremental::keep::Prepared;
use crate::fault::{FaultKind, configuration, fault};
use crate::model::aggregate::{CorrectionKind, StoredWindow, Values};
use crate::model::digest::{SetDigest, frame};
use crate::model::run::{InputFile, RunBasis, period_json, window_digest};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::store::AggregateStore;
use crate::whole_file;

const SCHEMA: &str = "trueup.saved_plan/1";

/// A plan in a file.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedPlan {
    pub schema: String,
    pub trueup_version: String,
    pub created_at: Timestamp,
    /// The job file.
    pub job_path: PathBuf,
    pub environment: Option<String>,
    pub request: Request,
    /// The ledger digest of the last run when the plan was made; empty without one.
    pub ledger_digest: String,
    /// Of the stored rows that the plan was made from, as [`store_digest`].
    pub store_digest: String,
    /// Why the guard refuses the plan, if it does.
    pub guard: Option<String>,
    pub draft: Draft,
    /// What later runs need not read again.
    #[serde(default)]
    pub kept: Prepared,
}

impl SavedPlan {
    pub fn schema() -> String {
        SCHEMA.to_owned()
    }

    /// Writes the plan, as a whole or not at all.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let give = |out: &mut dyn Write| {
            let mut out = Digested { out, hash: Xxh3::new() };
            serde_json::to_writer(&mut out, self)?;
            out.write_all(b"\n")?;
            let seal = seal(&out.hash);
            out.write_all(seal.as_bytes())
        };
        whole_file::write(path, give).with_context(|| format!("cannot write the plan {}", path.display()))
    }

    /// # Errors
    /// Where the file is no plan, or one of another version.
    pub fn read(path: &Path) -> Result<SavedPlan> {
        let file =
            File::open(path).map_err(|error| configuration(format!("cannot read the plan {}: {error}", path.display())))?;
        let unreadable = || format!("cannot read the plan {}", path.display());
        let mut file = rewindable(file).with_context(unreadable)?;
        let (length, is_sealed) = sealed(&mut *file).with_context(unreadable)?;
        let mut plan: SavedPlan = serde_json::from_reader(BufReader::new(file.take(length))).map_err(|error| {
            configuration(format!("{} is no saved plan: {error}; make one with `trueup plan JOB --out FILE`", path.display()))
        })?;
        if plan.schema != SCHEMA || plan.trueup_version != env!("CARGO_PKG_VERSION") {
            return Err(configuration(format!(
                "{} was saved by trueup {} ({}), this is {} ({SCHEMA}): plan again",
                path.display(),
                plan.trueup_version,
                plan.schema,
                env!("CARGO_PKG_VERSION")
            )));
        }
        if !is_sealed {
            return Err(stale(path, &["the file is not as it was saved".to_owned()]));
        }
        plan.draft.link();
        Ok(plan)
    }

    /// What the plan rests on and is no longer so, in words.
    ///
    /// # Errors
    /// Where the store cannot be read.
    pub fn moved(&self, job: &str, basis: &RunBasis, files: &[InputFile], store: &dyn AggregateStore) -> Result<Vec<String>> {
        let mut moved = Vec::new();
        let planned = &self.draft.basis;
        let digests = [
            ("the job file", &planned.job_digest, &basis.job_digest),
            ("the customers table", &planned.reference.customers, &basis.reference.customers),
            ("the subscriptions table", &planned.reference.subscriptions, &basis.reference.subscriptions),
            ("the meters table", &planned.reference.meters, &basis.reference.meters),
            ("the prices table", &planned.reference.prices, &basis.reference.prices),
        ];
        moved.extend(digests.iter().filter(|(_, then, now)| then != now).map(|(name, ..)| format!("{name} changed")));
        moved.extend(moved_files(&self.draft.input.files, files));
        moved.extend(self.moved_store(job, store)?);
        Ok(moved)
    }

    fn moved_store(&self, job: &str, store: &dyn AggregateStore) -> Result<Option<String>> {
        let runs = store.runs(job)?;
        let last = runs.last();
        if last.map(|run| &run.run_id) != self.draft.previous_run_id.as_ref() {
            let name = last.map_or("none", |run| run.run_id.as_str());
            return Ok(Some(format!("another run was published since (the last one is {name})")));
        }
        if last.map_or("", |run| run.ledger_digest.as_str()) != self.ledger_digest {
            return Ok(Some("the ledger is not the one that the plan was made from".to_owned()));
        }
        if store_digest(Some(store), job)? == self.store_digest {
            return Ok(None);
        }
        let mut rows = FxHashMap::default();
        store.each_window(job, &mut |stored| {
            rows.insert(stored.row.key.clone(), Values::from(&*stored.row));
            Ok(())
        })?;
        // A session that is rebuilt is retracted and inserted under one key.
        let mut seen = rustc_hash::FxHashSet::default();
        let mut first = self
            .draft
            .corrections
            .iter()
            .filter(|correction| correction.kind != CorrectionKind::Adjust && seen.insert(&correction.key));
        let other = first.find(|correction| rows.get(&correction.key).copied() != correction.values_before());
        Ok(Some(match other.map(|correction| crate::audit::describe(&correction.key)) {
            Some(key) => format!("the stored row {key} is not what the plan saw"),
            None => "stored rows are not what the plan saw (`trueup verify` names them)".to_owned(),
        }))
    }
}

/// Hashes what is written.
struct Digested<'w> {
    out: &'w mut dyn Write,
    hash: Xxh3,
}

impl Write for Digested<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

trait Rewindable: Read + Seek {}

impl<T: Read + Seek> Rewindable for T {}

/// A file that can be read twice, or all that a pipe gives.
fn rewindable(mut file: File) -> io::Result<Box<dyn Rewindable>> {
    if file.metadata()?.is_file() {
        return Ok(Box::new(file));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(Box::new(io::Cursor::new(bytes)))
}

/// The last line of a plan: whoever approved it did not approve another one.
fn seal(hash: &Xxh3) -> String {
    format!("{{\"digest\":\"{:032x}\"}}\n", hash.digest128())
}

/// The length of a plan without its last line, and whether that is the one that it was saved with.
/// The file is read from the start again after this.
fn sealed(file: &mut dyn Rewindable) -> io::Result<(u64, bool)> {
    let all = file.seek(io::SeekFrom::End(0))?;
    file.rewind()?;
    let mut hash = Xxh3::new();
    let length = all.saturating_sub(seal(&hash).len() as u64);
    let (mut buffer, mut left) = (vec![0; 1 << 16], length);
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let read = file.read(buffer.get_mut(..most).unwrap_or_default())?;
        if read == 0 {
            break;
        }
        hash.update(buffer.get(..read).unwrap_or_default());
        left -= read as u64;
    }
    let mut last = Vec::new();
    file.read_to_end(&mut last)?;
    file.rewind()?;
    let is_sealed = left == 0 && last == seal(&hash).as_bytes();
    Ok((if is_sealed || last.starts_with(b"{\"digest\":") { length } else { all }, is_sealed))
}

/// A digest of all that is stored of a job's windows and bills.
///
/// # Errors
/// Where the store cannot be read.
pub fn store_digest(store: Option<&dyn AggregateStore>, job: &str) -> Result<String> {
    let Some(store) = store else { return Ok(SetDigest::default().hex()) };
    let (mut digest, mut buffer) = (SetDigest::default(), Vec::new());
    let mut add = |parts: &[&str]| {
        buffer.clear();
        parts.iter().for_each(|part| frame(&mut buffer, Some(part.as_bytes())));
        digest.add(xxh3_128(&buffer));
    };
    let mut rest = Vec::new();
    store.each_window(job, &mut |StoredWindow { row, version, run_id }| {
        let period = &*row.key.period;
        let (starts, ends) = ([period.period_start, row.key.window_start], window_digest(&row, &mut rest));
        add(&[
            &period.tenant_id,
            &period.subscription_id,
            &period.meter_id,
            &period.price_id,
            &period.dimensions,
            &format!("{starts:?} {ends} {:?} {version}", Values::from(&*row)),
            &run_id,
        ]);
        Ok(())
    })?;
    for row in store.periods(job, Span { start: Timestamp::MIN, end: Timestamp::MAX })? {
        add(&[&period_json(Some(&row))]);
    }
    Ok(digest.hex())
}

fn moved_files(then: &[InputFile], now: &[InputFile]) -> Vec<String> {
    const SHOWN: usize = 5;
    let fingerprints = |files: &'_ [InputFile]| -> FxHashMap<String, String> {
        files.iter().map(|file| (file.name.clone(), file.fingerprint.clone())).collect()
    };
    let (before, after) = (fingerprints(then), fingerprints(now));
    let gone =
        then.iter().filter(|file| !after.contains_key(&file.name)).map(|file| format!("input {} is gone", shown(&file.name)));
    let changed = now.iter().filter_map(|file| match before.get(&file.name) {
        None => Some(format!("input {} is new", shown(&file.name))),
        Some(fingerprint) if *fingerprint != file.fingerprint => Some(format!("input {} changed", shown(&file.name))),
        Some(_) => None,
    });
    let mut moved: Vec<_> = gone.chain(changed).collect();
    if moved.len() > SHOWN {
        let more = moved.len() - SHOWN;
        moved.truncate(SHOWN);
        moved.push(format!("{more} more inputs moved"));
    }
    moved
}

/// A name as people read it: that of a part of a table is a condition, which may be long.
fn shown(name: &str) -> String {
    const MOST: usize = 120;
    match name.char_indices().nth(MOST) {
        Some((at, _)) => format!("{} …", name.get(..at).unwrap_or_default()),
        None => name.to_owned(),
    }
}

/// The fault of a plan that no longer holds (exit code 7).
pub fn stale(path: &Path, moved: &[String]) -> anyhow::Error {
    fault(FaultKind::Stale, format!("plan {} is stale: {}. Nothing was published; plan again", path.display(), moved.join("; ")))
}
