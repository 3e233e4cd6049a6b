//! Events from Arrow record batches, as Parquet files and databases deliver them;
//! nested properties become JSON text.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, StringArray, StringBuilder};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field as ArrowField, Int64Type, TimeUnit, TimestampNanosecondType};
use arrow::json::writer::{EncoderOptions, make_encoder};

use super::files::{ColumnMap, Field};
use super::{EventBatch, Problem};
use crate::model::timestamp::Timestamp;

/// The message for a column that a source lacks.
pub fn missing_column<'n>(origin: &str, field: Field, columns: &ColumnMap, found: impl Iterator<Item = &'n str>) -> String {
    let found: Vec<_> = found.collect();
    format!(
        "{origin} has no column `{}`: name the one that holds it in source.columns, `{}: <column>` (columns found: {})",
        columns.name(field),
        field.name(),
        found.join(", ")
    )
}

/// The events of a record batch. `origin` is what people call its source.
///
/// # Errors
/// Where a column has a type that its field cannot have.
pub fn convert(origin: &str, first_row: u64, batch: &RecordBatch, columns: &ColumnMap) -> Result<EventBatch> {
    let rows = batch.num_rows();
    let column = |field: Field| batch.column_by_name(columns.name(field));
    let wrong_type = |field: Field, array: &ArrayRef, expected: &str| {
        format!("{origin}: column `{}` is {}, expected {expected}", columns.name(field), array.data_type())
    };
    let text = |field: Field| -> Result<StringArray> {
        let Some(array) = column(field) else { return Ok(StringArray::new_null(rows)) };
        texts(array).with_context(|| wrong_type(field, array, "text"))
    };
    let mut problems = Vec::new();
    let mut instants = |field: Field| -> Result<Int64Array> {
        let Some(array) = column(field) else { return Ok(Int64Array::new_null(rows)) };
        let place = |row: usize| format!("{origin} row {}", first_row + row as u64 + 1);
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
pub fn reference_texts(array: &ArrayRef) -> Result<StringArray> {
    match array.data_type() {
        other if other.is_nested() => json_texts(array),
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => {
            let nanos = nanoseconds(array, Field::Timestamp, &|row| format!("row {}", row + 1), &mut Vec::new())?;
            Ok(nanos.iter().map(|value| value.map(|nanos| Timestamp::from_nanos(nanos).to_string())).collect())
        }
        _ => Ok(cast(array, &DataType::Utf8)?.as_string::<i32>().clone()),
    }
}
