//! Which rows of files that are known already must be read again.

use anyhow::{Result, bail};
use arrow::array::{Array as _, StringArray};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::model::spans::Spans;
use crate::model::timestamp::Timestamp;
use crate::model::window::Span;
use crate::pipeline::deduplicate::key_hash;
use crate::pipeline::keys::SplitKeys;
use crate::pipeline::state::index;
use crate::pipeline::text_memo::TextMemo;
use crate::source::batch::Texts;
use crate::source::{Chooser, EventBatch, EventRef, EventSource, Field, Moved, Names, RowChoice, Selection, Split, Wanted};

/// Rows of marked customers, in marked time.
#[derive(Debug, Default)]
pub struct CustomerChoice {
    /// Tenant, then external customer id.
    customers: FxHashMap<String, FxHashMap<String, Times>>,
    /// The external ids of all tenants.
    ids: FxHashSet<String>,
    /// The numbers of event names.
    names: FxHashMap<String, u32>,
    /// The spans of all customers together.
    span: Spans,
    /// Events of these names, whoever they belong to.
    always: FxHashSet<u32>,
}

/// Which entries of a dictionary of external ids are wanted at all. Batch after batch has the
/// same dictionary.
#[derive(Default)]
struct Candidates {
    /// It is kept, so that no other one can take its place.
    dictionary: Option<StringArray>,
    wanted: Vec<bool>,
    are_few: bool,
}

impl Candidates {
    /// The rows of wanted customers, where a dictionary tells them apart and they are few.
    fn of(&mut self, choice: &CustomerChoice, batch: &EventBatch) -> Option<Vec<usize>> {
        let Texts::Dictionary { keys, values } = &batch.external_customer_id else { return None };
        if !choice.always.is_empty() {
            return None;
        }
        let place = |values: &StringArray| (values.value_data().as_ptr(), values.value_offsets().as_ptr(), values.len());
        if self.dictionary.as_ref().is_none_or(|known| place(known) != place(values)) {
            self.wanted = values.iter().map(|id| id.is_some_and(|id| choice.ids.contains(id))).collect();
            self.are_few = self.wanted.iter().filter(|wanted| **wanted).count() * 4 <= self.wanted.len();
            self.dictionary = Some(values.clone());
        }
        let is_wanted = |key: Option<i32>| key.and_then(|key| self.wanted.get(usize::try_from(key).ok()?)) == Some(&true);
        let rows = || keys.iter().enumerate().filter(|(_, key)| is_wanted(*key)).map(|(row, _)| row).collect();
        self.are_few.then(rows)
    }
}

/// When events of a customer are wanted.
#[derive(Debug, Default)]
struct Times {
    of_all: Spans,
    by_name: FxHashMap<u32, Spans>,
}

impl CustomerChoice {
    /// Wants a customer's events of one name.
    pub fn add(&mut self, (tenant, external_id): (&str, &str), event_name: &str, span: Span) {
        let name = self.number(event_name);
        self.times(tenant, external_id, span).by_name.entry(name).or_default().add(span);
    }

    /// Wants all of a customer's events.
    pub fn add_customer(&mut self, tenant: &str, external_id: &str) {
        self.times(tenant, external_id, Spans::ALWAYS).of_all.add(Spans::ALWAYS);
    }

    pub fn add_name(&mut self, event_name: &str) {
        let name = self.number(event_name);
        self.always.insert(name);
    }

    fn times(&mut self, tenant: &str, external_id: &str, span: Span) -> &mut Times {
        self.span.add(span);
        if !self.ids.contains(external_id) {
            self.ids.insert(external_id.to_owned());
        }
        self.customers.entry(tenant.to_owned()).or_default().entry(external_id.to_owned()).or_default()
    }

    fn number(&mut self, event_name: &str) -> u32 {
        let next = index(self.names.len());
        *self.names.entry(event_name.to_owned()).or_insert(next)
    }

    /// Whether a split may have rows that are wanted.
    pub fn may_want(&self, split: &SplitKeys) -> bool {
        !self.always.is_empty() || split.extent.is_some_and(|extent| self.span.touches(extent))
    }

    /// About how many in a hundred events of so many customers and names in `extent` are
    /// wanted, if they are spread evenly.
    pub fn percent(&self, extent: Span, customers: usize, names: usize) -> u128 {
        let length = |span: Span| {
            let length = span.end.min(extent.end).nanos().saturating_sub(span.start.max(extent.start).nanos());
            u128::try_from(length).unwrap_or_default()
        };
        let of = |spans: &Spans| spans.iter().map(length).sum::<u128>();
        let (customers, names) = (customers.max(1) as u128, names.max(1) as u128);
        let times = self.customers.values().flat_map(FxHashMap::values);
        let chosen = times.map(|times| of(&times.of_all) * names + times.by_name.values().map(of).sum::<u128>());
        let always = length(extent) * customers * self.always.len() as u128;
        let wanted = chosen.sum::<u128>() + always;
        (wanted * 100 / (length(extent) * customers * names).max(1)).min(100)
    }

    fn times_of(&self, tenant: &str, external_id: &str) -> Option<&Times> {
        self.customers.get(tenant)?.get(external_id)
    }

    fn wants_of(&self, name: Option<u32>, times: Option<&Times>, t: Option<Timestamp>) -> bool {
        if name.is_some_and(|name| self.always.contains(&name)) {
            return true;
        }
        let (Some(times), Some(t)) = (times, t) else { return false };
        let of_name = || name.and_then(|name| times.by_name.get(&name));
        times.of_all.contains(t) || of_name().is_some_and(|spans| spans.contains(t))
    }
}

impl RowChoice for CustomerChoice {
    fn fields(&self) -> &[Field] {
        &[Field::TenantId, Field::ExternalCustomerId, Field::Timestamp, Field::EventName]
    }

    fn wants(&self, event: &EventRef<'_>) -> bool {
        let name = event.event_name.and_then(|name| self.names.get(name).copied());
        let times = event.tenant_id.zip(event.external_customer_id).and_then(|(tenant, id)| self.times_of(tenant, id));
        self.wants_of(name, times, event.timestamp)
    }

    /// A batch repeats few names and customers.
    fn chooser<'c>(&'c self) -> Chooser<'c> {
        let mut names: TextMemo<1, Option<u32>> = TextMemo::new(6);
        let mut customers: TextMemo<2, Option<&'c Times>> = TextMemo::new(12);
        let mut candidates = Candidates::default();
        Box::new(move |batch| {
            names.begin_batch();
            customers.begin_batch();
            let candidates = candidates.of(self, batch);
            if candidates.as_ref().is_some_and(Vec::is_empty) {
                return Vec::new();
            }
            let mut wants = |event: &EventRef<'_>| {
                let name = event.event_name.and_then(|name| names.get([name], || self.names.get(name).copied()));
                let customer = event.tenant_id.zip(event.external_customer_id);
                let times = customer.and_then(|(tenant, id)| customers.get([tenant, id], || self.times_of(tenant, id)));
                self.wants_of(name, times, event.timestamp)
            };
            match candidates {
                Some(rows) => rows.into_iter().filter(|row| wants(&batch.row(*row))).collect(),
                None => (0..batch.len()).filter(|row| wants(&batch.row(*row))).collect(),
            }
        })
    }
}

/// Rows by the hash of their key, without those that another choice wants.
pub struct KeyChoice<'c> {
    key: &'c [Field],
    fields: Vec<Field>,
    pub hashes: FxHashSet<u64>,
    except: Option<&'c CustomerChoice>,
    names: Option<Names>,
    without: Option<&'c Names>,
}

impl<'c> KeyChoice<'c> {
    pub fn new(key: &'c [Field], hashes: FxHashSet<u64>, except: Option<&'c CustomerChoice>) -> Self {
        let own: &[Field] = &[Field::TenantId, Field::Id];
        let mut fields = [own, key, except.map_or(&[], |except| except.fields())].concat();
        fields.sort_unstable();
        fields.dedup();
        KeyChoice { key, fields, hashes, except, names: None, without: None }
    }

    /// Only rows of these names: the source may find them by that.
    #[must_use]
    pub fn of(self, names: Names) -> Self {
        KeyChoice { names: Some(names), ..self }
    }

    /// No rows of these names.
    #[must_use]
    pub fn without(self, names: Option<&'c Names>) -> Self {
        KeyChoice { without: names, ..self }
    }

    fn wants_name(&self, event: &EventRef<'_>) -> bool {
        let is_in = |names: &Names| {
            let name = event.tenant_id.zip(event.id).map(|(tenant, id)| (tenant.to_owned(), id.to_owned()));
            name.is_some_and(|name| names.contains(&name))
        };
        self.names.as_ref().is_none_or(is_in) && !self.without.is_some_and(is_in)
    }
}

impl RowChoice for KeyChoice<'_> {
    fn fields(&self) -> &[Field] {
        &self.fields
    }

    fn wants(&self, event: &EventRef<'_>) -> bool {
        key_hash(self.key, event).is_some_and(|hash| self.hashes.contains(&hash))
            && self.wants_name(event)
            && !self.except.is_some_and(|except| except.wants(event))
    }

    fn names(&self) -> Option<&Names> {
        self.names.as_ref()
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
        let rows = self.rows.get(&split.label());
        let split = &Split { announced_rows: rows.copied(), ..split.clone() };
        let mut delivered = 0;
        let left_out = self.source.read_chosen(split, self.choice, &mut |batch| {
            delivered += batch.len() as u64;
            sink(batch)
        })?;
        match rows {
            Some(rows) if *rows != delivered + left_out => {
                let found = delivered + left_out;
                bail!(Moved(format!("{} had {rows} rows and now has {found}: it changed, run again", split.name)))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_that_is_wanted_grows_with_customers_names_and_time() {
        let span = |start, end| Span { start: Timestamp::from_nanos(start), end: Timestamp::from_nanos(end) };
        let percent = |choice: &CustomerChoice| choice.percent(span(0, 100), 5, 2);
        let mut choice = CustomerChoice::default();
        assert_eq!(percent(&choice), 0);
        // A tenth of everything for half of the time; what lies outside is not there.
        choice.add(("t", "a"), "call", span(50, 300));
        assert_eq!(percent(&choice), 5);
        choice.add(("t", "a"), "call", span(-100, 60));
        assert_eq!(percent(&choice), 10);
        choice.add_customer("t", "b");
        assert_eq!(percent(&choice), 30);
        choice.add_name("login");
        assert_eq!(percent(&choice), 80);
        choice.add_name("call");
        assert_eq!(percent(&choice), 100);
    }
}
