//! Ending on request. SIGTERM and SIGINT set a mark that reading stops at; a
//! publication under way is finished. A second signal ends the process at once: every
//! store stands that.

use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Result;

use crate::fault::{FaultKind, fault};

const NONE: u8 = 0;
const INTERRUPTED: u8 = 1;
const TERMINATED: u8 = 2;

static ASKED: AtomicU8 = AtomicU8::new(NONE);

/// Starts listening, on a thread of its own.
///
/// # Errors
/// Where the operating system gives neither a thread nor a signal handler.
pub fn listen() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let signals = runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        Ok::<_, anyhow::Error>((signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?))
    });
    let (mut terminate, mut interrupt) = signals?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            loop {
                let signal = tokio::select! {
                    _ = terminate.recv() => TERMINATED,
                    _ = interrupt.recv() => INTERRUPTED,
                };
                if ASKED.swap(signal, Ordering::Relaxed) != NONE {
                    std::process::exit(i32::from(kind(signal).exit_code()));
                }
            }
        });
    })?;
    Ok(())
}

fn kind(signal: u8) -> FaultKind {
    if signal == TERMINATED { FaultKind::Terminated } else { FaultKind::Interrupted }
}

/// Ends what is under way, if somebody asked for it.
///
/// # Errors
/// A fault with the exit code of the signal.
pub fn check() -> Result<()> {
    match ASKED.load(Ordering::Relaxed) {
        NONE => Ok(()),
        signal => Err(fault(kind(signal), "ended on request; nothing was written")),
    }
}
