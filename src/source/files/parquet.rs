//! Parquet, a row group a split.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::reader::ChunkReader;

use super::{Compression, open};
use crate::source::arrow_batch::{convert, missing_column};
use crate::source::batch::BATCH_ROWS;
use crate::source::columns::{ColumnMap, Field};
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
                bail!(
                    "{}",
                    missing_column(
                        &format!("events file {}", path.display()),
                        field,
                        columns,
                        schema.fields().iter().map(|f| f.name().as_str())
                    )
                );
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
        sink(&convert(&format!("events file {}", path.display()), row, &batch, columns)?)?;
        row += u64::try_from(batch.num_rows())?;
    }
    Ok(())
}
