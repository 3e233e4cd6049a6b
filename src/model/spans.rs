//! Sets of spans of time.

use super::timestamp::Timestamp;
use super::window::Span;

/// Instants as spans: sorted, apart from each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spans(Vec<Span>);

impl Spans {
    /// All of time.
    pub const ALWAYS: Span = Span { start: Timestamp::MIN, end: Timestamp::MAX };

    pub fn add(&mut self, span: Span) {
        if span.start >= span.end {
            return;
        }
        // Those that it touches.
        let first = self.0.partition_point(|known| known.end < span.start);
        let end = self.0.partition_point(|known| known.start <= span.end);
        let touched = self.0.get(first..end).unwrap_or_default();
        if touched.iter().any(|known| known.covers(span)) {
            return;
        }
        let whole = touched.iter().fold(span, |whole, known| whole.union(*known));
        self.0.splice(first..end, [whole]);
    }

    pub fn merge(&mut self, other: &Spans) {
        other.0.iter().for_each(|span| self.add(*span));
    }

    /// From the beginning of the first to the end of the last.
    pub fn whole(&self) -> Option<Span> {
        Some(self.0.first()?.union(*self.0.last()?))
    }

    pub fn iter(&self) -> impl Iterator<Item = Span> + '_ {
        self.0.iter().copied()
    }

    #[inline]
    pub fn contains(&self, t: Timestamp) -> bool {
        let at = self.0.partition_point(|span| span.start <= t);
        at.checked_sub(1).and_then(|at| self.0.get(at)).is_some_and(|span| span.contains(t))
    }

    /// Whether all of `span` is here.
    pub fn cover(&self, span: Span) -> bool {
        let at = self.0.partition_point(|known| known.end <= span.start);
        self.0.get(at).is_some_and(|known| known.covers(span))
    }

    /// Whether some instant of `span` is here.
    pub fn overlap(&self, span: Span) -> bool {
        let at = self.0.partition_point(|known| known.end <= span.start);
        self.0.get(at).is_some_and(|known| known.overlaps(span))
    }

    /// The first instant of `span` that is here.
    #[inline]
    pub fn first_in(&self, span: Span) -> Option<Timestamp> {
        let at = self.0.partition_point(|known| known.end <= span.start);
        let first = self.0.get(at).filter(|known| known.start < span.end)?;
        Some(first.start.max(span.start))
    }

    /// Whether an instant from `first` to `last`, both included, may be here.
    pub fn touches(&self, (first, last): (Timestamp, Timestamp)) -> bool {
        self.0.iter().any(|span| span.start <= last && first < span.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: i64, end: i64) -> Span {
        Span { start: Timestamp::from_nanos(start), end: Timestamp::from_nanos(end) }
    }

    #[test]
    fn spans_join_where_they_touch() {
        let mut spans = Spans::default();
        for (start, end) in [(10, 20), (30, 40), (50, 60), (20, 30), (55, 58), (7, 7)] {
            spans.add(span(start, end));
        }
        assert_eq!(spans, Spans(vec![span(10, 40), span(50, 60)]));
        let holds = |nanos| spans.contains(Timestamp::from_nanos(nanos));
        assert_eq!([9, 10, 39, 40, 50, 59, 60].map(holds), [false, true, true, false, true, true, false]);
        let touches = |first, last| spans.touches((Timestamp::from_nanos(first), Timestamp::from_nanos(last)));
        assert_eq!(
            [touches(0, 9), touches(0, 10), touches(40, 49), touches(40, 50), touches(60, 99)],
            [false, true, false, true, false]
        );
        let overlap = |start, end| spans.overlap(span(start, end));
        assert_eq!(
            [overlap(0, 10), overlap(0, 11), overlap(40, 50), overlap(45, 51), overlap(59, 99), overlap(60, 99)],
            [false, true, false, true, true, false]
        );
        let first_in = |start, end| spans.first_in(span(start, end)).map(Timestamp::nanos);
        assert_eq!(
            [first_in(0, 10), first_in(0, 11), first_in(15, 60), first_in(40, 50), first_in(40, 99), first_in(60, 99)],
            [None, Some(10), Some(15), None, Some(50), None]
        );
        spans.add(Spans::ALWAYS);
        assert_eq!(spans, Spans(vec![Spans::ALWAYS]));
    }
}
