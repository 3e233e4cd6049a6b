//! Runs, and the chain that holds the ledger together.

use std::fmt::Write as _;

use rustc_hash::FxHashSet;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use super::aggregate::{Basis, Causes, Correction, PERIOD_CHANGE, PeriodCorrection, PeriodRow, Values, WindowRow};
use super::basis::{ReferenceDigests, Scope};
use super::decimal::DecimalText;
use super::digest::frame;
use super::timestamp::{Timestamp, TimestampText};
use super::window::Span;

/// One row of `runs`.
#[derive(Debug, Clone, PartialEq)]
pub struct RunRecord {
    pub run_id: String,
    pub job: String,
    pub mode: RunMode,
    pub status: String,
    /// None where there was nothing to compute.
    pub range: Option<Span>,
    pub started_at: Timestamp,
    pub finished_at: Timestamp,
    pub origin: Origin,
    /// Orders the writes of different runs.
    pub version: i64,
    pub counts: serde_json::Value,
    pub input: RunInput,
    pub basis: RunBasis,
    pub ledger_digest: String,
}

/// Who or what started a run, and what it was told to pass over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// `ann@host trueup run`, or `schedule`.
    pub started_by: String,
    pub overrides: Vec<Override>,
}

/// A check that somebody told a run to pass over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Override {
    /// `--yes`: the job's guard.
    Guard,
    /// `--allow-closed`: closed periods.
    ClosedPeriods,
    /// `--force`: what later runs changed.
    LaterRuns,
}

impl Override {
    /// Those of `told` that are set.
    pub fn list(told: &[(bool, Override)]) -> Vec<Override> {
        told.iter().filter(|(is_set, _)| *is_set).map(|(_, which)| *which).collect()
    }
}

/// What kind of run it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunMode {
    /// Recomputed windows from events.
    Run,
    /// Published a saved plan: as good as a run.
    Apply,
    /// Took an earlier run back.
    Revert,
    /// Closed billing periods, or opened them again.
    Close,
}

impl RunMode {
    const ALL: [RunMode; 4] = [RunMode::Run, RunMode::Apply, RunMode::Revert, RunMode::Close];

    pub fn name(self) -> &'static str {
        match self {
            RunMode::Run => "run",
            RunMode::Apply => "apply",
            RunMode::Revert => "revert",
            RunMode::Close => "close",
        }
    }

    pub fn parse(name: &str) -> Option<RunMode> {
        RunMode::ALL.into_iter().find(|mode| mode.name() == name)
    }

    /// Whether it computed windows from events.
    pub fn computes(self) -> bool {
        matches!(self, RunMode::Run | RunMode::Apply)
    }
}

/// What a run read.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunInput {
    pub files: Vec<InputFile>,
    /// The greatest ingestion time read: later events are new.
    pub ingested_until: Option<Timestamp>,
    /// No event lies before, in range or not, but for copies that others replace or void; and
    /// events reach as far back as the windows around this time.
    #[serde(default)]
    pub events_from: Option<Timestamp>,
    /// The same of the last event: what lies later was not computed.
    #[serde(default)]
    pub events_until: Option<Timestamp>,
}

impl RunInput {
    /// From the first to the last event that counts.
    pub fn events(&self) -> Option<(Timestamp, Timestamp)> {
        self.events_from.zip(self.events_until)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    pub name: String,
    pub fingerprint: String,
    pub rows: u64,
    /// As [`crate::source::Split::evidence`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<String>,
}

/// What a run computed with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunBasis {
    pub trueup_version: String,
    pub job_digest: String,
    pub reference: ReferenceDigests,
    /// The part of the job that was computed.
    pub scope: Scope,
}

impl RunRecord {
    /// The run with the digest of the ledger that it is part of.
    #[must_use]
    pub fn in_ledger(&self, ledger_digest: String) -> RunRecord {
        RunRecord { ledger_digest, ..self.clone() }
    }

    /// Whether it computed everything that there was, from the beginning.
    pub fn is_of_everything(&self) -> bool {
        let mode = self.coverage("mode").and_then(serde_json::Value::as_str);
        self.mode.computes() && matches!(mode, Some("full" | "incremental"))
    }

    /// The range of which a run left everything as it should be: what is beyond is to be looked at.
    pub fn known(&self) -> Option<Span> {
        let billed = self.coverage("billed").and_then(|billed| serde_json::from_value::<Span>(billed.clone()).ok());
        let both = |range: Span, billed: Span| Span { start: range.start.max(billed.start), end: range.end.min(billed.end) };
        let known = self.range.map(|range| billed.map_or(range, |billed| both(range, billed)));
        known.filter(|known| known.start < known.end)
    }

    /// Its range, where somebody asked for it.
    pub fn asked_for(&self) -> Option<Span> {
        // Runs of older versions only say that they are of a part.
        let is_part = self.coverage("mode").and_then(serde_json::Value::as_str) == Some("part");
        let is_asked_for = self.coverage("asked_for").is_some() || (is_part && self.basis.scope.is_whole());
        self.range.filter(|_| is_asked_for)
    }

    /// What it says of how much it looked at.
    fn coverage(&self, name: &str) -> Option<&serde_json::Value> {
        self.counts.get("coverage")?.get(name)
    }

    /// The run that this one took back.
    pub fn reverted(&self) -> Option<&str> {
        let run_id = self.counts.get("reverted").filter(|_| self.mode == RunMode::Revert);
        run_id.and_then(serde_json::Value::as_str)
    }

    /// Those of `runs`, oldest first, that later ones took back, and nobody restored since.
    pub fn taken_back(runs: &[RunRecord]) -> FxHashSet<&str> {
        let mut taken_back = FxHashSet::default();
        // The last one stands: whether one before it does is known when it comes up.
        for run in runs.iter().rev().filter(|run| run.mode == RunMode::Revert) {
            if let Some(reverted) = run.reverted().filter(|_| !taken_back.contains(run.run_id.as_str())) {
                taken_back.insert(reverted);
            }
        }
        taken_back
    }
}

/// The ledger digest after a run: SHA-256 over the digest before it, the run's own row
/// and every correction, so that no row can change or vanish unseen. Corrections go in as the
/// digests of blocks of them, so that several threads can make these.
pub struct LedgerChain {
    chain: Sha256,
    block: Sha256,
    /// Corrections in the block.
    filled: usize,
}

/// Corrections that have a digest together.
const BLOCK: usize = 4096;

impl LedgerChain {
    pub fn new(previous: &str, run: &RunRecord) -> Self {
        let mut chain = LedgerChain { chain: Sha256::new(), block: Sha256::new(), filled: 0 };
        let instant = |t: Option<Timestamp>| t.map_or_else(|| "-".to_owned(), |t| t.to_string());
        chain.texts(&[
            previous,
            &run.run_id,
            &run.job,
            run.mode.name(),
            &run.status,
            &instant(run.range.map(|range| range.start)),
            &instant(run.range.map(|range| range.end)),
            &run.started_at.to_string(),
            &run.finished_at.to_string(),
            &run.origin.started_by,
            &serde_json::to_string(&run.origin.overrides).unwrap_or_default(),
            &run.version.to_string(),
            &run.counts.to_string(),
            &serde_json::to_string(&run.input).unwrap_or_default(),
            &serde_json::to_string(&run.basis).unwrap_or_default(),
        ]);
        chain
    }

    /// Adds the texts of one row, each with its length. Corrections come before it.
    pub fn texts(&mut self, texts: &[&str]) {
        self.end_block();
        let mut line = String::from("\n");
        for text in texts {
            let _ = write!(line, "{}:{text}|", text.len());
        }
        self.chain.update(line.as_bytes());
    }

    /// Adds a correction, in the order of its sequence.
    pub fn add(&mut self, correction: &LedgerText) {
        self.block.update(correction.line.as_bytes());
        self.filled += 1;
        if self.filled == BLOCK {
            self.end_block();
        }
    }

    fn end_block(&mut self) {
        if self.filled > 0 {
            self.filled = 0;
            self.chain.update(self.block.finalize_reset());
        }
    }

    pub fn finish(mut self) -> String {
        self.end_block();
        self.chain.finalize().iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}

/// A correction as digests see it: the same from memory and from the store.
pub struct LedgerLine<'a> {
    pub texts: [&'a str; 12],
    pub before: Option<Values>,
    pub after: Option<Values>,
    /// [`window_digest`] of the row that was written.
    pub after_digest: Option<i64>,
}

/// The line of one correction after the other, all in one buffer.
#[derive(Default)]
pub struct LedgerText {
    line: String,
    number: DecimalText,
    frame: Vec<u8>,
}

impl LedgerText {
    /// Takes the place of the line before.
    pub fn set(&mut self, line: &LedgerLine<'_>) {
        self.line.clear();
        self.line.push('\n');
        for text in line.texts {
            push_number(&mut self.line, text.len() as u64);
            self.line.push(':');
            self.line.push_str(text);
            self.line.push('|');
        }
        for values in [line.before, line.after] {
            match values {
                Some(values) => {
                    for number in [values.quantity, values.cost] {
                        self.line.push_str(self.number.of(number));
                        self.line.push(' ');
                    }
                    push_number(&mut self.line, values.event_count);
                    self.line.push('|');
                }
                None => self.line.push_str("-|"),
            }
        }
        if let Some(digest) = line.after_digest {
            push_number(&mut self.line, u64::from_le_bytes(digest.to_le_bytes()));
            self.line.push('|');
        }
    }

    /// The digest that is kept in the row: it tells which row was altered.
    pub fn row_digest(&mut self) -> i64 {
        digest_of(&[&self.line], &mut self.frame)
    }
}

/// Adds digits to a text, faster than formatting.
fn push_number(text: &mut String, number: u64) {
    let mut digits = [0; 20];
    let mut rest = number;
    let mut length = 0;
    for place in digits.iter_mut().rev() {
        *place = b'0' + u8::try_from(rest % 10).unwrap_or_default();
        rest /= 10;
        length += 1;
        if rest == 0 {
            break;
        }
    }
    text.extend(digits.iter().skip(digits.len() - length).copied().map(char::from));
}

/// The digest of a state that a run keeps, as its counts have it.
pub fn state_digest(content: &str) -> String {
    format!("{:016x}", xxh3_64(content.as_bytes()))
}

/// The digest of a row by the texts of its columns.
pub fn row_digest(texts: &[&str]) -> i64 {
    digest_of(texts, &mut Vec::with_capacity(256))
}

fn digest_of(texts: &[&str], buffer: &mut Vec<u8>) -> i64 {
    buffer.clear();
    texts.iter().for_each(|text| frame(buffer, Some(text.as_bytes())));
    i64::from_le_bytes(xxh3_64(buffer).to_le_bytes())
}

/// The digest of a row of `usage_windows`, of all that the corrections of its key do not tell.
pub fn window_digest(row: &WindowRow, buffer: &mut Vec<u8>) -> i64 {
    buffer.clear();
    let Basis { meter, price, subscription, customer } = &*row.basis;
    for text in [&row.customer_id, &row.currency, meter, price, subscription, customer] {
        frame(buffer, Some(text.as_bytes()));
    }
    buffer.extend(row.window_end.nanos().to_le_bytes());
    buffer.extend(row.period_end.nanos().to_le_bytes());
    buffer.extend(row.events_digest.to_le_bytes());
    i64::from_le_bytes(xxh3_64(buffer).to_le_bytes())
}

/// [`window_digest`] of the row that a correction writes, if it writes one.
pub fn after_digest(correction: &Correction, buffer: &mut Vec<u8>) -> Option<i64> {
    correction.written().map(|row| window_digest(row, buffer))
}

/// The lines of corrections in memory, one after the other.
#[derive(Default)]
pub struct LedgerLines {
    text: LedgerText,
    row: Vec<u8>,
    period_start: TimestampText,
    window_start: TimestampText,
    causes: String,
}

impl LedgerLines {
    pub fn of(&mut self, correction: &Correction) -> &mut LedgerText {
        let key = &correction.key;
        self.causes.clear();
        write_causes(&correction.causes, &mut self.causes);
        self.text.set(&LedgerLine {
            texts: [
                &key.period.tenant_id,
                &key.period.subscription_id,
                &key.period.meter_id,
                &key.period.price_id,
                &key.period.dimensions,
                self.period_start.of(key.period.period_start),
                self.window_start.of(key.window_start),
                &correction.customer_id,
                &correction.currency,
                correction.kind.name(),
                &self.causes,
                &replaced_json(correction),
            ],
            before: correction.values_before(),
            after: correction.values_after(),
            after_digest: after_digest(correction, &mut self.row),
        });
        &mut self.text
    }
}

/// The causes of a correction as the ledger stores them: `{"late_event":3}`.
pub fn causes_json(causes: &Causes) -> String {
    let mut json = String::new();
    write_causes(causes, &mut json);
    json
}

/// Adds the causes, by name.
pub fn write_causes(causes: &Causes, json: &mut String) {
    let mut named: Vec<_> = causes.iter().map(|(cause, count)| (cause.name(), count)).collect();
    named.sort_unstable();
    let mut separator = '{';
    for (name, count) in named {
        json.push(separator);
        json.push('"');
        json.push_str(name);
        json.push_str("\":");
        push_number(json, count);
        separator = ',';
    }
    json.push_str(if separator == '{' { "{}" } else { "}" });
}

/// The row that a correction replaced, as the ledger stores it; empty where there is none.
pub fn replaced_json(correction: &Correction) -> String {
    correction.replaced.as_deref().map_or_else(String::new, |row| serde_json::to_string(row).unwrap_or_default())
}

/// A row of `usage_periods` as the ledger stores it; empty where there is none.
pub fn period_json(row: Option<&PeriodRow>) -> String {
    row.map_or_else(String::new, |row| serde_json::to_string(row).unwrap_or_default())
}

/// The texts of a correction of `usage_periods` that digests are made of.
pub fn period_texts<'t>(kind: &'t str, before: &'t str, after: &'t str) -> Vec<&'t str> {
    // Rows of older versions have no kind.
    let kind = Some(kind).filter(|kind| *kind != PERIOD_CHANGE);
    [before, after].into_iter().chain(kind).collect()
}

/// Digests of the ledger after a run.
pub struct LedgerDigests {
    /// Of everything so far.
    pub chain: String,
    /// Of the row of each of the run's corrections.
    pub rows: Vec<i64>,
}

impl LedgerDigests {
    /// After `run`, with its corrections in their order.
    pub fn of(previous: &str, run: &RunRecord, corrections: &[Correction], periods: &[PeriodCorrection]) -> Self {
        let mut chain = LedgerChain::new(previous, run);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let blocks = corrections.len().div_ceil(BLOCK).div_ceil(threads).max(1);
        let mut parts = corrections.chunks(blocks * BLOCK);
        let ours = parts.next().unwrap_or_default();
        let rows = std::thread::scope(|scope| {
            let threads: Vec<_> = parts.map(|theirs| (theirs, scope.spawn(|| block_digests(theirs)))).collect();
            let (mut blocks, mut rows) = block_digests(ours);
            for (theirs, thread) in threads {
                let (more_blocks, more_rows) = thread.join().unwrap_or_else(|_| block_digests(theirs));
                blocks.extend(more_blocks);
                rows.extend(more_rows);
            }
            blocks.iter().for_each(|block| chain.chain.update(block));
            rows
        });
        for correction in periods {
            let (before, after) = (period_json(correction.before.as_ref()), period_json(correction.after.as_ref()));
            chain.texts(&period_texts(correction.kind(), &before, &after));
        }
        LedgerDigests { chain: chain.finish(), rows }
    }
}

/// The digests of blocks of corrections, and of their rows.
fn block_digests(corrections: &[Correction]) -> (Vec<sha2::digest::Output<Sha256>>, Vec<i64>) {
    let mut lines = LedgerLines::default();
    let mut rows = Vec::with_capacity(corrections.len());
    let block = |corrections: &[Correction]| {
        let mut block = Sha256::new();
        for correction in corrections {
            let line = lines.of(correction);
            block.update(line.line.as_bytes());
            rows.push(line.row_digest());
        }
        block.finalize()
    };
    (corrections.chunks(BLOCK).map(block).collect(), rows)
}
