//! The only place that reads the wall clock.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};

use crate::model::timestamp::Timestamp;

/// The current time, in whole milliseconds: enough to tell runs apart, and to read.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let millis = i64::try_from(since.as_millis()).unwrap_or(i64::MAX);
    Timestamp::from_nanos(millis.saturating_mul(1_000_000))
}

/// # Errors
/// Where the clock is so wrong that what it says could not be stored.
pub fn check() -> Result<()> {
    let now = now();
    if now.nanos() <= 0 || Timestamp::in_range(now.nanos()).is_none() {
        bail!("the clock of this machine says {now}: set it right, for runs are ordered by it");
    }
    Ok(())
}

/// A stopwatch, started.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch(Instant);

impl Stopwatch {
    #[allow(clippy::disallowed_methods)]
    pub fn start() -> Self {
        Stopwatch(Instant::now())
    }

    pub fn seconds(self) -> f64 {
        self.0.elapsed().as_secs_f64()
    }
}
