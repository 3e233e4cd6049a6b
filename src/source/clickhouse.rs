//! Events in a ClickHouse table or query, as ArrowStream.
//!
//! Rows are read as they are, without FINAL: deduplication is ours, so that all
//! copies of an event take part, merged or not. A range is pushed down as "every
//! copy of an event that has one copy in it". What is ingested after the start
//! of the reading is left for the next run.

use anyhow::{Context, Result, anyhow, bail};
use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::ipc::reader::StreamDecoder;

use super::arrow_batch::{convert, missing_column};
use super::columns::{ColumnMap, Field};
use super::{EventBatch, EventSource, Part, Selection, Split, Wanted};
use crate::clickhouse_client::{Database, identifier, literal};
use crate::config::{ClickHouseConnection, Relation};
use crate::model::timestamp::Timestamp;

/// Rows that one split should have, so that several threads find work and a
/// broken connection costs little.
const ROWS_PER_SPLIT: u64 = 500_000;
const MOST_SPLITS: u64 = 256;

/// A table or query with events.
pub struct ClickHouseSource {
    database: Database,
    name: String,
    /// The table, or the query in parentheses.
    relation: String,
    columns: ColumnMap,
    key: Vec<Field>,
}

/// A column as the server describes it.
struct Column {
    name: String,
    type_name: String,
}

impl Column {
    fn base_type(&self) -> &str {
        let inner = |text: &'_ str, wrapper: &str| -> Option<usize> { text.strip_prefix(wrapper).map(|_| wrapper.len()) };
        let mut start = 0;
        for wrapper in ["LowCardinality(", "Nullable("] {
            let rest = self.type_name.get(start..).unwrap_or_default();
            start += inner(rest, wrapper).unwrap_or(0);
        }
        self.type_name.get(start..).unwrap_or_default().trim_end_matches(')')
    }

    fn is_text(&self) -> bool {
        self.base_type().starts_with("String")
            || self.base_type().starts_with("FixedString")
            || self.base_type().starts_with("Enum")
    }

    /// The column as an instant, for conditions; text that is none becomes NULL.
    fn instant(&self) -> String {
        let name = identifier(&self.name);
        if self.is_text() { format!("parseDateTime64BestEffortOrNull(toString({name}), 9, 'UTC')") } else { name }
    }
}

/// The columns that a source has, by field.
struct Layout(Vec<(Field, Column)>);

impl Layout {
    fn get(&self, field: Field) -> Option<&Column> {
        self.0.iter().find(|(known, _)| *known == field).map(|(_, column)| column)
    }

    fn require(&self, field: Field) -> Result<&Column> {
        self.get(field).with_context(|| format!("column for {} is missing", field.name()))
    }
}

impl ClickHouseSource {
    /// `key` are the fields that identify an event.
    ///
    /// # Errors
    /// Where no connection can be prepared; nothing is sent yet.
    pub fn new(connection: &ClickHouseConnection, events: &Relation, columns: ColumnMap, key: Vec<Field>) -> Result<Self> {
        let database = Database::connect(connection)?;
        let (name, relation) = match events {
            Relation::Table(table) => {
                let quoted: Vec<_> = table.split('.').map(identifier).collect();
                (format!("table {table}"), quoted.join("."))
            }
            Relation::Query(query) => ("the source query".to_owned(), format!("({})", query.trim().trim_end_matches(';'))),
        };
        Ok(ClickHouseSource { database, name, relation, columns, key })
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
        for (field, column) in &layout.0 {
            let is_wanted = match wanted {
                Wanted::Whole => true,
                Wanted::Keys(fields) => *field == Field::Timestamp || fields.contains(field),
            };
            if !is_wanted {
                continue;
            }
            let name = identifier(&column.name);
            let base = column.base_type();
            let expression = match field {
                Field::Timestamp | Field::IngestedAt if base.starts_with("Date") => format!("toDateTime64({name}, 9, 'UTC')"),
                Field::Timestamp | Field::IngestedAt if !column.is_text() => {
                    bail!(
                        "{}: column `{}` is {}, expected a date and time, or RFC 3339 text",
                        self.name,
                        column.name,
                        column.type_name
                    );
                }
                Field::Properties if !column.is_text() => format!("toJSONString({name})"),
                Field::Deleted => format!("toUInt8(ifNull({name}, 0) != 0)"),
                _ => format!("CAST({name} AS Nullable(String))"),
            };
            list.push(format!("{expression} AS {name}"));
        }
        Ok(list.join(", "))
    }

    /// The rows that a selection needs, frozen at what is ingested by now.
    fn condition(&self, layout: &Layout, selection: &Selection) -> Result<String> {
        let mut conditions = Vec::new();
        if let Some(ingested_at) = layout.get(Field::IngestedAt) {
            let column = ingested_at.instant();
            let until = self.single(&format!("SELECT max(toDateTime64({column}, 9, 'UTC')) FROM {}", self.relation))?;
            if let Some(until) = until {
                conditions
                    .push(format!("ifNull({column} <= toDateTime64({}, 9, 'UTC'), 1)", literal(until.trim_end_matches('Z'))));
            }
        }
        if let Some(tenant) = &selection.tenant {
            conditions.push(format!("toString({}) = {}", identifier(&layout.require(Field::TenantId)?.name), literal(tenant)));
        }
        if let Some(span) = selection.span {
            let time = layout.require(Field::Timestamp)?.instant();
            let mut inner = conditions.clone();
            inner.push(format!("{time} >= {} AND {time} < {}", instant(span.start), instant(span.end)));
            let key: Vec<_> =
                self.key.iter().filter(|field| **field != Field::Timestamp).filter_map(|field| layout.get(*field)).collect();
            let key: Vec<_> = key.iter().map(|column| identifier(&column.name)).collect();
            let key = key.join(", ");
            conditions.push(format!("({key}) IN (SELECT {key} FROM {} WHERE {})", self.relation, inner.join(" AND ")));
        }
        Ok(if conditions.is_empty() { "1".to_owned() } else { conditions.join(" AND ") })
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
        let time = layout.require(Field::Timestamp)?.instant();
        let nanos = format!("toUnixTimestamp64Nano(toDateTime64(ifNull({time}, toDateTime64(0, 9, 'UTC')), 9, 'UTC'))");
        let extent = format!("SELECT count(), min({nanos}), max({nanos}) FROM {} WHERE {condition}", self.relation);
        let (_, rows) = self.database.texts(&extent)?;
        let number =
            |at: usize| rows.first().and_then(|row| row.get(at)).cloned().flatten().and_then(|text| text.parse::<i64>().ok());
        let (Some(count), Some(first), Some(last)) = (number(0), number(1), number(2)) else {
            bail!("{}: the server gave no row count", self.name);
        };
        let slices = i64::try_from((u64::try_from(count)? / ROWS_PER_SPLIT + 1).min(MOST_SPLITS))?;
        let width = last.saturating_sub(first) / slices + 1;
        let slice = format!("intDiv({nanos} - ({first}), {width})");
        let counts =
            format!("SELECT {slice} AS slice, count() FROM {} WHERE {condition} GROUP BY slice ORDER BY slice", self.relation);
        let mut splits = Vec::new();
        for row in self.database.texts(&counts)?.1 {
            let (Some(at), Some(rows)) = (row.first().cloned().flatten(), row.get(1).cloned().flatten()) else { continue };
            splits.push(Split {
                name: self.name.clone(),
                identity: self.relation.clone(),
                fingerprint: rows.clone(),
                announced_rows: Some(rows.parse().with_context(|| format!("row count `{rows}`"))?),
                part: Part::Rows { condition: format!("{condition} AND {slice} = {at}") },
            });
        }
        Ok(splits)
    }

    fn read(&self, split: &Split, wanted: Wanted<'_>, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<()> {
        let Part::Rows { condition } = &split.part else { bail!("{} is no part of a database", split.name) };
        let list = self.select_list(&self.layout()?, wanted)?;
        let sql = format!(
            "SELECT {list} FROM {} WHERE {condition} \
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

fn instant(t: Timestamp) -> String {
    format!("fromUnixTimestamp64Nano(toInt64({}), 'UTC')", t.nanos())
}
