//! Reading chosen properties out of an event's JSON text.
//!
//! The text is walked once and validated as a whole; only the wanted values are
//! kept, as slices of the text itself, so numbers keep every digit. A scanner of
//! our own takes the common texts; whatever it does not understand, or finds
//! wrong, serde_json reads again: it alone decides what is refused, and says why.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::json_scanner::{Node, Scanner};
use super::property::Property;

/// The properties to read from the events of one name: slot `i` holds path `i`.
#[derive(Debug, Clone, Default)]
pub struct PropertyPlan {
    paths: Vec<String>,
    root: Node,
    /// How many nodes have children.
    parents: u32,
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
            if node.children.is_empty() {
                node.bit = 1 << self.parents.min(63);
                self.parents += 1;
            }
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
            child.clear_below(self.slots);
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
    fn of_a_parent_that_repeats_the_last_counts() {
        let mut plan = PropertyPlan::default();
        for path in ["u.o", "u.i.d", "u"] {
            plan.slot(path);
        }
        let object = |raw| Property::Composite(raw);
        let one = || Property::Number("1");
        for (text, expected) in [
            (r#"{"u":{"o":1},"u":{"i":2}}"#, [Property::Absent, Property::Absent, object(r#"{"i":2}"#)]),
            (r#"{"u":{"o":1,"i":{"d":1}},"u":1}"#, [Property::Absent, Property::Absent, one()]),
            (r#"{"u":{"o":2,"i":{"d":1},"i":[]},"x":{"o":3}}"#, {
                [Property::Number("2"), Property::Absent, object(r#"{"o":2,"i":{"d":1},"i":[]}"#)]
            }),
            (r#"{"u":{"o":1,"i":{"d":3}},"u":{"o":1,"i":{"x":1}}}"#, [one(), Property::Absent, object(r#"{"o":1,"i":{"x":1}}"#)]),
            (r#"{"u":null,"u":{"i":{"d":2},"o":2,"i":{"d":1}}}"#, {
                [Property::Number("2"), one(), object(r#"{"i":{"d":2},"o":2,"i":{"d":1}}"#)]
            }),
        ] {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            plan.read(Some(text), &mut ours).unwrap();
            plan.read_with_serde(text, &mut theirs).unwrap();
            assert_eq!((ours.as_slice(), theirs.as_slice()), (expected.as_slice(), expected.as_slice()), "{text}");
        }
        // More parents than have a bit of their own.
        let mut plan = PropertyPlan::default();
        let paths: Vec<_> = (0..100).map(|n| format!("p{n}.q")).collect();
        let objects: Vec<_> = (0..100).map(|n| format!(r#""p{n}":{{"q":{n}}}"#)).collect();
        for path in &paths {
            plan.slot(path);
        }
        let text = format!(r#"{{{},"p99":{{}},"p7":{{}}}}"#, objects.join(","));
        let mut slots = Vec::new();
        plan.read(Some(&text), &mut slots).unwrap();
        let absent: Vec<_> = (0..100).filter(|n| slots[*n] == Property::Absent).collect();
        assert_eq!((absent, slots[98].text()), (vec![7, 99], "98".into()));
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
