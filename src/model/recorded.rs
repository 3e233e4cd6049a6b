//! What corrections say of a row, in little memory: most runs that correct much have the
//! row itself at hand.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::aggregate::{Values, WindowRow};

/// The values of a row.
#[derive(Debug, Clone)]
pub enum Recorded {
    Of(Arc<WindowRow>),
    Values(Box<Values>),
}

impl Recorded {
    pub fn values(&self) -> Values {
        match self {
            Recorded::Of(row) => Values::from(&**row),
            Recorded::Values(values) => **values,
        }
    }
}

impl From<Values> for Recorded {
    fn from(values: Values) -> Self {
        Recorded::Values(Box::new(values))
    }
}

impl From<&Arc<WindowRow>> for Recorded {
    fn from(row: &Arc<WindowRow>) -> Self {
        Recorded::Of(Arc::clone(row))
    }
}

impl PartialEq for Recorded {
    fn eq(&self, other: &Recorded) -> bool {
        self.values() == other.values()
    }
}

impl Eq for Recorded {}

impl Serialize for Recorded {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.values().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Recorded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Values::deserialize(deserializer).map(Recorded::from)
    }
}
