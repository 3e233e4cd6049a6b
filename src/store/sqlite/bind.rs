//! Writing many rows through one statement, on two threads: one makes the values, the
//! other one has the statement. Its parameters keep their values from row to row: rows are
//! sorted, so most of a row is what the row before had, and is neither formatted nor bound
//! again.

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

/// Inserts the rows that `give` makes. `into` is the statement up to its columns.
///
/// # Errors
/// Where a row cannot be made or written.
pub(super) fn insert(
    transaction: &Transaction<'_>,
    into: &str,
    columns: &[&str],
    give: impl FnOnce(&mut Rows) -> Result<()> + Send,
) -> Result<()> {
    let places: Vec<_> = (1..=columns.len()).map(|place| format!("?{place}")).collect();
    let mut statement = transaction.prepare(&format!("{into} ({}) VALUES ({})", columns.join(", "), places.join(", ")))?;
    let (sender, batches) = sync_channel(WAITING);
    std::thread::scope(|scope| {
        let giver = scope.spawn(|| {
            let mut rows = Rows::new(columns.len(), sender);
            give(&mut rows)?;
            rows.send()
        });
        // Where one cannot be written, the other thread finds the channel closed.
        let written = batches.into_iter().try_for_each(|batch: Vec<u8>| write(&mut statement, &batch));
        let given = giver.join().map_err(|_| anyhow!("a thread that makes rows panicked: this is a bug in trueup"))?;
        written.and(given)
    })
}

/// Makes rows.
pub(super) struct Rows {
    /// What each parameter holds.
    bound: Vec<Bound>,
    /// The parameter that is next.
    place: usize,
    instant: TimestampText,
    decimal: DecimalText,
    batch: Vec<u8>,
    sender: SyncSender<Vec<u8>>,
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

// In a batch, a value is the number of its parameter, what it is, and its bytes.
const ROW: u8 = 0;
const NULL: u8 = 1;
const INTEGER: u8 = 2;
const TEXT: u8 = 3;

impl Rows {
    fn new(columns: usize, sender: SyncSender<Vec<u8>>) -> Self {
        Rows {
            bound: vec![Bound::default(); columns],
            place: 0,
            instant: TimestampText::default(),
            decimal: DecimalText::default(),
            batch: Vec::new(),
            sender,
        }
    }

    /// Ends the row whose values were given.
    pub fn write(&mut self) -> Result<()> {
        self.place = 0;
        self.batch.push(ROW);
        if self.batch.len() >= BATCH { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> Result<()> {
        let next = Vec::with_capacity(BATCH + BATCH / 8);
        let batch = std::mem::replace(&mut self.batch, next);
        self.sender.send(batch).map_err(|_| anyhow!("the store takes no more rows"))
    }

    pub fn period_key(&mut self, key: &PeriodKey) -> Result<()> {
        for text in [&key.tenant_id, &key.subscription_id, &key.meter_id, &key.price_id, &key.dimensions] {
            self.text(text)?;
        }
        self.instant(key.period_start)
    }

    pub fn text(&mut self, text: &str) -> Result<()> {
        match self.bound.get_mut(self.place) {
            Some(Bound::Text(known)) if known == text => self.place += 1,
            Some(Bound::Text(known)) => {
                known.clear();
                known.push_str(text);
                self.place += 1;
                push_text(&mut self.batch, self.place, text)?;
            }
            _ => {
                self.is_new(Bound::Text(text.to_owned()));
                push_text(&mut self.batch, self.place, text)?;
            }
        }
        Ok(())
    }

    pub fn instant(&mut self, t: Timestamp) -> Result<()> {
        if self.is_new(Bound::Instant(t)) {
            push_text(&mut self.batch, self.place, self.instant.of(t))?;
        }
        Ok(())
    }

    pub fn decimal(&mut self, value: Decimal) -> Result<()> {
        if self.is_new(Bound::Decimal(value)) {
            push_text(&mut self.batch, self.place, self.decimal.of(value))?;
        }
        Ok(())
    }

    pub fn integer(&mut self, value: i64) -> Result<()> {
        if self.is_new(Bound::Integer(value)) {
            self.batch.extend([u8::try_from(self.place)?, INTEGER]);
            self.batch.extend(value.to_le_bytes());
        }
        Ok(())
    }

    pub fn count(&mut self, value: u64) -> Result<()> {
        self.integer(i64::try_from(value)?)
    }

    /// NULL for nothing.
    pub fn optional<T>(&mut self, value: Option<T>, bind: fn(&mut Self, T) -> Result<()>) -> Result<()> {
        match value {
            Some(value) => bind(self, value),
            None => {
                if self.is_new(Bound::Nothing) {
                    self.batch.extend([u8::try_from(self.place)?, NULL]);
                }
                Ok(())
            }
        }
    }

    /// Goes on to the next parameter; whether it holds something else.
    fn is_new(&mut self, value: Bound) -> bool {
        let Some(bound) = self.bound.get_mut(self.place) else { return false };
        self.place += 1;
        let is_new = *bound != value;
        *bound = value;
        is_new
    }
}

fn push_text(batch: &mut Vec<u8>, place: usize, text: &str) -> Result<()> {
    batch.extend([u8::try_from(place)?, TEXT]);
    batch.extend((text.len() as u64).to_le_bytes());
    batch.extend_from_slice(text.as_bytes());
    Ok(())
}

/// Writes the rows of a batch.
fn write(statement: &mut Statement<'_>, batch: &[u8]) -> Result<()> {
    let mut rest = batch;
    while let Some(place) = rest.split_off_first() {
        let place = usize::from(*place);
        if place == usize::from(ROW) {
            statement.raw_execute()?;
            continue;
        }
        bind(statement, place, &mut rest).with_context(|| format!("parameter {place}"))?;
    }
    Ok(())
}

fn bind(statement: &mut Statement<'_>, place: usize, rest: &mut &[u8]) -> Result<()> {
    let number = |rest: &mut &[u8]| rest.split_off(..8).and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
    match rest.split_off_first() {
        Some(&NULL) => statement.raw_bind_parameter(place, Null)?,
        Some(&INTEGER) => statement.raw_bind_parameter(place, number(rest).map(i64::from_le_bytes))?,
        Some(&TEXT) => {
            let length = number(rest).map(u64::from_le_bytes).and_then(|length| usize::try_from(length).ok());
            let Some(text) = length.and_then(|length| rest.split_off(..length)) else { bail!("a text breaks off") };
            // The thread that made it had a text.
            statement.raw_bind_parameter(place, std::str::from_utf8(text)?)?;
        }
        _ => bail!("a value breaks off"),
    }
    Ok(())
}
