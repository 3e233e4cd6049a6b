//! NDJSON: one event a line, with the standard fields or as CloudEvents JSON.

use std::borrow::Cow;
use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::columns::{ColumnMap, Field};
use crate::source::batch::TextEvent;
use crate::source::{BatchBuilder, EventBatch};

/// Reads all lines. A line that is no JSON object becomes a problem of its row.
pub(super) fn read(
    path: &Path,
    input: Box<dyn Read>,
    columns: &ColumnMap,
    sink: &mut dyn FnMut(&EventBatch) -> Result<()>,
) -> Result<()> {
    let keys = Keys::new(columns);
    let mut input = BufReader::with_capacity(256 * 1024, input);
    let mut builder = BatchBuilder::default();
    let mut line = Vec::new();
    for number in 1u64.. {
        line.clear();
        let read = input
            .read_until(b'\n', &mut line)
            .with_context(|| format!("events file {} breaks off after line {}", path.display(), number - 1))?;
        if read == 0 {
            break;
        }
        let line = if number == 1 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&line) } else { &line };
        push_line(&mut builder, &keys, line, || format!("{} line {number}", path.display()));
        if builder.is_full() {
            sink(&builder.finish())?;
        }
    }
    sink(&builder.finish())
}

fn push_line(builder: &mut BatchBuilder, keys: &Keys<'_>, line: &[u8], place: impl Fn() -> String) {
    let line = line.trim_ascii();
    if line.is_empty() {
        return;
    }
    let mut parsed = Line::default();
    let result = std::str::from_utf8(line).map_err(|error| error.to_string()).and_then(|text| {
        let mut reader = serde_json::Deserializer::from_str(text);
        LineReader { keys, line: &mut parsed }
            .deserialize(&mut reader)
            .and_then(|()| reader.end())
            .map_err(|error| error.to_string())
    });
    match result.and_then(|()| parsed.fields(keys.columns)) {
        Ok(fields) => builder.push(&text_event(&fields), place),
        Err(error) => {
            let raw = String::from_utf8_lossy(line).into_owned();
            builder.push_unreadable(raw, format!("{}: {error}", place()));
        }
    }
}

fn text_event<'f>(fields: &'f [Option<Cow<'_, str>>; 8]) -> TextEvent<'f> {
    let [tenant_id, id, event_name, external_customer_id, timestamp, ingested_at, properties, deleted] =
        fields.each_ref().map(|field| field.as_deref());
    TextEvent { tenant_id, id, event_name, external_customer_id, timestamp, ingested_at, properties, deleted }
}

/// CloudEvents 1.0 attributes (JSON format) with the field that each one stands for.
/// Extension attributes are lower-case letters and digits, hence `tenantid`.
const CLOUD_EVENTS: [(&str, Field); 8] = [
    ("tenantid", Field::TenantId),
    // The specification makes source + id unique, so the source stands in for a tenant.
    ("source", Field::TenantId),
    ("type", Field::EventName),
    ("subject", Field::ExternalCustomerId),
    ("time", Field::Timestamp),
    ("ingestedat", Field::IngestedAt),
    ("data", Field::Properties),
    ("specversion", Field::Id), // a mark only: its value is not used
];
const SPECVERSION: usize = CLOUD_EVENTS.len() - 1;

/// The keys to look for in a line.
struct Keys<'c> {
    columns: &'c ColumnMap,
    names: [&'c str; 8],
}

impl<'c> Keys<'c> {
    fn new(columns: &'c ColumnMap) -> Self {
        Self { columns, names: Field::ALL.map(|field| columns.name(field)) }
    }
}

/// The raw values of one line.
#[derive(Default)]
struct Line<'a> {
    standard: [Option<&'a RawValue>; 8],
    cloud_event: [Option<&'a RawValue>; CLOUD_EVENTS.len()],
}

impl<'a> Line<'a> {
    /// The texts of all fields, in the order of [`Field::ALL`].
    fn fields(&self, columns: &ColumnMap) -> Result<[Option<Cow<'a, str>>; 8], String> {
        let is_cloud_event = self.cloud_event.get(SPECVERSION).is_some_and(Option::is_some);
        let mut fields: [Option<Cow<'a, str>>; 8] = Default::default();
        for ((text, raw), field) in fields.iter_mut().zip(self.standard).zip(Field::ALL) {
            let raw = raw.or_else(|| {
                let attributes = CLOUD_EVENTS.iter().zip(self.cloud_event).take(SPECVERSION);
                let mut found = attributes.filter(|((_, of), raw)| *of == field && raw.is_some()).map(|(_, raw)| raw);
                (is_cloud_event && !columns.is_mapped(field)).then(|| found.next().flatten()).flatten()
            });
            *text = match raw {
                Some(raw) => field_text(field, raw.get()).map_err(|error| format!("{} {error}", columns.name(field)))?,
                None => None,
            };
        }
        Ok(fields)
    }
}

/// The text of a field: strings without quotes, numbers as written, properties as JSON.
fn field_text(field: Field, raw: &str) -> Result<Option<Cow<'_, str>>, String> {
    match raw.as_bytes().first() {
        Some(b'n') => Ok(None),
        Some(b'"') => {
            let inner = raw.get(1..raw.len() - 1).unwrap_or_default();
            if inner.contains('\\') {
                serde_json::from_str(raw).map(|text| Some(Cow::Owned(text))).map_err(|error| error.to_string())
            } else {
                Ok(Some(Cow::Borrowed(inner)))
            }
        }
        Some(b'{') if field == Field::Properties => Ok(Some(Cow::Borrowed(raw))),
        Some(b'{' | b'[') => Err("is an object or array where a text is expected".to_owned()),
        _ => Ok(Some(Cow::Borrowed(raw))),
    }
}

struct LineReader<'k, 'l, 'a> {
    keys: &'k Keys<'k>,
    line: &'l mut Line<'a>,
}

impl<'a> DeserializeSeed<'a> for LineReader<'_, '_, 'a> {
    type Value = ();
    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for LineReader<'_, '_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object with one event")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<(), M::Error> {
        while let Some((standard, cloud_event)) = map.next_key_seed(KeyReader(self.keys))? {
            let standard = standard.and_then(|at| self.line.standard.get_mut(at));
            let cloud_event = cloud_event.and_then(|at| self.line.cloud_event.get_mut(at));
            if standard.is_none() && cloud_event.is_none() {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let raw: &'a RawValue = map.next_value()?;
            for slot in [standard, cloud_event].into_iter().flatten() {
                *slot = Some(raw);
            }
        }
        Ok(())
    }
}

/// The places of a key among the standard fields and the CloudEvents attributes.
struct KeyReader<'k>(&'k Keys<'k>);

impl<'a> DeserializeSeed<'a> for KeyReader<'_> {
    type Value = (Option<usize>, Option<usize>);
    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyReader<'_> {
    type Value = (Option<usize>, Option<usize>);
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }
    fn visit_str<E>(self, key: &str) -> Result<Self::Value, E> {
        let standard = self.0.names.iter().position(|name| *name == key);
        Ok((standard, CLOUD_EVENTS.iter().position(|(name, _)| *name == key)))
    }
}
