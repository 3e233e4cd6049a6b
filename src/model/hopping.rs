//! Hopping windows: of one length, they begin more often than they end.

use chrono::{Duration, NaiveDate, NaiveTime};
use chrono_tz::Tz;

use super::calendar::{Span, Step, calendar_span, calendar_start, fixed_window, instant_of, local_time, offset_nanos};
use super::timestamp::{MINUTE, Timestamp};

/// A length of time: by the clock, or by the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Length {
    Minutes(u32),
    /// Local days, of 23 to 25 hours where clocks change.
    Days(u32),
}

/// Ten years: what lasts so long after any event can still be told as an instant.
const LONGEST_DAYS: u32 = 3660;

impl Length {
    /// `15m`, `1h`, `7d`, or a name such as `hour`, `day` and `week`.
    pub fn parse(text: &str) -> Option<Length> {
        let named =
            [("minute", Length::Minutes(1)), ("hour", Length::Minutes(60)), ("day", Length::Days(1)), ("week", Length::Days(7))];
        if let Some((_, length)) = named.iter().find(|(name, _)| *name == text) {
            return Some(*length);
        }
        let unit = text.chars().last()?;
        let count: u32 = text.strip_suffix(unit)?.parse().ok().filter(|count| *count > 0)?;
        let (length, most) = match unit {
            'm' => (Length::Minutes(count), LONGEST_DAYS * 24 * 60),
            'h' => (Length::Minutes(count.checked_mul(60)?), LONGEST_DAYS * 24 * 60),
            'd' => (Length::Days(count), LONGEST_DAYS),
            'w' => (Length::Days(count.checked_mul(7)?), LONGEST_DAYS),
            _ => return None,
        };
        let (Length::Minutes(number) | Length::Days(number)) = length;
        (number <= most).then_some(length)
    }

    /// Between clock changes.
    pub fn nominal_nanos(self) -> i64 {
        match self {
            Length::Minutes(minutes) => i64::from(minutes) * MINUTE,
            Length::Days(days) => i64::from(days) * 24 * 60 * MINUTE,
        }
    }

    /// The wall-clock grid of what lasts longer than an hour: as for windows of `6h`, where clocks
    /// change it lasts longer or shorter. Up to an hour, each hour that clocks repeat has its own.
    fn wall_step(self) -> Option<Step> {
        match self {
            Length::Minutes(minutes) if minutes > 60 => Some(Step::Minutes(minutes)),
            Length::Minutes(_) | Length::Days(_) => None,
        }
    }

    /// The span of a grid of this length that holds `t`: minutes from local midnight,
    /// days from 1970-01-01.
    fn span(self, t: Timestamp, tz: Tz) -> Span {
        if let Some(step) = self.wall_step() {
            return calendar_span(t, tz, step);
        }
        match self {
            Length::Minutes(minutes) => fixed_window(t, tz, i64::from(minutes) * MINUTE),
            Length::Days(days) => {
                let day = calendar_span(t, tz, Step::Days(1));
                let number = (local_time(day.start, tz).date() - NaiveDate::default()).num_days();
                let first = number - number.rem_euclid(i64::from(days));
                let midnight = |number: i64| {
                    let date = NaiveDate::default().checked_add_signed(Duration::days(number)).unwrap_or(NaiveDate::MAX);
                    instant_of(date.and_time(NaiveTime::MIN), tz)
                };
                Span { start: midnight(first), end: midnight(first + i64::from(days)) }
            }
        }
    }
}

impl std::fmt::Display for Length {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Length::Minutes(minutes) if minutes % 60 == 0 => write!(f, "{}h", minutes / 60),
            Length::Minutes(minutes) => write!(f, "{minutes}m"),
            Length::Days(days) => write!(f, "{days}d"),
        }
    }
}

/// Windows of `size` that begin every `advance`. Events are kept in panes of a length
/// that divides both; a window is a row of panes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hopping {
    pub(super) size: Length,
    pub(super) advance: Length,
}

/// Windows that may hold one event.
const MOST_HOPS: i64 = 1000;

impl Hopping {
    /// # Errors
    /// What does not fit together.
    pub fn new(size: Length, advance: Length) -> Result<Hopping, String> {
        const DAY: u32 = 24 * 60;
        let size = match (size, advance) {
            (Length::Days(days), Length::Minutes(_)) => days.checked_mul(DAY).map_or(size, Length::Minutes),
            _ => size,
        };
        match (size, advance) {
            (Length::Minutes(_), Length::Days(_)) => {
                return Err("advance is longer than size: events would be left out".to_owned());
            }
            (_, Length::Minutes(minutes)) if DAY.checked_rem(minutes) != Some(0) => {
                return Err(format!("an advance of {minutes} minutes does not divide a day"));
            }
            _ => {}
        }
        if advance.nominal_nanos() > size.nominal_nanos() {
            return Err("advance is longer than size: events would be left out".to_owned());
        }
        if size.nominal_nanos() / advance.nominal_nanos() > MOST_HOPS {
            return Err(format!("an event would count in more than {MOST_HOPS} windows"));
        }
        Ok(Hopping { size, advance })
    }

    pub(super) fn pane_length(self) -> Length {
        match (self.size, self.advance) {
            (Length::Days(size), Length::Days(advance)) => Length::Days(greatest_common_divisor(size, advance)),
            (Length::Minutes(size), Length::Minutes(advance)) => Length::Minutes(greatest_common_divisor(size, advance)),
            _ => self.advance,
        }
    }

    /// The pane that holds `t`.
    pub fn pane(self, t: Timestamp, tz: Tz) -> Span {
        self.pane_length().span(t, tz)
    }

    /// The windows that hold a pane, the latest first. Those that begin more than an hour apart
    /// begin and end by the clocks on the wall; others end with their last pane, also where a clock
    /// change has cut that.
    pub fn windows(self, pane: Span, tz: Tz) -> Vec<Span> {
        let mut windows: Vec<Span> = Vec::new();
        if let (Some(step), Length::Minutes(size), Length::Minutes(advance)) = (self.advance.wall_step(), self.size, self.advance)
        {
            let mut start = calendar_start(pane.start, tz, step);
            loop {
                let end = start + Duration::minutes(size.into());
                let window = Span { start: instant_of(start, tz), end: instant_of(end, tz) };
                if !window.contains(pane.start) {
                    return windows;
                }
                // Where clocks skip a whole window, the next one begins at the same time.
                if windows.last().is_none_or(|last| last.start != window.start) {
                    windows.push(window);
                }
                start -= Duration::minutes(advance.into());
            }
        }
        let mut start = self.advance.span(pane.start, tz).start;
        loop {
            let window = Span { start, end: self.end(start, tz) };
            if !window.contains(pane.start) {
                return windows;
            }
            windows.push(window);
            start = self.advance.span(Timestamp::from_nanos(start.nanos().saturating_sub(1)), tz).start;
        }
    }

    fn end(self, start: Timestamp, tz: Tz) -> Timestamp {
        match self.size {
            Length::Minutes(_) => {
                let last = Timestamp::from_nanos(start.nanos().saturating_add(self.size.nominal_nanos() - 1));
                let (size, advance) = (self.size.nominal_nanos(), self.advance.nominal_nanos());
                let first = self.advance.span(start, tz);
                let is_cut = first.end.nanos() - first.start.nanos() != advance;
                if size % advance == 0 && (is_cut || offset_nanos(start, tz) != offset_nanos(last, tz)) {
                    // A change may have cut any of them.
                    return (1..size / advance).fold(first.end, |start, _| self.advance.span(start, tz).end);
                }
                self.pane(last, tz).end
            }
            Length::Days(days) => {
                let date = local_time(start, tz).date().checked_add_signed(Duration::days(days.into()));
                instant_of(date.unwrap_or(NaiveDate::MAX).and_time(NaiveTime::MIN), tz)
            }
        }
    }

    pub(super) fn widen(self, span: Span, tz: Tz) -> Span {
        let last = Timestamp::from_nanos(span.end.nanos().saturating_sub(1));
        let first = self.windows(self.pane(span.start, tz), tz);
        let last = self.windows(self.pane(last, tz), tz);
        first.into_iter().chain(last).fold(span, Span::union)
    }
}

fn greatest_common_divisor(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}
