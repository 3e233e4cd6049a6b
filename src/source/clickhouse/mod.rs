//! Events in a ClickHouse table or query, as ArrowStream.
//!
//! Rows are read as they are, without FINAL: deduplication is ours, so that all
//! copies of an event take part, merged or not. A range is pushed down as "every
//! copy of an event that has one copy in it, or one without a time": of these,
//! nothing says that they are out of range. What is ingested after the start of
//! the reading is left for the next run.

mod column;
mod cuts;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::ipc::reader::StreamDecoder;

use super::arrow_batch::{convert, missing_column};
use super::{EventBatch, EventSource, Moved, Names, Part, RowChoice, Selection, Split, Wanted};
use crate::clickhouse_client::{Database, identifier, literal};
use crate::config::{ClickHouseConnection, Relation};
use crate::model::columns::{ColumnMap, Field};
use crate::model::run::InputFile;
use column::{Column, Layout};
use cuts::{Cut, Slices};

/// Rows that one split should have, so that several threads find work. Each split is a query,
/// and where the table is not in the order of event time, the server passes over all rows for
/// each of them: so they are few.
const ROWS_PER_SPLIT: u64 = 2_000_000;
const MOST_SPLITS: u64 = 32;
const EPOCH: &str = "1970-01-01 00:00:00.000000000";
/// Beyond so many wanted rows of a split, all are read.
const MOST_NAMED: usize = 20_000;
/// Bytes of names in one query; servers take 256 KiB.
const NAMES_AT_ONCE: usize = 100_000;

/// A table or query with events.
pub struct ClickHouseSource {
    database: Database,
    name: String,
    /// The table, or the query in parentheses.
    relation: String,
    margin: Duration,
    columns: ColumnMap,
    key: Vec<Field>,
}

impl ClickHouseSource {
    /// `margin` is how long after its ingestion time a row may come to be seen: what was
    /// ingested so short ago is left for later. `key` are the fields that identify an event.
    ///
    /// # Errors
    /// Where no connection can be prepared; nothing is sent yet.
    pub fn new(
        connection: &ClickHouseConnection,
        events: &Relation,
        margin: Duration,
        columns: ColumnMap,
        key: Vec<Field>,
    ) -> Result<Self> {
        let database = Database::connect(connection)?;
        let (name, relation) = match events {
            Relation::Table(table) => {
                let quoted: Vec<_> = table.split('.').map(identifier).collect();
                (format!("table {table}"), quoted.join("."))
            }
            Relation::Query(query) => ("the source query".to_owned(), format!("({})", query.trim().trim_end_matches(';'))),
        };
        Ok(ClickHouseSource { database, name, relation, margin, columns, key })
    }

    /// Asks the server for columns and types.
    fn layout(&self) -> Result<Layout> {
        let (_, rows) = self.database.texts(&format!("DESCRIBE (SELECT * FROM {})", self.relation))?;
        let cell = |row: &[Option<String>], at: usize| row.get(at).cloned().flatten().unwrap_or_default();
        let found: Vec<_> = rows.iter().map(|row| (cell(row, 0), cell(row, 1))).collect();
        let mut layout = Vec::new();
        for field in Field::ALL {
            let wanted = self.columns.name(field);
            match found.iter().find(|(name, _)| name == wanted) {
                Some((name, type_name)) => layout.push((field, Column { name: name.clone(), type_name: type_name.clone() })),
                None if field.is_required() || self.columns.is_mapped(field) => {
                    bail!("{}", missing_column(&self.name, field, &self.columns, found.iter().map(|(name, _)| name.as_str())));
                }
                None => {}
            }
        }
        Ok(Layout(layout))
    }

    /// The SELECT list: every field under its own column's name, in a type that Arrow carries well.
    fn select_list(&self, layout: &Layout, wanted: Wanted<'_>) -> Result<String> {
        let mut list = Vec::new();
        for column in &layout.0 {
            if wanted.holds(column.0) {
                list.push(format!("{} AS {}", column.1.expression(column.0, &self.name)?, identifier(&column.1.name)));
            }
        }
        Ok(list.join(", "))
    }

    /// The rows that a selection needs, frozen at what is ingested by now.
    fn condition(&self, layout: &Layout, selection: &Selection) -> Result<String> {
        let mut conditions = Vec::new();
        if let Some(ingested_at) = layout.get(Field::IngestedAt) {
            let column = ingested_at.instant();
            let until = self.ingested_until(&column)?;
            conditions.push(Cut { after: None, until }.condition(&column));
        }
        // Copies of one key can be told by their tenant only where it is part of the key.
        if let Some(tenant) = selection.tenant.as_ref().filter(|_| self.key.contains(&Field::TenantId)) {
            conditions.push(layout.require(Field::TenantId)?.is_or_null(tenant));
        }
        if let Some(span) = selection.span {
            let time = layout.require(Field::Timestamp)?;
            let lacks = time.lacks_instant().map_or_else(String::new, |lacks| format!(" OR {lacks}"));
            let mut inner = conditions.clone();
            inner.push(format!("({}{lacks})", time.is_in(span)));
            let key = self.key.iter().filter(|field| **field != Field::Timestamp).filter_map(|field| layout.get(*field));
            let key = key.map(Column::key).collect::<Vec<_>>().join(", ");
            conditions.push(format!("({key}) IN (SELECT {key} FROM {} WHERE {})", self.relation, inner.join(" AND ")));
        }
        Ok(if conditions.is_empty() { "1".to_owned() } else { conditions.join(" AND ") })
    }

    /// The greatest ingestion time of a row that is old enough, or 1970.
    fn ingested_until(&self, column: &str) -> Result<String> {
        let until = match self.margin.as_secs() {
            0 => String::new(),
            seconds => format!(" WHERE {column} <= now64(9, 'UTC') - toIntervalSecond({seconds})"),
        };
        let until = self.single(&format!("SELECT max(toDateTime64({column}, 9, 'UTC')) FROM {}{until}", self.relation))?;
        Ok(until.map_or_else(|| EPOCH.to_owned(), |until| until.trim_end_matches('Z').to_owned()))
    }

    /// Slices of the rows that `condition` selects, so that each has not too many.
    fn slices(&self, layout: &Layout, condition: &str) -> Result<Slices> {
        let time = layout.require(Field::Timestamp)?;
        let nanos = time.nanos();
        // Rows without a time would stretch the slices to 1970.
        let has_time = time.lacks_instant().map_or_else(|| "1".to_owned(), |lacks| format!("NOT ({lacks})"));
        let extent = format!("count(), minIf({nanos}, {has_time}), maxIf({nanos}, {has_time})");
        let (_, rows) = self.database.texts(&format!("SELECT {extent} FROM {} WHERE {condition}", self.relation))?;
        let number =
            |at: usize| rows.first().and_then(|row| row.get(at)).cloned().flatten().and_then(|text| text.parse::<i64>().ok());
        let (Some(count), Some(first), Some(last)) = (number(0), number(1), number(2)) else {
            bail!("{}: the server gave no row count", self.name);
        };
        let count = i64::try_from((u64::try_from(count)? / ROWS_PER_SPLIT + 1).min(MOST_SPLITS))?;
        Ok(Slices::new(first, last, count))
    }

    /// A split for each slice that has rows which `condition` selects. A digest of their
    /// content tells those that changed.
    fn sliced(&self, layout: &Layout, condition: &str, slices: Slices, has_digest: bool) -> Result<Vec<Split>> {
        let time = layout.require(Field::Timestamp)?;
        let nanos = time.nanos();
        let digest = if has_digest { self.row_digest(layout)? } else { "0".to_owned() };
        let counts = format!(
            "SELECT {} AS slice, count(), sum({digest}) FROM {} WHERE {condition} GROUP BY slice ORDER BY slice",
            slices.expression(&nanos),
            self.relation
        );
        let mut splits = Vec::new();
        for row in self.database.texts(&counts)?.1 {
            let cell = |at: usize| row.get(at).cloned().flatten();
            let (Some(at), Some(rows), Some(digest)) = (cell(0), cell(1), cell(2)) else { continue };
            let span = at.parse().ok().and_then(|at| slices.span(at)).filter(|_| time.is_date_time());
            let hint = span.map(|span| time.is_in(span));
            splits.push(Split {
                name: self.name.clone(),
                identity: self.relation.clone(),
                fingerprint: if has_digest { format!("{rows}:{digest}") } else { rows.clone() },
                evidence: None,
                announced_rows: Some(rows.parse().with_context(|| format!("row count `{rows}`"))?),
                part: Part::Rows { condition: cuts::write(condition, slices, &nanos, &at), hint },
            });
        }
        Ok(splits)
    }

    /// A number for each row, of all that is read of it.
    fn row_digest(&self, layout: &Layout) -> Result<String> {
        let columns = layout.0.iter().map(|(field, column)| column.expression(*field, &self.name));
        let texts = columns.map(|column| Ok(format!("ifNull(toString({}), '\\0')", column?))).collect::<Result<Vec<_>>>()?;
        Ok(format!("cityHash64({})", texts.join(", ")))
    }

    /// The one cell of an answer.
    fn single(&self, sql: &str) -> Result<Option<String>> {
        let (_, rows) = self.database.texts(sql)?;
        Ok(rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten())
    }
}

impl EventSource for ClickHouseSource {
    fn probe(&self) -> Result<String> {
        let layout = self.layout()?;
        self.select_list(&layout, Wanted::Whole)?;
        Ok(format!("ClickHouse {}, {} of {} event columns", self.name, layout.0.len(), Field::ALL.len()))
    }

    fn splits(&self, selection: &Selection) -> Result<Vec<Split>> {
        let layout = self.layout()?;
        let condition = self.condition(&layout, selection)?;
        let slices = self.slices(&layout, &condition)?;
        self.sliced(&layout, &condition, slices, *selection == Selection::default())
    }

    /// Rows that were ingested later are new; a digest shows whether the others are as they were.
    fn splits_since(&self, before: &[InputFile]) -> Result<Vec<Split>> {
        let layout = self.layout()?;
        let Some(column) = layout.get(Field::IngestedAt).map(Column::instant) else {
            bail!(Moved(format!("{}: without an ingestion time, nothing tells which rows are new", self.name)));
        };
        let nanos = layout.require(Field::Timestamp)?.nanos();
        let mut cuts = BTreeSet::new();
        for file in before {
            let part = file.name.strip_prefix(&self.relation).and_then(|part| part.strip_prefix('?'));
            let cut = part.and_then(|part| cuts::parse(part, &column, &nanos));
            cuts.insert(
                cut.ok_or_else(|| Moved(format!("the last run read `{}`, which is no part of {}", file.name, self.name)))?,
            );
        }
        let mut splits = Vec::new();
        for (cut, slices) in &cuts {
            splits.extend(self.sliced(&layout, &cut.condition(&column), *slices, true)?);
        }
        let after = cuts.iter().map(|(cut, _)| &cut.until).max().cloned();
        let until = self.ingested_until(&column)?;
        if after.as_ref().is_none_or(|after| until > *after) {
            let condition = Cut { after, until }.condition(&column);
            let slices = self.slices(&layout, &condition)?;
            splits.extend(self.sliced(&layout, &condition, slices, true)?);
        }
        Ok(splits)
    }

    fn reads_rows_without_time(&self, _: &Selection) -> bool {
        true
    }

    fn read(&self, split: &Split, wanted: Wanted<'_>, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<()> {
        self.select(&self.layout()?, split, wanted, None, sink)
    }

    /// Reads the rows that the choice wants by their tenant and id, unless they are many: where
    /// it does not know these, it looks at few columns of all rows first.
    fn read_chosen(&self, split: &Split, choice: &dyn RowChoice, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<u64> {
        let layout = self.layout()?;
        if let (Some(names), Some(rows)) = (choice.names(), split.announced_rows)
            && names.len() <= MOST_NAMED
        {
            return Ok(rows.saturating_sub(self.read_named(&layout, split, names, sink)?));
        }
        let (mut rows, mut wanted, mut have_names) = (0, BTreeSet::new(), true);
        let mut choose = choice.chooser();
        self.select(&layout, split, Wanted::Keys(choice.fields()), None, &mut |batch| {
            rows += batch.len() as u64;
            for event in choose(batch).into_iter().map(|row| batch.row(row)) {
                match (event.tenant_id, event.id) {
                    (Some(tenant), Some(id)) => _ = wanted.insert((tenant.to_owned(), id.to_owned())),
                    _ => have_names = false,
                }
            }
            Ok(())
        })?;
        if !have_names || wanted.len() > MOST_NAMED {
            self.select(&layout, split, Wanted::Whole, None, sink)?;
            return Ok(0);
        }
        Ok(rows.saturating_sub(self.read_named(&layout, split, &wanted, sink)?))
    }
}

impl ClickHouseSource {
    /// Reads the rows of a split that have one of these names; returns how many.
    fn read_named(
        &self,
        layout: &Layout,
        split: &Split,
        names: &Names,
        sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
    ) -> Result<u64> {
        let text = |field: Field| {
            let column = layout.require(field)?;
            let name = identifier(&column.name);
            // As it is, it may be found by the table's order.
            Ok::<_, anyhow::Error>(if column.is_text() { name } else { format!("toString({name})") })
        };
        let key = format!("({}, {})", text(Field::TenantId)?, text(Field::Id)?);
        let mut delivered = 0;
        let mut names = names.iter().map(|(tenant, id)| format!("({}, {})", literal(tenant), literal(id))).peekable();
        while let Some(mut some) = names.next() {
            while let Some(name) = names.next_if(|_| some.len() < NAMES_AT_ONCE) {
                some = some + ", " + &name;
            }
            let these = format!("{key} IN ({some})");
            self.select(layout, split, Wanted::Whole, Some(&these), &mut |batch| {
                delivered += batch.len() as u64;
                sink(batch)
            })?;
        }
        Ok(delivered)
    }

    /// Reads the rows of a split, or `these` of them.
    fn select(
        &self,
        layout: &Layout,
        split: &Split,
        wanted: Wanted<'_>,
        these: Option<&str>,
        sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
    ) -> Result<()> {
        let Part::Rows { condition, hint } = &split.part else { bail!("{} is no part of a database", split.name) };
        let more: String = [hint.as_deref(), these].into_iter().flatten().map(|more| format!(" AND {more}")).collect();
        let list = self.select_list(layout, wanted)?;
        // Side by side with the list, a condition would take what is selected under a column's name
        // for the column, and the server would use no index.
        let sql = format!(
            "SELECT {list} FROM (SELECT * FROM {} WHERE {condition}{more}) \
             SETTINGS output_format_arrow_string_as_string = 1, output_format_arrow_low_cardinality_as_dictionary = 0, \
             output_format_arrow_compression_method = 'none'",
            self.relation
        );
        let mut decoder = StreamDecoder::new();
        let mut row = 0;
        let mut deliver = |batch: &RecordBatch| -> Result<()> {
            sink(&convert(&self.name, row, batch, &self.columns)?)?;
            row += u64::try_from(batch.num_rows())?;
            Ok(())
        };
        self.database
            .stream(&sql, "ArrowStream", &mut |chunk| {
                let mut buffer = Buffer::from(chunk);
                while !buffer.is_empty() {
                    match decoder.decode(&mut buffer) {
                        Ok(Some(batch)) => deliver(&batch)?,
                        Ok(None) => break,
                        Err(error) => return Err(anyhow!("the stream is damaged: {error}")),
                    }
                }
                Ok(())
            })
            .with_context(|| format!("reading {}", self.name))?;
        decoder.finish().with_context(|| format!("reading {}: the stream broke off", self.name))
    }
}
