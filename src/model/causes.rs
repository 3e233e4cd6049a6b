//! The causes of a correction, each with how often it applies.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::aggregate::Cause;

/// Causes with how often each applies: events, or 1 for a changed definition. Most
/// corrections have one, and there are many corrections: a map would be ten times as large.
#[derive(Debug, Clone, Default)]
pub struct Causes(Held);

#[derive(Debug, Clone, Default)]
enum Held {
    #[default]
    None,
    One((Cause, u64)),
    /// Sorted.
    Several(Box<[(Cause, u64)]>),
}

impl Causes {
    pub fn new() -> Self {
        Causes::default()
    }

    /// As the ledger stores them; what it does not know is left out.
    pub fn parse(json: &str) -> Causes {
        let counts: BTreeMap<String, u64> = serde_json::from_str(json).unwrap_or_default();
        counts.into_iter().filter_map(|(name, count)| Some((Cause::parse(&name)?, count))).collect()
    }

    fn as_slice(&self) -> &[(Cause, u64)] {
        match &self.0 {
            Held::None => &[],
            Held::One(cause) => std::slice::from_ref(cause),
            Held::Several(causes) => causes,
        }
    }

    /// Sets how often a cause applies.
    pub fn insert(&mut self, cause: Cause, count: u64) {
        let mut causes = match std::mem::take(&mut self.0) {
            Held::None => return self.0 = Held::One((cause, count)),
            Held::One((known, _)) if known == cause => return self.0 = Held::One((cause, count)),
            Held::One(known) => vec![known],
            Held::Several(causes) => causes.into_vec(),
        };
        match causes.binary_search_by_key(&cause, |(known, _)| *known) {
            Ok(at) => causes.iter_mut().skip(at).take(1).for_each(|(_, known)| *known = count),
            Err(at) => causes.insert(at, (cause, count)),
        }
        self.0 = Held::Several(causes.into_boxed_slice());
    }

    pub fn hold(&self, cause: Cause) -> bool {
        self.names().any(|known| known == cause)
    }

    pub fn is_empty(&self) -> bool {
        self.as_slice().is_empty()
    }

    pub fn clear(&mut self) {
        self.0 = Held::None;
    }

    /// How often all of them apply.
    pub fn total(&self) -> u64 {
        self.iter().map(|(_, count)| count).sum()
    }

    /// In the order of [`Cause`].
    pub fn iter(&self) -> impl Iterator<Item = (Cause, u64)> {
        self.as_slice().iter().copied()
    }

    /// The causes without their counts.
    pub fn names(&self) -> impl Iterator<Item = Cause> {
        self.iter().map(|(cause, _)| cause)
    }
}

impl PartialEq for Causes {
    fn eq(&self, other: &Causes) -> bool {
        self.as_slice() == other.as_slice()
    }
}

impl Eq for Causes {}

impl IntoIterator for Causes {
    type Item = (Cause, u64);
    type IntoIter = std::vec::IntoIter<(Cause, u64)>;

    fn into_iter(self) -> Self::IntoIter {
        self.as_slice().to_vec().into_iter()
    }
}

impl Extend<(Cause, u64)> for Causes {
    fn extend<I: IntoIterator<Item = (Cause, u64)>>(&mut self, causes: I) {
        causes.into_iter().for_each(|(cause, count)| self.insert(cause, count));
    }
}

impl FromIterator<(Cause, u64)> for Causes {
    fn from_iter<I: IntoIterator<Item = (Cause, u64)>>(causes: I) -> Self {
        let mut all = Causes::new();
        all.extend(causes);
        all
    }
}

impl<const N: usize> From<[(Cause, u64); N]> for Causes {
    fn from(causes: [(Cause, u64); N]) -> Self {
        causes.into_iter().collect()
    }
}

impl Serialize for Causes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Causes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        BTreeMap::deserialize(deserializer).map(Causes::from_iter)
    }
}
