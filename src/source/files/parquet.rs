//! Parquet, a row group a split.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use arrow::datatypes::{DataType, Field as ArrowField, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::basic::{Compression as Codec, Encoding};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::reader::ChunkReader;

use super::{Compression, open};
use crate::model::columns::{ColumnMap, Field};
use crate::source::arrow_batch::{convert, missing_column};
use crate::source::batch::BATCH_ROWS;
use crate::source::{EventBatch, Part, Split, Wanted};

/// Appends a split for every row group.
pub(super) fn splits(path: &Path, whole: &Split, splits: &mut Vec<Split>) -> Result<()> {
    let file = File::open(path).with_context(|| format!("events file {}", path.display()))?;
    let metadata = load(path, &file)?;
    for (part, group) in metadata.metadata().row_groups().iter().enumerate() {
        splits.push(Split { announced_rows: u64::try_from(group.num_rows()).ok(), part: Part::RowGroup(part), ..whole.clone() });
    }
    Ok(())
}

/// Fewer rows are not worth a thread of their own.
const LEAST_ROWS: u64 = 8 * BATCH_ROWS as u64;

/// A row group in at most so many slices. A reader skips the pages of the others.
pub(super) fn slices(split: &Split, group: usize, most: u64) -> Vec<Split> {
    let Some(all) = split.announced_rows else { return vec![split.clone()] };
    let length = all.div_ceil(most.max(1)).max(LEAST_ROWS);
    let slice = |start: u64| {
        let rows = length.min(all - start);
        Split { announced_rows: Some(rows), part: Part::Slice { group, start, rows }, ..split.clone() }
    };
    if length >= all {
        return vec![split.clone()];
    }
    (0..all.div_ceil(length)).map(|at| slice(at * length)).collect()
}

pub(super) fn load<R: ChunkReader>(path: &Path, input: &R) -> Result<ArrowReaderMetadata> {
    metadata(input)
        .with_context(|| format!("events file {} is truncated or no Parquet file: replace it and run again", path.display()))
}

/// What a Parquet file says of itself, as far as a reader relies on it.
///
/// # Errors
/// Where the file is damaged.
pub fn metadata<R: ChunkReader>(input: &R) -> Result<ArrowReaderMetadata> {
    let metadata = ArrowReaderMetadata::load(input, ArrowReaderOptions::new())?;
    for group in metadata.metadata().row_groups() {
        for column in group.columns() {
            // The crate takes for granted that a column lies within its file.
            let start = u64::try_from(column.dictionary_page_offset().unwrap_or_else(|| column.data_page_offset()));
            let end =
                start.ok().zip(u64::try_from(column.compressed_size()).ok()).and_then(|(start, size)| start.checked_add(size));
            if end.is_none_or(|end| end > input.len()) || group.num_rows() < 0 {
                bail!("column {} lies outside of the file: it is damaged", column.column_path().string());
            }
        }
    }
    Ok(metadata)
}

/// The same file, with its texts read in layouts that need no copies: as views, or as
/// numbers into a dictionary where the file has them so.
pub(super) fn with_layouts(metadata: &ArrowReaderMetadata) -> Result<ArrowReaderMetadata> {
    let groups = metadata.metadata().row_groups();
    let has_dictionary = |name: &str| {
        groups
            .iter()
            .all(|group| group.columns().iter().find(|column| column.column_path().string() == name).is_some_and(is_dictionary))
    };
    let layout = |field: &Arc<ArrowField>| match field.data_type() {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            let layout = if has_dictionary(field.name()) {
                DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))
            } else {
                DataType::Utf8View
            };
            Arc::new(field.as_ref().clone().with_data_type(layout))
        }
        _ => Arc::clone(field),
    };
    let schema = metadata.schema();
    let fields: Vec<_> = schema.fields().iter().map(layout).collect();
    let schema = Schema::new_with_metadata(fields, schema.metadata().clone());
    let options = ArrowReaderOptions::new().with_schema(Arc::new(schema));
    Ok(ArrowReaderMetadata::try_new(Arc::clone(metadata.metadata()), options)?)
}

/// Whether all data of a column chunk is numbers into its dictionary.
fn is_dictionary(column: &ColumnChunkMetaData) -> bool {
    column.dictionary_page_offset().is_some()
        && column
            .page_encoding_stats_mask()
            .is_some_and(|used| used.is_only(Encoding::RLE_DICTIONARY) || used.is_only(Encoding::PLAIN_DICTIONARY))
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
        let file = File::open(path).with_context(|| format!("events file {}", path.display()))?;
        return read_groups(path, file, &split.part, columns, wanted, sink);
    }
    // The footer is at the end: a compressed Parquet file is read as a whole.
    let mut bytes = Vec::new();
    input.read_to_end(&mut bytes).with_context(|| super::broken(path, 0))?;
    read_groups(path, bytes::Bytes::from(bytes), &Part::Whole, columns, wanted, sink)
}

fn read_groups<R: ChunkReader + 'static>(
    path: &Path,
    input: R,
    part: &Part,
    columns: &ColumnMap,
    wanted: Wanted<'_>,
    sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
) -> Result<()> {
    let metadata = load(path, &input)?;
    let schema = Arc::clone(metadata.schema());
    let metadata = with_layouts(&metadata).with_context(|| format!("events file {}", path.display()))?;
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(input, metadata);
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
        if wanted.holds(field) {
            roots.push(index);
        }
    }
    if let Some(codec) = unread_codec(builder.metadata()) {
        let remedy = "write it with zstd, snappy, gzip or lz4";
        bail!("events file {} is compressed by {codec}, which is not read: {remedy}", path.display());
    }
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let (group, slice) = match part {
        Part::RowGroup(group) => (Some(*group), None),
        Part::Slice { group, start, rows } => (Some(*group), Some((*start, *rows))),
        _ => (None, None),
    };
    let first_row: i64 = builder.metadata().row_groups().iter().take(group.unwrap_or(0)).map(|group| group.num_rows()).sum();
    let mut row = u64::try_from(first_row).unwrap_or_default();
    let mut builder = match group {
        Some(group) => builder.with_row_groups(vec![group]),
        None => builder,
    };
    if let Some((start, rows)) = slice {
        builder = builder.with_offset(usize::try_from(start)?).with_limit(usize::try_from(rows)?);
        row += start;
    }
    let reader: ParquetRecordBatchReader = builder
        .with_projection(mask)
        .with_batch_size(BATCH_ROWS)
        .build()
        .with_context(|| format!("events file {}", path.display()))?;
    for batch in reader {
        let batch = batch
            .with_context(|| format!("events file {} is damaged after row {row}: replace it and run again", path.display()))?;
        sink(&convert(&format!("events file {}", path.display()), row, &batch, columns)?)?;
        row += u64::try_from(batch.num_rows())?;
    }
    Ok(())
}

/// A compression of some column that this build has no code for.
fn unread_codec(metadata: &ParquetMetaData) -> Option<&'static str> {
    let columns = metadata.row_groups().iter().flat_map(|group| group.columns());
    columns.map(|column| column.compression()).find_map(|compression| match compression {
        Codec::BROTLI(_) => Some("brotli"),
        Codec::LZO => Some("LZO"),
        _ => None,
    })
}
