//! Dead letters as they will be after a run: the same in every store.

use rustc_hash::FxHashMap;

use super::{Publication, StoredDeadLetter};
use crate::model::aggregate::DeadLetterKey;
use crate::model::run::row_digest;

/// The rows that a publication writes, in the order of their keys: letters that came
/// up, and those that are resolved. `known` are those of the store.
pub fn merge(publication: &Publication, known: &[StoredDeadLetter]) -> Vec<StoredDeadLetter> {
    let run = &publication.run;
    let known: FxHashMap<&DeadLetterKey, &StoredDeadLetter> = known.iter().map(|stored| (&stored.letter.key, stored)).collect();
    let mut letters: FxHashMap<&DeadLetterKey, StoredDeadLetter> = FxHashMap::default();
    for letter in &publication.dead_letters {
        let first_run_id = known.get(&letter.key).map_or(&run.run_id, |stored| &stored.first_run_id);
        let entry = letters.entry(&letter.key).or_insert_with(|| StoredDeadLetter {
            letter: letter.clone(),
            occurrences: 0,
            first_run_id: first_run_id.clone(),
            last_run_id: run.run_id.clone(),
            resolved_run_id: None,
            row_digest: 0,
        });
        entry.occurrences += 1;
    }
    for key in &publication.resolved {
        if let Some(stored) = known.get(key) {
            letters.insert(key, StoredDeadLetter { resolved_run_id: Some(run.run_id.clone()), ..(*stored).clone() });
        }
    }
    let mut letters: Vec<_> = letters.into_values().collect();
    letters.sort_unstable_by(|a, b| a.letter.key.cmp(&b.letter.key));
    letters.iter_mut().for_each(|stored| stored.row_digest = stored.digest());
    letters
}

impl StoredDeadLetter {
    /// What the digest in the row must be.
    pub fn digest(&self) -> i64 {
        let letter = &self.letter;
        row_digest(&[
            &letter.key.tenant_id,
            &letter.key.event_id,
            &letter.key.meter_id,
            letter.key.reason.name(),
            &letter.detail,
            &letter.event,
            &letter.event_time.map_or_else(String::new, |t| t.to_string()),
            &self.occurrences.to_string(),
            &self.first_run_id,
            &self.last_run_id,
            self.resolved_run_id.as_deref().unwrap_or_default(),
        ])
    }
}
