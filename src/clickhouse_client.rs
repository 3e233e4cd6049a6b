//! The official ClickHouse client, behind blocking calls: the pipeline's threads
//! wait for it, retries and their limits are here.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clickhouse::Client;
use clickhouse::error::Error;
use serde_json::value::RawValue;
use tokio::runtime::Runtime;

use crate::config::ClickHouseConnection;

/// A database on a server.
#[derive(Clone)]
pub struct Database {
    client: Client,
    runtime: Arc<Runtime>,
    name: String,
}

/// Names of columns, and rows of text cells.
type Texts = (Vec<String>, Vec<Vec<Option<String>>>);

/// The columns of an answer.
#[derive(Debug, Default)]
pub struct Header {
    pub names: Vec<String>,
    /// As the server writes them: `Nullable(Float64)`.
    pub types: Vec<String>,
}

impl Database {
    /// Nothing is sent yet.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn connect(connection: &ClickHouseConnection) -> Result<Database> {
        let mut client = Client::default()
            .with_url(&connection.url)
            .with_database(&connection.database)
            .with_product_info("trueup", env!("CARGO_PKG_VERSION"));
        if let Some(user) = &connection.user {
            client = client.with_user(user);
        }
        if let Some(password) = &connection.password {
            client = client.with_password(password.reveal());
        }
        for (name, value) in &connection.settings {
            client = client.with_setting(name, value);
        }
        // Texts must read back as they were written, whatever the server's defaults.
        for (name, value) in [
            ("output_format_json_quote_decimals", "1"),
            ("output_format_json_quote_64bit_integers", "1"),
            ("date_time_input_format", "best_effort"),
            ("date_time_output_format", "iso"),
            // The answer to an insert must mean that the rows are there.
            ("async_insert", "0"),
        ] {
            client = client.with_setting(name, value);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Database { client, runtime: Arc::new(runtime), name: connection.database.clone() })
    }

    /// The database's name, quoted.
    pub fn quoted_name(&self) -> String {
        identifier(&self.name)
    }

    /// The same server, outside of any database that may not exist yet.
    #[must_use]
    pub fn clone_for_server(&self) -> Database {
        Database { client: self.client.clone().with_database("default"), ..self.clone() }
    }

    /// Creates the database.
    ///
    /// # Errors
    /// As [`Database::execute`].
    pub fn create_if_missing(&self) -> Result<()> {
        self.clone_for_server().execute(&format!("CREATE DATABASE IF NOT EXISTS {}", self.quoted_name()))
    }

    /// Runs a statement that gives no rows.
    ///
    /// # Errors
    /// Where the server refuses it, or cannot be reached after retries.
    pub fn execute(&self, sql: &str) -> Result<()> {
        self.retry(sql, || async { self.client.query_raw(sql).execute().await })
    }

    /// Reads all rows as text, with the names of the columns: for small answers.
    ///
    /// # Errors
    /// As [`Database::execute`].
    pub fn texts(&self, sql: &str) -> Result<Texts> {
        let (header, rows) = self.typed_texts(sql)?;
        Ok((header.names, rows))
    }

    /// As [`Database::texts`], with the types of the columns too.
    ///
    /// # Errors
    /// As [`Database::execute`].
    pub fn typed_texts(&self, sql: &str) -> Result<(Header, Vec<Vec<Option<String>>>)> {
        let mut rows = Vec::new();
        let header = self.typed_rows(sql, &mut |_, row| {
            rows.push(row);
            Ok(())
        })?;
        Ok((header, rows))
    }

    /// Reads rows as text, one at a time, with the names of the columns. Tries again only
    /// while no row was delivered.
    ///
    /// # Errors
    /// As [`Database::execute`]; where the answer breaks off, or `each` fails.
    pub fn rows(&self, sql: &str, each: RowSink<'_>) -> Result<Vec<String>> {
        self.typed_rows(sql, each).map(|header| header.names)
    }

    fn typed_rows(&self, sql: &str, each: RowSink<'_>) -> Result<Header> {
        let mut delivered = false;
        let mut pauses = PAUSES_MILLIS.iter();
        loop {
            let mut lines = Lines::default();
            let result = self.stream_once(sql, "JSONCompactEachRowWithNamesAndTypes", &mut |chunk| {
                lines.push(&chunk, &mut |names, row| {
                    delivered = true;
                    each(names, row)
                })
            });
            match result {
                Ok(()) => match (lines.finish(), pauses.next()) {
                    // Whatever it holds, an answer begins with its header.
                    (Err(error), Some(pause)) if !delivered => pause_after(&error, *pause),
                    (header, _) => return header,
                },
                Err(Broken::Stream(error)) => match pauses.next().filter(|_| !delivered && is_transient(&error)) {
                    Some(pause) => pause_after(&error, *pause),
                    None => return Err(explain(sql, error)),
                },
                Err(Broken::Sink(error)) => return Err(error),
            }
        }
    }

    /// Streams an answer chunk by chunk. There is no retry: what was delivered
    /// cannot be taken back.
    ///
    /// # Errors
    /// Where the stream fails at any point, or `each` does.
    pub fn stream(&self, sql: &str, format: &str, each: &mut dyn FnMut(bytes::Bytes) -> Result<()>) -> Result<()> {
        self.stream_once(sql, format, each).map_err(|broken| match broken {
            Broken::Stream(error) => explain(sql, error),
            Broken::Sink(error) => error,
        })
    }

    fn stream_once(
        &self,
        sql: &str,
        format: &str,
        each: &mut dyn FnMut(bytes::Bytes) -> Result<()>,
    ) -> std::result::Result<(), Broken> {
        let mut cursor = self.client.query_raw(sql).fetch_bytes(format).map_err(Broken::Stream)?;
        while let Some(chunk) = self.runtime.block_on(cursor.next()).map_err(Broken::Stream)? {
            each(chunk).map_err(Broken::Sink)?;
        }
        Ok(())
    }

    /// Inserts rows in one of the server's formats. `token` makes a repetition of
    /// the same insert harmless.
    ///
    /// # Errors
    /// As [`Database::execute`].
    pub fn insert(&self, sql: &str, token: &str, data: &bytes::Bytes) -> Result<()> {
        self.retry(sql, || async {
            let mut insert = self
                .client
                .insert_formatted_with(sql.to_owned())
                .with_setting("insert_deduplication_token", token)
                .with_setting("insert_deduplicate", "1");
            insert.send(data.clone()).await?;
            insert.end().await
        })
    }

    /// Tries again what may pass: network trouble, an overloaded server.
    fn retry<T, F: Future<Output = std::result::Result<T, Error>>>(&self, sql: &str, work: impl Fn() -> F) -> Result<T> {
        let mut pauses = PAUSES_MILLIS.iter();
        loop {
            match self.runtime.block_on(work()) {
                Ok(result) => return Ok(result),
                Err(error) => match pauses.next().filter(|_| is_transient(&error)) {
                    Some(pause) => pause_after(&error, *pause),
                    None => return Err(explain(sql, error)),
                },
            }
        }
    }
}

/// Between attempts.
const PAUSES_MILLIS: [u64; 4] = [200, 800, 2_000, 5_000];

fn pause_after(error: &dyn std::fmt::Display, millis: u64) {
    tracing::warn!(%error, pause_ms = millis, "ClickHouse: trying again");
    std::thread::sleep(Duration::from_millis(millis));
}

/// Why a stream ended early.
enum Broken {
    Stream(Error),
    Sink(anyhow::Error),
}

/// Takes the cells of a row, with the names of the columns.
pub type RowSink<'s> = &'s mut dyn FnMut(&[String], Vec<Option<String>>) -> Result<()>;

/// Cuts chunks of an answer into rows; only what a chunk leaves unfinished is kept.
#[derive(Default)]
struct Lines {
    names: Option<Vec<String>>,
    types: Option<Vec<String>>,
    rest: Vec<u8>,
}

impl Lines {
    fn push(&mut self, chunk: &[u8], each: RowSink<'_>) -> Result<()> {
        self.rest.extend_from_slice(chunk);
        let rest = std::mem::take(&mut self.rest);
        let mut lines = rest.as_slice();
        // JSON escapes line breaks within texts.
        while let Some((line, after)) = lines.iter().position(|byte| *byte == b'\n').and_then(|at| lines.split_at_checked(at)) {
            lines = after.get(1..).unwrap_or_default();
            self.line(line, each)?;
        }
        self.rest = lines.to_vec();
        Ok(())
    }

    fn line(&mut self, line: &[u8], each: RowSink<'_>) -> Result<()> {
        let damaged = "the server's answer is damaged";
        let texts = || serde_json::from_slice::<Vec<String>>(line).context(damaged);
        match &self.names {
            None => self.names = Some(texts()?),
            Some(_) if self.types.is_none() => self.types = Some(texts()?),
            Some(names) => {
                let cells: Vec<&RawValue> = serde_json::from_slice(line).context(damaged)?;
                each(names, cells.into_iter().map(cell).collect::<Result<_>>().context(damaged)?)?;
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<Header> {
        if !self.rest.trim_ascii().is_empty() {
            return Err(anyhow!("the server's answer broke off within a row"));
        }
        let (Some(names), Some(types)) = (self.names, self.types) else {
            return Err(anyhow!("the server's answer is empty: not even the names of its columns came"));
        };
        Ok(Header { names, types })
    }
}

/// The text of a cell; `None` for NULL.
fn cell(raw: &RawValue) -> Result<Option<String>> {
    Ok(match raw.get().as_bytes().first() {
        Some(b'n') => None,
        Some(b'"') => Some(serde_json::from_str(raw.get())?),
        _ => Some(raw.get().to_owned()),
    })
}

/// A server's error says its code in its text: `Code: 60. DB::Exception: …`.
fn error_code(error: &Error) -> Option<u32> {
    let Error::BadResponse(text) = error else { return None };
    let (_, rest) = text.split_once("Code: ")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// HTTP 500 stands for final errors too: the server's own code decides.
fn is_transient(error: &Error) -> bool {
    // 159 timeout, 202 too many queries, 209/210 network, 241 memory, 242 read-only
    // table, 252 too many parts, 285 too few replicas, 999 Keeper.
    const TRANSIENT: [u32; 9] = [159, 202, 209, 210, 241, 242, 252, 285, 999];
    match error {
        Error::Network(_) | Error::TimedOut => true,
        error => error_code(error).is_some_and(|code| TRANSIENT.contains(&code)),
    }
}

fn explain(sql: &str, error: Error) -> anyhow::Error {
    let start: String = sql.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(120).collect();
    match error_code(&error) {
        Some(516) => anyhow!("ClickHouse refused user or password: check connections.clickhouse ({error})"),
        Some(60) => anyhow!("ClickHouse knows no such table: `{start}…`: {error}"),
        None if matches!(error, Error::Network(_) | Error::TimedOut) => {
            let remedy = "is it running, and is connections.clickhouse.url right?";
            anyhow::Error::new(error).context(format!("ClickHouse did not answer `{start}…`: {remedy}"))
        }
        _ => anyhow::Error::new(error).context(format!("ClickHouse: `{start}…`")),
    }
}

/// An identifier, quoted.
pub fn identifier(name: &str) -> String {
    format!("`{}`", name.replace('\\', "\\\\").replace('`', "\\`"))
}

/// A text literal, quoted.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}
