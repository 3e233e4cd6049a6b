//! The command line: one file a command.

mod apply;
mod audit;
mod audit_text;
mod changes;
mod check;
mod close;
mod dead_letters;
mod explain;
mod explain_text;
mod export;
mod generate;
mod init;
pub mod output;
mod plan;
mod progress;
mod range;
mod resume;
mod revert;
mod run;
mod runs;
mod serve;
mod verify;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{Job, default_environment};

/// Recomputes usage and cost windows from raw events, writes only what differs,
/// and keeps a ledger of every correction and its cause.
#[derive(Debug, Parser)]
#[command(
    name = "trueup",
    version,
    max_term_width = 100,
    after_help = "\
Exit codes: 0 done, 1 runtime error, 2 usage or configuration, 3 differences found,
4 invariant failed and nothing published, 5 partly published and resumable, 6 another run
holds the lock, 7 saved plan is stale, 8 guard tripped or approval needed, 130 and 143 signal."
)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,

    /// How results are printed on stdout.
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    output: Format,

    /// Threads that read and aggregate [default: one a core].
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

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
    /// Publish a saved plan exactly as it is, or refuse.
    Apply(apply::ApplyArguments),
    /// Recompute and compare, check the ledger, and write nothing.
    Verify(verify::VerifyArguments),
    /// Take one number apart: tiers, price, events, history.
    Explain(explain::ExplainArguments),
    /// Sum up what runs changed: by cause, customer, meter.
    Audit(audit::AuditArguments),
    /// Check the job file, the reference tables and the source.
    Check(check::CheckArguments),
    /// Take back what a run changed.
    Revert(revert::RevertArguments),
    /// Run again what was interrupted.
    Resume(resume::ResumeArguments),
    /// Close billing periods, because they are invoiced.
    Close(close::CloseArguments),
    /// List the runs of a job.
    Runs(JobArgument),
    /// List events that should have counted and could not.
    DeadLetters(dead_letters::DeadLetterArguments),
    /// Write a table as CSV, NDJSON or Parquet.
    Export(export::ExportArguments),
    /// Write a small job that runs.
    Init(init::InitArguments),
    /// Make up events, reference tables and a job, for demonstrations and sizing.
    Generate(generate::GenerateArguments),
    /// Run jobs by their schedules, with health and metrics over HTTP.
    Serve(serve::ServeArguments),
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

    /// The options that make other commands read the same job, each after a space.
    fn as_options(&self) -> String {
        let given = self.environment.as_ref().filter(|given| default_environment().as_ref() != Some(*given));
        given.map(|given| format!(" --environment {}", range::shell_word(given))).unwrap_or_default()
    }
}

/// Runs a command; returns its exit code.
///
/// # Errors
/// Whatever the command could not do; [`crate::fault::exit_code`] has its code.
pub fn dispatch(arguments: Arguments) -> Result<u8> {
    crate::telemetry::start(arguments.verbose, arguments.quiet);
    crate::clock::check()?;
    let threads = arguments.threads.map(usize::from);
    let threads = threads.or_else(|| std::thread::available_parallelism().ok().map(NonZeroUsize::get));
    let session = Session {
        format: arguments.output,
        threads: threads.unwrap_or(1),
        quiet: arguments.quiet,
        environment: arguments.environment.or_else(default_environment),
    };
    // The server finishes the runs under way by itself.
    if !matches!(arguments.command, Command::Serve(_)) {
        crate::interrupt::listen()?;
    }
    match arguments.command {
        Command::Run(arguments) => run::execute(&session, &arguments),
        Command::Plan(arguments) => plan::execute(&session, &arguments),
        Command::Apply(arguments) => apply::execute(&session, &arguments),
        Command::Revert(arguments) => revert::execute(&session, &arguments),
        Command::Resume(arguments) => resume::execute(&session, &arguments),
        Command::Close(arguments) => close::execute(&session, &arguments),
        Command::Verify(arguments) => verify::execute(&session, &arguments),
        Command::Explain(arguments) => explain::execute(&session, &arguments),
        Command::Audit(arguments) => audit::execute(&session, &arguments),
        Command::Check(arguments) => check::execute(&session, &arguments),
        Command::Runs(arguments) => runs::execute(&session, &arguments.job),
        Command::DeadLetters(arguments) => dead_letters::execute(&session, &arguments),
        Command::Export(arguments) => export::execute(&session, &arguments),
        Command::Init(arguments) => init::execute(&session, &arguments),
        Command::Generate(arguments) => generate::execute(&session, &arguments),
        Command::Serve(arguments) => serve::execute(&session, &arguments),
    }
}
