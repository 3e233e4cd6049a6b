//! `trueup generate`

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::output::{Style, counted, emit, emit_json, number};
use super::progress::Progress;
use super::range::shell_word;
use super::{Format, Session};
use crate::clock::Stopwatch;
use crate::generate::{Counts, DEFAULT, FileFormat, Options, Profile, check_days, check_events, generate};

#[derive(Debug, Args)]
#[command(after_help = "\
A profile says what to make up: event types and their properties, customers and how uneven they
are, and how many rows are duplicates, amended, voided, late or broken. The same profile and seed
give the same bytes, whatever the number of threads.

Files: job.yaml, meters.yaml, prices.yaml, customers.csv, subscriptions.csv, and in events/ one
file a local day, with what is ingested on it. `--print-profile` shows every setting.")]
pub struct GenerateArguments {
    /// What to make up [default: a built-in profile].
    profile: Option<PathBuf>,

    /// The folder to write to; it is created if needed.
    #[arg(long, value_name = "FOLDER", required_unless_present = "print_profile")]
    out: Option<PathBuf>,

    /// Rows, copies included [default: of the profile].
    #[arg(long, value_name = "N")]
    events: Option<u64>,

    /// Days from the profile's start [default: of the profile].
    #[arg(long, value_name = "D")]
    days: Option<u32>,

    /// Another seed gives other events [default: of the profile].
    #[arg(long, value_name = "S")]
    seed: Option<u64>,

    /// The format of events files.
    #[arg(long, value_enum, default_value_t = FileFormat::Parquet)]
    format: FileFormat,

    /// Write into a folder that is not empty; events of an earlier generation are removed.
    #[arg(long)]
    force: bool,

    /// Print the built-in profile, to copy and change.
    #[arg(long, exclusive = true)]
    print_profile: bool,
}

pub fn execute(session: &Session, arguments: &GenerateArguments) -> Result<u8> {
    if arguments.print_profile {
        emit(DEFAULT)?;
        return Ok(0);
    }
    let watch = Stopwatch::start();
    let folder = arguments.out.as_deref().context("--out is missing")?;
    let profile = profile(arguments)?;
    let progress = Progress::new(session.quiet);
    let options =
        Options { folder, format: arguments.format, threads: session.threads, force: arguments.force, progress: &progress };
    let counts = generate(&profile, &options)?;
    drop(progress);
    let report = Report { folder: folder.display().to_string(), format: arguments.format, profile: &profile, counts: &counts };
    match session.format {
        Format::Json => emit_json(&report.document(watch.seconds()))?,
        Format::Text => emit(&report.text(watch.seconds(), Style::for_stdout())?)?,
    }
    Ok(0)
}

/// The profile, with what the command line changes in it.
fn profile(arguments: &GenerateArguments) -> Result<Profile> {
    let mut profile = arguments.profile.as_deref().map_or_else(Profile::built_in, Profile::load)?;
    if let Some(events) = arguments.events {
        check_events(events).map_err(|message| crate::fault::configuration(format!("--{message}")))?;
        profile.events = events;
    }
    if let Some(days) = arguments.days {
        check_days(days).map_err(|message| crate::fault::configuration(format!("--{message}")))?;
        profile.days = days;
    }
    profile.seed = arguments.seed.unwrap_or(profile.seed);
    Ok(profile)
}

struct Report<'r> {
    folder: String,
    format: FileFormat,
    profile: &'r Profile,
    counts: &'r Counts,
}

/// What a run of the job will find, exactly.
#[derive(Debug, Serialize)]
struct Expected {
    read: u64,
    duplicates: u64,
    voided: u64,
    dead_letters: DeadLetters,
}

#[derive(Debug, Serialize)]
struct DeadLetters {
    customer_not_found: u64,
    invalid_property: u64,
    malformed_event: u64,
}

#[derive(Serialize)]
struct Document<'r> {
    schema: &'static str,
    folder: &'r str,
    job: String,
    format: &'static str,
    seed: u64,
    written: &'r Counts,
    run: Expected,
    seconds: f64,
}

impl Report<'_> {
    fn expected(&self) -> Expected {
        let counts = self.counts;
        Expected {
            read: counts.rows,
            duplicates: counts.outdated(),
            voided: counts.voided,
            dead_letters: DeadLetters {
                customer_not_found: counts.unknown_customer,
                invalid_property: counts.rejected_matches,
                malformed_event: counts.missing_timestamp,
            },
        }
    }

    fn document(&self, seconds: f64) -> Document<'_> {
        Document {
            schema: "trueup.generate/1",
            folder: &self.folder,
            job: self.job(),
            format: self.format.extension(),
            seed: self.profile.seed,
            written: self.counts,
            run: self.expected(),
            seconds,
        }
    }

    fn job(&self) -> String {
        PathBuf::from(&self.folder).join("job.yaml").display().to_string()
    }

    fn text(&self, seconds: f64, style: Style) -> Result<String> {
        let counts = self.counts;
        let mut out = String::new();
        let title = format!("trueup generate {}:", self.profile.name);
        let (rows, files) = (counted(counts.rows, "row"), counted(counts.files, "file"));
        writeln!(out, "{} wrote {rows} in {files} to {}", style.bold(&title), self.folder)?;
        let mut line = |name: &str, text: &str| writeln!(out, "  {} {text}", style.dim(&format!("{name:<12}")));
        let sum = [
            (counts.events, counted(counts.events, "event")),
            (counts.duplicates, counted(counts.duplicates, "duplicate")),
            (counts.amended, counted(counts.amended, "amendment")),
            (counts.voided, counted(counts.voided, "void")),
        ];
        line("rows", &joined(&sum, " + "))?;
        let special = [
            (counts.late, format!("{} late by up to {}", number(counts.late), counted(self.late_days(), "day"))),
            (counts.missing_timestamp, format!("{} without a timestamp", number(counts.missing_timestamp))),
            (counts.invalid_number, format!("{} with a property that is no number", number(counts.invalid_number))),
            (counts.unknown_customer, format!("{} of unknown customers", number(counts.unknown_customer))),
        ];
        if special.iter().any(|(count, _)| *count > 0) {
            line("of events", &joined(&special, ", "))?;
        }
        let expected = self.expected();
        let finds = [
            (expected.duplicates, counted(expected.duplicates, "duplicate")),
            (expected.voided, format!("{} voided", number(expected.voided))),
        ];
        if finds.iter().any(|(count, _)| *count > 0) {
            line("a run finds", &joined(&finds, ", "))?;
        }
        let letters = expected.dead_letters;
        let letters = [
            (letters.customer_not_found, format!("customer_not_found {}", number(letters.customer_not_found))),
            (letters.invalid_property, format!("invalid_property {}", number(letters.invalid_property))),
            (letters.malformed_event, format!("malformed_event {}", number(letters.malformed_event))),
        ];
        if letters.iter().any(|(count, _)| *count > 0) {
            line("dead letters", &joined(&letters, ", "))?;
        }
        line("size", &format!("{} kB of {}, seed {}", number(counts.bytes / 1000), self.format.extension(), self.profile.seed))?;
        line("time", &format!("{seconds:.2} s"))?;
        writeln!(out, "\n  trueup run {}  {}", shell_word(&self.job()), style.dim("# compute usage and cost of these events"))?;
        Ok(out)
    }

    fn late_days(&self) -> u64 {
        u64::from(self.profile.rates.late_days.min(self.profile.days.saturating_sub(1)))
    }
}

/// The parts that are there.
fn joined(parts: &[(u64, String)], separator: &str) -> String {
    parts.iter().filter(|(count, _)| *count > 0).map(|(_, text)| text.as_str()).collect::<Vec<_>>().join(separator)
}
