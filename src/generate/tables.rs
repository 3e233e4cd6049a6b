//! The reference tables and the job that belong to made-up events.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use chrono::Days;

use super::node::Definition;
use super::profile::{Plan, Profile};
use super::random::Random;
use super::writer::FileFormat;
use crate::config::Job;
use crate::fault::configuration;
use crate::reference::Reference;

/// Names of customers, made once.
pub struct Names {
    pub tenants: Vec<String>,
    /// External ids.
    pub customers: Vec<String>,
}

impl Names {
    pub fn new(profile: &Profile) -> Names {
        let numbered = |prefix: &str, count: u32| {
            let width = count.to_string().len();
            (1..=count).map(|number| format!("{prefix}{number:0width$}")).collect()
        };
        let Profile { customers, .. } = profile;
        Names { tenants: numbered("tenant_", customers.tenants), customers: numbered("customer-", customers.count) }
    }

    /// The tenant of the customer at `index`.
    pub fn tenant(&self, index: usize) -> &str {
        self.tenants.get(index % self.tenants.len().max(1)).map_or("", String::as_str)
    }

    pub fn customer(&self, index: usize) -> &str {
        self.customers.get(index).map_or("", String::as_str)
    }
}

pub const JOB: &str = "job.yaml";
const METERS: &str = "meters.yaml";
const PRICES: &str = "prices.yaml";

/// Every file with its content.
///
/// # Errors
/// Where a date is out of the calendar.
pub fn files(profile: &Profile, names: &Names, format: FileFormat) -> Result<Vec<(&'static str, String)>> {
    Ok(vec![
        (JOB, job(profile, format)),
        (METERS, definitions("meters", &profile.meters)),
        (PRICES, definitions("prices", &profile.prices)),
        ("customers.csv", customers(names)?),
        ("subscriptions.csv", subscriptions(profile, names)?),
    ])
}

/// Whether a job can be made of the files, tried where nobody sees it.
///
/// # Errors
/// A configuration fault that names the line of the profile.
pub fn check(profile: &Profile, files: &[(&str, String)]) -> Result<()> {
    let folder = tempfile::tempdir().context("cannot create a temporary folder")?;
    write(folder.path(), files)?;
    Job::load(&folder.path().join(JOB)).and_then(|job| Reference::load(&job)).map(drop).map_err(|error| {
        let message = format!("{error:#}");
        let at = in_profile(profile, folder.path(), &message);
        configuration(at.unwrap_or_else(|| {
            let said = message.replace(&format!("{}/", folder.path().display()), "the job's ");
            format!("{}: no job can be made of it: {said}", profile.path.display())
        }))
    })
}

/// Writes files into a folder.
///
/// # Errors
/// Where one cannot be written.
pub fn write(folder: &Path, files: &[(&str, String)]) -> Result<()> {
    for (name, content) in files {
        let path = folder.join(name);
        fs::write(&path, content).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn job(profile: &Profile, format: FileFormat) -> String {
    let Profile { name, seed, timezone, window, .. } = profile;
    let extension = format.extension();
    format!(
        "\
# Made up by `trueup generate` with seed {seed}. Paths are relative to this file.
version: 1
job: \"{name}\"
timezone: {timezone}
source: {{kind: files, paths: [\"events/*.{extension}\"]}}
reference:
  customers: {{path: customers.csv}}
  subscriptions: {{path: subscriptions.csv}}
  meters: {{path: {METERS}}}
  prices: {{path: {PRICES}}}
window: {window}
store: {{kind: sqlite, path: trueup.db}}
"
    )
}

/// One row a line, after one line for the key.
fn definitions(key: &str, rows: &[Definition]) -> String {
    if rows.is_empty() {
        return format!("{key}: []\n");
    }
    rows.iter().fold(format!("{key}:\n"), |mut text, row| {
        let _ = writeln!(text, "  - {}", row.value);
        text
    })
}

/// What a message about a file of definitions says of the profile: the line there.
fn in_profile(profile: &Profile, folder: &Path, message: &str) -> Option<String> {
    let located = [(METERS, &profile.meters), (PRICES, &profile.prices)].into_iter().find_map(|(name, rows)| {
        let rest = message.strip_prefix(&format!("{} line ", folder.join(name).display()))?;
        let (line, rest) = rest.split_once(':')?;
        let row = rows.get(line.parse::<usize>().ok()?.checked_sub(2)?)?;
        Some(format!("{}:{}:{rest}", profile.path.display(), row.defined.line()))
    });
    located.or_else(|| {
        // A key or value that cannot be read at all is reported with a column and an excerpt.
        [(METERS, &profile.meters), (PRICES, &profile.prices)].into_iter().find_map(|(name, rows)| {
            let rest = message.strip_prefix(&format!("{}:", folder.join(name).display()))?;
            let mut parts = rest.splitn(3, ':');
            let row = rows.get(parts.next()?.parse::<usize>().ok()?.checked_sub(2)?)?;
            let what = parts.nth(1)?.lines().next()?;
            Some(format!("{}:{}:{what}", profile.path.display(), row.defined.line()))
        })
    })
}

fn customers(names: &Names) -> Result<String> {
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record(["tenant_id", "customer_id", "external_customer_id", "valid_from", "valid_to"])?;
    for (index, external) in names.customers.iter().enumerate() {
        table.write_record([names.tenant(index), &id("cus_", external), external, "", ""])?;
    }
    Ok(String::from_utf8(table.into_inner()?)?)
}

fn subscriptions(profile: &Profile, names: &Names) -> Result<String> {
    let started = profile.start.checked_sub_days(Days::new(365)).context("start is out of the calendar")?;
    let started = format!("{started}T00:00:00Z");
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record([
        "tenant_id",
        "subscription_id",
        "customer_id",
        "plan_id",
        "currency",
        "billing_period",
        "anchor",
        "timezone",
        "started_at",
        "ended_at",
    ])?;
    for (index, external) in names.customers.iter().enumerate() {
        // No event has this number.
        let mut random = Random::new(profile.seed, u64::MAX - index as u64);
        let plan = profile.customers.plans.get(profile.customers.plan_weights.draw(&mut random));
        let Some(Plan { id: plan, currency, billing_period }) = plan else { continue };
        let (subscription, customer) = (id("sub_", external), id("cus_", external));
        table.write_record([
            names.tenant(index),
            &subscription,
            &customer,
            plan,
            currency,
            billing_period,
            "",
            "",
            &started,
            "",
        ])?;
    }
    Ok(String::from_utf8(table.into_inner()?)?)
}

/// The id that goes with an external one: `cus_07` with `customer-07`.
fn id(prefix: &str, external: &str) -> String {
    external.replacen("customer-", prefix, 1)
}
