//! When the events happened that count: what there are bills of without usage.

use crate::model::timestamp::Timestamp;

/// The first and the last time of events, but for copies that others replace or void. A run
/// that skips learns it from the run before, and from the events that it reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    found: Option<(Timestamp, Timestamp)>,
    /// What the run before says: no event that counted lies beyond.
    before: Option<(Timestamp, Timestamp)>,
    lost: Lost,
}

/// Which ends of the time of events are not what they were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lost {
    /// An event counts no more that may have been the first one.
    pub first: bool,
    /// One that may have been the last.
    pub last: bool,
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
            self.lost.first |= t <= first;
            self.lost.last |= t >= last;
        }
    }

    pub fn merge(&mut self, other: Times) {
        self.found = union(self.found, other.found);
        self.lost.first |= other.lost.first;
        self.lost.last |= other.lost.last;
    }

    /// From the first to the last event that counts, or did before.
    pub fn all(&self) -> Option<(Timestamp, Timestamp)> {
        union(self.found, self.before)
    }

    /// Where [`Times::all`] may reach further than events that count.
    pub fn lost(&self) -> Lost {
        let Some((first, last)) = self.before else { return Lost::default() };
        let (begins, ends) = self.found.map_or((false, false), |found| (found.0 <= first, found.1 >= last));
        Lost { first: self.lost.first && !begins, last: self.lost.last && !ends }
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

    const FIRST: Lost = Lost { first: true, last: false };
    const LAST: Lost = Lost { first: false, last: true };

    #[test]
    fn what_is_lost_at_an_end_leaves_it_open() {
        let mut times = Times::since(at(10).zip(at(20)));
        times.add(at(12));
        times.lose(at(15));
        assert_eq!(times.lost(), Lost::default());
        times.lose(at(20));
        assert_eq!(times.lost(), LAST);
        let mut others = Times::since(at(10).zip(at(20)));
        others.add(at(21));
        times.merge(others);
        assert_eq!((times.lost(), times.all()), (Lost::default(), at(10).zip(at(21))));
        times.lose(at(9));
        assert_eq!(times.lost(), FIRST);
        times.add(at(10));
        assert_eq!(times.lost(), Lost::default());
    }

    #[test]
    fn without_a_run_before_nothing_is_lost() {
        let mut times = Times::default();
        times.lose(at(5));
        assert!(times.lost() == Lost::default() && times.all().is_none());
        times.add(at(7));
        times.add(None);
        assert_eq!(times.all(), at(7).zip(at(7)));
    }
}
