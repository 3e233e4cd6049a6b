//! YAML files with errors that point at the line.

use std::path::Path;

use anyhow::Result;
use serde::de::DeserializeOwned;

use crate::fault::configuration;

/// A value with the place where it is written.
pub type Placed<T> = serde_saphyr::Spanned<T>;

/// Reads a whole YAML file.
///
/// # Errors
/// A configuration fault with the file, the line and an excerpt.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        std::fs::read_to_string(path).map_err(|error| configuration(format!("cannot read {}: {error}", path.display())))?;
    serde_saphyr::from_str(&text).map_err(|error| {
        let line = error.location().map_or(String::new(), |location| format!(":{}", location.line()));
        configuration(format!("{}{line}: {}", path.display(), error.render().trim_end()))
    })
}
