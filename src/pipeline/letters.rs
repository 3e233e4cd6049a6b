//! Dead letters that are still open, and which of them a run looked at.

use rustc_hash::FxHashSet;
use xxhash_rust::xxh3::xxh3_64;

use crate::model::digest::frame;
use crate::source::EventRef;

/// Dead letters that are still open: the hash of tenant and id and, where only one
/// match was rejected, the index of its meter.
#[derive(Debug, Default)]
pub struct OpenDeadLetters {
    letters: FxHashSet<(u64, Option<usize>)>,
    events: FxHashSet<u64>,
}

impl OpenDeadLetters {
    pub fn add(&mut self, tenant: &str, event_id: &str, meter: Option<usize>) {
        let hash = Self::hash(tenant, event_id);
        self.events.insert(hash);
        self.letters.insert((hash, meter));
    }

    fn hash(tenant: &str, event_id: &str) -> u64 {
        let mut key = Vec::with_capacity(64);
        frame(&mut key, Some(tenant.as_bytes()));
        frame(&mut key, Some(event_id.as_bytes()));
        xxh3_64(&key)
    }

    pub fn holds(&self, event: &EventRef<'_>, meter: Option<usize>) -> bool {
        let (Some(tenant), Some(id)) = (event.tenant_id, event.id) else { return false };
        !self.letters.is_empty() && self.letters.contains(&(Self::hash(tenant, id), meter))
    }

    /// The hash of an event that has an open dead letter.
    fn event(&self, event: &EventRef<'_>) -> Option<u64> {
        if self.events.is_empty() {
            return None;
        }
        let hash = Self::hash(event.tenant_id?, event.id?);
        self.events.contains(&hash).then_some(hash)
    }
}

/// Events with open dead letters that were judged again, by a run that does not look at
/// all events.
#[derive(Debug, Default)]
pub struct VisitedLetters {
    events: FxHashSet<u64>,
    /// Events of which a meter was not judged.
    left_out: FxHashSet<(u64, usize)>,
}

impl VisitedLetters {
    pub fn visit(&mut self, open: &OpenDeadLetters, event: &EventRef<'_>) {
        self.events.extend(open.event(event));
    }

    pub fn leave_out(&mut self, open: &OpenDeadLetters, event: &EventRef<'_>, meter: usize) {
        self.left_out.extend(open.event(event).map(|hash| (hash, meter)));
    }

    pub fn merge(&mut self, other: VisitedLetters) {
        self.events.extend(other.events);
        self.left_out.extend(other.left_out);
    }

    /// Whether a letter would have come up again if its reason still held.
    pub fn hold(&self, tenant: &str, event_id: &str, meter: Option<usize>) -> bool {
        let hash = OpenDeadLetters::hash(tenant, event_id);
        self.events.contains(&hash) && meter.is_none_or(|meter| !self.left_out.contains(&(hash, meter)))
    }
}
