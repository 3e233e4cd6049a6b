//! Which rows of files that are known already must be read again.

use anyhow::{Result, bail};
use rustc_hash::{FxHashMap, FxHashSet};

use super::spans::Spans;
use crate::model::window::Span;
use crate::pipeline::deduplicate::{key_hash, write_key};
use crate::pipeline::keys::SplitKeys;
use crate::source::{EventBatch, EventRef, EventSource, Field, RowChoice, Selection, Split, Wanted};

/// Rows of marked customers, in marked time.
#[derive(Debug, Default)]
pub struct CustomerChoice {
    /// Tenant, then external customer id.
    customers: FxHashMap<String, FxHashMap<String, Spans>>,
    /// The spans of all customers together.
    span: Spans,
    /// Events of these names, whoever they belong to.
    names: FxHashSet<String>,
}

impl CustomerChoice {
    pub fn add(&mut self, tenant: &str, external_id: &str, span: Span) {
        self.span.add(span);
        self.customers.entry(tenant.to_owned()).or_default().entry(external_id.to_owned()).or_default().add(span);
    }

    pub fn add_name(&mut self, event_name: &str) {
        self.names.insert(event_name.to_owned());
    }

    /// Whether a split may have rows that are wanted.
    pub fn may_want(&self, split: &SplitKeys) -> bool {
        !self.names.is_empty() || split.extent.is_some_and(|extent| self.span.touches(extent))
    }
}

impl RowChoice for CustomerChoice {
    fn fields(&self) -> &[Field] {
        const FIELDS: [Field; 4] = [Field::TenantId, Field::ExternalCustomerId, Field::Timestamp, Field::EventName];
        let count = if self.names.is_empty() { 3 } else { 4 };
        FIELDS.get(..count).unwrap_or(&FIELDS)
    }

    fn wants(&self, event: &EventRef<'_>) -> bool {
        if !self.names.is_empty() && event.event_name.is_some_and(|name| self.names.contains(name)) {
            return true;
        }
        let (Some(tenant), Some(external_id)) = (event.tenant_id, event.external_customer_id) else { return false };
        let spans = self.customers.get(tenant).and_then(|ids| ids.get(external_id));
        spans.is_some_and(|spans| event.timestamp.is_some_and(|t| spans.contains(t)))
    }
}

/// Rows by the hash of their key, without those that another choice wants.
pub struct KeyChoice<'c> {
    key: &'c [Field],
    fields: Vec<Field>,
    pub hashes: FxHashSet<u64>,
    except: Option<&'c CustomerChoice>,
}

impl<'c> KeyChoice<'c> {
    pub fn new(key: &'c [Field], hashes: FxHashSet<u64>, except: Option<&'c CustomerChoice>) -> Self {
        let own: &[Field] = &[Field::TenantId, Field::Id];
        let mut fields = [own, key, except.map_or(&[], |except| except.fields())].concat();
        fields.sort_unstable();
        fields.dedup();
        KeyChoice { key, fields, hashes, except }
    }
}

impl RowChoice for KeyChoice<'_> {
    fn fields(&self) -> &[Field] {
        &self.fields
    }

    fn wants(&self, event: &EventRef<'_>) -> bool {
        let mut key = Vec::with_capacity(64);
        write_key(self.key, event, &mut key)
            && self.hashes.contains(&key_hash(&key))
            && !self.except.is_some_and(|except| except.wants(event))
    }
}

/// A source of which only chosen rows are delivered.
pub struct Chosen<'s> {
    source: &'s dyn EventSource,
    choice: &'s dyn RowChoice,
    /// Rows that each split has, by its label.
    rows: FxHashMap<String, u64>,
}

impl<'s> Chosen<'s> {
    /// The source, and its splits as it announces them.
    pub fn new<'p>(
        source: &'s dyn EventSource,
        choice: &'s dyn RowChoice,
        splits: impl Iterator<Item = (&'p Split, &'p SplitKeys)>,
    ) -> (Self, Vec<Split>) {
        let mut chosen = Chosen { source, choice, rows: FxHashMap::default() };
        let mut announced = Vec::new();
        for (split, keys) in splits {
            chosen.rows.insert(split.label(), keys.rows);
            announced.push(Split { announced_rows: None, ..split.clone() });
        }
        (chosen, announced)
    }
}

impl EventSource for Chosen<'_> {
    fn probe(&self) -> Result<String> {
        self.source.probe()
    }

    fn splits(&self, selection: &Selection) -> Result<Vec<Split>> {
        self.source.splits(selection)
    }

    /// Delivers some rows, and sees that no others are missing (promise 8).
    fn read(&self, split: &Split, _: Wanted<'_>, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<()> {
        let mut delivered = 0;
        let left_out = self.source.read_chosen(split, self.choice, &mut |batch| {
            delivered += batch.len() as u64;
            sink(batch)
        })?;
        match self.rows.get(&split.label()) {
            Some(rows) if *rows != delivered + left_out => {
                let found = delivered + left_out;
                bail!("{} had {rows} rows and now has {found}: it changed while it was read, run again", split.name)
            }
            _ => Ok(()),
        }
    }
}
