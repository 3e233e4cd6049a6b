//! Reading chosen properties out of an event's JSON text.
//!
//! The text is walked once and validated as a whole; only the wanted values are
//! kept, as slices of the text itself, so numbers keep every digit. A scanner of
//! our own takes the common texts; whatever it does not understand, or finds
//! wrong, serde_json reads again: it alone decides what is refused, and says why.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::decimal::{Decimal, DecimalError};
use super::json_scanner::Scanner;

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

    /// The value as plain text: text without its quotes, numbers in canonical form.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Property::Absent | Property::Null => Cow::Borrowed(""),
            Property::Text(text) => Cow::Borrowed(text),
            Property::Number(number) => canonical_number(number),
            Property::Bool(value) => Cow::Borrowed(if *value { "true" } else { "false" }),
            Property::Composite(raw) => Cow::Borrowed(raw),
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

fn unquote(raw: &str) -> Cow<'_, str> {
    let inner = raw.get(1..raw.len().saturating_sub(1)).unwrap_or_default();
    if inner.contains('\\') {
        // The text was validated before; a lone surrogate is the one thing left to fail.
        serde_json::from_str(raw).map_or(Cow::Borrowed(inner), Cow::Owned)
    } else {
        Cow::Borrowed(inner)
    }
}

/// The properties to read from the events of one name: slot `i` holds path `i`.
#[derive(Debug, Clone, Default)]
pub struct PropertyPlan {
    paths: Vec<String>,
    root: Node,
}

/// A step of the wanted paths.
#[derive(Debug, Clone, Default)]
pub(super) struct Node {
    pub children: Vec<(String, Node)>,
    /// The slot whose path ends here.
    pub slot: Option<usize>,
}

impl Node {
    /// The wanted property of this name.
    pub fn child(&self, key: &str) -> Option<&Node> {
        self.children.iter().find(|(name, _)| name == key).map(|(_, node)| node)
    }
}

impl PropertyPlan {
    /// The slot of `path` (`usage.output_tokens`, or the same with a leading `$.`).
    pub fn slot(&mut self, path: &str) -> usize {
        let path = path.strip_prefix("$.").unwrap_or(path);
        if let Some(slot) = self.paths.iter().position(|known| known == path) {
            return slot;
        }
        let slot = self.paths.len();
        self.paths.push(path.to_owned());
        let mut node = &mut self.root;
        for key in path.split('.') {
            let at = node.children.iter().position(|(name, _)| name == key).unwrap_or_else(|| {
                node.children.push((key.to_owned(), Node::default()));
                node.children.len() - 1
            });
            node = match node.children.get_mut(at) {
                Some((_, child)) => child,
                None => return slot,
            };
        }
        node.slot = Some(slot);
        slot
    }

    /// Reads every slot; of a key that repeats, the last counts.
    ///
    /// # Errors
    /// Where the text is no JSON object.
    pub fn read<'a>(&self, json: Option<&'a str>, slots: &mut Vec<Property<'a>>) -> Result<(), serde_json::Error> {
        slots.clear();
        slots.resize(self.paths.len(), Property::Absent);
        let Some(json) = json.filter(|text| !text.is_empty() && *text != "null") else { return Ok(()) };
        if Scanner::new(json).properties(&self.root, slots).is_some() {
            return Ok(());
        }
        self.read_with_serde(json, slots)
    }

    fn read_with_serde<'a>(&self, json: &'a str, slots: &mut Vec<Property<'a>>) -> Result<(), serde_json::Error> {
        slots.clear();
        slots.resize(self.paths.len(), Property::Absent);
        let mut reader = serde_json::Deserializer::from_str(json);
        Walk { node: &self.root, slots }.deserialize(&mut reader)?;
        reader.end()
    }
}

struct Walk<'p, 's, 'a> {
    node: &'p Node,
    slots: &'s mut Vec<Property<'a>>,
}

impl<'a> DeserializeSeed<'a> for Walk<'_, '_, 'a> {
    type Value = ();
    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for Walk<'_, '_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object of properties")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<(), M::Error> {
        while let Some(child) = map.next_key_seed(Key(self.node))? {
            let Some(child) = child else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            let raw: &'a RawValue = map.next_value()?;
            if let Some(slot) = child.slot.and_then(|slot| self.slots.get_mut(slot)) {
                *slot = Property::from_raw(raw.get());
            }
            if !child.children.is_empty() && raw.get().starts_with('{') {
                let inner = Walk { node: child, slots: &mut *self.slots };
                inner.deserialize(&mut serde_json::Deserializer::from_str(raw.get())).map_err(serde::de::Error::custom)?;
            }
        }
        Ok(())
    }
}

/// Looks a key up among a node's children.
struct Key<'p>(&'p Node);

impl<'p, 'a> DeserializeSeed<'a> for Key<'p> {
    type Value = Option<&'p Node>;
    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'p> Visitor<'_> for Key<'p> {
    type Value = Option<&'p Node>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }
    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        Ok(self.0.child(key))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Texts of JSON's own characters, from sound to broken.
    fn json_like() -> impl Strategy<Value = String> {
        let word = proptest::sample::select(vec![
            "{",
            "}",
            "[",
            "]",
            ":",
            ",",
            "\"",
            "\"a\"",
            "\"b\":",
            "\"a\":",
            "{\"a\":",
            ",\"b\":",
            "1",
            "-0.5e+3",
            "01",
            "1.",
            "-",
            "1e",
            "true",
            "null",
            "fals",
            " ",
            "\n",
            "\t",
            "\"é\\n\"",
            "\"\\ud800\"",
            "\"\\u00zz\"",
            "\"\\q\"",
            "\u{1}",
            "\"\u{1}\"",
            "\"long text beyond eight bytes\"",
            "\"\\u0061\":",
            "{}",
            "[]",
            "[1,{\"a\":2}]",
            "x",
            "\u{feff}",
            "\\",
        ]);
        proptest::collection::vec(word, 0..12).prop_map(|words| words.concat())
    }

    /// Sound objects whose texts may be damaged at one place.
    fn damaged() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            ".{0,20}".prop_map(Into::into),
        ];
        let value = leaf.prop_recursive(3, 20, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                proptest::collection::btree_map("a|b|.{0,10}", inner, 0..4)
                    .prop_map(|entries| serde_json::Value::Object(entries.into_iter().collect())),
            ]
        });
        (value, any::<prop::sample::Index>(), any::<bool>(), "[ -~]?").prop_map(|(value, at, damage, replacement)| {
            let text = serde_json::json!({"a": value, "b": {"a": 1.5, "c": [value]}}).to_string();
            let place = text.char_indices().nth(at.index(text.chars().count()));
            match place.filter(|_| damage) {
                Some((at, old)) => {
                    let (before, rest) = text.split_at(at);
                    [before, &replacement, rest.strip_prefix(old).unwrap()].concat()
                }
                None => text,
            }
        })
    }

    proptest! {
        #[test]
        fn reads_as_serde_json_does(text in prop_oneof![json_like(), json_like().prop_map(|text| format!("{{{text}}}")), damaged()]) {
            let mut plan = PropertyPlan::default();
            for path in ["a", "b", "b.a", "b.c.a", "é"] {
                plan.slot(path);
            }
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            let expected = plan.read_with_serde(&text, &mut theirs).map_err(|error| error.to_string());
            let text = Some(text.as_str()).filter(|text| !text.is_empty() && *text != "null");
            prop_assume!(text.is_some());
            let read = plan.read(text, &mut ours).map_err(|error| error.to_string());
            prop_assert_eq!(&read, &expected);
            if read.is_ok() {
                prop_assert_eq!(ours, theirs);
            }
        }
    }

    #[test]
    fn reads_nested_paths_and_keeps_every_digit() {
        let mut plan = PropertyPlan::default();
        let slots = ["tokens", "usage.out", "$.model", "gone", "usage"].map(|path| plan.slot(path));
        assert_eq!(slots, [0, 1, 2, 3, 4]);
        assert_eq!(plan.slot("tokens"), 0);
        let mut read = Vec::new();
        let text = r#"{"tokens": 0.1000000000000000000001, "other": [1, {"tokens": 3}], "usage": {"out": 12}, "model": "a\"b"}"#;
        plan.read(Some(text), &mut read).unwrap();
        assert_eq!(read[0], Property::Number("0.1000000000000000000001"));
        assert_eq!(read[1], Property::Number("12"));
        assert_eq!(read[2].text(), "a\"b");
        assert_eq!(read[3], Property::Absent);
        assert_eq!(read[4], Property::Composite(r#"{"out": 12}"#));
    }

    #[test]
    fn the_whole_text_is_validated() {
        let mut plan = PropertyPlan::default();
        plan.slot("a");
        let mut slots = Vec::new();
        for bad in ["[1]", "7", r#"{"a": 1, oops"#, r#"{"a": 1} x"#, r#"{"a": 01}"#] {
            assert!(plan.read(Some(bad), &mut slots).is_err(), "{bad}");
        }
        for empty in [None, Some(""), Some("null"), Some("{}")] {
            plan.read(empty, &mut slots).unwrap();
            assert_eq!(slots, [Property::Absent]);
        }
    }

    #[test]
    fn canonical_json() {
        let mut out = String::new();
        for property in [Property::Number("1.50"), Property::Text("é\n".into()), Property::Absent, Property::Bool(true)] {
            property.write_json(&mut out);
            out.push(' ');
        }
        assert_eq!(out, "1.5 \"é\\n\" null true ");
    }

    #[test]
    fn composites_are_canonical_and_keep_every_digit() {
        let canonical = |raw: &str| {
            let mut out = String::new();
            Property::from_raw(raw).write_json(&mut out);
            out
        };
        for (raw, expected) in [
            ("[ ]", "[]"),
            ("{ }", "{}"),
            ("[1.50, 1e2,-0, true ,null,\"x\"]", r#"[1.5,100,0,true,null,"x"]"#),
            ("[12345678901234567890.123456789012345678]", "[12345678901234567890.123456789012345678]"),
            ("[1e999, 1e998]", "[1e999,1e998]"),
            (
                r#"{"b": {"d": [], "c": 1}, "a\u0062": "\u00e9\"}", "a": [{}, [2]]}"#,
                r#"{"a":[{},[2]],"ab":"é\"}","b":{"c":1,"d":[]}}"#,
            ),
            (r#"{"a": 1, "a": 2}"#, r#"{"a":2}"#),
            (r#"{"": "a,b:]", "\\": "\\"}"#, r#"{"":"a,b:]","\\":"\\"}"#),
        ] {
            assert_eq!(canonical(raw), expected, "{raw}");
        }
        assert_ne!(canonical(r#"["\ud800"]"#), canonical(r#"["\ud801"]"#), "lone surrogates are different values");
        let deep = "[".repeat(200_000) + &"]".repeat(200_000);
        assert_eq!(canonical(&deep), deep);
    }
}
