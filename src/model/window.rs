//! Windows and billing periods.
//!
//! Everything is half-open, `[start, end)`. Windows of an hour or less have a
//! fixed length and follow the wall clock between clock changes, so the hour
//! that an autumn night repeats is two windows. Longer windows and periods
//! begin at wall-clock boundaries: a local day has 23, 24 or 25 hours.

use chrono::{Datelike, Duration, NaiveDate, NaiveTime};
use chrono_tz::Tz;

pub use super::calendar::{Span, instant_of, local_time};
use super::calendar::{Step, add_months, calendar_span, fixed_window};
pub use super::hopping::{Hopping, Length};
use super::timestamp::{MINUTE, SECOND, Timestamp};

/// The size of a tumbling window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WindowSize {
    /// 1, 5, 15, 30 or 60 minutes.
    Minutes(u32),
    SixHours,
    Day,
    /// From Monday.
    Week,
    Month,
}

impl WindowSize {
    /// Every size with the names it goes by, the preferred one first.
    pub const NAMES: [(&'static str, WindowSize); 14] = [
        ("1m", WindowSize::Minutes(1)),
        ("5m", WindowSize::Minutes(5)),
        ("15m", WindowSize::Minutes(15)),
        ("30m", WindowSize::Minutes(30)),
        ("hour", WindowSize::Minutes(60)),
        ("6h", WindowSize::SixHours),
        ("day", WindowSize::Day),
        ("week", WindowSize::Week),
        ("month", WindowSize::Month),
        ("1h", WindowSize::Minutes(60)),
        ("60m", WindowSize::Minutes(60)),
        ("1d", WindowSize::Day),
        ("1w", WindowSize::Week),
        ("minute", WindowSize::Minutes(1)),
    ];

    pub fn parse(name: &str) -> Option<WindowSize> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, size)| *size)
    }

    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, size)| *size == self).map_or("", |(name, _)| name)
    }

    /// The window of this size that holds `t`, in the zone `tz`.
    pub fn window(self, t: Timestamp, tz: Tz) -> Span {
        match self {
            WindowSize::Minutes(minutes) => fixed_window(t, tz, i64::from(minutes) * MINUTE),
            WindowSize::SixHours => calendar_span(t, tz, Step::Minutes(6 * 60)),
            WindowSize::Day => calendar_span(t, tz, Step::Days(1)),
            WindowSize::Week => calendar_span(t, tz, Step::Week),
            WindowSize::Month => calendar_span(t, tz, Step::Months(1)),
        }
    }

    /// The smallest span of whole windows that covers `span`.
    #[must_use]
    pub fn widen(self, span: Span, tz: Tz) -> Span {
        let start = self.window(span.start, tz).start;
        let last = self.window(Timestamp::from_nanos(span.end.nanos().saturating_sub(1)), tz);
        Span { start, end: last.end }
    }

    /// The length between clock changes, in nanoseconds: a slot size for caches.
    pub fn nominal_nanos(self) -> i64 {
        const HOUR: i64 = 60 * MINUTE;
        match self {
            WindowSize::Minutes(minutes) => i64::from(minutes) * MINUTE,
            WindowSize::SixHours => 6 * HOUR,
            WindowSize::Day => 24 * HOUR,
            WindowSize::Week => 7 * 24 * HOUR,
            WindowSize::Month => 30 * 24 * HOUR,
        }
    }
}

/// How a meter divides time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WindowKind {
    Tumbling(WindowSize),
    Hopping(Hopping),
    /// From an event to the gap after the last event that followed within the gap.
    Session {
        gap_nanos: i64,
    },
}

impl WindowKind {
    /// The smallest span of whole windows that covers `span`, as far as the calendar
    /// tells; how far sessions reach, only their events tell.
    #[must_use]
    pub fn widen(self, span: Span, tz: Tz) -> Span {
        match self {
            WindowKind::Tumbling(size) => size.widen(span, tz),
            WindowKind::Hopping(hopping) => hopping.widen(span, tz),
            WindowKind::Session { .. } => span,
        }
    }

    /// The smallest span of whole windows that covers events from `first` to `last`.
    #[must_use]
    pub fn around_events(self, first: Timestamp, last: Timestamp, tz: Tz) -> Span {
        let after = |nanos: i64| Timestamp::from_nanos(last.nanos().saturating_add(nanos));
        match self {
            WindowKind::Session { gap_nanos } => Span { start: first, end: after(gap_nanos) },
            _ => self.widen(Span { start: first, end: after(1) }, tz),
        }
    }

    /// The tumbling window that an event at `t` is first put into: a pane of hopping
    /// windows, the gap after the event for a session.
    pub fn slot(self, t: Timestamp, tz: Tz) -> Span {
        match self {
            WindowKind::Tumbling(size) => size.window(t, tz),
            WindowKind::Hopping(hopping) => hopping.pane(t, tz),
            WindowKind::Session { gap_nanos } => {
                Span { start: t, end: Timestamp::from_nanos(t.nanos().saturating_add(gap_nanos)) }
            }
        }
    }

    /// The length of a slot between clock changes, for caches; `None` where no two
    /// events share one.
    pub fn nominal_nanos(self) -> Option<i64> {
        match self {
            WindowKind::Tumbling(size) => Some(size.nominal_nanos()),
            WindowKind::Hopping(hopping) => Some(hopping.pane_length().nominal_nanos()),
            WindowKind::Session { .. } => None,
        }
    }
}

impl std::fmt::Display for WindowKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WindowKind::Tumbling(size) => f.write_str(size.name()),
            WindowKind::Hopping(Hopping { size, advance }) => write!(f, "hopping, {size} every {advance}"),
            WindowKind::Session { gap_nanos } => {
                let seconds = gap_nanos / SECOND;
                if seconds % 60 == 0 { write!(f, "session, gap {}m", seconds / 60) } else { write!(f, "session, gap {seconds}s") }
            }
        }
    }
}

/// The length of a billing period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PeriodLength {
    Day,
    Week,
    Month,
    Quarter,
    Year,
}

impl PeriodLength {
    pub const NAMES: [(&'static str, PeriodLength); 5] = [
        ("day", PeriodLength::Day),
        ("week", PeriodLength::Week),
        ("month", PeriodLength::Month),
        ("quarter", PeriodLength::Quarter),
        ("year", PeriodLength::Year),
    ];

    pub fn parse(name: &str) -> Option<PeriodLength> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, length)| *length)
    }

    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, length)| *length == self).map_or("", |(name, _)| name)
    }

    fn step(self) -> Step {
        match self {
            PeriodLength::Day => Step::Days(1),
            PeriodLength::Week => Step::Week,
            PeriodLength::Month => Step::Months(1),
            PeriodLength::Quarter => Step::Months(3),
            PeriodLength::Year => Step::Months(12),
        }
    }
}

/// The billing periods of a subscription: calendar aligned, or counted from an anchor date.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BillingCycle {
    pub length: PeriodLength,
    pub anchor: Option<NaiveDate>,
    pub timezone: Tz,
}

impl BillingCycle {
    /// The billing period that holds `t`.
    pub fn period(&self, t: Timestamp) -> Span {
        match self.anchor {
            None => calendar_span(t, self.timezone, self.length.step()),
            Some(anchor) => self.anchored_period(t, anchor),
        }
    }

    /// The billing periods that a span of time touches, the first one first.
    pub fn periods(&self, span: Span) -> impl Iterator<Item = Span> + '_ {
        let first = (span.start < span.end).then(|| self.period(span.start));
        std::iter::successors(first, |period| Some(self.period(period.end))).take_while(move |period| period.start < span.end)
    }

    /// Boundaries are counted from the anchor itself, so that a month end that was
    /// clamped (31 Jan, 28 Feb) does not stick (31 Mar).
    fn anchored_period(&self, t: Timestamp, anchor: NaiveDate) -> Span {
        let boundary = |n: i64| instant_of(nth_from(anchor, self.length, n).and_time(NaiveTime::MIN), self.timezone);
        let local = local_time(t, self.timezone).date();
        let mut n = match self.length {
            PeriodLength::Day => (local - anchor).num_days(),
            PeriodLength::Week => (local - anchor).num_days().div_euclid(7),
            PeriodLength::Month | PeriodLength::Quarter | PeriodLength::Year => {
                let months = i64::from(local.year() - anchor.year()) * 12 + i64::from(local.month()) - i64::from(anchor.month());
                months.div_euclid(months_in(self.length))
            }
        };
        while boundary(n) > t {
            n -= 1;
        }
        while boundary(n + 1) <= t {
            n += 1;
        }
        Span { start: boundary(n), end: boundary(n + 1) }
    }
}

fn months_in(length: PeriodLength) -> i64 {
    match length {
        PeriodLength::Quarter => 3,
        PeriodLength::Year => 12,
        PeriodLength::Day | PeriodLength::Week | PeriodLength::Month => 1,
    }
}

fn nth_from(anchor: NaiveDate, length: PeriodLength, n: i64) -> NaiveDate {
    let moved = match length {
        PeriodLength::Day => anchor.checked_add_signed(Duration::days(n)),
        PeriodLength::Week => anchor.checked_add_signed(Duration::days(7 * n)),
        PeriodLength::Month | PeriodLength::Quarter | PeriodLength::Year => add_months(anchor, n * months_in(length)),
    };
    moved.unwrap_or(if n < 0 { NaiveDate::MIN } else { NaiveDate::MAX })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn t(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn shown(span: Span) -> String {
        format!("{} {}", span.start, span.end)
    }

    #[test]
    fn local_days_have_23_and_25_hours() {
        let berlin = chrono_tz::Europe::Berlin;
        assert_eq!(shown(WindowSize::Day.window(t("2026-03-29T12:00:00Z"), berlin)), "2026-03-28T23:00:00Z 2026-03-29T22:00:00Z");
        assert_eq!(shown(WindowSize::Day.window(t("2026-10-25T12:00:00Z"), berlin)), "2026-10-24T22:00:00Z 2026-10-25T23:00:00Z");
        let half_hour_change = chrono_tz::Australia::Lord_Howe;
        let span = WindowSize::Minutes(60).window(t("2026-04-04T15:10:00Z"), half_hour_change);
        assert!(span.contains(t("2026-04-04T15:10:00Z")));
    }

    #[test]
    fn the_repeated_hour_is_two_windows() {
        let berlin = chrono_tz::Europe::Berlin;
        let first = WindowSize::Minutes(60).window(t("2026-10-25T00:30:00Z"), berlin);
        let second = WindowSize::Minutes(60).window(t("2026-10-25T01:30:00Z"), berlin);
        assert_eq!(shown(first), "2026-10-25T00:00:00Z 2026-10-25T01:00:00Z");
        assert_eq!(shown(second), "2026-10-25T01:00:00Z 2026-10-25T02:00:00Z");
    }

    fn hopping(size: &str, advance: &str) -> Result<Hopping, String> {
        Hopping::new(Length::parse(size).unwrap(), Length::parse(advance).unwrap())
    }

    #[test]
    fn hopping_windows_overlap() {
        let windows = |size: &str, advance: &str, at: &str, tz: Tz| {
            let hopping = hopping(size, advance).unwrap();
            hopping.windows(hopping.pane(t(at), tz), tz).into_iter().map(shown).collect::<Vec<_>>()
        };
        let utc = Tz::UTC;
        assert_eq!(
            windows("1h", "30m", "2026-01-01T10:10:00Z", utc),
            ["2026-01-01T10:00:00Z 2026-01-01T11:00:00Z", "2026-01-01T09:30:00Z 2026-01-01T10:30:00Z"]
        );
        assert_eq!(windows("50m", "20m", "2026-01-01T10:45:00Z", utc).len(), 3);
        let berlin = chrono_tz::Europe::Berlin;
        assert_eq!(
            windows("2d", "1d", "2026-03-29T12:00:00Z", berlin),
            ["2026-03-28T23:00:00Z 2026-03-30T22:00:00Z", "2026-03-27T23:00:00Z 2026-03-29T22:00:00Z"]
        );
        // Clocks go on from 02:00 to 03:00, and back from 03:00 to 02:00.
        assert_eq!(windows("6h", "6h", "2026-03-29T02:30:00Z", berlin), ["2026-03-28T23:00:00Z 2026-03-29T04:00:00Z"]);
        assert_eq!(windows("2h", "2h", "2026-10-25T01:30:00Z", berlin), ["2026-10-25T00:00:00Z 2026-10-25T03:00:00Z"]);
        assert_eq!(
            windows("24h", "12h", "2026-03-29T02:30:00Z", berlin),
            ["2026-03-28T23:00:00Z 2026-03-29T22:00:00Z", "2026-03-28T11:00:00Z 2026-03-29T10:00:00Z"]
        );
        let widened =
            hopping("1h", "30m").unwrap().widen(Span { start: t("2026-01-01T10:00:00Z"), end: t("2026-01-01T11:00:00Z") }, utc);
        assert_eq!(shown(widened), "2026-01-01T09:30:00Z 2026-01-01T11:30:00Z");
        for (size, advance) in [("1h", "7m"), ("1h", "2h"), ("1h", "1d"), ("7d", "1m")] {
            assert!(hopping(size, advance).is_err(), "{size} {advance}");
        }
    }

    #[test]
    fn month_anchors_clamp_and_do_not_stick() {
        let cycle = BillingCycle { length: PeriodLength::Month, anchor: NaiveDate::from_ymd_opt(2026, 1, 31), timezone: Tz::UTC };
        assert_eq!(shown(cycle.period(t("2026-02-15"))), "2026-01-31T00:00:00Z 2026-02-28T00:00:00Z");
        assert_eq!(shown(cycle.period(t("2026-02-28"))), "2026-02-28T00:00:00Z 2026-03-31T00:00:00Z");
        assert_eq!(shown(cycle.period(t("2026-03-31"))), "2026-03-31T00:00:00Z 2026-04-30T00:00:00Z");
        assert_eq!(shown(cycle.period(t("2025-12-31"))), "2025-12-31T00:00:00Z 2026-01-31T00:00:00Z");
    }

    const ZONES: [Tz; 7] = [
        Tz::UTC,
        chrono_tz::Europe::Berlin,
        chrono_tz::America::New_York,
        chrono_tz::Asia::Kolkata,
        chrono_tz::Australia::Lord_Howe,
        chrono_tz::America::Sao_Paulo, // clocks once changed at midnight
        chrono_tz::Pacific::Apia,      // once skipped a whole day
    ];

    /// Windows that do not overlap partition time, around clock changes too.
    #[test]
    fn windows_that_hop_by_their_size_partition_time() {
        let changes = [
            "2026-03-29T01:00:00Z",
            "2026-10-25T01:00:00Z",
            "2026-04-04T15:00:00Z",
            "2026-10-03T15:30:00Z",
            "2011-12-30T10:00:00Z",
        ];
        for (tz, size) in ZONES.iter().flat_map(|tz| ["30m", "1h", "90m", "2h", "6h", "12h", "24h"].map(|size| (*tz, size))) {
            let hopping = hopping(size, size).unwrap();
            let window = |t: Timestamp| {
                let windows = hopping.windows(hopping.pane(t, tz), tz);
                let [window] = windows[..] else {
                    panic!("{size} {tz} at {t}: {:?}", windows.into_iter().map(shown).collect::<Vec<_>>())
                };
                window
            };
            for t in changes.iter().flat_map(|change| (-2000..2000).step_by(10).map(|minute| t(change).nanos() + minute * MINUTE))
            {
                let found = window(Timestamp::from_nanos(t));
                assert_eq!(window(found.start), found, "{size} {tz}");
                assert_eq!(window(Timestamp::from_nanos(found.end.nanos() - 1)), found, "{size} {tz}");
                assert_eq!(window(found.end).start, found.end, "{size} {tz}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]
        /// Every instant lies in exactly one window, and windows meet end to start.
        #[test]
        fn windows_partition_time(seconds in 1_000_000_000i64..2_000_000_000, zone in 0usize..7, size in 0usize..9) {
            let (tz, size) = (ZONES[zone], WindowSize::NAMES[size].1);
            let t = Timestamp::from_nanos(seconds * SECOND);
            let window = size.window(t, tz);
            prop_assert!(window.contains(t), "{} {} {}", size.name(), tz, shown(window));
            prop_assert_eq!(size.window(window.start, tz), window);
            prop_assert_eq!(size.window(Timestamp::from_nanos(window.end.nanos() - 1), tz), window);
            prop_assert_eq!(size.window(window.end, tz).start, window.end);
        }

        /// Every instant lies in size/advance windows, and its pane in each of them.
        #[test]
        fn panes_lie_in_their_windows(seconds in 1_000_000_000i64..2_000_000_000, zone in 0usize..7, kind in 0usize..5) {
            let (size, advance) = [("1h", "30m"), ("50m", "20m"), ("1d", "6h"), ("7d", "1d"), ("6h", "4h")][kind];
            let (tz, hopping) = (ZONES[zone], hopping(size, advance).unwrap());
            let t = Timestamp::from_nanos(seconds * SECOND);
            let pane = hopping.pane(t, tz);
            prop_assert!(pane.contains(t));
            prop_assert_eq!(hopping.pane(pane.start, tz), pane);
            let windows = hopping.windows(pane, tz);
            prop_assert!(!windows.is_empty());
            for window in windows {
                prop_assert!(window.covers(pane), "{} {} {}", tz, shown(window), shown(pane));
            }
        }

        #[test]
        fn periods_partition_time(seconds in 1_000_000_000i64..2_000_000_000, zone in 0usize..7, length in 0usize..5, anchor in proptest::option::of(0i64..1500)) {
            let anchor = anchor.map(|days| NaiveDate::from_ymd_opt(2023, 1, 1).unwrap() + Duration::days(days));
            let cycle = BillingCycle { length: PeriodLength::NAMES[length].1, anchor, timezone: ZONES[zone] };
            let t = Timestamp::from_nanos(seconds * SECOND);
            let period = cycle.period(t);
            prop_assert!(period.contains(t));
            prop_assert_eq!(cycle.period(period.start), period);
            prop_assert_eq!(cycle.period(Timestamp::from_nanos(period.end.nanos() - 1)), period);
            prop_assert_eq!(cycle.period(period.end).start, period.end);
        }
    }
}
