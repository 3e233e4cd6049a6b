//! Wall clocks: the only place where calendar arithmetic happens.

use chrono::{Datelike, Duration, Months, NaiveDate, NaiveDateTime, NaiveTime, Offset, TimeZone, Timelike};
use chrono_tz::Tz;

use super::timestamp::{SECOND, Timestamp};

/// A half-open span of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Span {
    pub start: Timestamp,
    pub end: Timestamp,
}

impl Span {
    pub fn contains(self, t: Timestamp) -> bool {
        self.start <= t && t < self.end
    }

    pub fn overlaps(self, other: Span) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether `other` lies in this span as a whole.
    pub fn covers(self, other: Span) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The smallest span that covers both.
    #[must_use]
    pub fn union(self, other: Span) -> Span {
        Span { start: self.start.min(other.start), end: self.end.max(other.end) }
    }
}

pub(super) fn add_months(date: NaiveDate, months: i64) -> Option<NaiveDate> {
    let count = Months::new(u32::try_from(months.unsigned_abs()).ok()?);
    if months < 0 { date.checked_sub_months(count) } else { date.checked_add_months(count) }
}

/// A wall-clock grid: boundaries at midnight, or every so many minutes from it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    /// Divides a day.
    Minutes(u32),
    Days(i64),
    Week,
    /// Divides a year: 1, 3, 12.
    Months(u32),
}

impl Step {
    fn floor(self, wall: NaiveDateTime) -> NaiveDateTime {
        let date = wall.date();
        match self {
            Step::Minutes(minutes) => {
                let minute = (wall.hour() * 60 + wall.minute()) / minutes * minutes;
                date.and_time(NaiveTime::MIN) + Duration::minutes(minute.into())
            }
            Step::Days(_) => date.and_time(NaiveTime::MIN),
            Step::Week => (date - Duration::days(i64::from(date.weekday().num_days_from_monday()))).and_time(NaiveTime::MIN),
            Step::Months(months) => {
                let month = date.month0() / months * months + 1;
                NaiveDate::from_ymd_opt(date.year(), month, 1).unwrap_or(date).and_time(NaiveTime::MIN)
            }
        }
    }

    fn next(self, boundary: NaiveDateTime, count: i64) -> NaiveDateTime {
        match self {
            Step::Minutes(minutes) => boundary + Duration::minutes(i64::from(minutes) * count),
            Step::Days(days) => boundary + Duration::days(days * count),
            Step::Week => boundary + Duration::days(7 * count),
            Step::Months(months) => {
                add_months(boundary.date(), i64::from(months) * count).map_or(boundary, |date| date.and_time(boundary.time()))
            }
        }
    }
}

/// The span of a wall-clock grid that holds `t`.
pub(super) fn calendar_span(t: Timestamp, tz: Tz, step: Step) -> Span {
    let start = calendar_start(t, tz, step);
    Span { start: instant_of(start, tz), end: instant_of(step.next(start, 1), tz) }
}

/// What clocks show, or would without a change, where the span of a wall-clock grid begins that
/// holds `t`.
pub(super) fn calendar_start(t: Timestamp, tz: Tz, step: Step) -> NaiveDateTime {
    let mut start = step.floor(local_time(t, tz));
    // A clock that goes back over midnight can put `t` before its own date's first
    // midnight, or after the next one's.
    while instant_of(start, tz) > t {
        start = step.next(start, -1);
    }
    while instant_of(step.next(start, 1), tz) <= t {
        start = step.next(start, 1);
    }
    start
}

/// A window of fixed length, aligned to the wall clock in force at `t`. Where a
/// clock change is no multiple of the length, the window is cut at the change.
pub(super) fn fixed_window(t: Timestamp, tz: Tz, length: i64) -> Span {
    let nanos = t.nanos();
    let offset = offset_nanos(t, tz);
    let start = (nanos.saturating_add(offset)).div_euclid(length).saturating_mul(length).saturating_sub(offset);
    let end = start.saturating_add(length);
    let span = Span { start: Timestamp::from_nanos(start), end: Timestamp::from_nanos(end) };
    let before = offset_nanos(span.start, tz);
    let after = offset_nanos(Timestamp::from_nanos(end - 1), tz);
    Span {
        start: if before == offset { span.start } else { change_between(span.start, t, tz) },
        end: if after == offset { span.end } else { change_between(t, span.end, tz) },
    }
}

/// The instant in `(from, to]` at which the offset becomes that of `to`.
fn change_between(from: Timestamp, to: Timestamp, tz: Tz) -> Timestamp {
    let target = offset_nanos(to, tz);
    let (mut low, mut high) = (from.nanos().div_euclid(SECOND), to.nanos().div_euclid(SECOND));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if offset_nanos(Timestamp::from_nanos(middle * SECOND), tz) == target { high = middle } else { low = middle }
    }
    Timestamp::from_nanos(high * SECOND)
}

pub(super) fn offset_nanos(t: Timestamp, tz: Tz) -> i64 {
    if tz == Tz::UTC {
        return 0;
    }
    i64::from(tz.offset_from_utc_datetime(&t.utc()).fix().local_minus_utc()) * SECOND
}

/// What the clocks of `tz` show at `t`.
pub fn local_time(t: Timestamp, tz: Tz) -> NaiveDateTime {
    tz.from_utc_datetime(&t.utc()).naive_local()
}

/// The first instant at which the clocks of `tz` show `wall` or, where a clock
/// change skips it, the instant of that change.
pub fn instant_of(wall: NaiveDateTime, tz: Tz) -> Timestamp {
    if tz == Tz::UTC {
        return Timestamp::from_utc(wall);
    }
    if let Some(found) = tz.from_local_datetime(&wall).earliest() {
        return Timestamp::from_utc(found.naive_utc());
    }
    let day = Duration::days(1);
    change_between(Timestamp::from_utc(wall - day), Timestamp::from_utc(wall + day), tz)
}
