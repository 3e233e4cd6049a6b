//! Some rows of a Parquet row group: the columns of the choice are read first, then
//! the whole rows that it wants, and no others.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use arrow::array::RecordBatch;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ParquetRecordBatchReaderBuilder, RowSelection};

use super::parquet::{load, with_layouts};
use crate::source::arrow_batch::convert_rows;
use crate::source::batch::BATCH_ROWS;
use crate::source::{ColumnMap, EventBatch, Field, RowChoice};

/// Reads the rows of row group `group` that `choice` wants; returns how many it left out.
pub(super) fn read(
    path: &Path,
    group: usize,
    columns: &ColumnMap,
    choice: &dyn RowChoice,
    sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
) -> Result<u64> {
    let file = File::open(path).with_context(|| format!("events file {}", path.display()))?;
    let metadata = with_layouts(&load(path, &file)?).with_context(|| format!("events file {}", path.display()))?;
    let groups = metadata.metadata().row_groups().iter().map(|group| u64::try_from(group.num_rows()).unwrap_or_default());
    let (first_row, rows): (u64, u64) = (groups.clone().take(group).sum(), groups.clone().nth(group).unwrap_or_default());
    let origin = format!("events file {}", path.display());
    let group = Group { path, file, metadata, group, columns, origin };

    let mut chosen = Vec::new();
    let mut at = 0;
    let mut choose = choice.chooser();
    group.batches(Some(choice.fields()), None, &mut |batch| {
        let events = convert_rows(&group.origin, &|row| first_row + at + row as u64, batch, columns)?;
        chosen.extend(choose(&events).into_iter().map(|row| at + row as u64));
        at += batch.num_rows() as u64;
        Ok(())
    })?;
    let left_out = at.saturating_sub(chosen.len() as u64);
    if chosen.is_empty() {
        return Ok(left_out);
    }
    let runs = chosen
        .chunk_by(|a, b| a + 1 == *b)
        .filter_map(|run| Some(usize::try_from(*run.first()?).ok()?..usize::try_from(run.last()? + 1).ok()?));
    let selection = RowSelection::from_consecutive_ranges(runs, usize::try_from(rows)?);
    let mut done = 0;
    group.batches(None, Some(selection), &mut |batch| {
        let number = |row: usize| first_row + chosen.get(done + row).copied().unwrap_or_default();
        sink(&convert_rows(&group.origin, &number, batch, columns)?)?;
        done += batch.num_rows();
        Ok(())
    })?;
    Ok(left_out)
}

/// One row group of an open file.
struct Group<'g> {
    path: &'g Path,
    file: File,
    metadata: ArrowReaderMetadata,
    group: usize,
    columns: &'g ColumnMap,
    origin: String,
}

impl Group<'_> {
    /// Reads some of the fields (or all of them) of some of the rows (or all).
    fn batches(
        &self,
        fields: Option<&[Field]>,
        rows: Option<RowSelection>,
        each: &mut dyn FnMut(&RecordBatch) -> Result<()>,
    ) -> Result<()> {
        let schema = self.metadata.schema();
        let wanted = Field::ALL.iter().filter(|field| fields.is_none_or(|fields| fields.contains(field)));
        let roots: Vec<_> = wanted.filter_map(|field| schema.index_of(self.columns.name(*field)).ok()).collect();
        let mask = ProjectionMask::roots(self.metadata.parquet_schema(), roots);
        let file = self.file.try_clone().with_context(|| self.origin.clone())?;
        let mut builder = ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone())
            .with_row_groups(vec![self.group])
            .with_projection(mask)
            .with_batch_size(BATCH_ROWS);
        if let Some(rows) = rows {
            builder = builder.with_row_selection(rows);
        }
        let reader = builder.build().with_context(|| self.origin.clone())?;
        for batch in reader {
            each(&batch.with_context(|| format!("events file {} is damaged", self.path.display()))?)?;
        }
        Ok(())
    }
}
