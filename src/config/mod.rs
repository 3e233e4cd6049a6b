//! The job file: typed as written in [`raw`], then validated into a [`Job`].
//!
//! The only module that reads the environment.

mod raw;
pub mod yaml;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use chrono_tz::Tz;

use crate::fault::configuration;
use crate::model::decimal::Decimal;
use crate::model::digest::Digest;
use crate::model::window::WindowSize;
use crate::source::files::{ColumnMap, Field};
use raw::{RawJob, RawSource, RawStore};
use yaml::Placed;

/// A job, validated: every path absolute or relative to the working directory,
/// every name resolved.
#[derive(Debug, Clone)]
pub struct Job {
    pub path: PathBuf,
    pub name: String,
    pub timezone: Tz,
    pub source: Source,
    pub deduplicate: Deduplicate,
    pub reference: ReferencePaths,
    /// For meters that name none.
    pub window: WindowSize,
    pub store: Store,
    pub guard: Guard,
    pub schedule: Option<Schedule>,
    /// Changes when a setting that can change an aggregate changes.
    pub digest: String,
}

#[derive(Debug, Clone)]
pub enum Source {
    Files { patterns: Vec<String>, columns: ColumnMap },
}

#[derive(Debug, Clone)]
pub enum Store {
    Sqlite { path: PathBuf },
}

/// Which copy of an event counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// The one ingested last, so that a re-sent id amends.
    Latest,
    /// The one ingested first.
    First,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deduplicate {
    /// The fields that identify an event.
    pub key: Vec<Field>,
    pub keep: Keep,
}

#[derive(Debug, Clone)]
pub struct ReferencePaths {
    pub customers: PathBuf,
    pub subscriptions: PathBuf,
    pub meters: PathBuf,
    pub prices: PathBuf,
}

/// Limits beyond which a run is refused unless told otherwise.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Guard {
    pub max_changed_rows: Option<Limit>,
    pub max_cost_change: Option<Limit>,
}

/// A share of what is stored, or an absolute number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Limit {
    Percent(Decimal),
    Absolute(Decimal),
}

impl Limit {
    fn parse(text: &str) -> Option<Limit> {
        let limit = match text.trim().strip_suffix('%') {
            Some(percent) => Limit::Percent(percent.trim().parse().ok()?),
            None => Limit::Absolute(text.trim().parse().ok()?),
        };
        let (Limit::Percent(value) | Limit::Absolute(value)) = limit;
        (!value.is_negative()).then_some(limit)
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Limit::Percent(value) => write!(f, "{value}%"),
            Limit::Absolute(value) => write!(f, "{value}"),
        }
    }
}

/// When the job runs by itself.
#[derive(Debug, Clone)]
pub struct Schedule {
    pub cron: String,
    pub timezone: Tz,
}

/// Whether the environment asks for output without colour (<https://no-color.org>).
#[allow(clippy::disallowed_methods)]
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

impl Job {
    /// Reads and validates a job file.
    ///
    /// # Errors
    /// A configuration fault that names the file, the line and the remedy.
    pub fn load(path: &Path) -> Result<Job> {
        let raw: RawJob = yaml::read(path)?;
        Validator { path }.job(raw)
    }
}

/// Validates the parts of one job file.
struct Validator<'p> {
    path: &'p Path,
}

impl Validator<'_> {
    fn error<T>(&self, at: &Placed<T>, message: impl std::fmt::Display) -> anyhow::Error {
        configuration(format!("{}:{}: {message}", self.path.display(), at.defined.line()))
    }

    fn job(&self, raw: RawJob) -> Result<Job> {
        if raw.version.value != 1 {
            return Err(
                self.error(&raw.version, format!("version {} is unknown: this trueup reads version 1", raw.version.value))
            );
        }
        let name = &raw.job.value;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || !name.chars().all(plain) {
            return Err(self.error(&raw.job, format!("job `{name}` must be a name of letters, digits, `_`, `-` and `.`")));
        }
        let timezone = raw.timezone.as_ref().map_or(Ok(Tz::UTC), |zone| self.timezone(zone))?;
        let window = match &raw.window {
            None => WindowSize::Minutes(60),
            Some(window) => WindowSize::parse(&window.value).ok_or_else(|| {
                let names: Vec<_> = WindowSize::NAMES.iter().take(9).map(|(name, _)| *name).collect();
                self.error(window, format!("window `{}` is unknown: use one of {}", window.value, names.join(", ")))
            })?,
        };
        let deduplicate = self.deduplicate(raw.deduplicate.unwrap_or_default())?;
        let reference = ReferencePaths {
            customers: self.resolve(&raw.reference.customers.path),
            subscriptions: self.resolve(&raw.reference.subscriptions.path),
            meters: self.resolve(&raw.reference.meters.path),
            prices: self.resolve(&raw.reference.prices.path),
        };
        let guard = raw.guard.unwrap_or_default();
        let guard = Guard {
            max_changed_rows: guard.max_changed_rows.map(|limit| self.limit("max_changed_rows", &limit)).transpose()?,
            max_cost_change: guard.max_cost_change.map(|limit| self.limit("max_cost_change", &limit)).transpose()?,
        };
        let schedule = match raw.schedule {
            None => None,
            Some(schedule) => {
                let zone = schedule.timezone.as_ref().map_or(Ok(timezone), |zone| self.timezone(zone))?;
                Some(Schedule { cron: schedule.cron.value, timezone: zone })
            }
        };
        let digest = Digest::new("job").text(timezone.name()).text(window.name()).text(&format!("{:?}", deduplicate)).hex();
        Ok(Job {
            path: self.path.to_owned(),
            name: raw.job.value,
            timezone,
            source: self.source(raw.source)?,
            deduplicate,
            reference,
            window,
            store: self.store(&raw.store)?,
            guard,
            schedule,
            digest,
        })
    }

    fn resolve(&self, path: &str) -> PathBuf {
        self.path.parent().unwrap_or(Path::new("")).join(path)
    }

    fn timezone(&self, zone: &Placed<String>) -> Result<Tz> {
        zone.value.parse().map_err(|_| {
            self.error(zone, format!("time zone `{}` is unknown: use an IANA name such as Europe/Berlin", zone.value))
        })
    }

    fn limit(&self, key: &str, limit: &Placed<String>) -> Result<Limit> {
        Limit::parse(&limit.value)
            .ok_or_else(|| self.error(limit, format!("{key} `{}` must be a share such as \"10%\" or a number", limit.value)))
    }

    fn field(&self, name: &Placed<String>, key: &str) -> Result<Field> {
        Field::parse(&name.value).ok_or_else(|| {
            let names: Vec<_> = Field::ALL.into_iter().map(Field::name).collect();
            self.error(name, format!("{key} names `{}`, which is no event field: use {}", name.value, names.join(", ")))
        })
    }

    fn deduplicate(&self, raw: raw::RawDeduplicate) -> Result<Deduplicate> {
        let key = match raw.key {
            None => vec![Field::TenantId, Field::Id],
            Some(names) => names.iter().map(|name| self.field(name, "deduplicate.key")).collect::<Result<Vec<_>>>()?,
        };
        if let Some(position) =
            key.iter().position(|field| matches!(field, Field::Properties | Field::Deleted | Field::IngestedAt))
        {
            let name = key.get(position).map_or("", |field| field.name());
            return Err(configuration(format!("{}: deduplicate.key cannot use `{name}`", self.path.display())));
        }
        if !key.contains(&Field::Id) {
            return Err(configuration(format!("{}: deduplicate.key must contain `id`", self.path.display())));
        }
        let keep = match raw.keep {
            None => Keep::Latest,
            Some(keep) => match keep.value.as_str() {
                "latest" => Keep::Latest,
                "first" => Keep::First,
                other => return Err(self.error(&keep, format!("keep `{other}` must be latest or first"))),
            },
        };
        Ok(Deduplicate { key, keep })
    }

    fn source(&self, raw: RawSource) -> Result<Source> {
        if raw.kind.value != "files" {
            return Err(
                self.error(&raw.kind, format!("source kind `{}` is not available: this version reads `files`", raw.kind.value))
            );
        }
        let paths = raw.paths.filter(|paths| !paths.is_empty());
        let Some(paths) = paths else {
            return Err(self.error(&raw.kind, "source.paths must list at least one file or glob pattern"));
        };
        let mut names = BTreeMap::new();
        for (field, column) in raw.columns.unwrap_or_default() {
            let known = Field::parse(&field).ok_or_else(|| {
                let names: Vec<_> = Field::ALL.into_iter().map(Field::name).collect();
                self.error(&column, format!("source.columns maps `{field}`, which is no event field: use {}", names.join(", ")))
            })?;
            names.insert(known, column.value);
        }
        let patterns = paths.iter().map(|path| self.resolve(path).display().to_string()).collect();
        Ok(Source::Files { patterns, columns: ColumnMap::new(names) })
    }

    fn store(&self, raw: &RawStore) -> Result<Store> {
        if raw.kind.value != "sqlite" {
            return Err(
                self.error(&raw.kind, format!("store kind `{}` is not available: this version writes `sqlite`", raw.kind.value))
            );
        }
        match &raw.path {
            Some(path) => Ok(Store::Sqlite { path: self.resolve(path) }),
            None => Err(self.error(&raw.kind, "store.path must name the database file")),
        }
    }
}
