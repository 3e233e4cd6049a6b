//! Meters and prices come as YAML lists or as tables: both give located rows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::de::DeserializeOwned;

use super::table::Table;
use crate::config::yaml::{self, Placed};
use crate::fault::configuration;

/// A row and the place where it stands.
pub(super) struct Located<T> {
    pub value: T,
    path: PathBuf,
    unit: &'static str,
    number: u64,
}

impl<T> Located<T> {
    pub fn place(&self) -> String {
        format!("{} {} {}", self.path.display(), self.unit, self.number)
    }

    /// A configuration fault at this row.
    pub fn error(&self, message: impl std::fmt::Display) -> anyhow::Error {
        configuration(format!("{}: {message}", self.place()))
    }
}

/// Reads `{key: [rows]}` from YAML, or a table whose `nested` columns hold JSON.
pub(super) fn read<T: DeserializeOwned>(path: &Path, key: &str, nested: &[&str]) -> Result<Vec<Located<T>>> {
    let is_yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    if is_yaml {
        return read_yaml(path, key);
    }
    let table = Table::read(path)?;
    let mut rows = Vec::new();
    for row in 0..table.height() {
        let value = serde_json::from_value(table.json_row(row, nested)?).map_err(|error| table.error(row, error))?;
        let (unit, number) = table.position(row);
        rows.push(Located { value, path: path.to_owned(), unit, number });
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
    let located = |row: Placed<T>| Located { number: row.defined.line(), value: row.value, path: path.to_owned(), unit: "line" };
    Ok(rows.into_iter().map(located).collect())
}
