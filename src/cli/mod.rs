//! The command line: one file a command.

mod check;
mod dead_letters;
mod export;
mod init;
mod lock;
pub mod output;
mod plan;
mod progress;
mod range;
mod run;
mod runs;
mod verify;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{Job, Keep, Source, Store, default_environment};
use crate::fault::configuration;
use crate::source::EventSource;
use crate::source::files::FileSource;
use crate::source::kafka::{KafkaSource, Snapshot};
use crate::store::AggregateStore;
use crate::store::sqlite::SqliteStore;

/// Recomputes usage and cost windows from raw events, writes only what differs,
/// and keeps a ledger of every correction and its cause.
#[derive(Debug, Parser)]
#[command(
    name = "trueup",
    version,
    max_term_width = 100,
    after_help = "\
Exit codes: 0 done, 1 runtime error, 2 usage or configuration, 3 differences found,
4 invariant failed and nothing published, 6 another run holds the lock, 8 guard tripped."
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,

    /// How results are printed on stdout.
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    output: Format,

    /// Threads that read and aggregate [default: one a core].
    #[arg(long, global = true, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// Connections of environments/NAME.yaml beside the job [default: $TRUEUP_ENVIRONMENT].
    #[arg(long, global = true, value_name = "NAME")]
    environment: Option<String>,

    /// More logs on stderr; twice for still more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    /// No progress and no warnings on stderr.
    #[arg(short, long, global = true)]
    quiet: bool,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    /// One JSON document.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Recompute, and publish what differs.
    Run(run::RunArguments),
    /// Show what a run would change, and write nothing.
    Plan(plan::PlanArguments),
    /// Recompute and compare, check the ledger, and write nothing.
    Verify(verify::VerifyArguments),
    /// Check the job file, the reference tables and the source.
    Check(JobArgument),
    /// List the runs of a job.
    Runs(JobArgument),
    /// List events that should have counted and could not.
    DeadLetters(dead_letters::DeadLetterArguments),
    /// Write a table as CSV, NDJSON or Parquet.
    Export(export::ExportArguments),
    /// Write a small job that runs.
    Init(init::InitArguments),
}

#[derive(Debug, Args)]
struct JobArgument {
    /// The job file.
    job: PathBuf,
}

/// What every command gets.
struct Session {
    format: Format,
    threads: usize,
    quiet: bool,
    environment: Option<String>,
}

impl Session {
    fn job(&self, path: &Path) -> Result<Job> {
        Job::load_in(path, self.environment.as_deref())
    }
}

/// Runs a command; returns its exit code.
///
/// # Errors
/// Whatever the command could not do; [`crate::fault::exit_code`] has its code.
pub fn dispatch(arguments: Arguments) -> Result<u8> {
    crate::telemetry::start(arguments.verbose, arguments.quiet);
    let threads = arguments.threads.or_else(|| std::thread::available_parallelism().ok());
    let session = Session {
        format: arguments.output,
        threads: threads.map_or(1, NonZeroUsize::get),
        quiet: arguments.quiet,
        environment: arguments.environment.or_else(default_environment),
    };
    match arguments.command {
        Command::Run(arguments) => run::execute(&session, &arguments),
        Command::Plan(arguments) => plan::execute(&session, &arguments),
        Command::Verify(arguments) => verify::execute(&session, &arguments),
        Command::Check(arguments) => check::execute(&session, &arguments.job),
        Command::Runs(arguments) => runs::execute(&session, &arguments.job),
        Command::DeadLetters(arguments) => dead_letters::execute(&session, &arguments),
        Command::Export(arguments) => export::execute(&session, &arguments),
        Command::Init(arguments) => init::execute(&session, &arguments),
    }
}

fn source_of(job: &Job) -> Result<Box<dyn EventSource>> {
    match &job.source {
        Source::Files { patterns, columns } => Ok(Box::new(FileSource::new(patterns.clone(), columns.clone()))),
        Source::ClickHouse { .. } => anyhow::bail!("not yet"),
        Source::Kafka { .. } => Ok(Box::new(kafka_source(job, None)?)),
    }
}

/// The job's topic, or the offsets of it that an earlier run read.
fn kafka_source(job: &Job, snapshot: Option<Snapshot>) -> Result<KafkaSource> {
    let Source::Kafka { connection, topic, margin, tenant_id, columns } = &job.source else {
        return Err(configuration(format!("{}: the source is no Kafka topic: only Kafka has snapshots", job.path.display())));
    };
    Ok(KafkaSource {
        connection: connection.clone(),
        topic: topic.clone(),
        margin: *margin,
        tenant_id: tenant_id.clone(),
        columns: columns.clone(),
        from_first_copy: job.deduplicate.keep == Keep::First,
        snapshot,
    })
}

/// The store for reading, if there is one.
fn read_store(job: &Job) -> Result<Option<Box<dyn AggregateStore>>> {
    match &job.store {
        Store::Sqlite { path } => Ok(SqliteStore::open_read_only(path)?.map(|store| Box::new(store) as Box<dyn AggregateStore>)),
        Store::ClickHouse { .. } => anyhow::bail!("not yet"),
    }
}

/// The store for writing, created and brought up to date as needed.
fn write_store(job: &Job) -> Result<Box<dyn AggregateStore>> {
    match &job.store {
        Store::Sqlite { path } => Ok(Box::new(SqliteStore::open(path)?)),
        Store::ClickHouse { .. } => anyhow::bail!("not yet"),
    }
}

/// The file whose lock keeps a second run of the job on this machine away.
fn lock_path(job: &Job) -> PathBuf {
    match &job.store {
        Store::Sqlite { path } => SqliteStore::lock_path(path, &job.name),
        Store::ClickHouse { connection } => {
            let store = crate::model::digest::Digest::new("lock").text(&connection.url).text(&connection.database).hex();
            std::env::temp_dir().join(format!("trueup-{store}-{}.lock", job.name))
        }
    }
}

/// What people call the store.
fn store_name(job: &Job) -> String {
    match &job.store {
        Store::Sqlite { path } => path.display().to_string(),
        Store::ClickHouse { connection } => format!("{} database {}", connection.url, connection.database),
    }
}
