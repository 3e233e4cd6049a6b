//! CSV with a header; an empty field is null.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::columns::{ColumnMap, Field};
use crate::source::arrow_batch::missing_column;
use crate::source::batch::TextEvent;
use crate::source::{BatchBuilder, EventBatch};

/// Reads all records. A record with too few or too many fields becomes a problem of its row.
pub(super) fn read(
    path: &Path,
    input: Box<dyn Read>,
    columns: &ColumnMap,
    sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
) -> Result<()> {
    let mut reader = ::csv::ReaderBuilder::new().flexible(true).buffer_capacity(256 * 1024).from_reader(input);
    let header = reader.headers().with_context(|| format!("events file {}: its header", path.display()))?.clone();
    let places = locate(path, &header, columns)?;
    let mut builder = BatchBuilder::default();
    let mut record = ::csv::ByteRecord::new();
    loop {
        let more = reader.read_byte_record(&mut record);
        if !more.with_context(|| format!("events file {} breaks off", path.display()))? {
            break;
        }
        let line = record.position().map_or(0, ::csv::Position::line);
        push_record(&mut builder, &record, header.len(), places, || format!("{} line {line}", path.display()));
        if builder.is_full() {
            sink(&builder.finish())?;
        }
    }
    sink(&builder.finish())
}

/// The column of each field, in the order of [`Field::ALL`].
fn locate(path: &Path, header: &::csv::StringRecord, columns: &ColumnMap) -> Result<[Option<usize>; 8]> {
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
