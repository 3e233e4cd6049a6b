//! Writing many rows through one statement. Its parameters keep their values from row
//! to row: rows are sorted, so most of a row is what the row before had, and is
//! neither formatted nor bound again.

use anyhow::Result;
use rusqlite::{Statement, Transaction};

use crate::model::aggregate::PeriodKey;
use crate::model::decimal::{Decimal, DecimalText};
use crate::model::timestamp::{Timestamp, TimestampText};

pub(super) struct Rows<'t> {
    statement: Statement<'t>,
    /// What each parameter holds.
    bound: Vec<Bound>,
    /// The parameter that is next.
    place: usize,
    instant: TimestampText,
    decimal: DecimalText,
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

impl<'t> Rows<'t> {
    /// `into` is the statement up to its columns.
    pub fn insert(transaction: &'t Transaction<'_>, into: &str, columns: &[&str]) -> Result<Self> {
        let places: Vec<_> = (1..=columns.len()).map(|place| format!("?{place}")).collect();
        let statement = transaction.prepare(&format!("{into} ({}) VALUES ({})", columns.join(", "), places.join(", ")))?;
        Ok(Rows {
            statement,
            bound: vec![Bound::default(); columns.len()],
            place: 0,
            instant: TimestampText::default(),
            decimal: DecimalText::default(),
        })
    }

    /// Writes the row whose values were given.
    pub fn write(&mut self) -> Result<()> {
        self.place = 0;
        self.statement.raw_execute()?;
        Ok(())
    }

    pub fn period_key(&mut self, key: &PeriodKey) -> Result<()> {
        for text in [&key.tenant_id, &key.subscription_id, &key.meter_id, &key.price_id, &key.dimensions] {
            self.text(text)?;
        }
        self.instant(key.period_start)
    }

    pub fn text(&mut self, text: &str) -> Result<()> {
        match self.bound.get_mut(self.place) {
            Some(Bound::Text(known)) if known == text => {}
            Some(Bound::Text(known)) => {
                known.clear();
                known.push_str(text);
                self.statement.raw_bind_parameter(self.place + 1, text)?;
            }
            Some(bound) => {
                *bound = Bound::Text(text.to_owned());
                self.statement.raw_bind_parameter(self.place + 1, text)?;
            }
            None => {}
        }
        self.place += 1;
        Ok(())
    }

    pub fn instant(&mut self, t: Timestamp) -> Result<()> {
        if self.is_new(Bound::Instant(t)) {
            self.statement.raw_bind_parameter(self.place, self.instant.of(t))?;
        }
        Ok(())
    }

    pub fn decimal(&mut self, value: Decimal) -> Result<()> {
        if self.is_new(Bound::Decimal(value)) {
            self.statement.raw_bind_parameter(self.place, self.decimal.of(value))?;
        }
        Ok(())
    }

    pub fn integer(&mut self, value: i64) -> Result<()> {
        if self.is_new(Bound::Integer(value)) {
            self.statement.raw_bind_parameter(self.place, value)?;
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
                    self.statement.raw_bind_parameter(self.place, rusqlite::types::Null)?;
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
