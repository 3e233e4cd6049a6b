//! The value of one property of an event: a slice of its JSON text, so that numbers keep
//! every digit.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::value::RawValue;

use super::decimal::{Decimal, DecimalError};

/// The value of one property.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Property<'a> {
    #[default]
    Absent,
    Null,
    Text(Cow<'a, str>),
    /// The digits as written.
    Number(&'a str),
    Bool(bool),
    /// An object or array, as written.
    Composite(&'a str),
}

impl<'a> Property<'a> {
    /// A JSON value as written, known to be valid.
    #[inline]
    pub(super) fn from_raw(raw: &'a str) -> Property<'a> {
        match raw.as_bytes().first() {
            Some(b'"') => Property::Text(unquote(raw)),
            Some(b'n') => Property::Null,
            Some(b't') => Property::Bool(true),
            Some(b'f') => Property::Bool(false),
            Some(b'{' | b'[') => Property::Composite(raw),
            _ => Property::Number(raw),
        }
    }

    /// Neither absent nor null.
    pub fn is_present(&self) -> bool {
        !matches!(self, Property::Absent | Property::Null)
    }

    /// The number: a JSON number, or text that holds one.
    ///
    /// # Errors
    /// [`DecimalError`] for anything else, and for numbers out of range.
    pub fn decimal(&self) -> Result<Decimal, DecimalError> {
        match self {
            Property::Number(text) => text.parse(),
            Property::Text(text) => text.trim().parse(),
            Property::Absent | Property::Null | Property::Bool(_) | Property::Composite(_) => Err(DecimalError::Syntax),
        }
    }

    /// How the number relates to a bound; `None` where it is none. A number of too many
    /// digits lies beyond every bound, on the side of its sign.
    pub fn compare(&self, bound: Decimal) -> Option<Ordering> {
        match self.decimal() {
            Ok(value) => Some(value.cmp(&bound)),
            Err(DecimalError::Overflow) if self.text().trim_start().starts_with('-') => Some(Ordering::Less),
            Err(DecimalError::Overflow) => Some(Ordering::Greater),
            Err(DecimalError::Syntax) => None,
        }
    }

    /// The value as plain text: text without its quotes, everything else in canonical form.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Property::Absent | Property::Null => Cow::Borrowed(""),
            Property::Text(text) => Cow::Borrowed(text),
            Property::Number(number) => canonical_number(number),
            Property::Bool(value) => Cow::Borrowed(if *value { "true" } else { "false" }),
            Property::Composite(raw) => Cow::Owned(canonical_composite(raw)),
        }
    }

    /// Appends the value as canonical JSON; absent is null.
    pub fn write_json(&self, out: &mut String) {
        match self {
            Property::Absent | Property::Null => out.push_str("null"),
            Property::Text(text) => write_json_text(text, out),
            Property::Number(number) => out.push_str(&canonical_number(number)),
            Property::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Property::Composite(raw) => Tree::parse(raw).write(out),
        }
    }
}

/// An object or array, known to be valid JSON, in canonical form.
fn canonical_composite(raw: &str) -> String {
    let mut out = String::new();
    Tree::parse(raw).write(&mut out);
    out
}

/// Whether an object or array is the one that `text` writes, in whatever way.
pub(super) fn is_composite(raw: &str, text: &str) -> bool {
    raw.as_bytes().first() == text.trim_start().as_bytes().first()
        && serde_json::from_str::<&RawValue>(text).is_ok_and(|text| canonical_composite(raw) == canonical_composite(text.get()))
}

/// Appends `text` as a JSON string.
pub fn write_json_text(text: &str, out: &mut String) {
    if text.bytes().all(|b| b >= 0x20 && b != b'"' && b != b'\\') {
        out.push('"');
        out.push_str(text);
        out.push('"');
    } else {
        let _ = write!(out, "{}", serde_json::Value::from(text));
    }
}

/// An object or array in parts. Neither reading nor writing recurses, so any depth
/// is fine, and numbers stay text, so every digit is kept.
#[derive(Debug, Default)]
struct Tree<'a> {
    nodes: Vec<TreeNode<'a>>,
}

#[derive(Debug)]
enum TreeNode<'a> {
    Scalar(&'a str),
    Array(Vec<usize>),
    /// By key, so that the order and the number of times it was written do not matter.
    Object(BTreeMap<Cow<'a, str>, usize>),
}

impl<'a> Tree<'a> {
    /// The parts of a text that is known to be valid JSON.
    fn parse(raw: &'a str) -> Tree<'a> {
        let mut tree = Tree::default();
        let mut open: Vec<usize> = Vec::new();
        let mut key = None;
        let mut rest = raw;
        while let Some((token, after)) = next_token(rest) {
            rest = after;
            let parent = open.last().copied().and_then(|at| tree.nodes.get_mut(at));
            if token.starts_with('"') && key.is_none() && matches!(parent, Some(TreeNode::Object(_))) {
                key = Some(unquote(token));
                continue;
            }
            if token == "}" || token == "]" {
                open.pop();
                continue;
            }
            let at = tree.nodes.len();
            match tree.nodes.get_mut(open.last().copied().unwrap_or(at)) {
                Some(TreeNode::Object(entries)) => {
                    entries.insert(key.take().unwrap_or_default(), at);
                }
                Some(TreeNode::Array(items)) => items.push(at),
                Some(TreeNode::Scalar(_)) | None => {}
            }
            let node = match token {
                "{" => TreeNode::Object(BTreeMap::new()),
                "[" => TreeNode::Array(Vec::new()),
                scalar => TreeNode::Scalar(scalar),
            };
            if !matches!(node, TreeNode::Scalar(_)) {
                open.push(at);
            }
            tree.nodes.push(node);
        }
        tree
    }

    fn write(&self, out: &mut String) {
        let mut tasks = vec![Task::Node(0)];
        while let Some(task) = tasks.pop() {
            let at = match task {
                Task::Text(text) => {
                    out.push_str(text);
                    continue;
                }
                Task::Key(key) => {
                    write_json_text(key, out);
                    out.push(':');
                    continue;
                }
                Task::Node(at) => at,
            };
            // What comes last is put on the stack first.
            match self.nodes.get(at) {
                Some(TreeNode::Scalar(raw)) => Property::from_raw(raw).write_json(out),
                Some(TreeNode::Array(items)) => {
                    out.push('[');
                    tasks.push(Task::Text("]"));
                    for (number, item) in items.iter().enumerate().rev() {
                        tasks.push(Task::Node(*item));
                        tasks.push(Task::Text(if number == 0 { "" } else { "," }));
                    }
                }
                Some(TreeNode::Object(entries)) => {
                    out.push('{');
                    tasks.push(Task::Text("}"));
                    for (number, (key, value)) in entries.iter().enumerate().rev() {
                        tasks.push(Task::Node(*value));
                        tasks.push(Task::Key(key));
                        tasks.push(Task::Text(if number == 0 { "" } else { "," }));
                    }
                }
                None => {}
            }
        }
    }
}

/// What is left to write.
enum Task<'t> {
    Text(&'t str),
    Key(&'t str),
    Node(usize),
}

/// The next bracket, string, number or word of valid JSON, and what follows it.
fn next_token(text: &str) -> Option<(&str, &str)> {
    let text = text.trim_start_matches([' ', '\t', '\r', '\n', ',', ':']);
    let length = match text.as_bytes().first()? {
        b'{' | b'}' | b'[' | b']' => 1,
        b'"' => {
            let mut escaped = false;
            let end = text.bytes().skip(1).position(|byte| {
                let is_end = byte == b'"' && !escaped;
                escaped = byte == b'\\' && !escaped;
                is_end
            });
            end.map_or(text.len(), |at| at + 2)
        }
        _ => text.find([',', ':', '}', ']', ' ', '\t', '\r', '\n']).unwrap_or(text.len()),
    };
    text.split_at_checked(length)
}

fn canonical_number(text: &str) -> Cow<'_, str> {
    // 1, 1.0 and 1e0 are one value; what no decimal holds stays as written.
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    match text.parse::<Decimal>() {
        Ok(value) if !plain => Cow::Owned(value.to_string()),
        _ => Cow::Borrowed(text),
    }
}

#[inline]
fn unquote(raw: &str) -> Cow<'_, str> {
    let inner = raw.get(1..raw.len().saturating_sub(1)).unwrap_or_default();
    if inner.contains('\\') {
        // The text was validated before; a lone surrogate is the one thing left to fail.
        serde_json::from_str(raw).map_or(Cow::Borrowed(inner), Cow::Owned)
    } else {
        Cow::Borrowed(inner)
    }
}
