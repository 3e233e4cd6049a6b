//! `trueup export`

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use arrow::array::{ArrayRef, Int64Builder, RecordBatch, StringBuilder};
use arrow::datatypes::{DataType, Field, Schema};
use clap::{Args, ValueEnum};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::Session;
use super::output::emit_bytes;
use crate::ends;
use crate::fault::configuration;
use crate::store::{Cell, Table};
use crate::whole_file;

#[derive(Debug, Args)]
pub struct ExportArguments {
    /// The job file.
    job: PathBuf,

    /// usage_windows, usage_periods, corrections, dead_letters or runs.
    table: String,

    #[arg(long, value_enum, default_value_t = ExportFormat::Csv)]
    format: ExportFormat,

    /// The file to write, as a whole or not at all [default: stdout].
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ExportFormat {
    Csv,
    Ndjson,
    Parquet,
}

pub fn execute(session: &Session, arguments: &ExportArguments) -> Result<u8> {
    let job = session.job(&arguments.job)?;
    let table = Table::NAMES.iter().find(|(name, _)| *name == arguments.table).map(|(_, table)| *table);
    let table = table.ok_or_else(|| {
        let names: Vec<_> = Table::NAMES.iter().map(|(name, _)| *name).collect();
        configuration(format!("table `{}` is unknown: use one of {}", arguments.table, names.join(", ")))
    })?;
    arguments.out.as_deref().map_or(Ok(()), |out| ends::check_output(&job, out))?;
    let store = ends::read_store(&job)?;
    let store = store.with_context(|| format!("job {} has no store yet: run it first", job.name))?;
    let mut rows: Vec<Vec<Cell>> = Vec::new();
    let columns = store.export(&job.name, table, &mut |cells| {
        rows.push(cells.to_vec());
        Ok(())
    })?;
    let mut bytes = Vec::new();
    match arguments.format {
        ExportFormat::Csv => write_csv(&columns, &rows, &mut bytes)?,
        ExportFormat::Ndjson => write_ndjson(&columns, &rows, &mut bytes)?,
        ExportFormat::Parquet => write_parquet(&columns, &rows, &mut bytes)?,
    }
    match &arguments.out {
        None => emit_bytes(&bytes)?,
        Some(path) => {
            whole_file::write(path, |file| file.write_all(&bytes)).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(0)
}

fn write_csv(columns: &[String], rows: &[Vec<Cell>], out: &mut Vec<u8>) -> Result<()> {
    let mut writer = csv::Writer::from_writer(out);
    writer.write_record(columns)?;
    for row in rows {
        writer.write_record(row.iter().map(|cell| match cell {
            Cell::Null => String::new(),
            Cell::Text(text) => text.clone(),
            Cell::Integer(value) => value.to_string(),
        }))?;
    }
    writer.flush()?;
    Ok(())
}

fn write_ndjson(columns: &[String], rows: &[Vec<Cell>], out: &mut Vec<u8>) -> Result<()> {
    for row in rows {
        let object: serde_json::Map<_, _> = columns.iter().zip(row).map(|(name, cell)| (name.clone(), json(cell))).collect();
        serde_json::to_writer(&mut *out, &object)?;
        out.push(b'\n');
    }
    Ok(())
}

fn json(cell: &Cell) -> serde_json::Value {
    match cell {
        Cell::Null => serde_json::Value::Null,
        Cell::Text(text) => text.as_str().into(),
        Cell::Integer(value) => (*value).into(),
    }
}

fn write_parquet(columns: &[String], rows: &[Vec<Cell>], out: &mut Vec<u8>) -> Result<()> {
    let mut fields = Vec::new();
    let mut arrays: Vec<ArrayRef> = Vec::new();
    for (at, name) in columns.iter().enumerate() {
        let cells = rows.iter().map(|row| row.get(at).unwrap_or(&Cell::Null));
        if Table::INTEGERS.contains(&name.as_str()) {
            let mut builder = Int64Builder::new();
            cells.for_each(|cell| builder.append_option(if let Cell::Integer(value) = cell { Some(*value) } else { None }));
            fields.push(Field::new(name, DataType::Int64, true));
            arrays.push(Arc::new(builder.finish()));
        } else {
            let mut builder = StringBuilder::new();
            cells.for_each(|cell| builder.append_option(if let Cell::Text(text) = cell { Some(text) } else { None }));
            fields.push(Field::new(name, DataType::Utf8, true));
            arrays.push(Arc::new(builder.finish()));
        }
    }
    let schema = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(Arc::clone(&schema), arrays)?;
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(out, schema, Some(properties))?;
    writer.write(&batch)?;
    writer.close()?;
    Ok(())
}
