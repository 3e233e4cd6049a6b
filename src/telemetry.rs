//! Logs, on stderr.

use std::io::IsTerminal as _;

use tracing::level_filters::LevelFilter;

/// Starts logging: warnings, or more with each `-v`; errors alone with `-q`.
pub fn start(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, _) => LevelFilter::DEBUG,
    };
    let colour = std::io::stderr().is_terminal() && !crate::config::no_color();
    let subscriber = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_ansi(colour);
    // Another subscriber is set only where a test set it.
    let _ = subscriber.with_target(false).try_init();
}
