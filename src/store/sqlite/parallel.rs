//! Reading many rows by several connections at once: most of the time goes into making
//! values of texts.

use std::path::Path;
use std::thread;

use anyhow::{Result, anyhow};
use rusqlite::Connection;

use super::{connect_read_only, read};
use crate::model::aggregate::StoredWindow;
use crate::model::window::Span;
use crate::store::WindowChoice;

/// Choices that are worth a connection.
const LEAST: usize = 500;

/// As [`read::windows_of`], for sorted `choices`.
pub(super) fn windows_of(connection: &Connection, job: &str, span: Span, choices: &[&WindowChoice]) -> Result<Vec<StoredWindow>> {
    let alone = |choices| read::windows_of(connection, job, span, choices);
    let path = connection.path().filter(|path| !path.is_empty());
    let connections = thread::available_parallelism().map_or(1, usize::from).min(choices.len() / LEAST);
    let (Some(path), true) = (path, connections > 1) else { return Ok(alone(choices)?.1) };
    let (ours, theirs) = choices.split_at(choices.len().div_ceil(connections));
    let parts: Vec<_> = thread::scope(|scope| {
        let work = |choices| scope.spawn(move || read::windows_of(&connect_read_only(Path::new(path))?, job, span, choices));
        let threads: Vec<_> = theirs.chunks(ours.len()).map(work).collect();
        let ours = alone(ours);
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a thread that reads the store panicked: this is a bug in trueup")))
        };
        std::iter::once(ours).chain(threads.into_iter().map(join)).collect::<Result<_>>()
    })?;
    // Somebody may have published between the first and the last of them.
    let is_one_state = parts.windows(2).all(|pair| matches!(pair, [(a, _), (b, _)] if a == b));
    if !is_one_state {
        return Ok(alone(choices)?.1);
    }
    Ok(parts.into_iter().flat_map(|(_, windows)| windows).collect())
}
