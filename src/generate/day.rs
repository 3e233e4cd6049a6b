//! The events of one day: which of them are late, copied or broken, and when they
//! happen. Any day can be worked out without the others.

use chrono::{Days, NaiveDate, NaiveTime};

use super::profile::{MILLION, Profile};
use super::random::{Random, mix};
use crate::model::timestamp::{MINUTE, SECOND, Timestamp};
use crate::model::window::{WindowSize, instant_of, local_time};

/// What becomes of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Plain,
    /// The same row comes again.
    Duplicated,
    /// The same id comes again with other values.
    Amended,
    /// The same id comes again, deleted.
    Voided,
    /// It comes days later.
    Late,
    MissingTimestamp,
    InvalidNumber,
    UnknownCustomer,
}

/// A day of events.
#[derive(Debug, Clone)]
pub struct Day {
    /// From 0.
    pub index: u32,
    pub date: NaiveDate,
    /// Microseconds since 1970.
    pub start: i64,
    pub end: i64,
    /// When clocks change, if they do.
    clock_change: Option<i64>,
    /// Events by id: rows that are no copies.
    pub events: u64,
    /// The ranks of each fate, from and to; the ranks beyond are plain.
    fates: [(Fate, u64, u64); 7],
    /// Ranks are positions in another order: position 0 has rank `shift`, the next one `step` more.
    step: u64,
    shift: u64,
    /// How many days later rows can come at most, so that no row comes after the last day.
    pub late_days: u32,
    seed: u64,
}

const MICROSECOND: i64 = SECOND / 1_000_000;

impl Day {
    pub fn new(profile: &Profile, index: u32) -> Option<Day> {
        let date = profile.start.checked_add_days(Days::new(u64::from(index)))?;
        let zone = profile.timezone;
        let span = WindowSize::Day.window(instant_of(date.and_time(NaiveTime::from_hms_opt(12, 0, 0)?), zone), zone);
        let (start, end) = (span.start.nanos() / MICROSECOND, span.end.nanos() / MICROSECOND);
        let (before, after) = (rows_before(profile, index), rows_before(profile, index + 1));
        let rates = profile.rates;
        let late_days = rates.late_days.min(profile.days.saturating_sub(index + 1));
        // Shares of the rows so far, so that what is rounded off on one day counts on another.
        let share = |rows: u64, rate: u64| u64::try_from(u128::from(rows) * u128::from(rate) / u128::from(MILLION));
        let mut rest = after - before;
        let mut take = |fate: Fate, rate: u64, rows_each: u64| {
            let wanted = share(after, rate).unwrap_or_default() - share(before, rate).unwrap_or_default();
            let count = wanted.min(rest / rows_each);
            rest -= count * rows_each;
            (fate, count)
        };
        let counts = [
            take(Fate::Duplicated, rates.duplicates, 2),
            take(Fate::Amended, rates.amended, 2),
            take(Fate::Voided, rates.voided, 2),
            take(Fate::Late, if late_days > 0 { rates.late } else { 0 }, 1),
            take(Fate::MissingTimestamp, rates.missing_timestamp, 1),
            take(Fate::InvalidNumber, rates.invalid_number, 1),
            take(Fate::UnknownCustomer, rates.unknown_customer, 1),
        ];
        let copies = counts.iter().take(3).map(|(_, count)| *count).sum::<u64>();
        let mut next = 0;
        let fates = counts.map(|(fate, count)| {
            next += count;
            (fate, next - count, next)
        });
        let events = after - before - copies;
        Some(Day {
            index,
            date,
            start,
            end,
            clock_change: clock_change(start, end, zone),
            events,
            fates,
            step: coprime(events),
            shift: mix(profile.seed ^ u64::from(index)) % events.max(1),
            late_days,
            seed: profile.seed,
        })
    }

    /// Every event in order of time, with its fate.
    pub fn positions(&self) -> impl Iterator<Item = (u64, Fate)> {
        let mut rank = self.shift;
        (0..self.events).map(move |position| {
            let fate = self.fate(rank);
            rank += self.step;
            if rank >= self.events {
                rank -= self.events;
            }
            (position, fate)
        })
    }

    fn fate(&self, rank: u64) -> Fate {
        let found = self.fates.iter().find(|(_, _, to)| rank < *to);
        found.map_or(Fate::Plain, |(fate, ..)| *fate)
    }

    /// The positions of one fate whose second row, or only row, comes `lag` days later.
    pub fn positions_after(&self, fate: Fate, lag: u32) -> impl Iterator<Item = u64> {
        let (first, choices) = match fate {
            Fate::Late => (1, self.late_days),
            Fate::Amended | Fate::Voided => (0, self.late_days + 1),
            _ => (0, 1),
        };
        let ranks = self.fates.iter().find(|(of, ..)| *of == fate).map_or(0..0, |(_, from, to)| *from..*to);
        let is_there = (first..first + choices).contains(&lag);
        let skipped = usize::try_from(lag.saturating_sub(first)).unwrap_or_default();
        let step = usize::try_from(choices.max(1)).unwrap_or(1);
        let inverse = inverse(self.step, self.events);
        let position = move |rank: u64| {
            let distance = u128::from(rank + self.events - self.shift) * u128::from(inverse);
            u64::try_from(distance % u128::from(self.events.max(1))).unwrap_or_default()
        };
        ranks.filter(move |_| is_there).skip(skipped).step_by(step).map(position)
    }

    /// A number of its own for every event.
    pub fn number(&self, position: u64) -> u64 {
        u64::from(self.index) << 40 | position
    }

    /// When an event happens. Events are spread over the day in order, but for some
    /// that are drawn to the hours around a clock change.
    pub fn time(&self, position: u64, near_clock_change: u64, random: &mut Random) -> i64 {
        let length = u64::try_from(self.end - self.start).unwrap_or_default();
        let slot =
            |at: u64| u64::try_from(u128::from(length) * u128::from(at) / u128::from(self.events.max(1))).unwrap_or_default();
        let (from, to) = (slot(position), slot(position + 1));
        let offset = from + random.below((to - from).max(1));
        let time = self.start + i64::try_from(offset).unwrap_or_default();
        let Some(change) = self.clock_change else { return time };
        if random.below(MILLION) >= near_clock_change {
            return time;
        }
        let near = i64::try_from(random.below(2 * HOUR)).unwrap_or_default() - HOUR_SIGNED;
        (change + near).clamp(self.start, self.end - 1)
    }

    /// When an event of this day is ingested: some seconds later, on the same day.
    pub fn ingestion(&self, time: i64, random: &mut Random) -> i64 {
        let delay = 200_000 + i64::try_from(random.skewed_below(10_000_000, 3)).unwrap_or_default();
        // There is room for a copy that comes later on the same day.
        (time + delay).min(self.end - 1000).max(time)
    }

    /// An instant of this day that comes after `earlier`.
    pub fn later(&self, earlier: i64, random: &mut Random) -> i64 {
        let from = self.start.max(earlier + 1);
        let room = u64::try_from(self.end - from).unwrap_or_default();
        from + i64::try_from(random.below(room.max(1))).unwrap_or_default()
    }

    /// Two words that no other event has.
    pub fn id(&self, position: u64) -> (u64, u64) {
        let first = mix(self.number(position).wrapping_add(mix(self.seed)));
        (first, mix(first ^ self.seed))
    }
}

const HOUR: u64 = 3_600_000_000;
const HOUR_SIGNED: i64 = 3_600_000_000;

/// The rows of all days before this one.
fn rows_before(profile: &Profile, index: u32) -> u64 {
    let (days, index) = (u64::from(profile.days), u64::from(index));
    profile.events / days * index + (profile.events % days).min(index)
}

/// The instant at which clocks change between two instants; they do so at quarter hours.
fn clock_change(start: i64, end: i64, zone: chrono_tz::Tz) -> Option<i64> {
    let quarter = 15 * MINUTE / MICROSECOND;
    let offset = |micros: i64| {
        let instant = Timestamp::from_nanos(micros * MICROSECOND);
        local_time(instant, zone).signed_duration_since(instant.utc())
    };
    let quarters = (0..).map(|number| start + number * quarter).take_while(|instant| *instant < end);
    let before = offset(start);
    quarters.into_iter().find(|instant| offset(*instant) != before)
}

/// A number that shares no factor with `count`, near its golden section: ranks that
/// are next to each other then lie far apart in time.
fn coprime(count: u64) -> u64 {
    let start = u64::try_from(u128::from(count) * 618_034 / 1_000_000).unwrap_or_default().max(1);
    (start..).find(|step| greatest_common_divisor(*step, count) == 1).unwrap_or(1) % count.max(1)
}

fn greatest_common_divisor(a: u64, b: u64) -> u64 {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// The number that, times `step`, gives 1 modulo `count`.
fn inverse(step: u64, count: u64) -> u64 {
    let (mut old, mut rest) = (i128::from(step), i128::from(count));
    let (mut coefficient, mut next) = (1i128, 0i128);
    while rest != 0 {
        let quotient = old / rest;
        (old, rest) = (rest, old - quotient * rest);
        (coefficient, next) = (next, coefficient - quotient * next);
    }
    u64::try_from(coefficient.rem_euclid(i128::from(count.max(1)))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(events: u64, days: u32) -> Profile {
        Profile { events, days, ..Profile::built_in().unwrap() }
    }

    #[test]
    fn every_event_has_one_fate_and_every_row_one_day() {
        for events in [1, 2, 20, 1000, 99_991] {
            let profile = profile(events, 5);
            let days: Vec<_> = (0..5).map(|index| Day::new(&profile, index).unwrap()).collect();
            for day in &days {
                for (fate, from, to) in day.fates {
                    let mut here: Vec<_> = day.positions().filter(|(_, of)| *of == fate).map(|(at, _)| at).collect();
                    let mut there: Vec<_> = (0..5).flat_map(|lag| day.positions_after(fate, lag)).collect();
                    here.sort_unstable();
                    there.sort_unstable();
                    assert_eq!((here.len() as u64, &here), (to - from, &there), "{fate:?}");
                }
                assert!((5 - day.index..9).all(|lag| day.positions_after(Fate::Late, lag).next().is_none()));
            }
            let copies = |day: &Day| {
                let of = |fate| (0..5).map(|lag| day.positions_after(fate, lag).count() as u64).sum::<u64>();
                of(Fate::Duplicated) + of(Fate::Amended) + of(Fate::Voided)
            };
            assert_eq!(days.iter().map(|day| day.events + copies(day)).sum::<u64>(), events);
        }
    }

    #[test]
    fn times_lie_in_the_local_day_and_some_near_a_clock_change() {
        let profile = Profile { start: "2026-03-29".parse().unwrap(), timezone: chrono_tz::Europe::Berlin, ..profile(10_000, 1) };
        let day = Day::new(&profile, 0).unwrap();
        assert_eq!((day.end - day.start) / HOUR_SIGNED, 23);
        let change = "2026-03-29T01:00:00Z".parse::<Timestamp>().unwrap().nanos() / 1000;
        assert_eq!(day.clock_change, Some(change));
        let times: Vec<_> = (0..day.events).map(|at| day.time(at, 100_000, &mut Random::new(1, at))).collect();
        assert!(times.iter().all(|time| (day.start..day.end).contains(time)));
        let near = times.iter().filter(|time| time.abs_diff(change) <= HOUR).count();
        assert!((1600..2000).contains(&near), "{near}");
    }
}
