//! Which range and which part of a job a command is about.

use std::path::Path;

use anyhow::Result;
use chrono::{Duration, NaiveDate, NaiveDateTime, NaiveTime};
use chrono_tz::Tz;
use clap::Args;

use crate::clock;
use crate::fault::configuration;
use crate::model::basis::Scope;
use crate::model::timestamp::Timestamp;
use crate::model::window::{Span, WindowSize, instant_of};
use crate::pipeline::by_hand::PeriodChoice;
use crate::pipeline::{Completeness, Request};

/// The range is `[start, end)`; without any of these, it is everything.
#[derive(Debug, Default, Args)]
pub struct RangeArguments {
    /// From this time on: a date (midnight in the job's zone) or RFC 3339.
    #[arg(long, value_name = "TIME", requires = "end", conflicts_with_all = ["day", "month", "last"])]
    start: Option<String>,

    /// Up to, not including, this time.
    #[arg(long, value_name = "TIME", requires = "start")]
    end: Option<String>,

    /// One day in the job's zone: 2026-01-31.
    #[arg(long, value_name = "DATE", conflicts_with_all = ["month", "last"])]
    day: Option<String>,

    /// One month in the job's zone: 2026-01.
    #[arg(long, value_name = "MONTH", conflicts_with = "last")]
    month: Option<String>,

    /// The time until now: 12h, 3d, 2w.
    #[arg(long, value_name = "DURATION")]
    last: Option<String>,

    /// Only this tenant.
    #[arg(long, value_name = "TENANT_ID")]
    tenant: Option<String>,

    /// Only this customer.
    #[arg(long, value_name = "CUSTOMER_ID")]
    customer: Option<String>,

    /// Only this meter.
    #[arg(long, value_name = "METER_ID")]
    meter: Option<String>,
}

/// How much a command without a range looks at: what the job says, unless told otherwise.
#[derive(Debug, Default, Args)]
#[group(multiple = false)]
pub struct CompletenessArguments {
    /// Without a range: compute only what is new since the last run, and what depends on it.
    #[arg(long, conflicts_with_all = ["start", "end", "day", "month", "last", "tenant", "customer", "meter"])]
    incremental: bool,

    /// Without a range: compute everything, whatever the job says.
    #[arg(long, conflicts_with_all = ["start", "end", "day", "month", "last"])]
    full: bool,
}

impl CompletenessArguments {
    pub fn choice(&self) -> Completeness {
        match (self.incremental, self.full) {
            (true, _) => Completeness::Incremental,
            (false, true) => Completeness::Full,
            (false, false) => Completeness::Auto,
        }
    }

    /// The option that repeats it, after a space.
    pub fn as_options(&self) -> String {
        let given = [(self.incremental, " --incremental"), (self.full, " --full")];
        given.iter().filter(|(is_given, _)| *is_given).map(|(_, option)| *option).collect()
    }
}

impl RangeArguments {
    /// The request in the zone of the job.
    ///
    /// # Errors
    /// Where a time cannot be read, or the range is empty.
    pub fn request(&self, timezone: Tz) -> Result<Request> {
        let scope = Scope { tenant: self.tenant.clone(), customer: self.customer.clone(), meter: self.meter.clone() };
        let range = if let (Some(start), Some(end)) = (&self.start, &self.end) {
            Some(Span { start: time("--start", start, timezone)?, end: time("--end", end, timezone)? })
        } else if let Some(day) = &self.day {
            let date = date(day).ok_or_else(|| configuration(format!("--day {day} is no date such as 2026-01-31")))?;
            Some(WindowSize::Day.window(midnight(date, timezone), timezone))
        } else if let Some(month) = &self.month {
            let first = date(&format!("{month}-01"));
            let first = first.ok_or_else(|| configuration(format!("--month {month} is no month such as 2026-01")))?;
            Some(WindowSize::Month.window(midnight(first, timezone), timezone))
        } else if let Some(last) = &self.last {
            let length =
                duration(last).ok_or_else(|| configuration(format!("--last {last} is no duration such as 12h, 3d or 2w")))?;
            let now = clock::now();
            let start = Timestamp::in_range(Timestamp::from_utc(now.utc() - length).nanos());
            let start = start.ok_or_else(|| configuration(format!("--last {last} begins before the year 1700")))?;
            Some(Span { start, end: now })
        } else {
            None
        };
        let before_end = |range: Span| Timestamp::from_nanos(range.end.nanos().saturating_sub(1));
        let is_known = |t: Timestamp| Timestamp::in_range(t.nanos()).is_some();
        match range {
            Some(range) if !is_known(range.start) || !is_known(before_end(range)) => Err(configuration(format!(
                "the range from {} to {} is outside of the years 1700 to 2199",
                range.start, range.end
            ))),
            Some(range) if range.start >= range.end => Err(configuration(format!(
                "the range from {} to {} is empty: --start must be before --end, which is not part of the range",
                range.start, range.end
            ))),
            range => Ok(Request { range, scope, ..Request::default() }),
        }
    }
}

impl RangeArguments {
    /// The options that repeat the request, each after a space.
    pub fn as_options(&self) -> String {
        let options = [
            ("start", &self.start),
            ("end", &self.end),
            ("day", &self.day),
            ("month", &self.month),
            ("last", &self.last),
            ("tenant", &self.tenant),
            ("customer", &self.customer),
            ("meter", &self.meter),
        ];
        let given = options.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)));
        given.map(|(name, value)| format!(" --{name} {}", shell_word(value))).collect()
    }
}

/// The billing periods that `--period` means: those of a month, or those around a time.
///
/// # Errors
/// Where it is neither.
pub fn period_choice(text: &str, timezone: Tz) -> Result<PeriodChoice> {
    if text.len() == "2026-01".len()
        && let Some(first) = date(&format!("{text}-01"))
    {
        return Ok(PeriodChoice::BeginInMonth(first));
    }
    if let Some(day) = date(text) {
        return Ok(PeriodChoice::HoldDay(day));
    }
    time("--period", text, timezone).map(PeriodChoice::Hold)
}

/// A path as a shell takes it.
pub fn shell_path(path: &Path) -> String {
    shell_word(&path.display().to_string())
}

/// A value as a shell takes it.
pub fn shell_word(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:+/@".contains(c);
    if !value.is_empty() && value.chars().all(plain) { value.to_owned() } else { format!("'{}'", value.replace('\'', "'\\''")) }
}

fn date(text: &str) -> Option<NaiveDate> {
    let date = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
    // The same bounds as for any instant.
    text.parse::<Timestamp>().ok().map(|_| date)
}

fn midnight(date: NaiveDate, timezone: Tz) -> Timestamp {
    instant_of(date.and_time(NaiveTime::MIN), timezone)
}

/// A bare date or a time without an offset is wall-clock time in the job's zone.
///
/// # Errors
/// Where the text, given by `option`, is no time.
pub fn time(option: &str, text: &str, timezone: Tz) -> Result<Timestamp> {
    if let Some(date) = date(text) {
        return Ok(midnight(date, timezone));
    }
    let wall = ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d %H:%M"];
    let wall = wall.iter().find_map(|format| NaiveDateTime::parse_from_str(text, format).ok());
    let parsed = text.parse::<Timestamp>().map_err(|error| configuration(format!("{option}: {error}")))?;
    Ok(wall.map_or(parsed, |wall| instant_of(wall, timezone)))
}

fn duration(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let count: i64 = text.strip_suffix(unit)?.parse().ok().filter(|count| (1..=100_000).contains(count))?;
    match unit {
        'h' => Some(Duration::hours(count)),
        'd' => Some(Duration::days(count)),
        'w' => Some(Duration::weeks(count)),
        _ => None,
    }
}
