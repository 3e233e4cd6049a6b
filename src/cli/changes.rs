//! Changes as people read them: grouped by customer and meter, the largest ones
//! first, folded when long.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::Result;

use super::output::{Style, counted, number, table};
use crate::audit::describe;
use crate::model::aggregate::{Correction, CorrectionKind, Values};
use crate::model::decimal::Decimal;
use crate::model::decimal_sum::DecimalSum;

/// Rows that are shown before the rest is folded.
const SHOWN: usize = 10;

/// The corrections of one customer and meter.
#[derive(Default)]
struct Group {
    rows: BTreeMap<CorrectionKind, u64>,
    before: DecimalSum,
    after: DecimalSum,
    causes: BTreeMap<&'static str, u64>,
}

fn symbol(kind: CorrectionKind) -> &'static str {
    match kind {
        CorrectionKind::Insert => "+",
        CorrectionKind::Update => "~",
        CorrectionKind::Retract => "-",
        CorrectionKind::Adjust => "!",
    }
}

fn cost(values: Option<Values>) -> Decimal {
    values.map_or(Decimal::ZERO, |values| values.cost)
}

/// A change with its sign.
fn signed(change: Decimal) -> String {
    if change.is_negative() || change.is_zero() { change.to_string() } else { format!("+{change}") }
}

/// Appends the changes by customer and meter, the largest in money first.
///
/// # Errors
/// Where a sum overflows.
pub fn by_customer_and_meter<'c>(corrections: &'c [Correction], style: Style, out: &mut String) -> Result<()> {
    let tenants: BTreeSet<_> = corrections.iter().map(|correction| &correction.key.period.tenant_id).collect();
    let mut groups: BTreeMap<(&'c str, &'c str, &'c str, &'c str), Group> = BTreeMap::new();
    for correction in corrections {
        let period = &correction.key.period;
        let key = |customer: &'c str, currency: &'c str| (&*period.tenant_id, customer, &*period.meter_id, currency);
        let is = key(&correction.customer_id, &correction.currency);
        let (customer, currency) = correction.owner_before();
        let was = key(customer, currency);
        groups.entry(was).or_default().before.add(cost(correction.values_before()));
        groups.entry(is).or_default().after.add(cost(correction.values_after()));
        // What moves from one to the other changes both.
        for of in [Some(was), Some(is).filter(|is| *is != was)].into_iter().flatten() {
            let group = groups.entry(of).or_default();
            *group.rows.entry(correction.kind).or_default() += 1;
            for cause in correction.causes.names() {
                *group.causes.entry(cause.name()).or_default() += 1;
            }
        }
    }
    let mut rows = Vec::new();
    for ((tenant, customer, meter, currency), group) in groups {
        let (before, after) = (group.before.total()?, group.after.total()?);
        let customer = if tenants.len() > 1 { format!("{tenant} / {customer}") } else { customer.to_owned() };
        let kinds: Vec<_> = group.rows.iter().map(|(kind, rows)| format!("{}{}", symbol(*kind), number(*rows))).collect();
        let causes: Vec<_> = group.causes.iter().map(|(cause, rows)| format!("{cause} {}", number(*rows))).collect();
        let change = after.checked_sub(before)?;
        let cells = vec![
            format!("  {customer}"),
            meter.to_owned(),
            kinds.join(" "),
            format!("{before} -> {after} {currency}"),
            signed(change),
            causes.join(", "),
        ];
        rows.push((change.abs(), cells));
    }
    rows.sort_by(|(a, left), (b, right)| b.cmp(a).then_with(|| left.cmp(right)));
    let header = ["  customer", "meter", "rows", "cost", "change", "causes"];
    fold(&header, rows, &[4], "customers and meters", style, out)
}

/// Appends the changes that move the most money, window by window.
///
/// # Errors
/// Where a difference overflows.
pub fn largest(corrections: &[Correction], style: Style, out: &mut String) -> Result<()> {
    let mut changes = Vec::new();
    for correction in corrections {
        changes.push((cost(correction.values_after()).checked_sub(cost(correction.values_before()))?, correction));
    }
    changes.sort_by(|(a, left), (b, right)| b.abs().cmp(&a.abs()).then_with(|| left.key.cmp(&right.key)));
    let quantity = |values: Option<Values>| values.map_or_else(|| "-".to_owned(), |values| values.quantity.to_string());
    let row = |(change, correction): &(Decimal, &Correction)| {
        let causes: Vec<_> = correction.causes.names().map(|cause| cause.name()).collect();
        let cells = vec![
            format!("  {}", symbol(correction.kind)),
            correction.customer_id.to_string(),
            describe(&correction.key),
            quantity(correction.values_before()),
            quantity(correction.values_after()),
            format!("{change} {}", correction.currency),
            causes.join(", "),
        ];
        (change.abs(), cells)
    };
    let folded = changes.len().saturating_sub(SHOWN);
    let mut rows: Vec<_> = changes.iter().take(SHOWN).map(row).collect();
    let header = ["", "customer", "window", "quantity", "becomes", "cost change", "cause"];
    if rows.is_empty() {
        return Ok(());
    }
    rows.truncate(SHOWN);
    fold(&header, rows, &[3, 4, 5], "windows", style, out)?;
    if folded > 0 {
        writeln!(out, "  … and {} more", counted(folded as u64, "window"))?;
    }
    Ok(())
}

fn fold(
    header: &[&str],
    rows: Vec<(Decimal, Vec<String>)>,
    right: &[usize],
    noun: &str,
    style: Style,
    out: &mut String,
) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let folded = rows.len().saturating_sub(SHOWN);
    let shown: Vec<_> = rows.into_iter().take(SHOWN).map(|(_, cells)| cells).collect();
    out.push('\n');
    out.push_str(&table(header, &shown, right, style));
    if folded > 0 {
        writeln!(out, "  … and {} more {noun}", number(folded as u64))?;
    }
    Ok(())
}
