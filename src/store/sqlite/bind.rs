//! Making many rows. Columns keep their values from row to row: rows are sorted, so most of a
//! row is what the row before had, and is neither formatted nor handed over again.

use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::{Context as _, Result, anyhow, bail};
use rusqlite::types::Null;
use rusqlite::{Statement, Transaction};

use crate::model::aggregate::PeriodKey;
use crate::model::decimal::{Decimal, DecimalText};
use crate::model::timestamp::{Timestamp, TimestampText};

/// Bytes that go from one thread to the other at once.
const BATCH: usize = 64 << 10;

/// Batches that wait for the statement.
const WAITING: usize = 8;

/// Makes all rows of a table.
type Give<'r> = dyn FnOnce(&mut Rows<'_>) -> Result<()> + Send + 'r;

/// Rows for a table, in the order of its key.
pub(super) struct NewRows<'r> {
    pub table: &'static str,
    /// What each row gives.
    pub columns: Vec<&'static str>,
    pub give: Box<Give<'r>>,
}

/// Inserts rows, on two threads: one makes the values, the other one has the statement.
/// `how` is the statement up to the table.
///
/// # Errors
/// Where a row cannot be made or written.
pub(super) fn insert(transaction: &Transaction<'_>, how: &str, rows: NewRows<'_>) -> Result<()> {
    let NewRows { table, columns, give } = rows;
    let places: Vec<_> = (1..=columns.len()).map(|place| format!("?{place}")).collect();
    let sql = format!("{how} {table} ({}) VALUES ({})", columns.join(", "), places.join(", "));
    let mut statement = transaction.prepare(&sql)?;
    let (sender, batches) = sync_channel(WAITING);
    std::thread::scope(|scope| {
        let giver = scope.spawn(|| {
            let mut sent = Batches { batch: Vec::new(), sender };
            give(&mut Rows::new(columns.len(), &mut sent))?;
            sent.send()
        });
        // Where one cannot be written, the other thread finds the channel closed.
        let written = batches.into_iter().try_for_each(|batch: Vec<u8>| write(&mut statement, &batch));
        let given = giver.join().map_err(|_| anyhow!("a thread that makes rows panicked: this is a bug in trueup"))?;
        written.and(given)
    })
}

/// What takes rows.
pub(super) trait Target {
    /// Sets a column, which it keeps until it is set again. `place` counts from 0.
    fn set(&mut self, place: usize, value: Value<'_>) -> Result<()>;

    /// Writes a row.
    fn write(&mut self) -> Result<()>;
}

/// A value of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'v> {
    Null,
    Integer(i64),
    /// UTF-8.
    Text(&'v [u8]),
}

/// Rows on their way from one thread to the other.
struct Batches {
    batch: Vec<u8>,
    sender: SyncSender<Vec<u8>>,
}

impl Batches {
    fn send(&mut self) -> Result<()> {
        let next = Vec::with_capacity(BATCH + BATCH / 8);
        let batch = std::mem::replace(&mut self.batch, next);
        self.sender.send(batch).map_err(|_| anyhow!("the store takes no more rows"))
    }
}

impl Target for Batches {
    fn set(&mut self, place: usize, value: Value<'_>) -> Result<()> {
        self.batch.push(u8::try_from(place + 1)?);
        match value {
            Value::Null => self.batch.push(NULL),
            Value::Integer(number) => {
                self.batch.push(INTEGER);
                self.batch.extend(number.to_le_bytes());
            }
            Value::Text(text) => {
                self.batch.push(TEXT);
                self.batch.extend((text.len() as u64).to_le_bytes());
                self.batch.extend_from_slice(text);
            }
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        self.batch.push(ROW);
        if self.batch.len() >= BATCH { self.send() } else { Ok(()) }
    }
}

/// Makes rows.
pub(super) struct Rows<'t> {
    /// What each column holds.
    bound: Vec<Bound>,
    /// The column that is next.
    place: usize,
    instant: TimestampText,
    decimal: DecimalText,
    target: &'t mut dyn Target,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum Bound {
    #[default]
    Nothing,
    Text(String),
    Instant(Timestamp),
    Decimal(Decimal),
    Integer(i64),
}

// In a batch, a value is the number of its column from 1, what it is, and its bytes.
const ROW: u8 = 0;
const NULL: u8 = 1;
const INTEGER: u8 = 2;
const TEXT: u8 = 3;

impl<'t> Rows<'t> {
    pub fn new(columns: usize, target: &'t mut dyn Target) -> Self {
        Rows {
            bound: vec![Bound::default(); columns],
            place: 0,
            instant: TimestampText::default(),
            decimal: DecimalText::default(),
            target,
        }
    }

    /// Ends the row whose values were given.
    pub fn write(&mut self) -> Result<()> {
        self.place = 0;
        self.target.write()
    }

    /// The next columns are as in the row before.
    pub fn keep(&mut self, columns: usize) {
        self.place += columns;
    }

    pub fn period_key(&mut self, key: &PeriodKey) -> Result<()> {
        for text in [&key.tenant_id, &key.subscription_id, &key.meter_id, &key.price_id, &key.dimensions] {
            self.text(text)?;
        }
        self.instant(key.period_start)
    }

    pub fn text(&mut self, text: &str) -> Result<()> {
        let at = self.place;
        self.place += 1;
        match self.bound.get_mut(at) {
            Some(Bound::Text(known)) if known == text => return Ok(()),
            Some(Bound::Text(known)) => {
                known.clear();
                known.push_str(text);
            }
            Some(bound) => *bound = Bound::Text(text.to_owned()),
            None => {}
        }
        self.target.set(at, Value::Text(text.as_bytes()))
    }

    pub fn instant(&mut self, t: Timestamp) -> Result<()> {
        match self.is_new(Bound::Instant(t)) {
            Some(at) => self.target.set(at, Value::Text(self.instant.of(t).as_bytes())),
            None => Ok(()),
        }
    }

    pub fn decimal(&mut self, value: Decimal) -> Result<()> {
        match self.is_new(Bound::Decimal(value)) {
            Some(at) => self.target.set(at, Value::Text(self.decimal.of(value).as_bytes())),
            None => Ok(()),
        }
    }

    pub fn integer(&mut self, value: i64) -> Result<()> {
        match self.is_new(Bound::Integer(value)) {
            Some(at) => self.target.set(at, Value::Integer(value)),
            None => Ok(()),
        }
    }

    pub fn count(&mut self, value: u64) -> Result<()> {
        self.integer(i64::try_from(value)?)
    }

    /// NULL for nothing.
    pub fn optional<T>(&mut self, value: Option<T>, bind: fn(&mut Self, T) -> Result<()>) -> Result<()> {
        match value {
            Some(value) => bind(self, value),
            None => match self.is_new(Bound::Nothing) {
                Some(at) => self.target.set(at, Value::Null),
                None => Ok(()),
            },
        }
    }

    /// Goes on to the next column; the place of this one where it holds something else.
    fn is_new(&mut self, value: Bound) -> Option<usize> {
        let at = self.place;
        self.place += 1;
        let bound = self.bound.get_mut(at)?;
        let is_new = *bound != value;
        *bound = value;
        is_new.then_some(at)
    }
}

/// Writes the rows of a batch.
fn write(statement: &mut Statement<'_>, batch: &[u8]) -> Result<()> {
    let mut rest = batch;
    while let Some(place) = rest.split_off_first() {
        if *place == ROW {
            statement.raw_execute()?;
        } else {
            bind(statement, usize::from(*place), value(&mut rest)?).with_context(|| format!("column {place}"))?;
        }
    }
    Ok(())
}

fn bind(statement: &mut Statement<'_>, place: usize, value: Value<'_>) -> Result<()> {
    match value {
        Value::Null => statement.raw_bind_parameter(place, Null)?,
        Value::Integer(number) => statement.raw_bind_parameter(place, number)?,
        // The thread that made it had a text.
        Value::Text(text) => statement.raw_bind_parameter(place, std::str::from_utf8(text)?)?,
    }
    Ok(())
}

fn value<'b>(rest: &mut &'b [u8]) -> Result<Value<'b>> {
    let number = |rest: &mut &[u8]| rest.split_off(..8).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
    match rest.split_off_first() {
        Some(&NULL) => Ok(Value::Null),
        Some(&INTEGER) => Ok(Value::Integer(number(rest).map(i64::from_le_bytes).context("a number breaks off")?)),
        Some(&TEXT) => {
            let length = number(rest).map(u64::from_le_bytes).and_then(|length| usize::try_from(length).ok());
            let text = length.and_then(|length| rest.split_off(..length)).context("a text breaks off")?;
            Ok(Value::Text(text))
        }
        _ => bail!("a value breaks off"),
    }
}
