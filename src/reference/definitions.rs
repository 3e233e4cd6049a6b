//! Meters and prices come as YAML lists or as tables: both give located rows.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::de::DeserializeOwned;

use super::table::Table;
use crate::config::ReferenceTable;
use crate::config::yaml::{self, Placed};
use crate::fault::configuration;

/// A row and the place where it stands.
pub(super) struct Located<T> {
    pub value: T,
    place: String,
}

impl<T> Located<T> {
    pub fn place(&self) -> &str {
        &self.place
    }

    /// A configuration fault at this row.
    pub fn error(&self, message: impl std::fmt::Display) -> anyhow::Error {
        configuration(format!("{}: {message}", self.place()))
    }
}

/// Reads `{key: [rows]}` from YAML, or a table whose `nested` columns hold JSON.
pub(super) fn read<T: DeserializeOwned>(table: &ReferenceTable, key: &str, nested: &[&str]) -> Result<Vec<Located<T>>> {
    if let ReferenceTable::File(path) = table
        && path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml")
    {
        return read_yaml(path, key);
    }
    let table = Table::read(table)?;
    let mut rows = Vec::new();
    for row in 0..table.height() {
        let value = serde_json::from_value(table.json_row(row, nested)?).map_err(|error| table.error(row, error))?;
        rows.push(Located { value, place: table.place(row) });
    }
    Ok(rows)
}

fn read_yaml<T: DeserializeOwned>(path: &Path, key: &str) -> Result<Vec<Located<T>>> {
    let mut lists: BTreeMap<String, Vec<Placed<T>>> = yaml::read(path)?;
    let rows = lists.remove(key);
    if let Some(other) = lists.keys().next() {
        return Err(configuration(format!("{}: unknown key `{other}`, expected `{key}`", path.display())));
    }
    let Some(rows) = rows else {
        return Err(configuration(format!("{}: has no list `{key}`", path.display())));
    };
    let located = |row: Placed<T>| {
        let place = format!("{} line {}", path.display(), row.defined.line());
        Located { value: row.value, place }
    };
    Ok(rows.into_iter().map(located).collect())
}
