//! Events from Arrow record batches, as Parquet files and databases deliver them;
//! nested properties become JSON text.

use std::sync::{Arc, LazyLock};

use anyhow::{Context, Result, bail};
use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, RecordBatch, StringArray, StringBuilder};
use arrow::compute::{cast, max, min};
use arrow::datatypes::{DataType, Field as ArrowField, FieldRef, Float64Type, Int32Type, Int64Type, TimeUnit};
use arrow::error::ArrowError;
use arrow::json::writer::{Encoder, EncoderFactory, EncoderOptions, NullableEncoder, make_encoder};
use chrono::{DateTime, SecondsFormat};

use super::batch::{Texts, flag};
use super::{EventBatch, EventRef, Problem};
use crate::model::columns::{ColumnMap, Field};
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
    convert_rows(origin, &|row| first_row + row as u64, batch, columns)
}

/// As [`convert`]; `number` gives the place of each row in its source.
///
/// # Errors
/// As [`convert`].
pub fn convert_rows(origin: &str, number: &dyn Fn(usize) -> u64, batch: &RecordBatch, columns: &ColumnMap) -> Result<EventBatch> {
    let rows = batch.num_rows();
    let column = |field: Field| batch.column_by_name(columns.name(field));
    let wrong_type = |field: Field, array: &ArrayRef, expected: &str| {
        format!("{origin}: column `{}` is {}, expected {expected}", columns.name(field), array.data_type())
    };
    let text = |field: Field| -> Result<Texts> {
        let Some(array) = column(field) else { return Ok(Texts::nulls(rows)) };
        texts(array).with_context(|| wrong_type(field, array, "text"))
    };
    let place = |row: usize| format!("{origin} row {}", number(row) + 1);
    let mut problems = Vec::new();
    let mut instants = |field: Field| -> Result<Int64Array> {
        let Some(array) = column(field) else { return Ok(Int64Array::new_null(rows)) };
        nanoseconds(array, field, &place, &mut problems)
            .with_context(|| wrong_type(field, array, "a timestamp, or RFC 3339 text"))
    };
    let (timestamp, ingested_at) = (instants(Field::Timestamp)?, instants(Field::IngestedAt)?);
    let properties = match column(Field::Properties) {
        None => Texts::nulls(rows),
        Some(array) => json_texts(array).with_context(|| wrong_type(Field::Properties, array, "JSON text, a struct or a map"))?,
    };
    let deleted = match column(Field::Deleted) {
        None => BooleanArray::new_null(rows),
        Some(array) => flags(array, &place, &mut problems).with_context(|| wrong_type(Field::Deleted, array, "a boolean"))?,
    };
    let mut batch = EventBatch {
        tenant_id: text(Field::TenantId)?,
        id: text(Field::Id)?,
        event_name: text(Field::EventName)?,
        external_customer_id: text(Field::ExternalCustomerId)?,
        timestamp,
        ingested_at,
        properties,
        deleted,
        problems: Vec::new(),
    };
    // A scan for keys has not every column.
    let is_whole = Field::ALL.into_iter().all(|field| !field.is_required() || column(field).is_some());
    if is_whole && batch.may_have_gaps() {
        let missing = |(row, event): (usize, EventRef<'_>)| Some((row, event.missing_field()?));
        problems
            .extend(batch.rows().enumerate().filter_map(missing).map(|(row, field)| Problem::missing(row, field, &place(row))));
    }
    problems.sort_by_key(|problem: &Problem| problem.row);
    problems.dedup_by_key(|problem| problem.row);
    batch.problems = problems;
    Ok(batch)
}

/// A column of booleans, numbers that stand for them, or text as CSV has it.
fn flags(array: &ArrayRef, place: &dyn Fn(usize) -> String, problems: &mut Vec<Problem>) -> Result<BooleanArray> {
    if array.data_type().is_integer() || matches!(array.data_type(), DataType::Boolean | DataType::Null) {
        return Ok(cast(array, &DataType::Boolean)?.as_boolean().clone());
    }
    let texts = plain_texts(array)?;
    let parse = |(row, text): (usize, Option<&str>)| {
        let flag = flag(text);
        if let Err(error) = &flag {
            problems.push(Problem { row, detail: format!("{}: {error}", place(row)), raw: None });
        }
        flag.ok()
    };
    Ok(texts.iter().enumerate().map(parse).collect())
}

/// A column as text, in its own layout where that is a common one; whole numbers (as
/// ids are) are written out.
fn texts(array: &ArrayRef) -> Result<Texts> {
    if let Some(dictionary) = array.as_dictionary_opt::<Int32Type>()
        && let Some(values) = dictionary.values().as_string_opt::<i32>()
    {
        return Ok(Texts::Dictionary { keys: dictionary.keys().clone(), values: values.clone() });
    }
    match array.data_type() {
        DataType::Utf8View => Ok(Texts::Views(array.as_string_view().clone())),
        DataType::Null => Ok(Texts::nulls(array.len())),
        _ => Ok(Texts::Plain(plain_texts(array)?)),
    }
}

fn plain_texts(array: &ArrayRef) -> Result<StringArray> {
    let plain = match array.data_type() {
        DataType::Utf8 => return Ok(array.as_string::<i32>().clone()),
        DataType::Null => return Ok(StringArray::new_null(array.len())),
        DataType::Dictionary(_, value) => value.as_ref(),
        other => other,
    };
    let textual = matches!(plain, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) || plain.is_integer();
    if !textual {
        bail!("a text is needed: write the column as text (UTF-8)");
    }
    Ok(cast(array, &DataType::Utf8)?.as_string::<i32>().clone())
}

/// Whole numbers since 1970 that are instants by their column's type.
struct RawInstants {
    values: Int64Array,
    /// Nanoseconds in one.
    factor: i64,
}

impl RawInstants {
    /// In nanoseconds, where all of them are instants of events: nearly always.
    fn all_in_range(&self) -> Option<Int64Array> {
        let in_range = |value: i64| value.checked_mul(self.factor).and_then(Timestamp::in_range).is_some();
        let (first, last) = (min(&self.values)?, max(&self.values)?);
        (in_range(first) && in_range(last)).then(|| self.values.unary(|value| value.wrapping_mul(self.factor)))
    }
}

/// The numbers of a column of timestamps or dates; `None` for other types.
fn raw_instants(array: &ArrayRef) -> Result<Option<RawInstants>> {
    let factor = match array.data_type() {
        DataType::Date32 => 86_400 * 1_000_000_000,
        DataType::Timestamp(TimeUnit::Second, _) => 1_000_000_000,
        DataType::Timestamp(TimeUnit::Millisecond, _) | DataType::Date64 => 1_000_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000,
        DataType::Timestamp(TimeUnit::Nanosecond, _) => 1,
        _ => return Ok(None),
    };
    let values = if *array.data_type() == DataType::Date32 {
        cast(array, &DataType::Int32).and_then(|days| cast(&days, &DataType::Int64))?
    } else {
        cast(array, &DataType::Int64)?
    };
    Ok(Some(RawInstants { values: values.as_primitive::<Int64Type>().clone(), factor }))
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
    if let Some(instants) = raw_instants(array)? {
        if let Some(nanoseconds) = instants.all_in_range() {
            return Ok(nanoseconds);
        }
        let convert = |(row, value): (usize, Option<i64>)| {
            let instant = value?.checked_mul(instants.factor).and_then(Timestamp::in_range);
            checked(row, instant.ok_or_else(|| "is outside of the years 1700 to 2199".to_owned()))
        };
        return Ok(instants.values.iter().enumerate().map(convert).collect());
    }
    match array.data_type() {
        DataType::Null => Ok(Int64Array::new_null(array.len())),
        other if other.is_integer() => bail!("a number could be seconds or milliseconds"),
        _ => {
            let texts = plain_texts(array)?;
            let parse = |(row, text): (usize, Option<&str>)| {
                checked(
                    row,
                    text.filter(|text| !text.is_empty())?
                        .parse()
                        .map_err(|error: crate::model::timestamp::TimestampError| error.to_string()),
                )
            };
            Ok(texts.iter().enumerate().map(parse).collect())
        }
    }
}

/// A column as JSON text: text as it is, structs and maps encoded.
fn json_texts(array: &ArrayRef) -> Result<Texts> {
    if array.data_type().is_nested() { Ok(encoded(array)?.into()) } else { texts(array) }
}

/// Where a nested type holds bytes: nothing says that they are text, and JSON has none.
fn bytes_in(data_type: &DataType, path: &str) -> Option<String> {
    let inner = |field: &ArrowField| bytes_in(field.data_type(), &format!("{path}.{}", field.name()));
    match data_type {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => Some(path.to_owned()),
        DataType::Struct(fields) => fields.iter().find_map(|field| inner(field)),
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::ListView(field)
        | DataType::LargeListView(field)
        | DataType::FixedSizeList(field, _)
        | DataType::Map(field, _) => inner(field),
        DataType::Dictionary(_, values) => bytes_in(values, path),
        _ => None,
    }
}

/// JSON has no word for floating-point numbers that are none, and null would be a value that is
/// absent: they become texts, which no meter takes for a number.
#[derive(Debug)]
struct NoNumbers;

/// Floating-point numbers, as they are and as JSON.
struct Floats<'a> {
    values: ArrayRef,
    encoder: NullableEncoder<'a>,
}

impl EncoderFactory for NoNumbers {
    fn make_default_encoder<'a>(
        &self,
        field: &'a FieldRef,
        array: &'a dyn Array,
        _: &'a EncoderOptions,
    ) -> std::result::Result<Option<NullableEncoder<'a>>, ArrowError> {
        static PLAIN: LazyLock<EncoderOptions> = LazyLock::new(EncoderOptions::default);
        if !array.data_type().is_floating() {
            return Ok(None);
        }
        let values = cast(array, &DataType::Float64)?;
        let floats = Floats { values, encoder: make_encoder(field, array, &PLAIN)? };
        Ok(Some(NullableEncoder::new(Box::new(floats), array.nulls().cloned())))
    }
}

impl Encoder for Floats<'_> {
    fn encode(&mut self, row: usize, out: &mut Vec<u8>) {
        match self.values.as_primitive::<Float64Type>().value(row) {
            value if value.is_finite() => self.encoder.encode(row, out),
            value => out.extend_from_slice(format!("\"{value}\"").as_bytes()),
        }
    }
}

/// A nested column as JSON text.
fn encoded(array: &ArrayRef) -> Result<StringArray> {
    if let Some(path) = bytes_in(array.data_type(), "it") {
        bail!("{path} holds bytes: write them as text (UTF-8)");
    }
    let field = Arc::new(ArrowField::new("properties", array.data_type().clone(), true));
    let options = EncoderOptions::default().with_encoder_factory(Arc::new(NoNumbers));
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

/// Any column as text, nested ones as JSON: for reference tables. Instants of any
/// year are written out; whether they are in range is for the reader to say.
pub fn reference_texts(array: &ArrayRef) -> Result<StringArray> {
    let Some(values) = raw_instants(array)? else {
        return match array.data_type() {
            other if other.is_nested() => encoded(array),
            _ => Ok(cast(array, &DataType::Utf8)?.as_string::<i32>().clone()),
        };
    };
    let text = |(value, factor): (i64, i64)| {
        let nanos = i128::from(value) * i128::from(factor);
        let (seconds, rest) = (nanos.div_euclid(1_000_000_000), nanos.rem_euclid(1_000_000_000));
        let instant = i64::try_from(seconds).ok().zip(u32::try_from(rest).ok());
        let instant = instant.and_then(|(seconds, rest)| DateTime::from_timestamp(seconds, rest));
        instant.map_or_else(|| value.to_string(), |instant| instant.to_rfc3339_opts(SecondsFormat::AutoSi, true))
    };
    Ok(values.values.iter().map(|value| value.map(|value| text((value, values.factor)))).collect())
}
