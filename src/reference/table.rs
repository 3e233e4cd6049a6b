//! Reference tables of any format as Polars frames of text.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use arrow::array::Array;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use polars::prelude::{Column, DataFrame, NamedFrom, Series};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::clickhouse_client::Database;
use crate::config::{ClickHouseConnection, ReferenceTable};
use crate::fault::configuration;
use crate::source::arrow_batch::reference_texts;
use crate::source::files::csv::{END, UNCLOSED, with_end};
use crate::source::files::{parquet_metadata, without_bom};

/// A table as it was read: text columns, and where each row stands.
pub struct Table {
    /// What people call it: the file, or the query.
    name: String,
    pub frame: DataFrame,
    rows: Vec<u64>,
    unit: &'static str,
    /// Columns that hold binary floats: no amount and no id can be read from them.
    floats: Vec<String>,
    /// What to do about them.
    exact: &'static str,
}

impl Table {
    /// Reads CSV, NDJSON or Parquet, by the file's name.
    ///
    /// # Errors
    /// A configuration fault that names the file and, where it can, the row.
    fn read_file(path: &Path) -> Result<Table> {
        let problem = |error: anyhow::Error| configuration(format!("reference table {}: {error:#}", path.display()));
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let mut columns = Columns::default();
        let unit = match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("csv") => columns.read_csv(path).map(|()| "line"),
            Some("ndjson" | "jsonl") => columns.read_ndjson(path).map(|()| "line"),
            Some("parquet") => columns.read_parquet(path).map(|()| "row"),
            _ => Err(anyhow!(
                "the name does not end in .csv, .ndjson, .jsonl or .parquet (of meters and prices, also .yaml or .yml)"
            )),
        }
        .map_err(problem)?;
        let frame = columns.frame().map_err(problem)?;
        let Columns { rows, floats, .. } = columns;
        Ok(Table { name: path.display().to_string(), frame, rows, unit, floats, exact: "store it as text or decimal" })
    }

    /// Rows of a ClickHouse query, every column as text.
    fn query(connection: &ClickHouseConnection, sql: &str) -> Result<Table> {
        // Whatever else a statement would do, within this one it can only read.
        let read = format!("SELECT * FROM ({})", sql.trim().trim_end_matches(';'));
        let answer = Database::connect(connection)?.typed_texts(&read);
        let (header, cells) = answer.with_context(|| format!("reference query `{sql}`"))?;
        let is_float = |(_, type_name): &(&String, &String)| holds_floats(type_name);
        let floats = header.names.iter().zip(&header.types).filter(is_float).map(|(name, _)| name.clone()).collect();
        let mut columns = Columns { texts: vec![Vec::new(); header.names.len()], names: header.names, ..Columns::default() };
        for (number, row) in (1u64..).zip(cells) {
            for (column, cell) in columns.texts.iter_mut().zip(row) {
                column.push(cell);
            }
            columns.rows.push(number);
        }
        let frame = columns.frame()?;
        let exact = "store it as text or Decimal, or let the query select toString(…) of it";
        Ok(Table { name: format!("query `{}`", sql.trim()), frame, rows: columns.rows, unit: "row", floats, exact })
    }

    /// Reads a reference table, wherever it is.
    ///
    /// # Errors
    /// As [`Table::read_file`]; where the query fails.
    pub fn read(table: &ReferenceTable) -> Result<Table> {
        match table {
            ReferenceTable::File(path) => Table::read_file(path),
            ReferenceTable::Query { connection, sql } => Table::query(connection, sql),
        }
    }

    pub fn height(&self) -> usize {
        self.rows.len()
    }

    /// For messages: file and line of a row.
    pub fn place(&self, row: usize) -> String {
        format!("{} {} {}", self.name, self.unit, self.rows.get(row).copied().unwrap_or_default())
    }

    /// A configuration fault at a row.
    pub fn error(&self, row: usize, message: impl std::fmt::Display) -> anyhow::Error {
        configuration(format!("{}: {message}", self.place(row)))
    }

    /// A text column; absent optional columns are all null, as empty texts are.
    ///
    /// # Errors
    /// Where a required column is missing.
    pub fn texts(&self, name: &str, required: bool) -> Result<Vec<Option<String>>> {
        let Ok(column) = self.frame.column(name) else {
            if required {
                let found: Vec<_> = self.frame.get_column_names().iter().map(|name| name.to_string()).collect();
                return Err(configuration(format!(
                    "reference table {} has no column `{name}` (columns found: {})",
                    self.name,
                    found.join(", ")
                )));
            }
            return Ok(vec![None; self.height()]);
        };
        let texts = column.str().with_context(|| format!("column {name}"))?;
        let texts: Vec<_> = texts.iter().map(|text| text.filter(|text| !text.is_empty()).map(str::to_owned)).collect();
        if let Some(row) = texts.iter().position(Option::is_some) {
            self.reject_float(row, name)?;
        }
        match texts.iter().position(Option::is_none) {
            Some(row) if required => Err(self.error(row, format!("`{name}` is empty, but every row needs it"))),
            _ => Ok(texts),
        }
    }

    /// Money must not pass through a float, and 1.0 is no id.
    fn reject_float(&self, row: usize, name: &str) -> Result<()> {
        if self.floats.iter().any(|float| float == name) {
            return Err(self.error(row, format!("column `{name}` holds binary floats: {}", self.exact)));
        }
        Ok(())
    }

    /// A row as a JSON object without its empty fields; `nested` columns hold JSON.
    ///
    /// # Errors
    /// Where a nested column holds no JSON.
    pub fn json_row(&self, row: usize, nested: &[&str]) -> Result<Value> {
        let mut object = serde_json::Map::new();
        for column in self.frame.columns() {
            let text = column.str().ok().and_then(|texts| texts.get(row)).filter(|text| !text.is_empty());
            let Some(text) = text else { continue };
            let name = column.name().to_string();
            self.reject_float(row, &name)?;
            let value = if nested.contains(&name.as_str()) || (name == "window" && text.starts_with('{')) {
                serde_json::from_str(text).map_err(|error| self.error(row, format!("`{name}` is no JSON: {error}")))?
            } else {
                Value::from(text)
            };
            object.insert(name, value);
        }
        Ok(Value::Object(object))
    }
}

/// Whether values of one of ClickHouse's types are binary floats, or hold some.
fn holds_floats(type_name: &str) -> bool {
    type_name.split(['(', ')', ',', ' ']).any(|word| matches!(word, "Float32" | "Float64" | "BFloat16"))
}

/// A JSON object whose values stay as they are written: no digit passes through a float.
struct RawObject<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for RawObject<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Vec<(String, &'de RawValue)>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a JSON object with one row")
            }
            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(pairs)
            }
        }
        deserializer.deserialize_map(Pairs).map(RawObject)
    }
}

/// Text without its quotes, null as none, everything else as written.
fn raw_text(raw: &str) -> Result<Option<String>, serde_json::Error> {
    match raw.as_bytes().first() {
        Some(b'"') => serde_json::from_str(raw).map(Some),
        Some(b'n') => Ok(None),
        _ => Ok(Some(raw.to_owned())),
    }
}

/// Columns under construction.
#[derive(Default)]
struct Columns {
    names: Vec<String>,
    texts: Vec<Vec<Option<String>>>,
    rows: Vec<u64>,
    floats: Vec<String>,
}

impl Columns {
    fn column(&mut self, name: &str) -> Option<&mut Vec<Option<String>>> {
        let at = self.names.iter().position(|known| known == name).unwrap_or_else(|| {
            self.names.push(name.to_owned());
            // Rows that came before have no such field.
            self.texts.push(vec![None; self.rows.len()]);
            self.names.len() - 1
        });
        self.texts.get_mut(at)
    }

    fn read_csv(&mut self, path: &Path) -> Result<()> {
        let (input, lines) = with_end(File::open(path)?);
        let mut reader = csv::ReaderBuilder::new().flexible(true).trim(csv::Trim::All).from_reader(input);
        let header = reader.headers()?.clone();
        let mut records = reader.records().collect::<Result<Vec<_>, _>>()?;
        let is_whole = |record: Option<csv::StringRecord>| record.is_some_and(|last| last.len() == 1 && last.get(0) == Some(END));
        // Of an empty file, the end is the header.
        if !is_whole(Some(header.clone())) {
            ensure!(is_whole(records.pop()), "{UNCLOSED}");
            self.name_columns(&header)?;
        }
        for record in records {
            let line = lines.of(record.position());
            ensure!(record.len() == header.len(), "line {line}: {} fields where the header has {}", record.len(), header.len());
            for (text, column) in record.iter().zip(&mut self.texts) {
                column.push(Some(text.to_owned()));
            }
            self.rows.push(line);
        }
        Ok(())
    }

    /// One column for each name of a header, in its order.
    fn name_columns(&mut self, header: &csv::StringRecord) -> Result<()> {
        for name in header {
            ensure!(!self.names.iter().any(|known| known == name), "has two columns `{name}`: rename or remove one");
            self.column(name);
        }
        Ok(())
    }

    fn read_ndjson(&mut self, path: &Path) -> Result<()> {
        let mut text = String::new();
        File::open(path)?.read_to_string(&mut text)?;
        for (number, line) in (1u64..).zip(without_bom(&text).lines()) {
            if line.trim().is_empty() {
                continue;
            }
            let object: RawObject<'_> = serde_json::from_str(line).with_context(|| format!("line {number}"))?;
            for (name, raw) in object.0 {
                let height = self.rows.len();
                let Some(column) = self.column(&name) else { continue };
                ensure!(column.len() == height, "line {number}: has `{name}` twice");
                column.push(raw_text(raw.get()).with_context(|| format!("line {number}: `{name}`"))?);
            }
            self.rows.push(number);
            let height = self.rows.len();
            for column in &mut self.texts {
                column.resize(height, None);
            }
        }
        Ok(())
    }

    fn read_parquet(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path)?;
        let metadata = parquet_metadata(&file).context("is truncated or no Parquet file: replace it")?;
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata).build()?;
        for batch in reader {
            let batch = batch?;
            let first = self.rows.len() as u64 + 1;
            for (field, array) in batch.schema().fields().iter().zip(batch.columns()) {
                let texts = reference_texts(array).with_context(|| format!("column {}", field.name()))?;
                if field.data_type().is_floating() && !self.floats.contains(field.name()) {
                    self.floats.push(field.name().clone());
                }
                if let Some(column) = self.column(field.name()) {
                    column.extend((0..texts.len()).map(|row| (!texts.is_null(row)).then(|| texts.value(row).to_owned())));
                }
            }
            self.rows.extend(first..first + batch.num_rows() as u64);
        }
        Ok(())
    }

    fn frame(&mut self) -> Result<DataFrame> {
        let columns = self
            .names
            .iter()
            .zip(&self.texts)
            .map(|(name, texts)| Column::from(Series::new(name.as_str().into(), texts.as_slice())));
        Ok(DataFrame::new(self.rows.len(), columns.collect())?)
    }
}
