//! Customers and subscriptions, and their join.

use std::sync::Arc;

use anyhow::{Context, Result};
use chrono::NaiveDate;
use chrono_tz::Tz;
use polars::prelude::{Column, DataFrame, DataFrameJoinOps, JoinArgs, JoinType, NamedFrom, Series, SortMultipleOptions};
use rustc_hash::FxHashMap;

use super::table::Table;
use super::{ExternalCustomer, Subscription, is_open_end, list_digest};
use crate::config::ReferenceTable;
use crate::model::digest::Digest;
use crate::model::price::Currency;
use crate::model::timestamp::Timestamp;
use crate::model::window::{BillingCycle, PeriodLength, Span};

/// The customers table: `tenant_id, customer_id, external_customer_id, valid_from?, valid_to?`
/// and attributes of the user's own.
pub(super) struct Customers {
    /// tenant_id, customer_id, external_customer_id, from, to, row.
    frame: DataFrame,
    row_digests: Vec<String>,
    /// Tenant and customer, then the digest of all its rows.
    pub by_customer: FxHashMap<(String, String), String>,
}

/// The subscriptions table.
pub(super) struct Subscriptions {
    pub list: Vec<Subscription>,
    /// tenant_id, customer_id, subscription (index into the list).
    frame: DataFrame,
}

/// What [`bind`] found.
pub(super) struct Bound {
    pub customers: FxHashMap<String, FxHashMap<String, ExternalCustomer>>,
    pub warnings: Vec<String>,
}

impl Customers {
    pub fn read(table: &ReferenceTable) -> Result<Customers> {
        let table = Table::read(table)?;
        let tenants = table.texts("tenant_id", true)?;
        let customers = table.texts("customer_id", true)?;
        let external = table.texts("external_customer_id", true)?;
        let spans = validity(&table, "valid_from", "valid_to")?;
        let mut by_customer: FxHashMap<_, Vec<String>> = FxHashMap::default();
        let mut row_digests = Vec::new();
        for (((tenant, customer), external), span) in tenants.iter().zip(&customers).zip(&external).zip(&spans) {
            let [tenant, customer, external] = [tenant, customer, external].map(|text| text.clone().unwrap_or_default());
            let digest = Digest::new("customer").text(&tenant).text(&customer).text(&external).text(&format!("{span:?}")).hex();
            by_customer.entry((tenant, customer)).or_default().push(digest.clone());
            row_digests.push(digest);
        }
        let by_customer =
            by_customer.into_iter().map(|(key, rows)| (key, list_digest("customer rows", rows.into_iter()))).collect();
        let rows: Vec<u32> = (0u32..).take(table.height()).collect();
        let frame = DataFrame::new(
            table.height(),
            vec![
                column("tenant_id", &tenants),
                column("customer_id", &customers),
                column("external_customer_id", &external),
                column("from", &spans.iter().map(|span| span.start.nanos()).collect::<Vec<_>>()),
                column("to", &spans.iter().map(|span| span.end.nanos()).collect::<Vec<_>>()),
                column("row", &rows),
            ],
        )?;
        check_overlaps(&table, &frame, ["tenant_id", "external_customer_id"])?;
        Ok(Customers { frame, row_digests, by_customer })
    }

    pub fn digest(&self) -> String {
        list_digest("customers", self.row_digests.iter().cloned())
    }
}

impl Subscriptions {
    /// `timezone` is the job's, for subscriptions that name none.
    pub fn read(table: &ReferenceTable, timezone: Tz, customers: &Customers) -> Result<Subscriptions> {
        let table = Table::read(table)?;
        let tenants = table.texts("tenant_id", true)?;
        let ids = table.texts("subscription_id", true)?;
        let owners = table.texts("customer_id", true)?;
        let plans = table.texts("plan_id", true)?;
        let currencies = table.texts("currency", true)?;
        let periods = table.texts("billing_period", true)?;
        let anchors = table.texts("anchor", false)?;
        let zones = table.texts("timezone", false)?;
        table.texts("started_at", true)?;
        let spans = validity(&table, "started_at", "ended_at")?;
        let mut list = Vec::new();
        for row in 0..table.height() {
            let text = |column: &[Option<String>]| column.get(row).cloned().flatten().unwrap_or_default();
            let cell = |column: &[Option<String>]| column.get(row).cloned().flatten();
            let currency = text(&currencies);
            if Currency::from_code(&currency).is_none() {
                return Err(table.error(row, format!("currency `{currency}` is unknown: use an ISO 4217 code such as USD")));
            }
            let cycle = cycle(&table, row, &text(&periods), cell(&anchors), cell(&zones), timezone)?;
            let active = spans.get(row).copied().context("row without a span")?;
            let (tenant_id, customer_id) = (text(&tenants), text(&owners));
            let digest = [&tenant_id, &text(&ids), &customer_id, &text(&plans), &currency]
                .into_iter()
                .fold(Digest::new("subscription"), |digest, text| digest.text(text))
                .text(&format!("{cycle:?} {active:?}"))
                .hex();
            let customer_digest = customers.by_customer.get(&(tenant_id.clone(), customer_id.clone())).cloned();
            list.push(Subscription {
                tenant_id,
                id: text(&ids),
                customer_id,
                plan_id: text(&plans),
                currency,
                cycle,
                active,
                digest,
                customer_digest: customer_digest.unwrap_or_default(),
            });
        }
        let rows: Vec<u32> = (0u32..).take(table.height()).collect();
        check_unique_ids(&table, &list)?;
        let frame = DataFrame::new(
            table.height(),
            vec![column("tenant_id", &tenants), column("customer_id", &owners), column("subscription", &rows)],
        )?;
        Ok(Subscriptions { list, frame })
    }
}

/// A plan change is a new subscription: one id is one accumulation of usage.
fn check_unique_ids(table: &Table, list: &[Subscription]) -> Result<()> {
    let mut rows: FxHashMap<(&str, &str), usize> = FxHashMap::default();
    for (row, subscription) in list.iter().enumerate() {
        if let Some(first) = rows.insert((&subscription.tenant_id, &subscription.id), row) {
            return Err(table.error(
                row,
                format!(
                    "subscription_id `{}` of tenant `{}` is already used by {}: give a changed plan a subscription of its own",
                    subscription.id,
                    subscription.tenant_id,
                    table.place(first)
                ),
            ));
        }
    }
    Ok(())
}

/// Joins every customer row with the subscriptions of its customer.
pub(super) fn bind(customers: &Customers, subscriptions: &Subscriptions) -> Result<Bound> {
    const KEY: [&str; 2] = ["tenant_id", "customer_id"];
    let mut by_tenant: FxHashMap<String, FxHashMap<String, ExternalCustomer>> = FxHashMap::default();
    let mut entry = |tenant: &str, external: &str, visit: &mut dyn FnMut(&mut ExternalCustomer)| {
        visit(by_tenant.entry(tenant.to_owned()).or_default().entry(external.to_owned()).or_default());
    };
    let ids = customers.frame.column("customer_id")?.str()?;
    for_each_row(&customers.frame, &mut |tenant, external, span, row| {
        let id = Arc::from(ids.get(row).unwrap_or_default());
        entry(tenant, external, &mut |customer| customer.validity.push((span, Arc::clone(&id))));
    })?;
    let joined = customers.frame.join(&subscriptions.frame, KEY, KEY, JoinArgs::new(JoinType::Inner), None)?;
    for_each_row(&joined, &mut |tenant, external, span, subscription| {
        let Some(active) = subscriptions.list.get(subscription).map(|subscription| subscription.active) else { return };
        let both = Span { start: span.start.max(active.start), end: span.end.min(active.end) };
        if both.start < both.end {
            entry(tenant, external, &mut |customer| customer.bindings.push((both, subscription)));
        }
    })?;
    let orphans = subscriptions.frame.join(&customers.frame, KEY, KEY, JoinArgs::new(JoinType::Anti), None)?;
    let orphans = orphans.column("subscription")?.u32()?.iter().flatten().filter_map(|at| subscriptions.list.get(at as usize));
    let warnings = orphans
        .map(|s| {
            format!(
                "subscription `{}` belongs to customer `{}` of tenant `{}`, who is not in the customers table",
                s.id, s.customer_id, s.tenant_id
            )
        })
        .collect();
    Ok(Bound { customers: by_tenant, warnings })
}

/// Visits tenant, external id, span and (after the join) subscription of each row.
fn for_each_row(frame: &DataFrame, visit: &mut dyn FnMut(&str, &str, Span, usize)) -> Result<()> {
    let tenants = frame.column("tenant_id")?.str()?;
    let external = frame.column("external_customer_id")?.str()?;
    let (from, to) = (frame.column("from")?.i64()?, frame.column("to")?.i64()?);
    let last = if frame.column("subscription").is_ok() { "subscription" } else { "row" };
    let index = frame.column(last)?.u32()?;
    for row in 0..frame.height() {
        let (Some(tenant), Some(external), Some(from), Some(to), Some(index)) =
            (tenants.get(row), external.get(row), from.get(row), to.get(row), index.get(row))
        else {
            continue;
        };
        let span = Span { start: Timestamp::from_nanos(from), end: Timestamp::from_nanos(to) };
        visit(tenant, external, span, index as usize);
    }
    Ok(())
}

/// No two rows with the same key may be valid at the same time.
fn check_overlaps(table: &Table, frame: &DataFrame, key: [&str; 2]) -> Result<()> {
    let [tenant, id] = key;
    let sorted = frame.sort([tenant, id, "from", "row"], SortMultipleOptions::default())?;
    let before = sorted.head(Some(sorted.height().saturating_sub(1)));
    let after = sorted.slice(1, sorted.height());
    let (tenants, ids, to) = (before.column(tenant)?.str()?, before.column(id)?.str()?, before.column("to")?.i64()?);
    let (next_tenants, next_ids, from) = (after.column(tenant)?.str()?, after.column(id)?.str()?, after.column("from")?.i64()?);
    let (rows, next_rows) = (before.column("row")?.u32()?, after.column("row")?.u32()?);
    for at in 0..after.height() {
        let same = tenants.get(at) == next_tenants.get(at) && ids.get(at) == next_ids.get(at);
        if same && from.get(at) < to.get(at) {
            let (row, other) = (next_rows.get(at).unwrap_or_default(), rows.get(at).unwrap_or_default());
            return Err(table.error(
                row as usize,
                format!(
                    "{id} `{}` of tenant `{}` is already valid at that time by {}: end the earlier row or remove one",
                    ids.get(at).unwrap_or_default(),
                    tenants.get(at).unwrap_or_default(),
                    table.place(other as usize),
                ),
            ));
        }
    }
    Ok(())
}

/// The spans between two columns of timestamps; open ends reach to the end of time.
fn validity(table: &Table, from: &str, to: &str) -> Result<Vec<Span>> {
    let (starts, ends) = (table.texts(from, false)?, table.texts(to, false)?);
    let parse = |row: usize, name: &str, text: Option<&String>, open: Timestamp| match text {
        None => Ok(open),
        Some(text) => text.parse::<Timestamp>().map_err(|error| table.error(row, format!("{name} {error}"))),
    };
    let span = |(row, (start, end)): (usize, (&Option<String>, &Option<String>))| {
        let start = parse(row, from, start.as_ref(), Timestamp::MIN)?;
        let end = parse(row, to, end.as_ref().filter(|text| !is_open_end(text)), Timestamp::MAX)?;
        if end <= start {
            return Err(table.error(row, format!("{to} {end} is not after {from} {start}")));
        }
        Ok(Span { start, end })
    };
    starts.iter().zip(&ends).enumerate().map(span).collect()
}

fn cycle(
    table: &Table,
    row: usize,
    period: &str,
    anchor: Option<String>,
    zone: Option<String>,
    default: Tz,
) -> Result<BillingCycle> {
    let length = PeriodLength::parse(period).ok_or_else(|| {
        table.error(row, format!("billing_period `{period}` is unknown: use day, week, month, quarter or year"))
    })?;
    let timezone = match zone {
        None => default,
        Some(zone) => zone
            .parse()
            .map_err(|_| table.error(row, format!("timezone `{zone}` is unknown: use an IANA name such as Europe/Berlin")))?,
    };
    let anchor = match anchor {
        None => None,
        Some(text) => Some(
            // The date of a time is the one that it says, whatever its offset.
            Some(&text)
                .filter(|text| text.parse::<Timestamp>().is_ok())
                .and_then(|text| text.trim().get(..10)?.parse::<NaiveDate>().ok())
                .ok_or_else(|| table.error(row, format!("anchor `{text}` is no date such as 2026-01-31")))?,
        ),
    };
    Ok(BillingCycle { length, anchor, timezone })
}

fn column<'a, T>(name: &str, values: &'a Vec<T>) -> Column
where
    Series: NamedFrom<&'a Vec<T>, [T]>,
{
    Column::from(Series::new(name.into(), values))
}
