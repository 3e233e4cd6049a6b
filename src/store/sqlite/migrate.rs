//! Versioned migrations: `sql/sqlite/NNNN_name.sql`, each applied once, in order.

use std::path::Path;

use anyhow::{Context, Result, bail};
use rusqlite::Connection;

/// Every migration; the version of a store is how many of them it has.
const MIGRATIONS: [&str; 2] =
    [include_str!("../../../sql/sqlite/0001_initial.sql"), include_str!("../../../sql/sqlite/0002_ledger.sql")];

/// Marks a SQLite file as ours ("TRUE" in ASCII).
const APPLICATION_ID: i64 = 0x5452_5545;

fn version(connection: &Connection) -> Result<usize> {
    let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    usize::try_from(version).context("negative user_version")
}

/// The version of the store; 0 for an empty file.
///
/// # Errors
/// Where the file is no store of ours, or newer than this program.
pub(super) fn check_version(connection: &Connection, path: &Path) -> Result<usize> {
    let found = version(connection).with_context(|| format!("store {}: this is no SQLite database", path.display()))?;
    let unreadable = || format!("store {}: cannot be read", path.display());
    let application: i64 = connection.pragma_query_value(None, "application_id", |row| row.get(0)).with_context(unreadable)?;
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).with_context(unreadable)?;
    if tables > 0 && application != APPLICATION_ID {
        bail!("store {}: this SQLite database belongs to another program; name another file in store.path", path.display());
    }
    if found > MIGRATIONS.len() {
        bail!(
            "store {}: written by a newer trueup (schema version {found}, this one knows {}); upgrade trueup",
            path.display(),
            MIGRATIONS.len()
        );
    }
    Ok(found)
}

/// Applies what is missing, all in one transaction.
pub(super) fn migrate(connection: &mut Connection, path: &Path) -> Result<()> {
    // Two programs may open a new store at once: the second one waits here.
    let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let found = check_version(&transaction, path)?;
    for migration in MIGRATIONS.iter().skip(found) {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", i64::try_from(MIGRATIONS.len())?)?;
    transaction.commit()?;
    Ok(())
}
