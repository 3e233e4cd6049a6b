//! What people and programs read on stdout.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};

use anyhow::Result;
use serde::Serialize;

/// Writes a result to stdout. A reader that went away is no error.
///
/// # Errors
/// Where stdout cannot be written for another reason.
pub fn emit(text: &str) -> Result<()> {
    emit_bytes(text.as_bytes())
}

/// As [`emit`], for bytes.
///
/// # Errors
/// As [`emit`].
pub fn emit_bytes(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(anyhow::Error::new(error).context("what was done stands, but its report cannot be written to standard output"))
        }
        _ => Ok(()),
    }
}

/// Writes one JSON document.
///
/// # Errors
/// As [`emit`].
pub fn emit_json(document: &impl Serialize) -> Result<()> {
    emit(&(serde_json::to_string_pretty(document)? + "\n"))
}

/// Writes an error with its causes to stderr.
pub fn report_error(error: &anyhow::Error) {
    let style = Style::for_stream(std::io::stderr().is_terminal());
    let _ = writeln!(std::io::stderr(), "{} {error:#}", style.red("error:"));
}

/// Colours, where they are wanted.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// For results on stdout.
    pub fn for_stdout() -> Self {
        Self::for_stream(std::io::stdout().is_terminal())
    }

    fn for_stream(is_terminal: bool) -> Self {
        Style { colour: is_terminal && !crate::config::no_color() }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    pub fn red(self, text: &str) -> String {
        self.paint("31", text)
    }

    pub fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }
}

/// A whole number with separators: 12,345.
pub fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 row`, `2 rows`.
pub fn counted(value: u64, noun: &str) -> String {
    format!("{} {noun}{}", number(value), if value == 1 { "" } else { "s" })
}

/// Aligned columns; the ones in `right` to the right.
pub fn table(header: &[&str], rows: &[Vec<String>], right: &[usize], style: Style) -> String {
    let rows: Vec<Vec<_>> = rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[Cow<'_, str>]| {
        let mut line = String::new();
        for (at, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width.saturating_sub(cell.chars().count()));
            let _ = if right.contains(&at) { write!(line, "{pad}{cell}  ") } else { write!(line, "{cell}{pad}  ") };
        }
        line.trim_end().to_owned()
    };
    let header: Vec<_> = header.iter().map(|cell| Cow::Borrowed(*cell)).collect();
    let mut out = style.dim(&line(&header)) + "\n";
    for row in &rows {
        out.push_str(&line(row));
        out.push('\n');
    }
    out
}

/// A text of somebody else's on one line: what would move the cursor or colour the terminal is
/// written out.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let written = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(written).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_separators() {
        let shown = [0, 999, 1000, 1_234_567].map(number);
        assert_eq!(shown, ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn texts_of_others_cannot_steer_a_terminal() {
        assert_eq!(printable("\x1b[31mr\nö"), "\\u{1b}[31mr\\nö");
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [vec!["a".to_owned(), "10".to_owned()], vec!["long".to_owned(), "1".to_owned()]];
        assert_eq!(table(&["name", "rows"], &rows, &[1], Style { colour: false }), "name  rows\na       10\nlong     1\n");
    }
}
