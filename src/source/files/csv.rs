//! CSV with a header; an empty field is null.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::Read;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, bail};

use crate::model::columns::{ColumnMap, Field};
use crate::source::arrow_batch::missing_column;
use crate::source::batch::TextEvent;
use crate::source::{BatchBuilder, EventBatch};

/// Follows the file as a record of its own. A quote that is never closed swallows
/// it: if the last record is another one, the file ends inside quotes.
pub const END: &str = "\u{1f}trueup: end of file\u{1f}";

/// The file, then [`END`]; and its lines.
pub fn with_end<R: Read>(input: R) -> (impl Read, Lines) {
    let lines = Lines::default();
    let input = input.chain(std::io::Cursor::new(format!("\n{END}\n")));
    (Counted { input, lines: lines.clone() }, lines)
}

/// Where lines end in what was read so far. The reader of records says where each begins, but
/// before it has passed over empty lines and the second half of `\r\n`.
#[derive(Debug, Clone, Default)]
pub struct Lines(Rc<RefCell<LineEnds>>);

#[derive(Debug, Default)]
struct LineEnds {
    /// Bytes read.
    read: u64,
    ends_in_return: bool,
    /// Lines that lie before those of `ends`.
    passed: u64,
    /// Where a line's end begins, and where the next line does.
    ends: VecDeque<(u64, u64)>,
}

impl Lines {
    /// The line, from 1, in which a record begins that was found at `position`. Records come one
    /// after the other.
    pub fn of(&self, position: Option<&::csv::Position>) -> u64 {
        let mut lines = self.0.borrow_mut();
        let mut byte = position.map_or(0, ::csv::Position::byte);
        while let Some((_, next)) = lines.ends.front().copied().filter(|(end, _)| *end <= byte) {
            byte = byte.max(next);
            lines.passed += 1;
            lines.ends.pop_front();
        }
        lines.passed + 1
    }
}

/// Notes where lines end.
struct Counted<R> {
    input: R,
    lines: Lines,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.input.read(buffer)?;
        let bytes = buffer.get(..read).unwrap_or_default();
        let lines = &mut *self.lines.0.borrow_mut();
        for at in memchr::memchr_iter(b'\n', bytes) {
            let before = at.checked_sub(1).map_or(lines.ends_in_return, |before| bytes.get(before) == Some(&b'\r'));
            let end = lines.read + at as u64;
            lines.ends.push_back((end.saturating_sub(u64::from(before)), end + 1));
        }
        lines.read += read as u64;
        lines.ends_in_return = bytes.last().map_or(lines.ends_in_return, |last| *last == b'\r');
        Ok(read)
    }
}

/// The message for a file without its [`END`].
pub const UNCLOSED: &str = "ends inside quotes: a quote is opened and never closed; correct it or replace the file";

/// The first name that stands twice in a header; columns without a name are nobody's.
pub fn repeated_name(header: &::csv::StringRecord) -> Option<&str> {
    let names = || header.iter().map(str::trim);
    names()
        .enumerate()
        .find(|(at, name)| !name.is_empty() && names().take(*at).any(|earlier| earlier == *name))
        .map(|(_, name)| name)
}

fn is_end(record: &::csv::ByteRecord) -> bool {
    record.len() == 1 && record.get(0) == Some(END.as_bytes())
}

/// Reads all records. A record with too few or too many fields becomes a problem of its row.
///
/// # Errors
/// Where a column is missing or stands twice, or the file ends inside quotes.
pub(super) fn read(
    path: &Path,
    input: Box<dyn Read>,
    columns: &ColumnMap,
    sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
) -> Result<()> {
    let (input, lines) = with_end(input);
    let mut reader = ::csv::ReaderBuilder::new().flexible(true).buffer_capacity(256 * 1024).from_reader(input);
    let header = reader.headers().with_context(|| format!("events file {}: its header", path.display()))?.clone();
    if header.iter().any(|name| name.contains(END)) && !is_end(header.as_byte_record()) {
        bail!("events file {} {UNCLOSED} (its header)", path.display());
    }
    let header = if is_end(header.as_byte_record()) { ::csv::StringRecord::new() } else { header };
    let places = locate(path, &header, columns)?;
    let mut builder = BatchBuilder::default();
    let (mut record, mut next) = (::csv::ByteRecord::new(), ::csv::ByteRecord::new());
    let mut advance = |record: &mut ::csv::ByteRecord| reader.read_byte_record(record).with_context(|| super::broken(path, 0));
    let mut more = advance(&mut record)?;
    // One record ahead: only the last one is the end.
    while more {
        more = advance(&mut next)?;
        if more {
            let line = lines.of(record.position());
            push_record(&mut builder, &record, header.len(), places, || format!("{} line {line}", path.display()));
            std::mem::swap(&mut record, &mut next);
        }
        if builder.is_full() {
            sink(&builder.finish())?;
        }
    }
    if !is_end(&record) {
        let line = lines.of(record.position());
        bail!("events file {} {UNCLOSED} (the record that begins in line {line})", path.display());
    }
    sink(&builder.finish())
}

/// The column of each field, in the order of [`Field::ALL`].
fn locate(path: &Path, header: &::csv::StringRecord, columns: &ColumnMap) -> Result<[Option<usize>; 8]> {
    if let Some(name) = repeated_name(header) {
        bail!("events file {} has two columns `{name}`: rename or remove one", path.display());
    }
    let places = Field::ALL.map(|field| header.iter().position(|name| name.trim() == columns.name(field)));
    for (field, place) in Field::ALL.into_iter().zip(places) {
        if place.is_none() && (field.is_required() || columns.is_mapped(field)) {
            bail!("{}", missing_column(&format!("events file {}", path.display()), field, columns, header.iter()));
        }
    }
    Ok(places)
}

fn push_record(
    builder: &mut BatchBuilder,
    record: &::csv::ByteRecord,
    width: usize,
    places: [Option<usize>; 8],
    place: impl Fn() -> String,
) {
    let unreadable = |reason: String| {
        let raw: Vec<_> = record.iter().map(String::from_utf8_lossy).collect();
        (raw.join(","), format!("{}: {reason}", place()))
    };
    if record.len() != width {
        let (raw, detail) = unreadable(format!("{} fields where the header has {width}", record.len()));
        return builder.push_unreadable(raw, detail);
    }
    let mut fields = [None; 8];
    for (text, at) in fields.iter_mut().zip(places) {
        let bytes = at.and_then(|at| record.get(at)).unwrap_or_default();
        match std::str::from_utf8(bytes) {
            Ok("") => {}
            Ok(value) => *text = Some(value),
            Err(error) => {
                let (raw, detail) = unreadable(error.to_string());
                return builder.push_unreadable(raw, detail);
            }
        }
    }
    let [tenant_id, id, event_name, external_customer_id, timestamp, ingested_at, properties, deleted] = fields;
    builder
        .push(&TextEvent { tenant_id, id, event_name, external_customer_id, timestamp, ingested_at, properties, deleted }, place);
}
