//! Events files: Parquet or NDJSON.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use arrow::array::{ArrayRef, BooleanBuilder, RecordBatch, StringBuilder, TimestampMicrosecondBuilder};
use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use super::property::write_digits;
use crate::model::property::write_json_text;
use crate::model::timestamp::Timestamp;

/// The format of events files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FileFormat {
    Parquet,
    Ndjson,
}

impl FileFormat {
    pub const ALL: [FileFormat; 2] = [FileFormat::Parquet, FileFormat::Ndjson];

    pub fn extension(self) -> &'static str {
        match self {
            FileFormat::Parquet => "parquet",
            FileFormat::Ndjson => "ndjson",
        }
    }

    /// A new file of this format.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn create(self, path: &Path) -> Result<Box<dyn EventWriter>> {
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(match self {
            FileFormat::Parquet => Box::new(ParquetFile::new(file)?),
            FileFormat::Ndjson => Box::new(NdjsonFile::new(file)),
        })
    }
}

/// A row of an events file. Instants are microseconds since 1970.
#[derive(Debug, Clone, Default)]
pub struct Row<'p> {
    pub tenant_id: &'p str,
    pub id: String,
    pub event_name: &'p str,
    pub external_customer_id: &'p str,
    pub timestamp: Option<i64>,
    pub ingested_at: i64,
    pub properties: String,
    pub deleted: bool,
}

/// Writes the rows of one file.
pub trait EventWriter {
    /// # Errors
    /// Where the file cannot be written.
    fn write(&mut self, row: &Row<'_>) -> Result<()>;

    /// Completes the file; returns its size in bytes.
    ///
    /// # Errors
    /// As [`EventWriter::write`].
    fn finish(self: Box<Self>) -> Result<u64>;
}

const BATCH_ROWS: usize = 16_384;
/// Readers take a row group at a time, and each on a thread of its own.
const GROUP_ROWS: usize = 122_880;

struct ParquetFile {
    writer: ArrowWriter<File>,
    schema: Arc<Schema>,
    /// Tenant, id, name, customer, properties.
    texts: [StringBuilder; 5],
    timestamp: TimestampMicrosecondBuilder,
    ingested_at: TimestampMicrosecondBuilder,
    deleted: BooleanBuilder,
    rows: usize,
}

impl ParquetFile {
    fn new(file: File) -> Result<Self> {
        let instant = || DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let schema = Arc::new(Schema::new(vec![
            Field::new("tenant_id", DataType::Utf8, false),
            Field::new("id", DataType::Utf8, false),
            Field::new("event_name", DataType::Utf8, false),
            Field::new("external_customer_id", DataType::Utf8, false),
            Field::new("timestamp", instant(), true),
            Field::new("ingested_at", instant(), false),
            Field::new("properties", DataType::Utf8, false),
            Field::new("deleted", DataType::Boolean, false),
        ]));
        let mut properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_statistics_enabled(EnabledStatistics::Chunk);
        // Hardly any value comes twice: a dictionary would be built in vain.
        for name in ["id", "timestamp", "ingested_at", "properties"] {
            properties = properties.set_column_dictionary_enabled(ColumnPath::from(name), false);
        }
        for name in ["timestamp", "ingested_at"] {
            properties = properties.set_column_encoding(ColumnPath::from(name), Encoding::DELTA_BINARY_PACKED);
        }
        for name in ["id", "properties"] {
            properties = properties.set_column_statistics_enabled(ColumnPath::from(name), EnabledStatistics::None);
        }
        Ok(ParquetFile {
            writer: ArrowWriter::try_new(file, Arc::clone(&schema), Some(properties.build()))?,
            schema,
            texts: Default::default(),
            timestamp: TimestampMicrosecondBuilder::new().with_timezone("UTC"),
            ingested_at: TimestampMicrosecondBuilder::new().with_timezone("UTC"),
            deleted: BooleanBuilder::new(),
            rows: 0,
        })
    }

    fn flush(&mut self) -> Result<()> {
        let [tenant, id, name, customer, properties] = self.texts.each_mut().map(|texts| Arc::new(texts.finish()) as ArrayRef);
        let (timestamp, ingested_at) = (Arc::new(self.timestamp.finish()), Arc::new(self.ingested_at.finish()));
        let columns = vec![tenant, id, name, customer, timestamp, ingested_at, properties, Arc::new(self.deleted.finish())];
        self.writer.write(&RecordBatch::try_new(Arc::clone(&self.schema), columns)?)?;
        self.rows = 0;
        Ok(())
    }
}

impl EventWriter for ParquetFile {
    fn write(&mut self, row: &Row<'_>) -> Result<()> {
        let [tenant, id, name, customer, properties] = &mut self.texts;
        tenant.append_value(row.tenant_id);
        id.append_value(&row.id);
        name.append_value(row.event_name);
        customer.append_value(row.external_customer_id);
        properties.append_value(&row.properties);
        self.timestamp.append_option(row.timestamp);
        self.ingested_at.append_value(row.ingested_at);
        self.deleted.append_value(row.deleted);
        self.rows += 1;
        if self.rows < BATCH_ROWS { Ok(()) } else { self.flush() }
    }

    fn finish(mut self: Box<Self>) -> Result<u64> {
        self.flush()?;
        self.writer.finish()?;
        Ok(self.writer.bytes_written() as u64)
    }
}

struct NdjsonFile {
    output: BufWriter<File>,
    line: String,
    date: Date,
    bytes: u64,
}

impl NdjsonFile {
    fn new(file: File) -> Self {
        NdjsonFile { output: BufWriter::with_capacity(1 << 20, file), line: String::new(), date: Date::default(), bytes: 0 }
    }
}

impl EventWriter for NdjsonFile {
    fn write(&mut self, row: &Row<'_>) -> Result<()> {
        let line = &mut self.line;
        line.clear();
        let texts = [
            ("{\"tenant_id\":", row.tenant_id),
            (",\"id\":", &row.id),
            (",\"event_name\":", row.event_name),
            (",\"external_customer_id\":", row.external_customer_id),
        ];
        for (lead, text) in texts {
            line.push_str(lead);
            write_json_text(text, line);
        }
        line.push_str(",\"timestamp\":");
        match row.timestamp {
            Some(timestamp) => self.date.write(timestamp, line),
            None => line.push_str("null"),
        }
        line.push_str(",\"ingested_at\":");
        self.date.write(row.ingested_at, line);
        line.push_str(",\"properties\":");
        line.push_str(&row.properties);
        line.push_str(if row.deleted { ",\"deleted\":true}\n" } else { "}\n" });
        self.bytes += line.len() as u64;
        self.output.write_all(line.as_bytes())?;
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<u64> {
        self.output.flush()?;
        Ok(self.bytes)
    }
}

/// The date written last: calendar arithmetic costs more than the digits.
#[derive(Default)]
struct Date {
    day: i64,
    text: String,
}

impl Date {
    /// Appends an instant as a JSON string.
    fn write(&mut self, micros: i64, out: &mut String) {
        const DAY: i64 = 86_400_000_000;
        let day = micros.div_euclid(DAY);
        if self.text.is_empty() || self.day != day {
            let midnight = Timestamp::from_nanos(day.saturating_mul(DAY * 1000));
            (self.day, self.text) = (day, format!("\"{}T", midnight.utc().date()));
        }
        out.push_str(&self.text);
        let of_day = micros.rem_euclid(DAY).unsigned_abs();
        for (value, width, end) in [
            (of_day / 3_600_000_000, 2, ':'),
            (of_day / 60_000_000 % 60, 2, ':'),
            (of_day / 1_000_000 % 60, 2, '.'),
            (of_day % 1_000_000, 6, 'Z'),
        ] {
            write_digits(value, width, out);
            out.push(end);
        }
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_written_in_full() {
        let mut date = Date::default();
        for text in ["2026-03-29T01:02:03.000004Z", "2026-03-29T23:59:59.999999Z", "1969-12-31T23:00:00.000000Z"] {
            let mut shown = String::new();
            date.write(text.parse::<Timestamp>().unwrap().nanos() / 1000, &mut shown);
            assert_eq!(shown, format!("\"{text}\""));
        }
    }
}
