//! Closing billing periods: a change that nobody computes.

use anyhow::Result;
use chrono::{Datelike as _, Days, NaiveDate, NaiveTime};
use chrono_tz::Tz;

use super::draft::Draft;
use crate::clock::now;
use crate::fault::configuration;
use crate::model::aggregate::{PeriodCorrection, PeriodRow};
use crate::model::run::{RunMode, RunRecord};
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, instant_of, local_time};
use crate::store::AggregateStore;

/// Which billing periods somebody means. Dates are those of each subscription's own zone, in
/// which its periods begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeriodChoice {
    /// Those that begin in the month of a date.
    BeginInMonth(NaiveDate),
    /// Those that hold the beginning of a day.
    HoldDay(NaiveDate),
    /// Those that hold an instant.
    Hold(Timestamp),
}

impl PeriodChoice {
    /// All that is meant touches it, in whatever zone.
    fn span(self) -> Span {
        let days = |first: NaiveDate, count: u64| {
            let of = |date: Option<NaiveDate>| date.map(|date| Timestamp::from_utc(date.and_time(NaiveTime::MIN)));
            let (start, end) = (of(first.checked_sub_days(Days::new(1))), of(first.checked_add_days(Days::new(count + 1))));
            Span { start: start.unwrap_or(Timestamp::MIN), end: end.unwrap_or(Timestamp::MAX) }
        };
        match self {
            PeriodChoice::BeginInMonth(date) => days(date.with_day(1).unwrap_or(date), 31),
            PeriodChoice::HoldDay(date) => days(date, 1),
            PeriodChoice::Hold(t) => Span { start: t, end: Timestamp::from_nanos(t.nanos().saturating_add(1)) },
        }
    }

    fn means(self, row: &PeriodRow, zone: Tz) -> bool {
        let period = Span { start: row.key.period_start, end: row.period_end };
        match self {
            PeriodChoice::BeginInMonth(date) => {
                let begin = local_time(period.start, zone).date();
                (begin.year(), begin.month()) == (date.year(), date.month())
            }
            PeriodChoice::HoldDay(date) => period.contains(instant_of(date.and_time(NaiveTime::MIN), zone)),
            PeriodChoice::Hold(t) => period.contains(t),
        }
    }
}

/// Closes the chosen periods, or opens them again. `None` where they are so already. `zone` tells
/// that of a row's subscription.
///
/// # Errors
/// Where there is no such period.
pub fn close(
    store: &dyn AggregateStore,
    job: &str,
    runs: &[RunRecord],
    choice: PeriodChoice,
    reopen: bool,
    zone: impl Fn(&PeriodRow) -> Tz,
    wants: impl Fn(&PeriodRow) -> bool,
) -> Result<Option<(Draft, Vec<PeriodRow>)>> {
    let rows = store.periods(job, choice.span())?;
    let chosen: Vec<_> = rows.into_iter().filter(|row| wants(row) && choice.means(row, zone(row))).collect();
    if chosen.is_empty() {
        return Err(configuration(
            "no stored billing period is meant: check --period, --tenant, --customer and --subscription, or run the job first",
        ));
    }
    let closed_at = (!reopen).then(now);
    let changed: Vec<_> = chosen.into_iter().filter(|row| row.closed_at.is_some() == reopen).collect();
    if changed.is_empty() {
        return Ok(None);
    }
    let count = changed.len();
    let counts = serde_json::json!({ if reopen { "reopened" } else { "closed" }: count });
    let mut draft = Draft::by_hand(RunMode::Close, runs.last(), counts);
    for row in changed {
        let after = PeriodRow { closed_at, ..row.clone() };
        draft.period_corrections.push(PeriodCorrection {
            key: row.key.clone(),
            before: Some(row),
            after: Some(after.clone()),
            is_adjustment: false,
        });
        draft.period_upserts.push(after);
    }
    let rows = draft.period_upserts.clone();
    Ok(Some((draft, rows)))
}
