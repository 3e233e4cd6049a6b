//! The only place that reads the wall clock.

use std::time::Instant;

use crate::model::timestamp::Timestamp;

/// The current time, in whole milliseconds: enough to tell runs apart, and to read.
#[allow(clippy::disallowed_methods)]
pub fn now() -> Timestamp {
    let now = Timestamp::from(chrono::Utc::now());
    Timestamp::from_nanos(now.nanos() / 1_000_000 * 1_000_000)
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
