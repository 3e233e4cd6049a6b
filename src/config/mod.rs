//! The job file: typed as written in [`raw`], then validated into a [`Job`].
//!
//! The only module that reads the environment.

mod connection;
mod raw;
pub mod yaml;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use chrono_tz::Tz;
use croner::Cron;
use croner::parser::{CronParser, Seconds};

use crate::fault::configuration;
use crate::model::columns::{ColumnMap, Field};
use crate::model::decimal::Decimal;
use crate::model::digest::Digest;
use crate::model::window::WindowSize;
use crate::source::files::FilePattern;
use connection::Connections;
pub use connection::{ClickHouseConnection, KafkaConnection, Secret, default_environment, operator};
use raw::{RawJob, RawSource, RawStore, RawTable};
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
    pub reference: ReferenceTables,
    /// For meters that name none.
    pub window: WindowSize,
    pub store: Store,
    pub guard: Guard,
    pub incremental: Incremental,
    pub lateness: Lateness,
    pub schedule: Option<Schedule>,
    /// Changes when a setting that can change an aggregate changes.
    pub digest: String,
}

#[derive(Debug, Clone)]
pub enum Source {
    Files { patterns: Vec<FilePattern>, columns: ColumnMap },
    ClickHouse { connection: ClickHouseConnection, events: Relation, margin: Duration, columns: ColumnMap },
    Kafka { connection: KafkaConnection, topic: String, margin: Duration, tenant_id: Option<String>, columns: ColumnMap },
}

/// Rows of a database: a table by name, or a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Relation {
    Table(String),
    Query(String),
}

#[derive(Debug, Clone)]
pub enum Store {
    Sqlite { path: PathBuf },
    ClickHouse { connection: ClickHouseConnection },
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
pub struct ReferenceTables {
    pub customers: ReferenceTable,
    pub subscriptions: ReferenceTable,
    pub meters: ReferenceTable,
    pub prices: ReferenceTable,
}

/// Where a reference table comes from.
#[derive(Debug, Clone)]
pub enum ReferenceTable {
    File(PathBuf),
    Query { connection: ClickHouseConnection, sql: String },
}

impl std::fmt::Display for ReferenceTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ReferenceTable::File(path) => write!(f, "{}", path.display()),
            ReferenceTable::Query { sql, .. } => write!(f, "query `{}`", sql.trim()),
        }
    }
}

/// Limits beyond which a run is refused unless told otherwise.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Guard {
    pub max_changed_rows: Option<Limit>,
    pub max_cost_change: Option<Limit>,
    /// Rows with events that are gone from the source, though nobody voided them: none,
    /// where a guard is set and says nothing else.
    pub max_vanished_rows: Option<Limit>,
}

/// Whether a run without a range skips what cannot have changed since the last one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Incremental {
    /// Where there are so many events that it saves time.
    #[default]
    Auto,
    Always,
    Never,
}

/// What becomes of events that come late, and of those that may still come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lateness {
    /// How far back from now a run without a range looks: everything, where it is not set.
    pub lookback: Option<Duration>,
    /// How long ago a window must have ended to be computed by a run without a range.
    pub settle: Option<Duration>,
    /// Billing periods that ended longer ago, and were computed, change no more: differences
    /// are recorded as adjustments.
    pub horizon: Option<Duration>,
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
    pub cron: Cron,
    pub timezone: Tz,
}

/// The grammar of schedules: that of the scheduler itself, seconds left out or given.
fn cron_parser() -> CronParser {
    CronParser::builder().seconds(Seconds::Optional).dom_and_dow(true).build()
}

/// Whether the environment asks for output without colour (<https://no-color.org>).
#[allow(clippy::disallowed_methods)]
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// The folder for what can be made again at any time; `None` where there is none.
#[allow(clippy::disallowed_methods)]
pub fn cache_folder() -> Option<PathBuf> {
    let given = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches =
        given("XDG_CACHE_HOME").filter(|path| path.is_absolute()).or_else(|| given("HOME").map(|home| home.join(".cache")));
    caches.map(|caches| caches.join("trueup").join("keys"))
}

impl Job {
    /// Reads and validates a job file.
    ///
    /// # Errors
    /// A configuration fault that names the file, the line and the remedy.
    pub fn load(path: &Path) -> Result<Job> {
        Job::load_in(path, None)
    }

    /// Reads a job file with the connections of `environments/<environment>.yaml`.
    ///
    /// # Errors
    /// As [`Job::load`].
    pub fn load_in(path: &Path, environment: Option<&str>) -> Result<Job> {
        let mut raw: RawJob = yaml::read(path)?;
        let connections = Connections::load(path, environment, raw.connections.take())?;
        Validator { path, connections }.job(raw)
    }
}

/// Validates the parts of one job file.
struct Validator<'p> {
    path: &'p Path,
    connections: Connections<'p>,
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
        // Files are called by it.
        if !(1..=100).contains(&name.len()) || name.starts_with('.') || !name.chars().all(plain) {
            let must = "must be a name of at most 100 letters, digits, `_`, `-` and `.`, which does not begin with `.`";
            return Err(self.error(&raw.job, format!("job `{name}` {must}")));
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
        let reference = ReferenceTables {
            customers: self.reference("customers", &raw.reference.customers)?,
            subscriptions: self.reference("subscriptions", &raw.reference.subscriptions)?,
            meters: self.reference("meters", &raw.reference.meters)?,
            prices: self.reference("prices", &raw.reference.prices)?,
        };
        let vanished = raw.guard.as_ref().map(|_| Limit::Absolute(Decimal::ZERO));
        let guard = raw.guard.unwrap_or_default();
        let guard = Guard {
            max_changed_rows: guard.max_changed_rows.map(|limit| self.limit("max_changed_rows", &limit)).transpose()?,
            max_cost_change: guard.max_cost_change.map(|limit| self.limit("max_cost_change", &limit)).transpose()?,
            max_vanished_rows: match guard.max_vanished_rows {
                Some(limit) => Some(self.limit("max_vanished_rows", &limit)?),
                None => vanished,
            },
        };
        let incremental = match &raw.incremental {
            None => Incremental::Auto,
            Some(incremental) => match incremental.value.as_str() {
                "auto" => Incremental::Auto,
                "always" => Incremental::Always,
                "never" => Incremental::Never,
                other => return Err(self.error(incremental, format!("incremental `{other}` must be auto, always or never"))),
            },
        };
        let lateness = raw.lateness.unwrap_or_default();
        let lateness = Lateness {
            lookback: self.duration("lateness.lookback", lateness.lookback.as_ref())?,
            settle: self.duration("lateness.settle", lateness.settle.as_ref())?,
            horizon: self.duration("lateness.horizon", lateness.horizon.as_ref())?,
        };
        let schedule = match raw.schedule {
            None => None,
            Some(schedule) => {
                let zone = schedule.timezone.as_ref().map_or(Ok(timezone), |zone| self.timezone(zone))?;
                let cron = cron_parser().parse(&schedule.cron.value).map_err(|error| {
                    let written = &schedule.cron.value;
                    self.error(&schedule.cron, format!("cron `{written}`: {error}; five fields, for example \"0 2 * * *\""))
                })?;
                if cron.find_next_occurrence(&crate::clock::now().utc().and_utc(), false).is_err() {
                    return Err(self.error(&schedule.cron, format!("cron `{}` is never due", schedule.cron.value)));
                }
                Some(Schedule { cron, timezone: zone })
            }
        };
        let source = self.source(raw.source)?;
        let (Source::Files { columns, .. } | Source::ClickHouse { columns, .. } | Source::Kafka { columns, .. }) = &source;
        let digest = Digest::new("job").text(timezone.name()).text(window.name());
        let digest = digest.text(&format!("{deduplicate:?}")).text(&format!("{columns:?}"));
        let digest = match &source {
            Source::Kafka { tenant_id: Some(tenant), .. } => digest.text(tenant).hex(),
            _ => digest.hex(),
        };
        Ok(Job {
            path: self.path.to_owned(),
            name: raw.job.value,
            timezone,
            source,
            deduplicate,
            reference,
            window,
            store: self.store(&raw.store)?,
            guard,
            incremental,
            lateness,
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

    fn duration(&self, key: &str, text: Option<&Placed<String>>) -> Result<Option<Duration>> {
        let Some(text) = text else { return Ok(None) };
        // A century is as good as never.
        let length = duration(&text.value).filter(|length| *length <= Duration::from_secs(36_525 * 86_400));
        length
            .map(Some)
            .ok_or_else(|| self.error(text, format!("{key} `{}` is no duration such as 30m, 12h, 35d or 8w", text.value)))
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

    fn reference(&self, name: &str, raw: &RawTable) -> Result<ReferenceTable> {
        match (&raw.path, &raw.query) {
            (Some(path), None) => Ok(ReferenceTable::File(self.resolve(&path.value))),
            (None, Some(query)) => {
                Ok(ReferenceTable::Query { connection: self.connections.clickhouse()?, sql: query.value.clone() })
            }
            (Some(_), Some(query)) => Err(self.error(query, format!("reference.{name} has a path and a query: keep one"))),
            (None, None) => Err(configuration(format!("{}: reference.{name} needs a path or a query", self.path.display()))),
        }
    }

    fn source(&self, raw: RawSource) -> Result<Source> {
        self.reject_foreign_keys(&raw)?;
        let columns = self.columns(raw.columns.unwrap_or_default())?;
        match raw.kind.value.as_str() {
            "files" => {
                let Some(paths) = raw.paths.filter(|paths| !paths.is_empty()) else {
                    return Err(self.error(&raw.kind, "source.paths must list at least one file or glob pattern"));
                };
                let folder = self.path.parent().unwrap_or(Path::new(""));
                let patterns: Option<Vec<_>> = paths.iter().map(|path| FilePattern::new(folder, path)).collect();
                let patterns = patterns.ok_or_else(|| {
                    configuration(format!("{}: the name of its folder is not UTF-8: rename the folder", self.path.display()))
                })?;
                Ok(Source::Files { patterns, columns })
            }
            "clickhouse" => {
                let events = match (raw.table, raw.query) {
                    (Some(table), None) => Relation::Table(table.value),
                    (None, Some(query)) => Relation::Query(query.value),
                    _ => return Err(self.error(&raw.kind, "source needs either `table` or `query`")),
                };
                let margin = self.duration("source.margin", raw.margin.as_ref())?.unwrap_or_default();
                Ok(Source::ClickHouse { connection: self.connections.clickhouse()?, events, margin, columns })
            }
            // Other kinds are refused above.
            _ => {
                let Some(topic) = raw.topic else { return Err(self.error(&raw.kind, "source.topic must name the topic")) };
                let margin = self.duration("source.margin", raw.margin.as_ref())?.unwrap_or(Duration::from_secs(3600));
                let tenant_id = raw.tenant_id.map(|tenant| tenant.value);
                Ok(Source::Kafka { connection: self.connections.kafka()?, topic: topic.value, margin, tenant_id, columns })
            }
        }
    }

    /// Keys that belong to another kind of source would silently do nothing.
    fn reject_foreign_keys(&self, raw: &RawSource) -> Result<()> {
        let keys: &[&str] = match raw.kind.value.as_str() {
            "files" => &["paths"],
            "clickhouse" => &["table", "query", "margin"],
            "kafka" => &["topic", "margin", "tenant_id"],
            other => {
                return Err(self.error(&raw.kind, format!("source kind `{other}` is unknown: use files, clickhouse or kafka")));
            }
        };
        let given = [
            ("table", raw.table.as_ref()),
            ("query", raw.query.as_ref()),
            ("topic", raw.topic.as_ref()),
            ("margin", raw.margin.as_ref()),
            ("tenant_id", raw.tenant_id.as_ref()),
        ];
        for (key, value) in given {
            if let Some(value) = value.filter(|_| !keys.contains(&key)) {
                return Err(self.error(value, format!("source.{key} does not belong to kind {}", raw.kind.value)));
            }
        }
        if raw.paths.is_some() && !keys.contains(&"paths") {
            return Err(self.error(&raw.kind, format!("source.paths does not belong to kind {}", raw.kind.value)));
        }
        Ok(())
    }

    fn columns(&self, raw: BTreeMap<String, Placed<String>>) -> Result<ColumnMap> {
        let mut names = BTreeMap::new();
        for (field, column) in raw {
            let known = Field::parse(&field).ok_or_else(|| {
                let names: Vec<_> = Field::ALL.into_iter().map(Field::name).collect();
                self.error(&column, format!("source.columns maps `{field}`, which is no event field: use {}", names.join(", ")))
            })?;
            names.insert(known, column.value);
        }
        Ok(ColumnMap::new(names))
    }

    fn store(&self, raw: &RawStore) -> Result<Store> {
        match raw.kind.value.as_str() {
            "sqlite" => match &raw.path {
                Some(_) if raw.database.is_some() => {
                    Err(self.error(&raw.kind, "store.database does not belong to kind sqlite: use `path`"))
                }
                Some(path) if path.is_empty() || path.ends_with('/') => {
                    Err(self.error(&raw.kind, format!("store.path `{path}` must name the database file, as data/trueup.db does")))
                }
                Some(path) => Ok(Store::Sqlite { path: self.resolve(path) }),
                None => Err(self.error(&raw.kind, "store.path must name the database file")),
            },
            "clickhouse" => {
                if raw.path.is_some() {
                    return Err(self.error(&raw.kind, "store.path does not belong to kind clickhouse: use `database`"));
                }
                let mut connection = self.connections.clickhouse()?;
                if let Some(database) = &raw.database {
                    connection.database.clone_from(database);
                }
                Ok(Store::ClickHouse { connection })
            }
            other => Err(self.error(&raw.kind, format!("store kind `{other}` is not available: use sqlite or clickhouse"))),
        }
    }
}

/// `30m`, `1h`, `2d`, `8w`.
fn duration(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let count: u64 = text.strip_suffix(unit)?.parse().ok()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        'w' => 7 * 86_400,
        _ => return None,
    };
    count.checked_mul(seconds).map(Duration::from_secs)
}
