//! Who may write a job's rows, in a store that many machines reach.
//!
//! A lease lasts five minutes by the server's clock, the only one that counts, and is renewed while
//! its holder works. Who finds the lease of somebody else gives up, unless it has expired, or its
//! holder is known to be dead: a process of this boot of this machine that is there no more.
//!
//! The server has no compare-and-set. One statement looks whether the last row is still the one
//! that was seen, and inserts the next; whoever sent it waits a moment, reads again, and yields to
//! a greater row. Versions count changes in their upper half and have bits of the holder in the
//! lower: those of two holders differ, and merges keep the row that wins.
//!
//! What remains: of two such statements that the server runs at the same time, one lasts longer than
//! the wait; or the table is replicated, and the replicas are apart for so long. Then there are two
//! holders until one looks again: at the latest before it marks its run as publishing.

use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::clickhouse_client::{Database, literal};
use crate::clock::{self, Stopwatch};
use crate::config::operator;
use crate::fault::{FaultKind, fault};
use crate::model::timestamp::Timestamp;

/// How long a lease lasts that is not renewed, in seconds.
const LASTS: u32 = 300;

/// The age in seconds at which a lease is renewed.
const RENEWED_AT: u32 = 100;

/// Until a statement that was under way when ours began is done.
const SETTLING: Duration = Duration::from_millis(100);

/// The columns of `leases` that are read, in the order of [`Row`].
const COLUMNS: &str = "holder, host, boot, process, process_start, what, since, expires_at, version";

/// Does work that only the holder of the job's lease may do, and releases the lease however it ends.
///
/// # Errors
/// A lock fault (exit code 6) that names the holder of the lease; whatever the work could not do.
pub(super) fn hold<T>(database: &Database, job: &str, what: &str, work: impl FnOnce(&mut Lease<'_>) -> Result<T>) -> Result<T> {
    let mut lease = Lease::take(database, job, what)?;
    let result = work(&mut lease);
    lease.release();
    result
}

/// Fails where somebody else holds the job's lease.
///
/// # Errors
/// A lock fault (exit code 6) that names the holder; where the store cannot be read.
pub(super) fn check(database: &Database, job: &str) -> Result<()> {
    match Row::last(database, job)? {
        Some(row) if row.is_held(&Process::this()) => Err(row.refusal(job)),
        _ => Ok(()),
    }
}

/// The right to write a job's rows.
pub(super) struct Lease<'d> {
    pub database: &'d Database,
    pub job: &'d str,
    holder: uuid::Uuid,
    version: u64,
    age: Age,
}

impl<'d> Lease<'d> {
    fn take(database: &'d Database, job: &'d str, what: &str) -> Result<Lease<'d>> {
        let this = Process::this();
        let last = Row::last(database, job)?;
        if let Some(row) = &last {
            if row.is_held(&this) {
                return Err(row.refusal(job));
            }
            if row.is_active {
                tracing::warn!(process = row.process, row.what, "taking over the lease of a process that is no more");
            }
        }
        let seen = last.map_or(0, |row| row.version);
        let age = Age::none();
        let now = u64::try_from(clock::now().nanos() / 1_000_000_000).unwrap_or_default();
        let holder = uuid::Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, now, 0));
        let lease = Lease { database, job, holder, version: version_after(seen, holder), age };
        let texts = [job, &holder.to_string(), &this.host, &this.boot].map(literal).join(", ");
        let sql = format!(
            "INSERT INTO leases (job, {COLUMNS}) SELECT {texts}, {}, {}, {}, now64(3), now64(3) + INTERVAL {LASTS} SECOND, {} \
             WHERE (SELECT ifNull(max(version), 0) FROM leases WHERE job = {}) = {seen}",
            this.id,
            this.start,
            literal(what),
            lease.version,
            literal(job)
        );
        database.execute(&sql).context("taking the lease")?;
        std::thread::sleep(SETTLING);
        match lease.other()? {
            None => Ok(lease),
            Some(Some(row)) => Err(row.refusal(job)),
            Some(None) => Err(anyhow!("the lease of job {job} was not written: are rows of table leases deleted?")),
        }
    }

    /// Renews the lease once a good part of its time has passed.
    ///
    /// # Errors
    /// Where somebody else has taken it over.
    pub fn keep(&mut self) -> Result<()> {
        if !self.age.is_over(RENEWED_AT) {
            return Ok(());
        }
        let age = Age::none();
        self.change(&format!("now64(3) + INTERVAL {LASTS} SECOND")).context("renewing the lease")?;
        self.look()?;
        self.age = age;
        Ok(())
    }

    /// As [`Lease::keep`], and looks at once.
    ///
    /// # Errors
    /// Where somebody else has taken it over.
    pub fn confirm(&mut self) -> Result<()> {
        self.keep()?;
        self.look()
    }

    fn look(&self) -> Result<()> {
        let Some(row) = self.other()? else { return Ok(()) };
        let by = row.map_or_else(|| "nobody".to_owned(), |row| row.to_string());
        Err(anyhow!("the lease of job {} was taken over meanwhile ({by})", self.job))
    }

    /// The row that counts, if it is not of this lease; `Some(None)` where there is none.
    fn other(&self) -> Result<Option<Option<Row>>> {
        let last = Row::last(self.database, self.job)?;
        let is_own = last.as_ref().is_some_and(|row| row.holder == self.holder.to_string());
        Ok((!is_own).then_some(last))
    }

    /// Another end, if the lease is still this one.
    fn change(&mut self, expires_at: &str) -> Result<()> {
        let job = literal(self.job);
        let next = version_after(self.version, self.holder);
        // Sent again because its answer was lost, it finds its own row, and does nothing.
        let sql = format!(
            "INSERT INTO leases SELECT * REPLACE ({expires_at} AS expires_at, {next} AS version) \
             FROM (SELECT * FROM (SELECT * FROM leases WHERE job = {job} ORDER BY version DESC LIMIT 1) \
             WHERE version = {} AND holder = '{}')",
            self.version, self.holder
        );
        self.database.execute(&sql)?;
        self.version = next;
        Ok(())
    }

    fn release(mut self) {
        if let Err(error) = self.change("now64(3)") {
            tracing::warn!(job = self.job, "the lease could not be released, and stays until it expires: {error:#}");
        }
    }
}

fn version_after(version: u64, holder: uuid::Uuid) -> u64 {
    let bits = u32::try_from(holder.as_u128() & u128::from(u32::MAX)).unwrap_or_default();
    ((version >> 32).saturating_add(1) << 32) | u64::from(bits)
}

/// How long ago something was: by whichever clock of this machine says longer, as one stands still
/// while the machine sleeps, and the other may be set.
struct Age(Stopwatch, Timestamp);

impl Age {
    fn none() -> Self {
        Age(Stopwatch::start(), clock::now())
    }

    fn is_over(&self, seconds: u32) -> bool {
        let passed = clock::now().nanos().abs_diff(self.1.nanos());
        self.0.seconds() > f64::from(seconds) || passed / 1_000_000_000 > seconds.into()
    }
}

/// The row of `leases` that counts.
struct Row {
    holder: String,
    host: String,
    boot: String,
    process: String,
    process_start: String,
    what: String,
    since: String,
    expires_at: String,
    version: u64,
    is_active: bool,
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} on host {}, {}, since {}", self.process, self.host, self.what, instant(&self.since))
    }
}

/// As people read it: without a fraction of zeros.
fn instant(text: &str) -> String {
    text.parse::<Timestamp>().map_or_else(|_| text.to_owned(), |instant| instant.to_string())
}

impl Row {
    fn last(database: &Database, job: &str) -> Result<Option<Row>> {
        let sql = format!(
            "SELECT {COLUMNS}, expires_at > now64(3) FROM leases WHERE job = {} ORDER BY version DESC LIMIT 1",
            literal(job)
        );
        let (_, rows) = database.texts(&sql).context("reading the lease")?;
        let Some(row) = rows.into_iter().next() else { return Ok(None) };
        let cells: Vec<_> = row.into_iter().map(Option::unwrap_or_default).collect();
        let cells: [String; 10] = cells.try_into().map_err(|_| anyhow!("reading the lease: columns are missing"))?;
        let [holder, host, boot, process, process_start, what, since, expires_at, version, active] = cells;
        let version = version.parse().with_context(|| format!("reading the lease: version `{version}`"))?;
        let is_active = active == "1";
        Ok(Some(Row { holder, host, boot, process, process_start, what, since, expires_at, version, is_active }))
    }

    /// Whether a process other than `this` holds the lease, as far as `this` can know.
    fn is_held(&self, this: &Process) -> bool {
        self.is_active && !self.holder_is_gone(this)
    }

    /// A process has one lease at a time: its own is one that it could not release.
    fn holder_is_gone(&self, this: &Process) -> bool {
        let is_near = !this.boot.is_empty() && self.boot == this.boot && self.host == this.host;
        let is_this = self.process == this.id.to_string() && self.process_start == this.start.to_string();
        let is_alive = || match start_of(&self.process) {
            Found::Started(start) => self.process_start == start.to_string(),
            Found::Nothing => false,
            Found::Unknown => true,
        };
        is_near && (is_this || !is_alive())
    }

    fn refusal(&self, job: &str) -> anyhow::Error {
        let message = format!(
            "the store of job {job} is being written ({self}); wait until that is done: \
             its lease ends at {} unless it is renewed",
            instant(&self.expires_at)
        );
        fault(FaultKind::LockHeld, message)
    }
}

/// A process, as others on its machine know it.
struct Process {
    host: String,
    /// As in `leases`.
    boot: String,
    id: u32,
    start: u64,
}

impl Process {
    fn this() -> Self {
        let operator = operator();
        let host = operator.rsplit_once('@').map_or(&*operator, |(_, host)| host).to_owned();
        let id = std::process::id();
        let start = match start_of(&id.to_string()) {
            Found::Started(start) => Some(start),
            _ => None,
        };
        let boot = start.and_then(|_| boot(id)).unwrap_or_default();
        Process { host, boot, id, start: start.unwrap_or_default() }
    }
}

/// What must be the same for one process to see whether another one lives: containers share a boot,
/// but not their numbers of processes, and those of other users may be hidden.
fn boot(process: u32) -> Option<String> {
    // The numbers must be those that /proc tells.
    if std::fs::read_link("/proc/self").ok()?.to_str()? != process.to_string() {
        return None;
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let namespace = std::fs::read_link("/proc/self/ns/pid").ok()?;
    let user = std::fs::metadata("/proc/self").ok()?.uid();
    Some(format!("{} {} user:{user}", boot.trim(), namespace.to_str()?))
}

enum Found {
    /// A process that lives, and when it started, in ticks since the boot.
    Started(u64),
    Nothing,
    Unknown,
}

fn start_of(process: &str) -> Found {
    /// The system's answer where a process ends while it is looked at.
    const NO_SUCH_PROCESS: i32 = 3;
    let stat = match std::fs::read_to_string(format!("/proc/{process}/stat")) {
        Ok(stat) => stat,
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(NO_SUCH_PROCESS) => {
            return Found::Nothing;
        }
        Err(_) => return Found::Unknown,
    };
    // The name, in parentheses, may hold anything; the state is the field behind it, the start the 20th.
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
    match (fields.next(), fields.nth(18).and_then(|start| start.parse().ok())) {
        (Some("Z" | "X"), _) => Found::Nothing,
        (_, Some(start)) => Found::Started(start),
        _ => Found::Unknown,
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use super::*;
    use crate::config::ClickHouseConnection;

    #[test]
    fn another_start_is_another_process() {
        let this = Process::this();
        let row = |process: &str, start: u64, boot: &str| Row {
            holder: "somebody".to_owned(),
            host: this.host.clone(),
            boot: boot.to_owned(),
            process: process.to_owned(),
            process_start: start.to_string(),
            what: String::new(),
            since: String::new(),
            expires_at: String::new(),
            version: 1,
            is_active: true,
        };
        let Found::Started(parent) = start_of(&std::os::unix::process::parent_id().to_string()) else { return };
        let parent_id = std::os::unix::process::parent_id().to_string();
        assert!(row(&parent_id, parent, &this.boot).is_held(&this));
        assert!(!row(&parent_id, parent + 1, &this.boot).is_held(&this));
        assert!(!row(&this.id.to_string(), this.start, &this.boot).is_held(&this));
        assert!(!row("4000000000", 1, &this.boot).is_held(&this));
        // Where it cannot be known.
        assert!(row("4000000000", 1, "").is_held(&this));
        assert!(row("4000000000", 1, "another boot").is_held(&Process { boot: String::new(), ..Process::this() }));
    }

    #[test]
    fn a_lease_is_renewed_until_it_is_taken_over() {
        let Ok(url) = std::env::var("TRUEUP_TEST_CLICKHOUSE_URL") else {
            assert!(std::env::var_os("TRUEUP_TEST_REQUIRE_SERVICES").is_none(), "TRUEUP_TEST_CLICKHOUSE_URL is not set");
            let why = b"skipped: TRUEUP_TEST_CLICKHOUSE_URL is not set (tests/run starts a server)\n";
            return std::io::Write::write_all(&mut std::io::stderr(), why).unwrap();
        };
        let name = format!("trueup_lease_{}", std::process::id());
        let connection =
            ClickHouseConnection { url, user: None, password: None, database: name.clone(), settings: Default::default() };
        let database = Database::connect(&connection).unwrap();
        database.create_if_missing().unwrap();
        for statement in super::super::statements(include_str!("../../../sql/clickhouse/0003_lease.sql")) {
            database.execute(&statement).unwrap();
        }
        let last = || Row::last(&database, "it's").unwrap().unwrap();
        let mut lease = Lease::take(&database, "it's", "testing").unwrap();
        let first = last();
        lease.keep().unwrap();
        assert_eq!(last().version, first.version);
        // Long ago by one clock, or by the other.
        for nanos in [-200_000_000_000, 200_000_000_000] {
            lease.age.1 = Timestamp::from_nanos(clock::now().nanos() + nanos);
            let before = last();
            lease.keep().unwrap();
            let after = last();
            assert!(after.version > before.version && after.expires_at > before.expires_at && after.since == first.since);
            assert!(!lease.age.is_over(RENEWED_AT));
        }
        // Sent twice, a change is made once.
        let version = lease.version;
        lease.change("now64(3) + INTERVAL 300 SECOND").unwrap();
        let renewed = last();
        lease.version = version;
        lease.change("now64(3) + INTERVAL 300 SECOND").unwrap();
        assert_eq!(last().expires_at, renewed.expires_at);
        lease.confirm().unwrap();
        // Somebody else takes it, and keeps it.
        database
            .execute(
                "INSERT INTO leases SELECT * REPLACE ('stranger' AS holder, 'elsewhere' AS host, '' AS boot, \
                 version + 4294967296 AS version) FROM (SELECT * FROM leases ORDER BY version DESC LIMIT 1)",
            )
            .unwrap();
        assert!(lease.confirm().unwrap_err().to_string().contains("host elsewhere"));
        lease.age.1 = Timestamp::from_nanos(0);
        assert!(lease.keep().is_err());
        lease.release();
        assert_eq!(last().holder, "stranger");
        assert_eq!(crate::fault::exit_code(&check(&database, "it's").unwrap_err()), 6);
        check(&database, "another").unwrap();
        database.execute(&format!("DROP DATABASE {name} SYNC")).unwrap();
    }
}
