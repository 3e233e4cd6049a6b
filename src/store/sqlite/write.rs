//! Publishing: one transaction for aggregates, ledger, dead letters and the run.

use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior, params};

use super::bind::{NewRows, Rows, insert};
use super::digests::Numbers;
use super::fill;
use crate::model::aggregate::{Correction, PeriodCorrection, PeriodKey, PeriodRow, WindowKey, WindowRow};
use crate::model::run::{RunRecord, after_digest, period_json, period_texts, replaced_json, row_digest, write_causes};
use crate::store::reader::{PeriodReader, WindowReader};
use crate::store::{Publication, letters};

const INSERT: &str = "INSERT INTO";
const REPLACE: &str = "INSERT OR REPLACE INTO";

/// Returns the run as it was recorded.
pub(super) fn publish(connection: &mut Connection, publication: &Publication) -> Result<RunRecord> {
    let mut transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    check_previous(&transaction, publication)?;
    let can_fill = is_in_order(&publication.upserts)
        && fill::can_fill(&transaction, &windows(publication, &[]))?
        && fill::can_fill(&transaction, &corrections(publication, (1, &[])))?;
    let last = "SELECT coalesce(max(sequence), 0) FROM corrections";
    let first: i64 = transaction.query_row(last, [], |row| row.get::<_, i64>(0))? + 1;
    let numbers = Numbers::load(&transaction)?.of_all(publication.upserts.iter().map(|row| &row.basis))?;
    let ledger = std::thread::scope(|scope| {
        let ledger = scope.spawn(|| publication.ledger());
        delete_windows(&transaction, publication)?;
        write_periods(&transaction, publication)?;
        write_period_corrections(&transaction, publication)?;
        write_ranges(&transaction, publication, first)?;
        write_dead_letters(&transaction, publication)?;
        write_states(&transaction, publication)?;
        if !can_fill {
            insert(&transaction, REPLACE, windows(publication, &numbers))?;
        }
        ledger.join().map_err(|_| anyhow!("a thread that makes digests panicked: this is a bug in trueup"))
    })?;
    let run = publication.run.in_ledger(ledger.chain);
    let last = first - 1 + i64::try_from(publication.corrections.len())?;
    write_run(&transaction, &run, (first, last))?;
    let corrections = corrections(publication, (first, &ledger.rows));
    if can_fill {
        tracing::info!("the store is empty: its tables are filled page by page");
        fill::fill(&mut transaction, [windows(publication, &numbers), corrections])?;
    } else {
        insert(&transaction, INSERT, corrections)?;
    }
    transaction.commit()?;
    if can_fill {
        // That it knows the pages as they were is no failure of what is published.
        let forgotten = connection.execute_batch("PRAGMA shrink_memory");
        forgotten.unwrap_or_else(|error| tracing::debug!(%error, "the cache of the store keeps old pages"));
    }
    Ok(run)
}

/// Whether rows are sorted as SQLite sorts them: as text.
fn is_in_order(rows: &[Arc<WindowRow>]) -> bool {
    let in_order = |a: &WindowKey, b: &WindowKey| match Arc::ptr_eq(&a.period, &b.period) {
        true => a.window_start < b.window_start,
        false => a < b,
    };
    let is_text = |key: &WindowKey| key.window_start.sorts_as_text() && key.period.period_start.sorts_as_text();
    rows.iter().all(|row| is_text(&row.key)) && rows.iter().zip(rows.iter().skip(1)).all(|(a, b)| in_order(&a.key, &b.key))
}

/// What was planned against an older state must not be written.
fn check_previous(transaction: &Transaction<'_>, publication: &Publication) -> Result<()> {
    let sql = "SELECT run_id FROM runs WHERE job = ?1 ORDER BY version DESC, run_id DESC LIMIT 1";
    let last: Option<String> = transaction.query_row(sql, [&publication.run.job], |row| row.get(0)).optional()?;
    if last != publication.previous_run_id {
        bail!("another run of job {} published meanwhile: run again", publication.run.job);
    }
    Ok(())
}

fn delete_windows(transaction: &Transaction<'_>, publication: &Publication) -> Result<()> {
    let run = &publication.run;
    let mut delete = transaction.prepare(
        "DELETE FROM usage_windows WHERE job = ?1 AND tenant_id = ?2 AND subscription_id = ?3 AND meter_id = ?4 \
         AND price_id = ?5 AND dimensions = ?6 AND period_start = ?7 AND window_start = ?8",
    )?;
    for WindowKey { period, window_start } in &publication.retractions {
        let PeriodKey { tenant_id, subscription_id, meter_id, price_id, dimensions, period_start } = &**period;
        delete.execute(params![
            run.job,
            tenant_id,
            subscription_id,
            meter_id,
            price_id,
            dimensions,
            period_start.to_string(),
            window_start.to_string()
        ])?;
    }
    Ok(())
}

/// Columns of the key of a billing period.
const PERIOD_KEY: usize = 6;

/// `numbers` are those of the digests of their definitions, and how many rows in a row have them.
fn windows<'p>(publication: &'p Publication, numbers: &'p [([i64; 4], usize)]) -> NewRows<'p> {
    let run = &publication.run;
    let columns = ["job"].into_iter().chain(WindowReader::COLUMNS).chain(["updated_at"]).collect();
    let mut numbers = numbers.iter().flat_map(|(numbers, rows)| std::iter::repeat_n(*numbers, *rows));
    let mut last: Option<&Arc<PeriodKey>> = None;
    let mut give = move |rows: &mut Rows<'_>, row: &'p WindowRow| {
        let is_first = last.is_none();
        if last.is_some_and(|last| Arc::ptr_eq(last, &row.key.period)) {
            rows.keep(1 + PERIOD_KEY);
        } else {
            rows.text(&run.job)?;
            rows.period_key(&row.key.period)?;
            last = Some(&row.key.period);
        }
        rows.instant(row.key.window_start)?;
        rows.text(&row.customer_id)?;
        rows.instant(row.window_end)?;
        rows.instant(row.period_end)?;
        rows.decimal(row.quantity)?;
        rows.count(row.event_count)?;
        rows.decimal(row.cost)?;
        rows.text(&row.currency)?;
        row.events_digest.with_hex(|digest| rows.text(digest))?;
        for number in numbers.next().unwrap_or_default() {
            rows.integer(number)?;
        }
        if is_first {
            rows.integer(run.version)?;
            rows.text(&run.run_id)?;
            rows.instant(run.finished_at)?;
        }
        rows.write()
    };
    let give = move |rows: &mut Rows<'_>| publication.upserts.iter().try_for_each(|row| give(rows, row));
    NewRows { table: "usage_windows", columns, give: Box::new(give) }
}

fn write_periods(transaction: &Transaction<'_>, publication: &Publication) -> Result<()> {
    let run = &publication.run;
    let mut delete = transaction.prepare(
        "DELETE FROM usage_periods WHERE job = ?1 AND tenant_id = ?2 AND subscription_id = ?3 AND meter_id = ?4 \
         AND price_id = ?5 AND dimensions = ?6 AND period_start = ?7",
    )?;
    for PeriodKey { tenant_id, subscription_id, meter_id, price_id, dimensions, period_start } in &publication.period_deletions {
        delete.execute(params![run.job, tenant_id, subscription_id, meter_id, price_id, dimensions, period_start.to_string()])?;
    }
    let columns = ["job"].into_iter().chain(PeriodReader::COLUMNS).chain(["version", "run_id", "updated_at"]).collect();
    let give = |rows: &mut Rows<'_>, row: &PeriodRow| {
        rows.text(&run.job)?;
        rows.period_key(&row.key)?;
        rows.text(&row.customer_id)?;
        rows.instant(row.period_end)?;
        for amount in [row.quantity, row.cost, row.minimum_adjustment, row.commitment_adjustment, row.amount] {
            rows.decimal(amount)?;
        }
        rows.text(&row.currency)?;
        rows.optional(row.closed_at, Rows::instant)?;
        rows.integer(run.version)?;
        rows.text(&run.run_id)?;
        rows.instant(run.finished_at)?;
        rows.write()
    };
    let give = move |rows: &mut Rows<'_>| publication.period_upserts.iter().try_for_each(|row| give(rows, row));
    insert(transaction, REPLACE, NewRows { table: "usage_periods", columns, give: Box::new(give) })
}

/// `first` is the sequence of the first one.
fn corrections<'p>(publication: &'p Publication, (first, digests): (i64, &'p [i64])) -> NewRows<'p> {
    let run = &publication.run;
    let columns = vec![
        "sequence",
        "number",
        "run_id",
        "job",
        "tenant_id",
        "subscription_id",
        "meter_id",
        "price_id",
        "dimensions",
        "period_start",
        "window_start",
        "customer_id",
        "currency",
        "kind",
        "causes",
        "quantity_before",
        "quantity_after",
        "cost_before",
        "cost_after",
        "event_count_before",
        "event_count_after",
        "replaced",
        "row_digest",
        "recorded_at",
        "after_digest",
    ];
    let (mut causes_json, mut buffer) = (String::new(), Vec::new());
    let mut last: Option<&Correction> = None;
    let mut give = move |rows: &mut Rows<'_>, number: i64, correction: &'p Correction, digest: i64| {
        let Correction { key, customer_id, currency, kind, causes, .. } = correction;
        let (old, new) = (correction.values_before(), correction.values_after());
        rows.integer(first - 1 + number)?;
        rows.integer(number)?;
        let before = last.replace(correction);
        if before.is_some_and(|before| Arc::ptr_eq(&before.key.period, &key.period)) {
            rows.keep(2 + PERIOD_KEY);
        } else {
            rows.text(&run.run_id)?;
            rows.text(&run.job)?;
            rows.period_key(&key.period)?;
        }
        rows.instant(key.window_start)?;
        rows.text(customer_id)?;
        rows.text(currency)?;
        rows.text(kind.name())?;
        if before.is_some_and(|before| before.causes == *causes) {
            rows.keep(1);
        } else {
            causes_json.clear();
            write_causes(causes, &mut causes_json);
            rows.text(&causes_json)?;
        }
        for values in [old, new] {
            rows.optional(values.map(|values| values.quantity), Rows::decimal)?;
        }
        for values in [old, new] {
            rows.optional(values.map(|values| values.cost), Rows::decimal)?;
        }
        for values in [old, new] {
            rows.optional(values.map(|values| values.event_count), Rows::count)?;
        }
        rows.text(&replaced_json(correction))?;
        rows.integer(digest)?;
        rows.instant(run.finished_at)?;
        rows.optional(after_digest(correction, &mut buffer), Rows::integer)?;
        rows.write()
    };
    let give = move |rows: &mut Rows<'_>| {
        let mut corrections = (1..).zip(publication.corrections.iter().zip(digests));
        corrections.try_for_each(|(number, (correction, digest))| give(rows, number, correction, *digest))
    };
    NewRows { table: "corrections", columns, give: Box::new(give) }
}

/// Where the corrections of each meter of a subscription lie.
fn write_ranges(transaction: &Transaction<'_>, publication: &Publication, mut first: i64) -> Result<()> {
    let columns = vec!["job", "tenant_id", "subscription_id", "meter_id", "first_sequence", "last_sequence"];
    let of = |correction: &Correction| {
        let PeriodKey { tenant_id, subscription_id, meter_id, .. } = &*correction.key.period;
        [tenant_id.clone(), subscription_id.clone(), meter_id.clone()]
    };
    let give = move |rows: &mut Rows<'_>| {
        for range in publication.corrections.chunk_by(|a, b| Arc::ptr_eq(&a.key.period, &b.key.period) || of(a) == of(b)) {
            let next = first + i64::try_from(range.len())?;
            rows.text(&publication.run.job)?;
            for name in range.first().map(of).iter().flatten() {
                rows.text(name)?;
            }
            rows.integer(first)?;
            rows.integer(next - 1)?;
            rows.write()?;
            first = next;
        }
        Ok(())
    };
    insert(transaction, INSERT, NewRows { table: "correction_ranges", columns, give: Box::new(give) })
}

fn write_period_corrections(transaction: &Transaction<'_>, publication: &Publication) -> Result<()> {
    let run = &publication.run;
    let columns = vec![
        "correction_id",
        "run_id",
        "job",
        "tenant_id",
        "subscription_id",
        "meter_id",
        "price_id",
        "dimensions",
        "period_start",
        "row_before",
        "row_after",
        "row_digest",
        "recorded_at",
        "kind",
    ];
    let give = |rows: &mut Rows<'_>, sequence: u64, correction: &PeriodCorrection| {
        rows.text(&format!("{}-{sequence:09}", run.run_id))?;
        rows.text(&run.run_id)?;
        rows.text(&run.job)?;
        rows.period_key(&correction.key)?;
        let (before, after) = (period_json(correction.before.as_ref()), period_json(correction.after.as_ref()));
        rows.text(&before)?;
        rows.text(&after)?;
        rows.integer(row_digest(&period_texts(correction.kind(), &before, &after)))?;
        rows.instant(run.finished_at)?;
        rows.text(correction.kind())?;
        rows.write()
    };
    let give = move |rows: &mut Rows<'_>| {
        (1..).zip(&publication.period_corrections).try_for_each(|(sequence, correction)| give(rows, sequence, correction))
    };
    insert(transaction, INSERT, NewRows { table: "period_corrections", columns, give: Box::new(give) })
}

fn write_dead_letters(transaction: &Transaction<'_>, publication: &Publication) -> Result<()> {
    let job = &publication.run.job;
    if publication.dead_letters.is_empty() && publication.resolved.is_empty() {
        return Ok(());
    }
    let mut insert = transaction.prepare(
        "INSERT OR REPLACE INTO dead_letters (job, tenant_id, event_id, meter_id, reason, detail, event, event_time, occurrences, \
         first_run_id, last_run_id, resolved_run_id, row_digest) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
    )?;
    let known = super::read::dead_letters(transaction, job)?;
    for stored in letters::merge(publication, &known) {
        let key = &stored.letter.key;
        insert.execute(params![
            job,
            key.tenant_id,
            key.event_id,
            key.meter_id,
            key.reason.name(),
            stored.letter.detail,
            stored.letter.event,
            stored.letter.event_time.map(|t| t.to_string()),
            i64::try_from(stored.occurrences)?,
            stored.first_run_id,
            stored.last_run_id,
            stored.resolved_run_id,
            stored.row_digest
        ])?;
    }
    Ok(())
}

fn write_states(transaction: &Transaction<'_>, publication: &Publication) -> Result<()> {
    let run = &publication.run;
    let mut replace =
        transaction.prepare("INSERT OR REPLACE INTO job_state (job, name, run_id, content) VALUES (?1, ?2, ?3, ?4)")?;
    for (name, content) in &publication.states {
        replace.execute(params![run.job, name, run.run_id, content])?;
    }
    Ok(())
}

fn write_run(transaction: &Transaction<'_>, run: &RunRecord, (first, last): (i64, i64)) -> Result<()> {
    transaction.execute(
        "INSERT INTO runs (run_id, job, mode, status, range_start, range_end, started_at, finished_at, started_by, \
         overrides, version, counts, input, basis, ledger_digest, first_correction, last_correction) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17)",
        params![
            run.run_id,
            run.job,
            run.mode.name(),
            run.status,
            run.range.map(|range| range.start.to_string()),
            run.range.map(|range| range.end.to_string()),
            run.started_at.to_string(),
            run.finished_at.to_string(),
            run.origin.started_by,
            serde_json::to_string(&run.origin.overrides)?,
            run.version,
            run.counts.to_string(),
            serde_json::to_string(&run.input)?,
            serde_json::to_string(&run.basis)?,
            run.ledger_digest,
            first,
            last
        ],
    )?;
    Ok(())
}
