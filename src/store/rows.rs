//! Rows of the contract's tables from cells of text: every store reads them back
//! the same way.

use std::borrow::Cow;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustc_hash::FxHashSet;

use super::{LedgerEntry, PeriodEntry, StoredDeadLetter};
use crate::model::aggregate::{
    Basis, DeadLetter, DeadLetterKey, PeriodKey, PeriodRow, Reason, StoredWindow, Text, Values, WindowKey, WindowRow,
};
use crate::model::digest::SetDigest;
use crate::model::run::{Origin, RunMode, RunRecord};
use crate::model::window::Span;

/// A row whose cells are found by the name of their column, or by its place.
pub trait Cells {
    /// The text of a cell; `None` for NULL.
    fn cell(&self, column: &str) -> Result<Option<Cow<'_, str>>>;

    fn cell_at(&self, place: usize) -> Result<Option<Cow<'_, str>>>;

    /// The number of a cell that the store keeps as one; otherwise its text tells.
    fn integer_at(&self, _place: usize) -> Result<Option<i64>> {
        Ok(None)
    }
}

fn required<'r>(row: &'r dyn Cells, column: &str) -> Result<Cow<'r, str>> {
    row.cell(column)?.with_context(|| format!("column {column} is NULL"))
}

fn optional<T: FromStr>(row: &dyn Cells, column: &str) -> Result<Option<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let Some(text) = row.cell(column)? else { return Ok(None) };
    text.parse().map(Some).with_context(|| format!("column {column} holds `{text}`"))
}

fn parsed<T: FromStr>(row: &dyn Cells, column: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    optional(row, column)?.with_context(|| format!("column {column} is NULL"))
}

fn string(row: &dyn Cells, column: &str) -> Result<String> {
    required(row, column).map(Cow::into_owned)
}

fn text(row: &dyn Cells, column: &str) -> Result<Text> {
    required(row, column).map(|text| Arc::from(&*text))
}

fn json<T: serde::de::DeserializeOwned>(row: &dyn Cells, column: &str) -> Result<T> {
    serde_json::from_str(&required(row, column)?).with_context(|| format!("column {column}"))
}

fn period_key(row: &dyn Cells) -> Result<PeriodKey> {
    Ok(PeriodKey {
        tenant_id: text(row, "tenant_id")?,
        subscription_id: text(row, "subscription_id")?,
        meter_id: text(row, "meter_id")?,
        price_id: text(row, "price_id")?,
        dimensions: text(row, "dimensions")?,
        period_start: parsed(row, "period_start")?,
    })
}

fn window_key(row: &dyn Cells) -> Result<WindowKey> {
    Ok(WindowKey { period: Arc::new(period_key(row)?), window_start: parsed(row, "window_start")? })
}

/// Reads rows of `usage_windows`. There are many: cells are found by their place, and
/// what repeats is shared.
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

    /// The places of the digests of definitions.
    pub const DIGESTS: std::ops::Range<usize> = 15..19;

    pub fn read(&mut self, row: &dyn Cells) -> Result<StoredWindow> {
        let mut cells = NextCells { row, place: 0, texts: &mut self.texts, last_digests: &mut self.last_digests };
        let last = self.last.as_ref();
        let last_row = last.map(|last| &last.row);
        let period = cells.period_key(last_row.map(|row| &row.key.period))?;
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
                basis: cells.basis(last_row.map(|row| &row.basis))?,
            }),
            version: cells.integer()?,
            run_id: cells.text(last.map(|last| &last.run_id))?,
        };
        self.last = Some(read.clone());
        Ok(read)
    }
}

/// The cells of a row, one after the other.
struct NextCells<'r> {
    row: &'r dyn Cells,
    place: usize,
    texts: &'r mut FxHashSet<Text>,
    last_digests: &'r mut Option<[i64; 4]>,
}

impl<'r> NextCells<'r> {
    fn column(&self) -> &'static str {
        WindowReader::COLUMNS.get(self.place.saturating_sub(1)).copied().unwrap_or_default()
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

    fn period_key(&mut self, last: Option<&Arc<PeriodKey>>) -> Result<Arc<PeriodKey>> {
        let key = PeriodKey {
            tenant_id: self.text(last.map(|key| &key.tenant_id))?,
            subscription_id: self.text(last.map(|key| &key.subscription_id))?,
            meter_id: self.text(last.map(|key| &key.meter_id))?,
            price_id: self.text(last.map(|key| &key.price_id))?,
            dimensions: self.text(last.map(|key| &key.dimensions))?,
            period_start: self.parsed()?,
        };
        Ok(last.filter(|last| ***last == key).map_or_else(|| Arc::new(key), Arc::clone))
    }

    fn basis(&mut self, last: Option<&Arc<Basis>>) -> Result<Arc<Basis>> {
        let digests = self.digest_numbers()?;
        let are_same = digests.is_some() && digests == *self.last_digests;
        *self.last_digests = digests;
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
}

/// A row of `usage_periods`.
pub fn period(row: &dyn Cells) -> Result<PeriodRow> {
    Ok(PeriodRow {
        key: period_key(row)?,
        customer_id: text(row, "customer_id")?,
        period_end: parsed(row, "period_end")?,
        quantity: parsed(row, "quantity")?,
        cost: parsed(row, "cost")?,
        minimum_adjustment: parsed(row, "minimum_adjustment")?,
        commitment_adjustment: parsed(row, "commitment_adjustment")?,
        amount: parsed(row, "amount")?,
        currency: text(row, "currency")?,
        closed_at: optional(row, "closed_at")?,
    })
}

/// A row of `runs`.
pub fn run(row: &dyn Cells) -> Result<RunRecord> {
    let (start, end) = (optional(row, "range_start")?, optional(row, "range_end")?);
    Ok(RunRecord {
        run_id: string(row, "run_id")?,
        job: string(row, "job")?,
        mode: {
            let mode = required(row, "mode")?;
            RunMode::parse(&mode).with_context(|| format!("unknown mode `{mode}`"))?
        },
        status: string(row, "status")?,
        range: start.zip(end).map(|(start, end)| Span { start, end }),
        started_at: parsed(row, "started_at")?,
        finished_at: parsed(row, "finished_at")?,
        origin: Origin { started_by: string(row, "started_by")?, overrides: json(row, "overrides")? },
        version: parsed(row, "version")?,
        counts: json(row, "counts")?,
        input: json(row, "input")?,
        basis: json(row, "basis")?,
        ledger_digest: string(row, "ledger_digest")?,
    })
}

/// A row of `dead_letters`.
pub fn dead_letter(row: &dyn Cells) -> Result<StoredDeadLetter> {
    let reason = required(row, "reason")?;
    Ok(StoredDeadLetter {
        letter: DeadLetter {
            key: DeadLetterKey {
                tenant_id: string(row, "tenant_id")?,
                event_id: string(row, "event_id")?,
                meter_id: string(row, "meter_id")?,
                reason: Reason::parse(&reason).with_context(|| format!("unknown reason `{reason}`"))?,
            },
            detail: string(row, "detail")?,
            event: string(row, "event")?,
            event_time: optional(row, "event_time")?,
        },
        occurrences: parsed(row, "occurrences")?,
        first_run_id: string(row, "first_run_id")?,
        last_run_id: string(row, "last_run_id")?,
        resolved_run_id: row.cell("resolved_run_id")?.map(Cow::into_owned),
        row_digest: parsed(row, "row_digest")?,
    })
}

/// A row of `corrections`.
pub fn ledger_entry(row: &dyn Cells) -> Result<LedgerEntry> {
    let values = |suffix: &str| -> Result<Option<Values>> {
        let Some(quantity) = optional(row, &format!("quantity_{suffix}"))? else { return Ok(None) };
        let cost = parsed(row, &format!("cost_{suffix}"))?;
        Ok(Some(Values { quantity, cost, event_count: parsed(row, &format!("event_count_{suffix}"))? }))
    };
    Ok(LedgerEntry {
        correction_id: string(row, "correction_id")?,
        run_id: string(row, "run_id")?,
        key: window_key(row)?,
        customer_id: string(row, "customer_id")?,
        currency: string(row, "currency")?,
        kind: string(row, "kind")?,
        causes: string(row, "causes")?,
        before: values("before")?,
        after: values("after")?,
        replaced: row.cell("replaced")?.unwrap_or_default().into_owned(),
        row_digest: parsed(row, "row_digest")?,
    })
}

/// A row of `period_corrections`.
pub fn period_entry(row: &dyn Cells) -> Result<PeriodEntry> {
    Ok(PeriodEntry {
        correction_id: string(row, "correction_id")?,
        run_id: string(row, "run_id")?,
        before: string(row, "row_before")?,
        after: string(row, "row_after")?,
        row_digest: parsed(row, "row_digest")?,
    })
}
