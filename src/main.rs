//! Parses, dispatches, and turns the result into an exit code.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let arguments = trueup::cli::Arguments::parse();
    match trueup::cli::dispatch(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            trueup::cli::output::report_error(&error);
            ExitCode::from(trueup::fault::exit_code(&error))
        }
    }
}
