//! Runs, and the chain that holds the ledger together.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::aggregate::{Causes, Correction, Values};
use super::timestamp::Timestamp;
use super::window::Span;
use crate::pipeline::enrich::Scope;
use crate::reference::ReferenceDigests;

/// One row of `runs`.
#[derive(Debug, Clone, PartialEq)]
pub struct RunRecord {
    pub run_id: String,
    pub job: String,
    pub mode: String,
    pub status: String,
    /// None where there was nothing to compute.
    pub range: Option<Span>,
    pub started_at: Timestamp,
    pub finished_at: Timestamp,
    /// Orders the writes of different runs.
    pub version: i64,
    pub counts: serde_json::Value,
    pub input: RunInput,
    pub basis: RunBasis,
    pub ledger_digest: String,
}

/// What a run read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunInput {
    pub files: Vec<InputFile>,
    /// The greatest ingestion time read: later events are new.
    pub ingested_until: Option<Timestamp>,
    /// The last event time read: what lies later was not computed, in range or not.
    #[serde(default)]
    pub events_until: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    pub name: String,
    pub fingerprint: String,
    pub rows: u64,
}

/// What a run computed with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunBasis {
    pub trueup_version: String,
    pub job_digest: String,
    pub reference: ReferenceDigests,
    /// The part of the job that was computed.
    pub scope: Scope,
}

/// The ledger digest after a run: SHA-256 over the digest before it, the run's id
/// and every correction, so that no row can change or vanish unseen.
pub struct LedgerChain(Sha256);

impl LedgerChain {
    pub fn new(previous: &str, run_id: &str) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(previous.as_bytes());
        hasher.update(b"\n");
        hasher.update(run_id.as_bytes());
        LedgerChain(hasher)
    }

    /// Adds a correction, in the order of its sequence.
    pub fn add(&mut self, correction: &LedgerLine<'_>) {
        let mut line = String::from("\n");
        for text in correction.texts {
            let _ = write!(line, "{}:{text}|", text.len());
        }
        for values in [&correction.before, &correction.after] {
            let _ = match values {
                Some(v) => write!(line, "{} {} {}|", v.quantity, v.cost, v.event_count),
                None => write!(line, "-|"),
            };
        }
        self.0.update(line.as_bytes());
    }

    pub fn finish(self) -> String {
        self.0.finalize().iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

/// A correction as the ledger digest sees it: the same from memory and from the store.
pub struct LedgerLine<'a> {
    pub texts: [&'a str; 9],
    pub before: Option<Values>,
    pub after: Option<Values>,
}

/// The causes of a correction as the ledger stores them: `{"late_event":3}`.
pub fn causes_json(causes: &Causes) -> String {
    let causes: serde_json::Map<_, _> = causes.iter().map(|(cause, count)| (cause.name().to_owned(), (*count).into())).collect();
    serde_json::Value::from(causes).to_string()
}

/// The ledger digest of `corrections`, in their order.
pub fn ledger_digest(previous: &str, run_id: &str, corrections: &[Correction]) -> String {
    let mut chain = LedgerChain::new(previous, run_id);
    for correction in corrections {
        let key = &correction.key;
        let (period_start, window_start) = (key.period.period_start.to_string(), key.window_start.to_string());
        let causes = causes_json(&correction.causes);
        chain.add(&LedgerLine {
            texts: [
                &key.period.tenant_id,
                &key.period.subscription_id,
                &key.period.meter_id,
                &key.period.price_id,
                &key.period.dimensions,
                &period_start,
                &window_start,
                correction.kind.name(),
                &causes,
            ],
            before: correction.before,
            after: correction.after,
        });
    }
    chain.finish()
}
