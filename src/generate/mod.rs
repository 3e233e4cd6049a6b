//! Made-up events for demonstrations, sizing and benchmarks: the same seed gives
//! the same bytes, whatever the number of threads.
//!
//! A [`profile`] says what to make up. Each [`day`] works out by itself which of its
//! events are late, copied or broken; a file of events holds what is ingested on its
//! day: that day's events, and what comes late from the days before.

mod day;
mod node;
mod profile;
mod property;
mod random;
mod raw;
mod tables;
mod writer;

use std::collections::VecDeque;
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::fault::configuration;
use crate::pipeline::Observer;
use day::{Day, Fate};
pub use profile::{DEFAULT, Profile, check_days, check_events};
use property::write_hexadecimal;
use random::Random;
use tables::Names;
pub use writer::FileFormat;
use writer::{EventWriter, Row};

use crate::{interrupt, workers};

/// How to make events up.
pub struct Options<'o> {
    pub folder: &'o Path,
    pub format: FileFormat,
    pub threads: usize,
    /// Whether to write into a folder that is not empty.
    pub force: bool,
    pub progress: &'o dyn Observer,
}

/// What was written, exactly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// All rows, copies included.
    pub rows: u64,
    /// Different ids.
    pub events: u64,
    /// Rows that came again.
    pub duplicates: u64,
    /// Ids that came again with other values.
    pub amended: u64,
    /// Ids that came again, deleted.
    pub voided: u64,
    /// Events that came days later.
    pub late: u64,
    pub missing_timestamp: u64,
    pub invalid_number: u64,
    pub unknown_customer: u64,
    /// Matches of an event with a meter that are rejected for `invalid_number`.
    pub rejected_matches: u64,
    pub files: u64,
    pub bytes: u64,
}

impl Counts {
    fn merge(&mut self, other: &Counts) {
        self.rows += other.rows;
        self.events += other.events;
        self.duplicates += other.duplicates;
        self.amended += other.amended;
        self.voided += other.voided;
        self.late += other.late;
        self.missing_timestamp += other.missing_timestamp;
        self.invalid_number += other.invalid_number;
        self.unknown_customer += other.unknown_customer;
        self.rejected_matches += other.rejected_matches;
        self.files += other.files;
        self.bytes += other.bytes;
    }

    /// Rows that a run counts out, because another copy of theirs counts.
    pub fn outdated(&self) -> u64 {
        self.duplicates + self.amended + self.voided
    }
}

/// Writes events, reference tables and a job.
///
/// # Errors
/// A configuration fault where the folder is in use or the meters and prices of the
/// profile are wrong; or where a file cannot be written.
pub fn generate(profile: &Profile, options: &Options<'_>) -> Result<Counts> {
    let folder = options.folder;
    let is_new = !folder.exists();
    if !is_new && !options.force && has_entries(folder)? {
        return Err(configuration(format!(
            "{} is not empty: nothing was written; name another folder, or overwrite with --force",
            folder.display()
        )));
    }
    let names = Names::new(profile);
    let tables = tables::files(profile, &names, options.format)?;
    tables::check(profile, &tables)?;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let partial = folder.join(PARTIAL);
    let made = make(profile, &names, &tables, &partial, options).and_then(|counts| {
        put_in_place(&partial, folder, &tables)?;
        Ok(counts)
    });
    let _ = fs::remove_dir_all(&partial);
    if made.is_err() && is_new {
        let _ = fs::remove_dir(folder);
    }
    made
}

/// Where files are until all of them are whole, in their folder.
const PARTIAL: &str = ".trueup-generate.partial";

fn has_entries(folder: &Path) -> Result<bool> {
    let unreadable = |error| configuration(format!("cannot read {}: {error}", folder.display()));
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        // What a killed generation left is in nobody's way.
        if entry.map_err(unreadable)?.file_name() != PARTIAL {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Writes everything into a folder of its own.
fn make(profile: &Profile, names: &Names, tables: &[(&str, String)], partial: &Path, options: &Options<'_>) -> Result<Counts> {
    if partial.exists() {
        fs::remove_dir_all(partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    let events = partial.join(EVENTS);
    fs::create_dir_all(&events).with_context(|| format!("cannot create {}", events.display()))?;
    tables::write(partial, tables)?;
    options.progress.step("generate", Some(profile.events));
    write_events(profile, names, &events, options)
}

const EVENTS: &str = "events";

/// Moves what is whole to where it belongs. While there is no job file, nobody runs half of it.
fn put_in_place(partial: &Path, folder: &Path, tables: &[(&str, String)]) -> Result<()> {
    let (job, events) = (folder.join(tables::JOB), folder.join(EVENTS));
    if job.exists() {
        fs::remove_file(&job).with_context(|| format!("cannot replace {}", job.display()))?;
    }
    fs::create_dir_all(&events).with_context(|| format!("cannot create {}", events.display()))?;
    remove_events(&events)?;
    let place = |from: &Path, to: &Path| fs::rename(from, to).with_context(|| format!("cannot write {}", to.display()));
    for entry in fs::read_dir(partial.join(EVENTS))? {
        let entry = entry?;
        place(&entry.path(), &events.join(entry.file_name()))?;
    }
    let (last, others): (Vec<_>, Vec<_>) = tables.iter().map(|(name, _)| *name).partition(|name| *name == tables::JOB);
    others.into_iter().chain(last).try_for_each(|name| place(&partial.join(name), &folder.join(name)))
}

/// Removes what an earlier generation left: the job would read it too.
fn remove_events(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_day =
            path.file_stem().and_then(|stem| stem.to_str()).is_some_and(|stem| stem.parse::<chrono::NaiveDate>().is_ok());
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if is_day && FileFormat::ALL.iter().any(|format| format.extension() == extension) {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Threads take one day after another.
fn write_events(profile: &Profile, names: &Names, folder: &Path, options: &Options<'_>) -> Result<Counts> {
    let next = AtomicU32::new(0);
    let total: Mutex<Result<Counts>> = Mutex::new(Ok(Counts::default()));
    let lost = || anyhow::anyhow!("a thread that writes events was lost");
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(file) = (index < profile.days).then(|| EventsFile::new(profile, names, index)).flatten() else { return };
            let path = folder.join(format!("{}.{}", file.day.date, options.format.extension()));
            let counts = file.write_to(&path, options);
            let Ok(mut total) = total.lock() else { return };
            match (&mut *total, counts) {
                (Ok(total), Ok(counts)) => total.merge(&counts),
                (Ok(_), Err(error)) => *total = Err(error),
                (Err(_), _) => return,
            }
        }
    };
    let is_lost = workers::spread(options.threads, work).iter().any(Result::is_err);
    if is_lost { Err(lost()) } else { total.into_inner().map_err(|_| lost())? }
}

/// The file of one day.
struct EventsFile<'p> {
    profile: &'p Profile,
    names: &'p Names,
    day: Day,
}

/// How many rows after an event its duplicate comes.
const ECHO_ROWS: u64 = 500;
/// How often progress is told.
const PROGRESS_ROWS: u64 = 16_384;

/// Which row of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copy {
    First,
    Amendment,
    Void,
}

impl<'p> EventsFile<'p> {
    fn new(profile: &'p Profile, names: &'p Names, index: u32) -> Option<Self> {
        Some(EventsFile { profile, names, day: Day::new(profile, index)? })
    }

    /// Writes what is ingested on this day.
    fn write_to(&self, path: &Path, options: &Options<'_>) -> Result<Counts> {
        let context = || format!("cannot write {}", path.display());
        let mut output =
            Output { writer: options.format.create(path)?, rows: 0, progress: options.progress, row: Row::default() };
        let mut counts = Counts { files: 1, events: self.day.events, ..Counts::default() };
        self.write_day(&mut output, &mut counts).with_context(context)?;
        self.write_arrivals(&mut output, &mut counts).with_context(context)?;
        options.progress.rows(output.rows % PROGRESS_ROWS);
        counts.rows = output.rows;
        counts.bytes = output.writer.finish().with_context(context)?;
        Ok(counts)
    }

    /// The day's own events in order of time, but for the late ones.
    fn write_day(&self, output: &mut Output<'p, '_>, counts: &mut Counts) -> Result<()> {
        let mut echoes: VecDeque<u64> = VecDeque::new();
        for (position, fate) in self.day.positions() {
            while let Some(echo) = echoes.pop_front_if(|echo| *echo + ECHO_ROWS <= position) {
                self.write(output, &self.day, echo, Fate::Duplicated, Copy::First)?;
            }
            match fate {
                Fate::Late => continue,
                Fate::Duplicated => {
                    counts.duplicates += 1;
                    echoes.push_back(position);
                }
                Fate::MissingTimestamp => counts.missing_timestamp += 1,
                Fate::InvalidNumber => counts.invalid_number += 1,
                Fate::UnknownCustomer => counts.unknown_customer += 1,
                Fate::Plain | Fate::Amended | Fate::Voided => {}
            }
            counts.rejected_matches += self.write(output, &self.day, position, fate, Copy::First)?;
        }
        for echo in echoes {
            self.write(output, &self.day, echo, Fate::Duplicated, Copy::First)?;
        }
        Ok(())
    }

    /// What comes after its day: late events, amendments and voids.
    fn write_arrivals(&self, output: &mut Output<'p, '_>, counts: &mut Counts) -> Result<()> {
        let last = self.profile.rates.late_days.min(self.day.index);
        for lag in 0..=last {
            let Some(day) = Day::new(self.profile, self.day.index - lag) else { continue };
            let kinds = [
                (Fate::Late, Copy::First, &mut counts.late),
                (Fate::Amended, Copy::Amendment, &mut counts.amended),
                (Fate::Voided, Copy::Void, &mut counts.voided),
            ];
            for (fate, copy, count) in kinds {
                for position in day.positions_after(fate, lag) {
                    *count += 1;
                    self.write(output, &day, position, fate, copy)?;
                }
            }
        }
        Ok(())
    }

    /// Writes a row of an event of `day`; returns how many meters will reject it.
    fn write(&self, output: &mut Output<'p, '_>, day: &Day, position: u64, fate: Fate, copy: Copy) -> Result<u64> {
        let rejected = self.fill(&mut output.row, day, position, fate, copy);
        output.write()?;
        Ok(rejected)
    }

    /// The same arguments give the same row.
    fn fill(&self, row: &mut Row<'p>, day: &Day, position: u64, fate: Fate, copy: Copy) -> u64 {
        let Profile { seed, customers, event_types, rates, .. } = self.profile;
        let mut random = Random::new(*seed, day.number(position));
        let weights = match fate {
            Fate::InvalidNumber => event_types.breakable.as_ref(),
            Fate::UnknownCustomer => event_types.metered.as_ref(),
            _ => None,
        };
        let event_type = event_types.list.get(weights.unwrap_or(&event_types.all).draw(&mut random));
        let customer = customers.weights.draw(&mut random);
        let time = day.time(position, rates.near_clock_change, &mut random);
        let first_ingestion = day.ingestion(time, &mut random);
        row.tenant_id = self.names.tenant(customer);
        row.external_customer_id = if fate == Fate::UnknownCustomer { "unknown" } else { self.names.customer(customer) };
        row.timestamp = (fate != Fate::MissingTimestamp).then_some(time);
        row.ingested_at = match (fate, copy) {
            (Fate::Late, _) => self.day.later(first_ingestion, &mut random),
            (_, Copy::First) => first_ingestion,
            (_, Copy::Amendment | Copy::Void) => self.day.later(first_ingestion, &mut Random::new(*seed, !day.number(position))),
        };
        row.deleted = copy == Copy::Void;
        write_id(day.id(position), &mut row.id);
        row.properties.clear();
        let Some(event_type) = event_type else { return 0 };
        row.event_name = &event_type.name;
        if copy == Copy::Amendment {
            // Other values than those of the first row.
            random = Random::new(seed.wrapping_add(1), day.number(position));
        }
        let broken = event_type.breakable.filter(|_| fate == Fate::InvalidNumber);
        for (index, property) in event_type.properties.iter().enumerate() {
            row.properties.push_str(&property.lead);
            match broken {
                Some((of, _)) if of == index => row.properties.push_str("\"n/a\""),
                _ => property.values.write(&mut random, &mut row.properties),
            }
        }
        row.properties.push_str(if event_type.properties.is_empty() { "{}" } else { "}" });
        broken.map_or(0, |(_, rejected)| rejected)
    }
}

/// 32 hexadecimal digits.
fn write_id((first, second): (u64, u64), out: &mut String) {
    out.clear();
    write_hexadecimal(first, out);
    write_hexadecimal(second, out);
}

/// A file under way, and the row that is written next.
struct Output<'p, 'o> {
    writer: Box<dyn EventWriter>,
    row: Row<'p>,
    rows: u64,
    progress: &'o dyn Observer,
}

impl Output<'_, '_> {
    fn write(&mut self) -> Result<()> {
        self.rows += 1;
        if self.rows.is_multiple_of(PROGRESS_ROWS) {
            interrupt::check()?;
            self.progress.rows(PROGRESS_ROWS);
        }
        self.writer.write(&self.row)
    }
}
