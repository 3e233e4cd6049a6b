//! NDJSON: one event a line, with the standard fields or as CloudEvents JSON.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};

use super::ColumnMap;
use crate::source::json_event::{Defaults, JsonEvents};
use crate::source::{BatchBuilder, EventBatch};

/// Reads all lines. A line that is no JSON object becomes a problem of its row.
pub(super) fn read(
    path: &Path,
    input: Box<dyn Read>,
    columns: &ColumnMap,
    sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
) -> Result<()> {
    let events = JsonEvents::new(columns);
    let mut input = BufReader::with_capacity(256 * 1024, input);
    let mut builder = BatchBuilder::default();
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        let read = input.read_until(b'\n', &mut line).with_context(|| super::broken(path, number - 1))?;
        if read == 0 {
            break;
        }
        let text = if number == 1 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line) } else { &line }.trim_ascii();
        if !text.is_empty() {
            events.push(&mut builder, text, Defaults::default(), || format!("{} line {number}", path.display()));
        }
        if builder.is_full() {
            sink(&builder.finish())?;
        }
    }
    sink(&builder.finish())
}
