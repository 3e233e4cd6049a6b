//! What a run will write, before it has an id: made by a plan, kept in a file, or
//! made by hand (closing a period, taking a run back).

use std::sync::Arc;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use crate::clock::now;
use crate::model::aggregate::{
    Correction, CorrectionKind, DeadLetter, DeadLetterKey, PeriodCorrection, PeriodKey, PeriodRow, Recorded, WindowKey, WindowRow,
};
use crate::model::run::{Origin, RunBasis, RunInput, RunMode, RunRecord, state_digest};
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::store::{Publication, next_run_id, next_version};

mod shared_rows {
    use std::sync::Arc;

    use serde::{Deserialize as _, Deserializer, Serializer};

    use crate::model::aggregate::WindowRow;

    pub fn serialize<S: Serializer>(rows: &[Arc<WindowRow>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(rows.iter().map(|row| &**row))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Arc<WindowRow>>, D::Error> {
        Ok(Vec::deserialize(deserializer)?.into_iter().map(Arc::new).collect())
    }
}

/// A publication without id and version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Draft {
    pub mode: RunMode,
    /// The last run when the draft was made.
    pub previous_run_id: Option<String>,
    pub range: Option<Span>,
    pub started_at: Timestamp,
    pub counts: serde_json::Value,
    pub input: RunInput,
    pub basis: RunBasis,
    #[serde(with = "shared_rows")]
    pub upserts: Vec<Arc<WindowRow>>,
    pub retractions: Vec<WindowKey>,
    pub corrections: Vec<Correction>,
    pub period_upserts: Vec<PeriodRow>,
    pub period_deletions: Vec<PeriodKey>,
    pub period_corrections: Vec<PeriodCorrection>,
    pub dead_letters: Vec<DeadLetter>,
    pub resolved: Vec<DeadLetterKey>,
    #[serde(default)]
    pub states: Vec<(String, String)>,
}

impl Draft {
    /// A run that computes nothing: it knows what the run before it knew.
    pub fn by_hand(mode: RunMode, previous: Option<&RunRecord>, counts: serde_json::Value) -> Draft {
        let mut counts = counts;
        if let (Some(counts), Some(rows)) = (counts.as_object_mut(), previous.and_then(|run| run.counts.get("dead_letter_rows")))
        {
            counts.insert("dead_letter_rows".to_owned(), rows.clone());
        }
        let input = previous.map(|run| RunInput { files: Vec::new(), ..run.input.clone() });
        Draft {
            mode,
            previous_run_id: previous.map(|run| run.run_id.clone()),
            range: None,
            started_at: now(),
            counts,
            input: input.unwrap_or_default(),
            basis: previous.map(|run| run.basis.clone()).unwrap_or_default(),
            upserts: Vec::new(),
            retractions: Vec::new(),
            corrections: Vec::new(),
            period_upserts: Vec::new(),
            period_deletions: Vec::new(),
            period_corrections: Vec::new(),
            dead_letters: Vec::new(),
            resolved: Vec::new(),
            states: Vec::new(),
        }
    }

    /// Finds the rows that the corrections write among those of the draft: a file tells only their
    /// values.
    pub fn link(&mut self) {
        let rows: FxHashMap<_, _> = self.upserts.iter().map(|row| (&row.key, row)).collect();
        for correction in self.corrections.iter_mut().filter(|correction| correction.kind != CorrectionKind::Adjust) {
            if let Some(row) = correction.after.as_ref().and_then(|_| rows.get(&correction.key)) {
                correction.after = Some(Recorded::from(*row));
            }
        }
    }

    /// The publication, as the run after `previous`.
    pub fn into_publication(mut self, job: &str, previous: &[RunRecord], origin: &Origin) -> Publication {
        let finished_at = now();
        if let Some(counts) = self.counts.as_object_mut().filter(|_| !self.states.is_empty()) {
            let digests = self.states.iter().map(|(name, content)| (name.clone(), state_digest(content).into()));
            counts.insert("states".to_owned(), serde_json::Value::Object(digests.collect()));
        }
        let run = RunRecord {
            run_id: next_run_id(previous, finished_at),
            job: job.to_owned(),
            mode: self.mode,
            status: "succeeded".to_owned(),
            range: self.range,
            started_at: self.started_at,
            finished_at,
            origin: origin.clone(),
            version: next_version(previous, finished_at),
            counts: self.counts,
            input: self.input,
            basis: self.basis,
            ledger_digest: String::new(),
        };
        Publication {
            previous_run_id: self.previous_run_id,
            run,
            upserts: self.upserts,
            retractions: self.retractions,
            corrections: self.corrections,
            ledger_before: previous.last().map_or_else(String::new, |run| run.ledger_digest.clone()),
            period_upserts: self.period_upserts,
            period_deletions: self.period_deletions,
            period_corrections: self.period_corrections,
            dead_letters: self.dead_letters,
            resolved: self.resolved,
            states: self.states,
        }
    }
}
