//! Metrics in Prometheus' text format
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Mutex;

use crate::model::timestamp::{SECOND, Timestamp};
use crate::pipeline::Published;

/// Counters and gauges of all jobs.
#[derive(Default)]
pub struct Metrics(Mutex<BTreeMap<String, JobMetrics>>);

#[derive(Default)]
struct JobMetrics {
    runs: BTreeMap<&'static str, u64>,
    last_status: &'static str,
    last_end: i64,
    last_success: i64,
    last_seconds: f64,
    events: BTreeMap<&'static str, u64>,
    corrections: BTreeMap<&'static str, u64>,
    dead_letters: u64,
}

impl Metrics {
    fn change(&self, job: &str, change: impl FnOnce(&mut JobMetrics)) {
        if let Ok(mut jobs) = self.0.lock() {
            change(jobs.entry(job.to_owned()).or_default());
        }
    }

    pub fn succeeded(&self, job: &str, published: &Published, now: Timestamp) {
        self.change(job, |metrics| {
            metrics.end("succeeded", now);
            metrics.last_success = now.nanos() / SECOND;
            metrics.last_seconds = published.plan.steps.iter().map(|step| step.seconds).sum();
            metrics.dead_letters = published.plan.dead_letters.len() as u64;
            let events = published.plan.events;
            for (bucket, count) in [
                ("out_of_range", events.out_of_range),
                ("duplicates", events.duplicates),
                ("voided", events.voided),
                ("unmatched", events.unmatched),
                ("dead_lettered", events.dead_lettered),
                ("metered", events.metered),
            ] {
                *metrics.events.entry(bucket).or_default() += count;
            }
            let rows = published.plan.changes.rows;
            for (kind, count) in [("insert", rows.inserted), ("update", rows.updated), ("retract", rows.retracted)] {
                *metrics.corrections.entry(kind).or_default() += count;
            }
        });
    }

    pub fn failed(&self, job: &str, status: &'static str, now: Timestamp) {
        self.change(job, |metrics| metrics.end(status, now));
    }

    pub fn last_status(&self, job: &str) -> Option<&'static str> {
        self.0.lock().ok()?.get(job).map(|metrics| metrics.last_status)
    }

    /// `running` has the name of every job, and whether it runs now.
    pub fn render<'j>(&self, running: impl Iterator<Item = (&'j str, bool)>) -> String {
        let mut out = String::new();
        family(&mut out, "trueup_running", "gauge", "Whether a run of the job is under way.");
        for (job, is_running) in running {
            sample(&mut out, "trueup_running", job, None, u8::from(is_running));
        }
        let Ok(jobs) = self.0.lock() else { return out };
        family(&mut out, "trueup_runs_total", "counter", "Runs by how they ended.");
        jobs.iter().for_each(|(job, m)| samples(&mut out, "trueup_runs_total", job, "status", &m.runs));
        family(&mut out, "trueup_events_total", "counter", "Events read, by where they went.");
        jobs.iter().for_each(|(job, m)| samples(&mut out, "trueup_events_total", job, "bucket", &m.events));
        family(&mut out, "trueup_corrections_total", "counter", "Corrections published, by kind.");
        jobs.iter().for_each(|(job, m)| samples(&mut out, "trueup_corrections_total", job, "kind", &m.corrections));
        family(&mut out, "trueup_dead_letters", "gauge", "Dead letters of the last successful run.");
        jobs.iter().for_each(|(job, m)| sample(&mut out, "trueup_dead_letters", job, None, m.dead_letters));
        family(&mut out, "trueup_last_run_duration_seconds", "gauge", "How long the last successful run took.");
        jobs.iter().for_each(|(job, m)| sample(&mut out, "trueup_last_run_duration_seconds", job, None, m.last_seconds));
        family(&mut out, "trueup_last_run_timestamp_seconds", "gauge", "When the last run ended.");
        jobs.iter().for_each(|(job, m)| sample(&mut out, "trueup_last_run_timestamp_seconds", job, None, m.last_end));
        family(&mut out, "trueup_last_success_timestamp_seconds", "gauge", "When the last successful run ended.");
        jobs.iter().for_each(|(job, m)| sample(&mut out, "trueup_last_success_timestamp_seconds", job, None, m.last_success));
        out
    }
}

impl JobMetrics {
    fn end(&mut self, status: &'static str, now: Timestamp) {
        *self.runs.entry(status).or_default() += 1;
        self.last_status = status;
        self.last_end = now.nanos() / SECOND;
    }
}

fn family(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

/// Job names are letters, digits, `_`, `-` and `.`: nothing to escape.
fn sample(out: &mut String, name: &str, job: &str, label: Option<(&str, &str)>, value: impl std::fmt::Display) {
    let label = label.map_or(String::new(), |(key, text)| format!(",{key}=\"{text}\""));
    let _ = writeln!(out, "{name}{{job=\"{job}\"{label}}} {value}");
}

fn samples(out: &mut String, name: &str, job: &str, key: &str, values: &BTreeMap<&'static str, u64>) {
    values.iter().for_each(|(text, value)| sample(out, name, job, Some((key, text)), value));
}
