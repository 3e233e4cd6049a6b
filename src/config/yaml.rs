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
    parse(&text, path)
}

/// Reads YAML that people know as the file `path`.
///
/// # Errors
/// As [`read`].
pub fn parse<T: DeserializeOwned>(text: &str, path: &Path) -> Result<T> {
    // `match: {country: NO}` is no boolean.
    let options = serde_saphyr::options! { strict_booleans: true };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| configuration(located(path, &error)))
}

/// `file:line:column: what is wrong`, then the excerpt under the file's own name.
fn located(path: &Path, error: &serde_saphyr::Error) -> String {
    let rendered = error.render();
    let (first, excerpt) = rendered.trim_end().split_once('\n').unwrap_or((rendered.trim_end(), ""));
    let mut message = first.strip_prefix("error: ").unwrap_or(first);
    let mut place = path.display().to_string();
    if let Some(location) = error.location() {
        let (line, column) = (location.line(), location.column());
        message = message.strip_prefix(&format!("line {line} column {column}: ")).unwrap_or(message);
        place = format!("{place}:{line}:{column}");
    }
    // The caret alone: what it says stands in the first line.
    let excerpt = excerpt.lines().map(|line| line.strip_suffix(message).unwrap_or(line).trim_end());
    let excerpt: String = excerpt.map(|line| format!("\n{}", line.replace("<input>", &path.display().to_string()))).collect();
    format!("{place}: {message}{excerpt}")
}
