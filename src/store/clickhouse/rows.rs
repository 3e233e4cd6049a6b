//! Rows as the server takes them, one JSON object a line.

use serde_json::{Value, json};

use crate::model::aggregate::{Correction, PeriodCorrection, PeriodKey, PeriodRow, Values, WindowKey, WindowRow};
use crate::model::run::{RunRecord, after_digest, causes_json, period_json, period_texts, replaced_json, row_digest};
use crate::store::{Publication, StoredDeadLetter, letters};
/// Columns that hold instants, in any table.
pub const INSTANTS: [&str; 12] = [
    "window_start",
    "window_end",
    "period_start",
    "period_end",
    "updated_at",
    "closed_at",
    "recorded_at",
    "range_start",
    "range_end",
    "started_at",
    "finished_at",
    "event_time",
];

fn with_key(mut row: Value, job: &str, key: &PeriodKey) -> Value {
    if let Some(row) = row.as_object_mut() {
        row.insert("job".to_owned(), job.into());
        row.insert("tenant_id".to_owned(), (*key.tenant_id).into());
        row.insert("subscription_id".to_owned(), (*key.subscription_id).into());
        row.insert("meter_id".to_owned(), (*key.meter_id).into());
        row.insert("price_id".to_owned(), (*key.price_id).into());
        row.insert("dimensions".to_owned(), (*key.dimensions).into());
        row.insert("period_start".to_owned(), key.period_start.to_string().into());
    }
    row
}

pub fn window(run: &RunRecord, row: &WindowRow) -> String {
    let fields = json!({
        "customer_id": *row.customer_id,
        "window_start": row.key.window_start,
        "window_end": row.window_end,
        "period_end": row.period_end,
        "quantity": row.quantity,
        "event_count": row.event_count,
        "cost": row.cost,
        "currency": *row.currency,
        "events_digest": row.events_digest,
        "meter_digest": *row.basis.meter,
        "price_digest": *row.basis.price,
        "subscription_digest": *row.basis.subscription,
        "customer_digest": *row.basis.customer,
        "version": run.version,
        "run_id": run.run_id,
        "updated_at": run.finished_at,
        "is_deleted": 0,
    });
    with_key(fields, &run.job, &row.key.period).to_string()
}

/// A tombstone needs its key and a greater version; the rest takes the columns' defaults.
pub fn retracted_window(run: &RunRecord, key: &WindowKey) -> String {
    let fields = json!({
        "window_start": key.window_start,
        "version": run.version,
        "run_id": run.run_id,
        "updated_at": run.finished_at,
        "is_deleted": 1,
    });
    with_key(fields, &run.job, &key.period).to_string()
}

pub fn period(run: &RunRecord, row: &PeriodRow) -> String {
    let fields = json!({
        "customer_id": *row.customer_id,
        "period_end": row.period_end,
        "quantity": row.quantity,
        "cost": row.cost,
        "minimum_adjustment": row.minimum_adjustment,
        "commitment_adjustment": row.commitment_adjustment,
        "amount": row.amount,
        "currency": *row.currency,
        "closed_at": row.closed_at,
        "version": run.version,
        "run_id": run.run_id,
        "updated_at": run.finished_at,
        "is_deleted": 0,
    });
    with_key(fields, &run.job, &row.key).to_string()
}

pub fn removed_period(run: &RunRecord, key: &PeriodKey) -> String {
    let fields = json!({"version": run.version, "run_id": run.run_id, "updated_at": run.finished_at, "is_deleted": 1});
    with_key(fields, &run.job, key).to_string()
}

pub fn correction(run: &RunRecord, sequence: usize, correction: &Correction, digest: i64) -> String {
    let Correction { key, customer_id, currency, kind, causes, .. } = correction;
    let (before, after) = (&correction.values_before(), &correction.values_after());
    let quantity = |values: &Option<Values>| values.map(|values| values.quantity);
    let cost = |values: &Option<Values>| values.map(|values| values.cost);
    let event_count = |values: &Option<Values>| values.map(|values| values.event_count);
    let fields = json!({
        "correction_id": format!("{}-{sequence:09}", run.run_id),
        "run_id": run.run_id,
        "customer_id": **customer_id,
        "window_start": key.window_start,
        "currency": **currency,
        "kind": kind.name(),
        "causes": causes_json(causes),
        "quantity_before": quantity(before),
        "quantity_after": quantity(after),
        "cost_before": cost(before),
        "cost_after": cost(after),
        "event_count_before": event_count(before),
        "event_count_after": event_count(after),
        "replaced": replaced_json(correction),
        "row_digest": digest,
        "after_digest": after_digest(correction, &mut Vec::new()),
        "recorded_at": run.finished_at,
    });
    with_key(fields, &run.job, &key.period).to_string()
}

pub fn period_correction(run: &RunRecord, sequence: usize, correction: &PeriodCorrection) -> String {
    let (before, after) = (period_json(correction.before.as_ref()), period_json(correction.after.as_ref()));
    let fields = json!({
        "correction_id": format!("{}-{sequence:09}", run.run_id),
        "run_id": run.run_id,
        "row_before": before,
        "row_after": after,
        "row_digest": row_digest(&period_texts(correction.kind(), &before, &after)),
        "kind": correction.kind(),
        "recorded_at": run.finished_at,
    });
    with_key(fields, &run.job, &correction.key).to_string()
}

pub fn state(run: &RunRecord, name: &str, content: &str) -> String {
    json!({"job": run.job, "name": name, "run_id": run.run_id, "content": content, "version": run.version}).to_string()
}

/// `stage` 1 while publishing, 2 when done.
pub fn run(run: &RunRecord, stage: u8) -> String {
    json!({
        "run_id": run.run_id,
        "job": run.job,
        "mode": run.mode.name(),
        "status": if stage == 2 { run.status.as_str() } else { "publishing" },
        "range_start": run.range.map(|range| range.start),
        "range_end": run.range.map(|range| range.end),
        "started_at": run.started_at,
        "finished_at": run.finished_at,
        "started_by": run.origin.started_by,
        "overrides": serde_json::to_string(&run.origin.overrides).unwrap_or_default(),
        "version": run.version,
        "counts": run.counts.to_string(),
        "input": serde_json::to_string(&run.input).unwrap_or_default(),
        "basis": serde_json::to_string(&run.basis).unwrap_or_default(),
        "ledger_digest": run.ledger_digest,
        "stage": stage,
    })
    .to_string()
}

/// Dead letters as they will be after the run.
pub fn dead_letters(publication: &Publication, known: &[StoredDeadLetter]) -> Vec<String> {
    letters::merge(publication, known).iter().map(|stored| dead_letter(&publication.run, stored)).collect()
}

fn dead_letter(run: &RunRecord, stored: &StoredDeadLetter) -> String {
    let letter = &stored.letter;
    json!({
        "job": run.job,
        "tenant_id": letter.key.tenant_id,
        "event_id": letter.key.event_id,
        "meter_id": letter.key.meter_id,
        "reason": letter.key.reason.name(),
        "detail": letter.detail,
        "event": letter.event,
        "event_time": letter.event_time,
        "occurrences": stored.occurrences,
        "first_run_id": stored.first_run_id,
        "last_run_id": stored.last_run_id,
        "resolved_run_id": stored.resolved_run_id,
        "row_digest": stored.row_digest,
        "version": run.version,
    })
    .to_string()
}
