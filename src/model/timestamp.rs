//! Instants: nanoseconds since 1970-01-01T00:00:00Z, from the year 1700 to 2199.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, Datelike, NaiveDate, NaiveDateTime, Timelike, Utc};

/// Nanoseconds in a second.
pub const SECOND: i64 = 1_000_000_000;
/// Nanoseconds in a minute.
pub const MINUTE: i64 = 60 * SECOND;

/// What is read back: bounds of windows and periods can lie a year beyond the
/// events in them.
const REPRESENTABLE: std::ops::Range<i64> = -9_151_488_000 * SECOND..9_151_488_000 * SECOND; // 1680 to 2260

/// An instant with nanosecond precision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

/// A text that is no instant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an RFC 3339 timestamp between the years 1700 and 2199 (for example 2026-01-31T09:30:00Z)")]
pub struct TimestampError(String);

impl Timestamp {
    /// Before every event.
    pub const MIN: Timestamp = Timestamp(i64::MIN);
    /// After every event.
    pub const MAX: Timestamp = Timestamp(i64::MAX);

    pub const fn from_nanos(nanos: i64) -> Self {
        Timestamp(nanos)
    }

    /// The instant of an event, unless it is outside of the years 1700 to 2199, where
    /// calendar arithmetic could leave the representable range.
    pub fn in_range(nanos: i64) -> Option<Self> {
        const FIRST: i64 = -8_520_336_000 * SECOND;
        const LAST: i64 = 7_258_118_400 * SECOND;
        (FIRST..LAST).contains(&nanos).then_some(Timestamp(nanos))
    }

    pub const fn nanos(self) -> i64 {
        self.0
    }

    /// Whether it sorts among others by its text as it does by time: fractions of a second come
    /// before `Z`.
    pub const fn sorts_as_text(self) -> bool {
        self.0 % SECOND == 0
    }

    /// Wall time in UTC.
    pub fn utc(self) -> NaiveDateTime {
        DateTime::from_timestamp_nanos(self.0).naive_utc()
    }

    /// The instant at which UTC shows `wall`; beyond the representable range, the nearest end.
    pub fn from_utc(wall: NaiveDateTime) -> Self {
        let utc = wall.and_utc();
        Timestamp(utc.timestamp_nanos_opt().unwrap_or(if utc.timestamp() < 0 { i64::MIN } else { i64::MAX }))
    }
}

impl From<DateTime<Utc>> for Timestamp {
    fn from(value: DateTime<Utc>) -> Self {
        Timestamp::from_utc(value.naive_utc())
    }
}

impl FromStr for Timestamp {
    type Err = TimestampError;

    /// RFC 3339, with `T` or a space, any offset; without an offset it is UTC.
    /// A bare date is its midnight in UTC. Digits beyond nanoseconds are cut.
    fn from_str(text: &str) -> Result<Self, TimestampError> {
        parse(text.trim().as_bytes())
            .filter(|nanos| REPRESENTABLE.contains(nanos))
            .map(Timestamp)
            .ok_or_else(|| TimestampError(text.to_owned()))
    }
}

/// `count` decimal digits at `at`.
fn digits(text: &[u8], at: usize, count: usize) -> Option<u32> {
    let slice = text.get(at..at + count)?;
    slice.iter().try_fold(0, |value, b| b.is_ascii_digit().then(|| value * 10 + u32::from(b - b'0')))
}

fn parse(text: &[u8]) -> Option<i64> {
    let separated = |at: usize, expected: &[u8]| text.get(at).filter(|b| expected.contains(b)).map(|_| ());
    separated(4, b"-")?;
    separated(7, b"-")?;
    let year = i32::try_from(digits(text, 0, 4)?).ok()?;
    let date = NaiveDate::from_ymd_opt(year, digits(text, 5, 2)?, digits(text, 8, 2)?)?;
    let day_seconds = date.signed_duration_since(NaiveDate::default()).num_seconds();
    if text.len() == 10 {
        return day_seconds.checked_mul(SECOND);
    }
    separated(10, b"Tt ")?;
    separated(13, b":")?;
    let (hour, minute) = (digits(text, 11, 2)?, digits(text, 14, 2)?);
    let (second, mut at) = match text.get(16) {
        Some(b':') => (digits(text, 17, 2)?, 19),
        _ => (0, 16),
    };
    // A leap second is the last second of its minute, as POSIX time has it.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let mut fraction = 0i64;
    if text.get(at) == Some(&b'.') {
        at += 1;
        let start = at;
        let mut unit = SECOND;
        while let Some(b) = text.get(at).filter(|b| b.is_ascii_digit()) {
            unit /= 10;
            fraction += unit * i64::from(b - b'0');
            at += 1;
        }
        if at == start {
            return None;
        }
    }
    let offset_seconds = offset(text.get(at..)?)?;
    let seconds = day_seconds + i64::from(hour * 3600 + minute * 60 + second.min(59)) - offset_seconds;
    seconds.checked_mul(SECOND)?.checked_add(fraction)
}

/// Seconds east of UTC.
fn offset(text: &[u8]) -> Option<i64> {
    let sign = match text {
        [] | [b'Z' | b'z'] | b" UTC" => return Some(0),
        [b'+', ..] => 1,
        [b'-', ..] => -1,
        _ => return None,
    };
    let hours = digits(text, 1, 2)?;
    let minutes = match text.len() {
        3 => 0,
        5 => digits(text, 3, 2)?,
        6 if text.get(3) == Some(&b':') => digits(text, 4, 2)?,
        _ => return None,
    };
    (hours < 24 && minutes < 60).then(|| sign * i64::from(hours * 3600 + minutes * 60))
}

impl fmt::Display for Timestamp {
    /// RFC 3339 in UTC; the fraction is trimmed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = TimestampText::default();
        f.write_str(text.of(*self))
    }
}

/// A place to write instants to, one after the other: every row of the store has four.
#[derive(Debug, Default)]
pub struct TimestampText([u8; 30]);

impl TimestampText {
    /// The instant as RFC 3339 in UTC; the fraction is trimmed.
    pub fn of(&mut self, t: Timestamp) -> &str {
        let wall = t.utc();
        let fields = [
            (0..4, u32::try_from(wall.year()).unwrap_or_default(), b'-'),
            (5..7, wall.month(), b'-'),
            (8..10, wall.day(), b'T'),
            (11..13, wall.hour(), b':'),
            (14..16, wall.minute(), b':'),
            (17..19, wall.second(), b'.'),
            (20..29, wall.nanosecond(), b'Z'),
        ];
        for (place, value, separator) in fields {
            self.write(place, value, separator);
        }
        let mut length = 30;
        if wall.nanosecond() == 0 {
            length = 20;
        } else {
            while self.0.get(length - 2) == Some(&b'0') {
                length -= 1;
            }
        }
        if let Some(last) = self.0.get_mut(length - 1) {
            *last = b'Z';
        }
        self.0.get(..length).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default()
    }

    /// Digits with leading zeros at `place`, and what stands behind them.
    fn write(&mut self, place: std::ops::Range<usize>, mut value: u32, separator: u8) {
        if let Some(byte) = self.0.get_mut(place.end) {
            *byte = separator;
        }
        for byte in self.0.get_mut(place).into_iter().flatten().rev() {
            *byte = b'0' + u8::try_from(value % 10).unwrap_or_default();
            value /= 10;
        }
    }
}

impl serde::Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_and_prints() {
        for (text, shown) in [
            ("2026-01-31T09:30:00Z", "2026-01-31T09:30:00Z"),
            ("2026-01-31 09:30:00", "2026-01-31T09:30:00Z"),
            ("2026-01-31", "2026-01-31T00:00:00Z"),
            ("2026-01-31T09:30", "2026-01-31T09:30:00Z"),
            ("2026-01-31T09:30:00.120+02:00", "2026-01-31T07:30:00.12Z"),
            ("2023-11-16 18:15:46.6805900", "2023-11-16T18:15:46.68059Z"),
            ("1969-12-31T23:59:59.999999999Z", "1969-12-31T23:59:59.999999999Z"),
            ("2016-12-31T23:59:60Z", "2016-12-31T23:59:59Z"),
        ] {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "2026-02-30",
            "2026-01-31T25:00:00Z",
            "2026-01-31T09:30:00.Z",
            "yesterday",
            "9999-01-01",
            "2026-01-31T09:30:00+1",
            "1767225600",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }
}
