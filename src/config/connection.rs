//! Connections: from `platform.yaml` beside the job, then `environments/<name>.yaml`,
//! then the job itself; what comes later wins, key by key.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;

use super::yaml;
use crate::fault::configuration;

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for the one place that needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A ClickHouse server, over HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClickHouseConnection {
    pub url: String,
    pub user: Option<String>,
    pub password: Option<Secret>,
    pub database: String,
    pub settings: BTreeMap<String, String>,
}

/// A Kafka cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KafkaConnection {
    pub brokers: String,
    /// librdkafka's own properties, for example `security.protocol`.
    pub properties: BTreeMap<String, Secret>,
}

/// `connections:` as people write it, in any of the three places.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConnections {
    clickhouse: Option<RawClickHouse>,
    kafka: Option<RawKafka>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawClickHouse {
    url: Option<String>,
    user: Option<String>,
    password: Option<String>,
    database: Option<String>,
    #[serde(default)]
    settings: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawKafka {
    brokers: Option<String>,
    #[serde(default)]
    properties: BTreeMap<String, String>,
}

/// A file that holds connections alone.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPlatform {
    #[serde(default)]
    connections: RawConnections,
}

/// The connections of a job, layered, secrets not yet looked up.
#[derive(Debug, Clone)]
pub struct Connections<'p> {
    job: &'p Path,
    raw: RawConnections,
}

impl<'p> Connections<'p> {
    /// Layers the connections for the job file at `job`.
    ///
    /// # Errors
    /// Where a file cannot be read, or the named environment does not exist.
    pub fn load(job: &'p Path, environment: Option<&str>, own: Option<RawConnections>) -> Result<Self> {
        let folder = job.parent().unwrap_or(Path::new(""));
        let platform = folder.join("platform.yaml");
        let mut raw = RawConnections::default();
        if platform.exists() {
            raw.merge(yaml::read::<RawPlatform>(&platform)?.connections);
        }
        if let Some(name) = environment {
            let path = folder.join("environments").join(format!("{name}.yaml"));
            if !path.exists() {
                return Err(configuration(format!("environment `{name}`: {} does not exist", path.display())));
            }
            raw.merge(yaml::read::<RawPlatform>(&path)?.connections);
        }
        raw.merge(own.unwrap_or_default());
        Ok(Connections { job, raw })
    }

    /// # Errors
    /// Where no layer gives a URL, or a secret cannot be looked up.
    pub fn clickhouse(&self) -> Result<ClickHouseConnection> {
        let raw = self.raw.clickhouse.clone().unwrap_or_default();
        let url = raw.url.ok_or_else(|| self.missing("clickhouse", "url", "http://localhost:8123"))?;
        let settings = raw.settings.iter().map(|(name, value)| Ok((name.clone(), self.expand(name, value)?)));
        Ok(ClickHouseConnection {
            url: self.expand("url", &url)?,
            user: raw.user.as_deref().map(|user| self.expand("user", user)).transpose()?,
            password: raw.password.as_deref().map(|password| self.expand("password", password).map(Secret)).transpose()?,
            database: self.expand("database", raw.database.as_deref().unwrap_or("default"))?,
            settings: settings.collect::<Result<_>>()?,
        })
    }

    /// # Errors
    /// Where no layer gives brokers, or a secret cannot be looked up.
    pub fn kafka(&self) -> Result<KafkaConnection> {
        let raw = self.raw.kafka.clone().unwrap_or_default();
        let brokers = raw.brokers.ok_or_else(|| self.missing("kafka", "brokers", "localhost:9092"))?;
        let properties = raw.properties.iter().map(|(name, value)| Ok((name.clone(), Secret(self.expand(name, value)?))));
        Ok(KafkaConnection { brokers: self.expand("brokers", &brokers)?, properties: properties.collect::<Result<_>>()? })
    }

    fn missing(&self, connection: &str, key: &str, example: &str) -> anyhow::Error {
        let folder = self.job.parent().unwrap_or(Path::new(""));
        configuration(format!(
            "{}: connections.{connection}.{key} is not set: add it here or to {} (for example {example})",
            self.job.display(),
            folder.join("platform.yaml").display()
        ))
    }

    /// Replaces `${env:NAME}`, `${env:NAME:-default}` and `${file:path}`. What `key` is set to may
    /// be a secret: errors do not tell it.
    #[allow(clippy::disallowed_methods)]
    fn expand(&self, key: &str, text: &str) -> Result<String> {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            let (reference, after) = after.split_once('}').ok_or_else(|| {
                configuration(format!("{}: `{key}` of a connection has `${{` without `}}`", self.job.display()))
            })?;
            out.push_str(before);
            out.push_str(&match reference.split_once(':') {
                Some(("env", name)) => {
                    let (name, default) = name.split_once(":-").map_or((name, None), |(name, default)| (name, Some(default)));
                    let value = std::env::var(name).ok().or_else(|| default.map(str::to_owned));
                    value.ok_or_else(|| {
                        configuration(format!("{}: the environment variable {name} is not set", self.job.display()))
                    })?
                }
                Some(("file", path)) => {
                    let path = self.job.parent().unwrap_or(Path::new("")).join(path);
                    let content = std::fs::read_to_string(&path);
                    let content = content.map_err(|error| configuration(format!("secret file {}: {error}", path.display())))?;
                    content.trim_end_matches(['\r', '\n']).to_owned()
                }
                _ => {
                    // What is a reference as a whole is no secret itself.
                    let is_reference = reference.contains(':') && text.len() == reference.len() + "${}".len();
                    let shown = if is_reference { text } else { "${…}" };
                    return Err(configuration(format!(
                        "{}: `{key}` of a connection: `{shown}` is unknown: use ${{env:NAME}} or ${{file:path}}",
                        self.job.display()
                    )));
                }
            });
            rest = after;
        }
        out.push_str(rest);
        Ok(out)
    }
}

impl RawConnections {
    fn merge(&mut self, later: RawConnections) {
        if let Some(later) = later.clickhouse {
            let ours = self.clickhouse.get_or_insert_default();
            replace(&mut ours.url, later.url);
            replace(&mut ours.user, later.user);
            replace(&mut ours.password, later.password);
            replace(&mut ours.database, later.database);
            ours.settings.extend(later.settings);
        }
        if let Some(later) = later.kafka {
            let ours = self.kafka.get_or_insert_default();
            replace(&mut ours.brokers, later.brokers);
            ours.properties.extend(later.properties);
        }
    }
}

fn replace<T>(ours: &mut Option<T>, later: Option<T>) {
    if later.is_some() {
        *ours = later;
    }
}

/// Who runs the program, and where: `ann@host`.
#[allow(clippy::disallowed_methods)]
pub fn operator() -> String {
    let named = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let user = named("USER").or_else(|| named("LOGNAME")).unwrap_or_else(|| "unknown".to_owned());
    let read = |path: &str| std::fs::read_to_string(path).ok().map(|name| name.trim().to_owned()).filter(|name| !name.is_empty());
    let host = read("/proc/sys/kernel/hostname").or_else(|| named("HOSTNAME")).or_else(|| read("/etc/hostname"));
    format!("{user}@{}", host.unwrap_or_else(|| "unknown".to_owned()))
}

/// The environment to layer in, where the command line names none.
#[allow(clippy::disallowed_methods)]
pub fn default_environment() -> Option<String> {
    std::env::var("TRUEUP_ENVIRONMENT").ok().filter(|name| !name.is_empty())
}
