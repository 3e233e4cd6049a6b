//! When the events happened that count: what there are bills of without usage.

use crate::model::timestamp::Timestamp;

/// The first and the last time of events, but for copies that others replace or void. A run
/// that skips learns it from the run before, and from the events that it reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    found: Option<(Timestamp, Timestamp)>,
    /// What the run before says.
    before: Option<(Timestamp, Timestamp)>,
    /// Whether an event counts no more that was the first one then, or the last one.
    lost: (bool, bool),
}

impl Times {
    pub fn since(before: Option<(Timestamp, Timestamp)>) -> Self {
        Times { before, ..Times::default() }
    }

    /// Takes the time of an event that counts, if it is one that events can have.
    #[inline]
    pub fn add(&mut self, time: Option<Timestamp>) {
        if let Some(t) = time.filter(|t| Timestamp::in_range(t.nanos()).is_some()) {
            let (first, last) = self.found.unwrap_or((t, t));
            self.found = Some((first.min(t), last.max(t)));
        }
    }

    /// Takes the time of a copy that does not count.
    pub fn lose(&mut self, time: Option<Timestamp>) {
        if let (Some(t), Some((first, last))) = (time, self.before) {
            self.lost.0 |= t == first;
            self.lost.1 |= t == last;
        }
    }

    pub fn merge(&mut self, other: Times) {
        self.found = union(self.found, other.found);
        self.lost.0 |= other.lost.0;
        self.lost.1 |= other.lost.1;
    }

    /// From the first to the last event that counts, or may count still.
    pub fn all(&self) -> Option<(Timestamp, Timestamp)> {
        union(self.found, self.before)
    }

    /// Whether [`Times::all`] reaches no further than events that count.
    pub fn are_proved(&self) -> bool {
        let Some((first, last)) = self.before else { return true };
        let (begins, ends) = self.found.map_or((false, false), |found| (found.0 <= first, found.1 >= last));
        (begins || !self.lost.0) && (ends || !self.lost.1)
    }
}

fn union(one: Option<(Timestamp, Timestamp)>, other: Option<(Timestamp, Timestamp)>) -> Option<(Timestamp, Timestamp)> {
    [one, other].into_iter().flatten().reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(t: i64) -> Option<Timestamp> {
        Some(Timestamp::from_nanos(t))
    }

    #[test]
    fn what_is_lost_at_an_edge_leaves_it_unproved() {
        let mut times = Times::since(at(10).zip(at(20)));
        times.add(at(12));
        times.lose(at(15));
        // It was no longer one of those that count.
        times.lose(at(30));
        assert!(times.are_proved());
        times.lose(at(20));
        assert!(!times.are_proved());
        let mut others = Times::since(at(10).zip(at(20)));
        others.add(at(21));
        times.merge(others);
        assert!(times.are_proved());
        assert_eq!(times.all(), at(10).zip(at(21)));
        times.lose(at(10));
        assert!(!times.are_proved());
        times.add(at(10));
        assert!(times.are_proved());
    }

    #[test]
    fn without_a_run_before_nothing_is_lost() {
        let mut times = Times::default();
        times.lose(at(5));
        assert!(times.are_proved() && times.all().is_none());
        times.add(at(7));
        times.add(None);
        assert_eq!(times.all(), at(7).zip(at(7)));
    }
}
