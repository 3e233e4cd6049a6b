//! Readers of the aggregates' tables and of their ledger. There are many rows: cells are found by
//! their place, and what repeats is shared.

use std::borrow::Cow;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustc_hash::FxHashSet;

use super::LedgerEntry;
use super::rows::{Cells, Unreadable};
use crate::model::aggregate::{Basis, PeriodKey, PeriodRow, StoredWindow, Text, Values, WindowKey, WindowRow};
use crate::model::digest::SetDigest;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;

/// Reads rows of `usage_windows`.
#[derive(Debug, Default)]
pub struct WindowReader {
    texts: FxHashSet<Text>,
    /// The row before: the next one mostly has the same key up to the window.
    last: Option<StoredWindow>,
    /// The numbers of its digests, where the store has numbers for them.
    last_digests: Option<[i64; 4]>,
}

impl WindowReader {
    /// The columns to select, in the order in which they are read.
    pub const COLUMNS: [&str; 21] = [
        "tenant_id",
        "subscription_id",
        "meter_id",
        "price_id",
        "dimensions",
        "period_start",
        "window_start",
        "customer_id",
        "window_end",
        "period_end",
        "quantity",
        "event_count",
        "cost",
        "currency",
        "events_digest",
        "meter_digest",
        "price_digest",
        "subscription_digest",
        "customer_digest",
        "version",
        "run_id",
    ];

    /// The places of the start and the end of the window.
    const WINDOW: [usize; 2] = [6, 8];

    /// The places of the digests of definitions.
    pub const DIGESTS: std::ops::Range<usize> = 15..19;

    /// The window of a row alone.
    pub fn window(row: &dyn Cells) -> Result<Span> {
        let instant = |place: usize| -> Result<Timestamp> {
            let column = WindowReader::COLUMNS.get(place).copied().unwrap_or_default();
            let cell = row.cell_at(place)?.with_context(|| format!("column {column} is NULL"))?;
            cell.parse().with_context(|| format!("column {column} holds `{cell}`"))
        };
        Ok(Span { start: instant(WindowReader::WINDOW[0])?, end: instant(WindowReader::WINDOW[1])? })
    }

    /// # Errors
    /// Names the row and its column where a cell holds nothing that fits.
    pub fn read(&mut self, row: &dyn Cells) -> Result<StoredWindow> {
        let row_of = || key_of(row, WindowReader::WINDOW[0]);
        self.read_cells(row).with_context(|| Unreadable { table: "usage_windows", row: row_of() })
    }

    fn read_cells(&mut self, row: &dyn Cells) -> Result<StoredWindow> {
        let mut cells = NextCells { row, columns: &WindowReader::COLUMNS, place: 0, texts: &mut self.texts };
        let last = self.last.as_ref();
        let last_row = last.map(|last| &last.row);
        let last_period = last_row.map(|row| &row.key.period);
        let period = cells.period_key(last_period.map(|period| &**period))?;
        let period = last_period.filter(|last| ***last == period).map_or_else(|| Arc::new(period), Arc::clone);
        let read = StoredWindow {
            row: Arc::new(WindowRow {
                key: WindowKey { period, window_start: cells.parsed()? },
                customer_id: cells.text(last_row.map(|row| &row.customer_id))?,
                window_end: cells.parsed()?,
                period_end: cells.parsed()?,
                quantity: cells.parsed()?,
                event_count: cells.integer()?,
                cost: cells.parsed()?,
                currency: cells.text(last_row.map(|row| &row.currency))?,
                events_digest: cells.events_digest()?,
                basis: cells.basis(last_row.map(|row| &row.basis), &mut self.last_digests)?,
            }),
            version: cells.integer()?,
            run_id: cells.text(last.map(|last| &last.run_id))?,
        };
        self.last = Some(read.clone());
        Ok(read)
    }
}

/// The key of a row that cannot be read, up to the column at `last`.
fn key_of(row: &dyn Cells, last: usize) -> String {
    let texts = (0..=last).map(|place| row.cell_at(place).ok().flatten().unwrap_or(Cow::Borrowed("?")).into_owned());
    texts.collect::<Vec<_>>().join(" / ")
}

/// Reads rows of `usage_periods`.
#[derive(Debug, Default)]
pub struct PeriodReader {
    texts: FxHashSet<Text>,
    last: Option<PeriodRow>,
}

impl PeriodReader {
    /// The columns to select, in the order in which they are read.
    pub const COLUMNS: [&str; 15] = [
        "tenant_id",
        "subscription_id",
        "meter_id",
        "price_id",
        "dimensions",
        "period_start",
        "customer_id",
        "period_end",
        "quantity",
        "cost",
        "minimum_adjustment",
        "commitment_adjustment",
        "amount",
        "currency",
        "closed_at",
    ];

    /// # Errors
    /// As [`WindowReader::read`].
    pub fn read(&mut self, row: &dyn Cells) -> Result<PeriodRow> {
        let row_of = || key_of(row, WindowReader::WINDOW[0] - 1);
        self.read_cells(row).with_context(|| Unreadable { table: "usage_periods", row: row_of() })
    }

    fn read_cells(&mut self, row: &dyn Cells) -> Result<PeriodRow> {
        let mut cells = NextCells { row, columns: &PeriodReader::COLUMNS, place: 0, texts: &mut self.texts };
        let last = self.last.as_ref();
        let read = PeriodRow {
            key: cells.period_key(last.map(|row| &row.key))?,
            customer_id: cells.text(last.map(|row| &row.customer_id))?,
            period_end: cells.parsed()?,
            quantity: cells.parsed()?,
            cost: cells.parsed()?,
            minimum_adjustment: cells.parsed()?,
            commitment_adjustment: cells.parsed()?,
            amount: cells.parsed()?,
            currency: cells.text(last.map(|row| &row.currency))?,
            closed_at: cells.optional()?,
        };
        self.last = Some(read.clone());
        Ok(read)
    }
}

/// Reads rows of `corrections`.
#[derive(Debug, Default)]
pub struct LedgerReader {
    texts: FxHashSet<Text>,
    last: Option<LastEntry>,
    /// Where the columns stand, once a row was seen: a store that an older version wrote last
    /// lacks some.
    places: Option<[Option<usize>; LedgerReader::COLUMNS.len()]>,
}

/// What the next correction mostly has too.
#[derive(Debug)]
struct LastEntry {
    run_id: Text,
    period: Arc<PeriodKey>,
    customer_id: Text,
    currency: Text,
    kind: Text,
    causes: Text,
}

impl LedgerReader {
    /// In the order in which they are read.
    const COLUMNS: [&str; 23] = [
        "correction_id",
        "run_id",
        "tenant_id",
        "subscription_id",
        "meter_id",
        "price_id",
        "dimensions",
        "period_start",
        "window_start",
        "customer_id",
        "currency",
        "kind",
        "causes",
        "quantity_before",
        "cost_before",
        "event_count_before",
        "quantity_after",
        "cost_after",
        "event_count_after",
        "replaced",
        "row_digest",
        "recorded_at",
        "after_digest",
    ];

    /// All rows must have their columns in the same order, whichever that is.
    pub fn read(&mut self, row: &dyn Cells) -> Result<LedgerEntry> {
        let places = *self.places.get_or_insert_with(|| LedgerReader::COLUMNS.map(|column| row.place(column)));
        let row = &Placed { row, places: &places };
        let correction_id = row.cell_at(0)?.context("column correction_id is NULL")?.into_owned();
        self.read_of(row, &correction_id).with_context(|| correction_id)
    }

    fn read_of(&mut self, row: &dyn Cells, correction_id: &str) -> Result<LedgerEntry> {
        let mut cells = NextCells { row, columns: &LedgerReader::COLUMNS, place: 1, texts: &mut self.texts };
        let last = self.last.as_ref();
        let run_id = cells.text(last.map(|last| &last.run_id))?;
        let last_period = last.map(|last| &last.period);
        let period = cells.period_key(last_period.map(|period| &**period))?;
        let period = last_period.filter(|last| ***last == period).map_or_else(|| Arc::new(period), Arc::clone);
        let read = LedgerEntry {
            correction_id: correction_id.to_owned(),
            run_id,
            key: WindowKey { period, window_start: cells.parsed()? },
            customer_id: cells.text(last.map(|last| &last.customer_id))?,
            currency: cells.text(last.map(|last| &last.currency))?,
            kind: cells.text(last.map(|last| &last.kind))?,
            causes: cells.text(last.map(|last| &last.causes))?,
            before: cells.values()?,
            after: cells.values()?,
            replaced: cells.next()?.into_owned(),
            row_digest: cells.integer()?,
            recorded_at: cells.parsed()?,
            after_digest: cells.optional()?,
        };
        self.last = Some(LastEntry {
            run_id: Text::clone(&read.run_id),
            period: Arc::clone(&read.key.period),
            customer_id: Text::clone(&read.customer_id),
            currency: Text::clone(&read.currency),
            kind: Text::clone(&read.kind),
            causes: Text::clone(&read.causes),
        });
        Ok(read)
    }
}

/// A row whose columns stand in another order, or not at all.
struct Placed<'r> {
    row: &'r dyn Cells,
    places: &'r [Option<usize>],
}

impl Cells for Placed<'_> {
    fn place(&self, column: &str) -> Option<usize> {
        self.row.place(column)
    }

    fn cell_at(&self, place: usize) -> Result<Option<Cow<'_, str>>> {
        self.places.get(place).copied().flatten().map_or(Ok(None), |place| self.row.cell_at(place))
    }

    fn integer_at(&self, place: usize) -> Result<Option<i64>> {
        self.places.get(place).copied().flatten().map_or(Ok(None), |place| self.row.integer_at(place))
    }
}

/// The cells of a row, one after the other.
struct NextCells<'r> {
    row: &'r dyn Cells,
    columns: &'static [&'static str],
    place: usize,
    texts: &'r mut FxHashSet<Text>,
}

impl<'r> NextCells<'r> {
    fn column(&self) -> &'static str {
        self.columns.get(self.place.saturating_sub(1)).copied().unwrap_or_default()
    }

    fn next(&mut self) -> Result<Cow<'r, str>> {
        let place = self.place;
        self.place += 1;
        self.row.cell_at(place)?.with_context(|| format!("column {} is NULL", self.column()))
    }

    /// `last` is what the row before has.
    fn text(&mut self, last: Option<&Text>) -> Result<Text> {
        let cell = self.next()?;
        if let Some(known) = last.filter(|last| ***last == *cell).or_else(|| self.texts.get(&*cell)) {
            return Ok(Text::clone(known));
        }
        let text: Text = Arc::from(&*cell);
        self.texts.insert(Text::clone(&text));
        Ok(text)
    }

    fn period_key(&mut self, last: Option<&PeriodKey>) -> Result<PeriodKey> {
        Ok(PeriodKey {
            tenant_id: self.text(last.map(|key| &key.tenant_id))?,
            subscription_id: self.text(last.map(|key| &key.subscription_id))?,
            meter_id: self.text(last.map(|key| &key.meter_id))?,
            price_id: self.text(last.map(|key| &key.price_id))?,
            dimensions: self.text(last.map(|key| &key.dimensions))?,
            period_start: self.parsed()?,
        })
    }

    /// `last_digests` are the numbers of those of the row before.
    fn basis(&mut self, last: Option<&Arc<Basis>>, last_digests: &mut Option<[i64; 4]>) -> Result<Arc<Basis>> {
        let digests = self.digest_numbers()?;
        let are_same = digests.is_some() && digests == *last_digests;
        *last_digests = digests;
        if let Some(last) = last.filter(|_| are_same) {
            self.place += WindowReader::DIGESTS.len();
            return Ok(Arc::clone(last));
        }
        let basis = Basis {
            meter: self.text(last.map(|basis| &basis.meter))?,
            price: self.text(last.map(|basis| &basis.price))?,
            subscription: self.text(last.map(|basis| &basis.subscription))?,
            customer: self.text(last.map(|basis| &basis.customer))?,
        };
        Ok(last.filter(|last| ***last == basis).map_or_else(|| Arc::new(basis), Arc::clone))
    }

    fn digest_numbers(&self) -> Result<Option<[i64; 4]>> {
        let mut numbers = [0; 4];
        for (number, place) in numbers.iter_mut().zip(WindowReader::DIGESTS) {
            let Some(found) = self.row.integer_at(place)? else { return Ok(None) };
            *number = found;
        }
        Ok(Some(numbers))
    }

    fn events_digest(&mut self) -> Result<SetDigest> {
        Ok(SetDigest::stored(&self.next()?))
    }

    fn integer<T: FromStr + TryFrom<i64>>(&mut self) -> Result<T>
    where
        <T as FromStr>::Err: std::error::Error + Send + Sync + 'static,
    {
        match self.row.integer_at(self.place)?.map(T::try_from) {
            Some(Ok(number)) => {
                self.place += 1;
                Ok(number)
            }
            _ => self.parsed(),
        }
    }

    fn parsed<T: FromStr>(&mut self) -> Result<T>
    where
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        let cell = self.next()?;
        cell.parse().with_context(|| format!("column {} holds `{cell}`", self.column()))
    }

    /// Who altered one of them alone altered the row: its digest tells.
    fn values(&mut self) -> Result<Option<Values>> {
        let (quantity, cost, event_count) = (self.optional()?, self.optional()?, self.optional()?);
        if quantity.is_none() && cost.is_none() && event_count.is_none() {
            return Ok(None);
        }
        Ok(Some(Values {
            quantity: quantity.unwrap_or_default(),
            cost: cost.unwrap_or_default(),
            event_count: event_count.unwrap_or_default(),
        }))
    }

    fn optional<T: FromStr>(&mut self) -> Result<Option<T>>
    where
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        let is_null = self.row.cell_at(self.place)?.is_none();
        if is_null {
            self.place += 1;
            return Ok(None);
        }
        self.parsed().map(Some)
    }
}
