//! Why an event is matched with its meters: it counts, or it counts no more.

/// How an event relates to the run before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It was there already.
    Known,
    /// It came later.
    Late,
    /// It replaces a copy that was there.
    Amended,
}

/// Why an event is passed through the aggregation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Count(Arrival),
    /// It no longer counts: only note which windows lose it.
    Withdraw(Loss),
}

/// Why an event counts no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    Voided,
    /// Another copy says something else.
    Amended,
    /// Another copy says the same of another time.
    Duplicate,
}
