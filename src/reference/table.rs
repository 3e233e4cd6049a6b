//! Reference tables of any format as Polars frames of text.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use arrow::array::Array;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use polars::prelude::{Column, DataFrame, NamedFrom, Series};
use serde_json::Value;

use crate::clickhouse_client::Database;
use crate::config::{ClickHouseConnection, ReferenceTable};
use crate::fault::configuration;
use crate::source::arrow_batch::reference_texts;

/// A table as it was read: text columns, and where each row stands.
pub struct Table {
    /// What people call it: the file, or the query.
    name: String,
    pub frame: DataFrame,
    rows: Vec<u64>,
    unit: &'static str,
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
            _ => Err(anyhow!("the name does not end in .csv, .ndjson, .jsonl or .parquet")),
        }
        .map_err(problem)?;
        let frame = columns.frame().map_err(problem)?;
        Ok(Table { name: path.display().to_string(), frame, rows: columns.rows, unit })
    }

    /// Rows of a ClickHouse query, every column as text.
    fn query(connection: &ClickHouseConnection, sql: &str) -> Result<Table> {
        let (names, cells) = Database::connect(connection)?.texts(sql).with_context(|| format!("reference query `{sql}`"))?;
        let mut columns = Columns { texts: vec![Vec::new(); names.len()], names, rows: Vec::new() };
        for (number, row) in (1u64..).zip(cells) {
            for (column, cell) in columns.texts.iter_mut().zip(row) {
                column.push(cell);
            }
            columns.rows.push(number);
        }
        let frame = columns.frame()?;
        Ok(Table { name: format!("query `{}`", sql.trim()), frame, rows: columns.rows, unit: "row" })
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
        match texts.iter().position(Option::is_none) {
            Some(row) if required => Err(self.error(row, format!("`{name}` is empty, but every row needs it"))),
            _ => Ok(texts),
        }
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

/// Columns under construction.
#[derive(Default)]
struct Columns {
    names: Vec<String>,
    texts: Vec<Vec<Option<String>>>,
    rows: Vec<u64>,
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
        let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_path(path)?;
        let header = reader.headers()?.clone();
        for name in &header {
            self.column(name);
        }
        for record in reader.records() {
            let record = record?;
            for (text, column) in record.iter().zip(&mut self.texts) {
                column.push(Some(text.to_owned()));
            }
            self.rows.push(record.position().map_or(0, csv::Position::line));
        }
        Ok(())
    }

    fn read_ndjson(&mut self, path: &Path) -> Result<()> {
        let mut text = String::new();
        File::open(path)?.read_to_string(&mut text)?;
        for (number, line) in (1u64..).zip(text.lines()) {
            if line.trim().is_empty() {
                continue;
            }
            let object: serde_json::Map<String, Value> = serde_json::from_str(line).with_context(|| format!("line {number}"))?;
            for (name, value) in object {
                let text = match value {
                    Value::Null => None,
                    Value::String(text) => Some(text),
                    other => Some(other.to_string()),
                };
                if let Some(column) = self.column(&name) {
                    column.push(text);
                }
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
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path)?)?.build()?;
        for batch in reader {
            let batch = batch?;
            for (field, array) in batch.schema().fields().iter().zip(batch.columns()) {
                let texts = reference_texts(array).with_context(|| format!("column {}", field.name()))?;
                if let Some(column) = self.column(field.name()) {
                    column.extend((0..texts.len()).map(|row| (!texts.is_null(row)).then(|| texts.value(row).to_owned())));
                }
            }
            let first = self.rows.len() as u64 + 1;
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
