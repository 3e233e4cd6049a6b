//! Parquet, a row group a split; nested properties become JSON text.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, StringArray, StringBuilder};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field as ArrowField, Int64Type, TimeUnit, TimestampNanosecondType};
use arrow::json::writer::{EncoderOptions, make_encoder};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::reader::ChunkReader;

use super::columns::{ColumnMap, Field};
use super::{Compression, open};
use crate::model::timestamp::Timestamp;
use crate::source::batch::{BATCH_ROWS, Problem};
use crate::source::{EventBatch, Part, Split, Wanted};

/// Appends a split for every row group.
pub(super) fn splits(path: &Path, whole: &Split, splits: &mut Vec<Split>) -> Result<()> {
    let file = File::open(path).with_context(|| format!("events file {}", path.display()))?;
    let builder = builder(path, file)?;
    for (part, group) in builder.metadata().row_groups().iter().enumerate() {
        splits.push(Split { announced_rows: u64::try_from(group.num_rows()).ok(), part: Part::RowGroup(part), ..whole.clone() });
    }
    Ok(())
}

fn builder<R: ChunkReader + 'static>(path: &Path, input: R) -> Result<ParquetRecordBatchReaderBuilder<R>> {
    ParquetRecordBatchReaderBuilder::try_new(input)
        .with_context(|| format!("events file {} is truncated or no Parquet file: replace it and run again", path.display()))
}

pub(super) fn read(
    path: &Path,
    compression: Compression,
    split: &Split,
    columns: &ColumnMap,
    wanted: Wanted<'_>,
    sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
) -> Result<()> {
    let mut input = open(path, compression)?;
    if compression == Compression::Plain {
        let group = if let Part::RowGroup(group) = split.part { Some(group) } else { None };
        let file = File::open(path).with_context(|| format!("events file {}", path.display()))?;
        return read_groups(path, builder(path, file)?, group, columns, wanted, sink);
    }
    // The footer is at the end: a compressed Parquet file is read as a whole.
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).with_context(|| format!("events file {} breaks off", path.display()))?;
    read_groups(path, builder(path, bytes::Bytes::from(bytes))?, None, columns, wanted, sink)
}

fn read_groups<R: ChunkReader + 'static>(
    path: &Path,
    builder: ParquetRecordBatchReaderBuilder<R>,
    part: Option<usize>,
    columns: &ColumnMap,
    wanted: Wanted<'_>,
    sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
) -> Result<()> {
    let schema = Arc::clone(builder.schema());
    let mut roots = Vec::new();
    for field in Field::ALL {
        let Ok(index) = schema.index_of(columns.name(field)) else {
            if field.is_required() || columns.is_mapped(field) {
                bail!("{}", missing_column(path, field, columns, schema.fields().iter().map(|f| f.name().as_str())));
            }
            continue;
        };
        let is_wanted = match wanted {
            Wanted::Whole => true,
            Wanted::Keys(fields) => field == Field::Timestamp || fields.contains(&field),
        };
        if is_wanted {
            roots.push(index);
        }
    }
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let first_row: i64 = builder.metadata().row_groups().iter().take(part.unwrap_or(0)).map(|group| group.num_rows()).sum();
    let mut row = u64::try_from(first_row).unwrap_or_default();
    let builder = match part {
        Some(part) => builder.with_row_groups(vec![part]),
        None => builder,
    };
    let reader: ParquetRecordBatchReader = builder
        .with_projection(mask)
        .with_batch_size(BATCH_ROWS)
        .build()
        .with_context(|| format!("events file {}", path.display()))?;
    for batch in reader {
        let batch = batch.with_context(|| format!("events file {} is damaged after row {row}", path.display()))?;
        sink(&convert(path, row, &batch, columns)?)?;
        row += u64::try_from(batch.num_rows())?;
    }
    Ok(())
}

/// The message for a column that a file lacks.
pub(super) fn missing_column<'n>(path: &Path, field: Field, columns: &ColumnMap, found: impl Iterator<Item = &'n str>) -> String {
    let found: Vec<_> = found.collect();
    format!(
        "events file {} has no column `{}`: name the one that holds it in source.columns, `{}: <column>` (columns found: {})",
        path.display(),
        columns.name(field),
        field.name(),
        found.join(", ")
    )
}

fn convert(path: &Path, first_row: u64, batch: &RecordBatch, columns: &ColumnMap) -> Result<EventBatch> {
    let rows = batch.num_rows();
    let column = |field: Field| batch.column_by_name(columns.name(field));
    let wrong_type = |field: Field, array: &ArrayRef, expected: &str| {
        format!("events file {}: column `{}` is {}, expected {expected}", path.display(), columns.name(field), array.data_type())
    };
    let text = |field: Field| -> Result<StringArray> {
        let Some(array) = column(field) else { return Ok(StringArray::new_null(rows)) };
        texts(array).with_context(|| wrong_type(field, array, "text"))
    };
    let mut problems = Vec::new();
    let mut instants = |field: Field| -> Result<Int64Array> {
        let Some(array) = column(field) else { return Ok(Int64Array::new_null(rows)) };
        let place = |row: usize| format!("{} row {}", path.display(), first_row + row as u64 + 1);
        nanoseconds(array, field, &place, &mut problems)
            .with_context(|| wrong_type(field, array, "a timestamp, or RFC 3339 text"))
    };
    let (timestamp, ingested_at) = (instants(Field::Timestamp)?, instants(Field::IngestedAt)?);
    problems.sort_by_key(|problem: &Problem| problem.row);
    problems.dedup_by_key(|problem| problem.row);
    let properties = match column(Field::Properties) {
        None => StringArray::new_null(rows),
        Some(array) => json_texts(array).with_context(|| wrong_type(Field::Properties, array, "JSON text, a struct or a map"))?,
    };
    let deleted = match column(Field::Deleted) {
        None => BooleanArray::new_null(rows),
        Some(array) if matches!(array.data_type(), DataType::Boolean | DataType::UInt8 | DataType::Int8) => {
            cast(array, &DataType::Boolean)?.as_boolean().clone()
        }
        Some(array) => bail!("{}", wrong_type(Field::Deleted, array, "a boolean")),
    };
    Ok(EventBatch {
        tenant_id: text(Field::TenantId)?,
        id: text(Field::Id)?,
        event_name: text(Field::EventName)?,
        external_customer_id: text(Field::ExternalCustomerId)?,
        timestamp,
        ingested_at,
        properties,
        deleted,
        problems,
    })
}

/// A column as text; whole numbers (as ids are) are written out.
fn texts(array: &ArrayRef) -> Result<StringArray> {
    let plain = match array.data_type() {
        DataType::Utf8 => return Ok(array.as_string::<i32>().clone()),
        DataType::Dictionary(_, value) => value.as_ref().clone(),
        other => other.clone(),
    };
    let textual = matches!(plain, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) || plain.is_integer();
    if !textual {
        bail!("no text");
    }
    Ok(cast(array, &DataType::Utf8)?.as_string::<i32>().clone())
}

/// Instants in nanoseconds. Text that is none becomes null and a problem of its row.
fn nanoseconds(
    array: &ArrayRef,
    field: Field,
    place: &dyn Fn(usize) -> String,
    problems: &mut Vec<Problem>,
) -> Result<Int64Array> {
    let mut checked = |row: usize, instant: Result<Timestamp, String>| match instant {
        Ok(instant) => Some(instant.nanos()),
        Err(error) => {
            problems.push(Problem { row, detail: format!("{}: {} {error}", place(row), field.name()), raw: None });
            None
        }
    };
    match array.data_type() {
        DataType::Timestamp(unit, _) => {
            let factor = match unit {
                TimeUnit::Second => 1_000_000_000,
                TimeUnit::Millisecond => 1_000_000,
                TimeUnit::Microsecond => 1_000,
                TimeUnit::Nanosecond => 1,
            };
            let values = array.to_data();
            let values = arrow::array::make_array(values.into_builder().data_type(DataType::Int64).build()?);
            let values = values.as_primitive::<Int64Type>();
            let convert = |(row, value): (usize, Option<i64>)| {
                let instant = value?.checked_mul(factor).and_then(Timestamp::in_range);
                checked(row, instant.ok_or_else(|| "is outside of the years 1700 to 2199".to_owned()))
            };
            Ok(values.iter().enumerate().map(convert).collect())
        }
        DataType::Date32 | DataType::Date64 => {
            let array = cast(array, &DataType::Timestamp(TimeUnit::Nanosecond, None))?;
            Ok(array.as_primitive::<TimestampNanosecondType>().reinterpret_cast::<Int64Type>())
        }
        other if other.is_integer() => bail!("a number could be seconds or milliseconds"),
        _ => {
            let texts = texts(array)?;
            let parse = |(row, text): (usize, Option<&str>)| {
                checked(row, text?.parse().map_err(|error: crate::model::timestamp::TimestampError| error.to_string()))
            };
            Ok(texts.iter().enumerate().map(parse).collect())
        }
    }
}

/// A column as JSON text: text as it is, structs and maps encoded.
fn json_texts(array: &ArrayRef) -> Result<StringArray> {
    if !array.data_type().is_nested() {
        return texts(array);
    }
    let field = Arc::new(ArrowField::new("properties", array.data_type().clone(), true));
    let options = EncoderOptions::default();
    let mut encoder = make_encoder(&field, array.as_ref(), &options)?;
    let mut out = StringBuilder::with_capacity(array.len(), array.len() * 64);
    let mut text = Vec::new();
    for row in 0..array.len() {
        if encoder.is_null(row) {
            out.append_null();
            continue;
        }
        text.clear();
        encoder.encode(row, &mut text);
        out.append_value(std::str::from_utf8(&text)?);
    }
    Ok(out.finish())
}

/// Any column as text, nested ones as JSON: for reference tables.
pub(crate) fn reference_texts(array: &ArrayRef) -> Result<StringArray> {
    match array.data_type() {
        other if other.is_nested() => json_texts(array),
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => {
            let nanos = nanoseconds(array, Field::Timestamp, &|row| format!("row {}", row + 1), &mut Vec::new())?;
            Ok(nanos.iter().map(|value| value.map(|nanos| Timestamp::from_nanos(nanos).to_string())).collect())
        }
        _ => Ok(cast(array, &DataType::Utf8)?.as_string::<i32>().clone()),
    }
}
