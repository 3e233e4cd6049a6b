//! Which column of a file holds which field of an event.

use std::collections::BTreeMap;

/// The fields of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Field {
    TenantId,
    Id,
    EventName,
    ExternalCustomerId,
    Timestamp,
    IngestedAt,
    Properties,
    Deleted,
}

impl Field {
    pub const ALL: [Field; 8] = [
        Field::TenantId,
        Field::Id,
        Field::EventName,
        Field::ExternalCustomerId,
        Field::Timestamp,
        Field::IngestedAt,
        Field::Properties,
        Field::Deleted,
    ];

    /// The standard name.
    pub fn name(self) -> &'static str {
        match self {
            Field::TenantId => "tenant_id",
            Field::Id => "id",
            Field::EventName => "event_name",
            Field::ExternalCustomerId => "external_customer_id",
            Field::Timestamp => "timestamp",
            Field::IngestedAt => "ingested_at",
            Field::Properties => "properties",
            Field::Deleted => "deleted",
        }
    }

    pub fn parse(name: &str) -> Option<Field> {
        Field::ALL.into_iter().find(|field| field.name() == name)
    }

    /// Files without this column are refused. Without `ingested_at`, an event
    /// counts as ingested when it happened.
    pub fn is_required(self) -> bool {
        !matches!(self, Field::IngestedAt | Field::Properties | Field::Deleted)
    }
}

/// Names of columns that differ from the standard ones.
#[derive(Debug, Clone, Default)]
pub struct ColumnMap(BTreeMap<Field, String>);

impl ColumnMap {
    pub fn new(names: BTreeMap<Field, String>) -> Self {
        Self(names)
    }

    /// The file's name for `field`.
    pub fn name(&self, field: Field) -> &str {
        self.0.get(&field).map_or(field.name(), String::as_str)
    }

    pub fn is_mapped(&self, field: Field) -> bool {
        self.0.contains_key(&field)
    }
}
