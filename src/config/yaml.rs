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
    serde_saphyr::from_str_with_options(text, options).map_err(|error| configuration(located(path, text, &error)))
}

/// The lines, from 1, that may hold secrets: those of `connections`.
fn secret_lines(text: &str) -> Vec<usize> {
    let mut is_secret = false;
    let lines = (1..).zip(text.lines()).filter(|(_, line)| {
        // A key at the margin begins something else.
        if line.starts_with(|c: char| !c.is_whitespace() && c != '#') {
            is_secret = line.starts_with("connections");
        }
        is_secret
    });
    lines.map(|(number, _)| number).collect()
}

/// A line of an excerpt; the one that says where it is says so by the whole line, which the excerpt
/// may have cut.
fn pointing_at(place: &str, line: &str) -> String {
    match line.split_once("-->") {
        Some((indent, rest)) if rest.trim_start().starts_with("<input>") => format!("{indent}--> {place}"),
        _ => line.to_owned(),
    }
}

/// `file:line:column: what is wrong`, then the excerpt under the file's own name.
fn located(path: &Path, text: &str, error: &serde_saphyr::Error) -> String {
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
    let secrets = secret_lines(text);
    let is_shown = |line: &&str| {
        let number = line.split_once('|').and_then(|(number, _)| number.trim().parse().ok());
        number.is_none_or(|number| !secrets.contains(&number))
    };
    let excerpt: String = excerpt.filter(is_shown).map(|line| format!("\n{}", pointing_at(&place, line))).collect();
    let said = format!("{place}: {message}{excerpt}");
    // What the reader says to programmers, for people.
    let words = [
        (", set DuplicateKeyPolicy in Options if acceptable", ": it must stand once"),
        ("cannot deserialize null into string; use Option<String>", "a text is missing here"),
        (
            "use from_str_multiple or from_str_multiple_with_options",
            "a file holds one document: remove what stands after the line `---`",
        ),
        ("invalid u32", "this must be a whole number from 0 on"),
        ("invalid u64", "this must be a whole number from 0 on"),
    ];
    words.into_iter().fold(said, |said, (theirs, ours)| said.replace(theirs, ours))
}
