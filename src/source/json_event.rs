//! One event as JSON: the standard fields, or CloudEvents. A line of a file and
//! the value of a message are read by the same rules.

use std::borrow::Cow;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::batch::{BatchBuilder, TextEvent};
use crate::model::columns::{ColumnMap, Field};
use crate::model::timestamp::Timestamp;

/// CloudEvents 1.0 attributes (JSON format) with the field that each one stands for.
/// Extension attributes are lower-case letters and digits, hence `tenantid`.
const CLOUD_EVENTS: [(&str, Field); 9] = [
    ("tenantid", Field::TenantId),
    // The specification makes source + id unique, so the source stands in for a tenant.
    ("source", Field::TenantId),
    ("type", Field::EventName),
    ("subject", Field::ExternalCustomerId),
    ("time", Field::Timestamp),
    ("ingestedat", Field::IngestedAt),
    (DATA, Field::Properties),
    ("data_base64", Field::Properties), // decoded first
    ("specversion", Field::Id),         // a mark only: its value is not used
];
const DATA: &str = "data";
const DATA_BASE64: usize = CLOUD_EVENTS.len() - 2;
const SPECVERSION: usize = CLOUD_EVENTS.len() - 1;

/// What holds for an event that does not say it itself.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Defaults<'d> {
    pub tenant_id: Option<&'d str>,
    pub ingested_at: Option<Timestamp>,
}

/// Reads events whose fields have the names of a column map.
pub(super) struct JsonEvents<'c> {
    columns: &'c ColumnMap,
    /// The keys to look for, in the order of [`Field::ALL`].
    names: [&'c str; 8],
    /// Fields, by their places, that have the key of an earlier one: what is read for that is theirs too.
    shared: Vec<(usize, usize)>,
}

/// The texts of an event's fields, in the order of [`Field::ALL`].
type Fields<'a> = [Option<Cow<'a, str>>; 8];

impl<'c> JsonEvents<'c> {
    pub fn new(columns: &'c ColumnMap) -> Self {
        let names = Field::ALL.map(|field| columns.name(field));
        let first = |(at, name): (usize, &&str)| Some((at, names.iter().position(|other| other == name)?));
        let shared = names.iter().enumerate().filter_map(first).filter(|(at, first)| first < at).collect();
        Self { columns, names, shared }
    }

    /// Adds the event in `text`. What is no JSON object becomes a problem of its row.
    pub fn push(&self, builder: &mut BatchBuilder, text: &[u8], defaults: Defaults<'_>, place: impl Fn() -> String) {
        match self.fields(text) {
            Ok(fields) => {
                let mut event = text_event(&fields);
                if event.tenant_id.is_none_or(str::is_empty) {
                    event.tenant_id = defaults.tenant_id.or(event.tenant_id);
                }
                builder.push_ingested(&event, defaults.ingested_at, place);
            }
            Err(error) => {
                let raw = String::from_utf8_lossy(text).into_owned();
                builder.push_unreadable(raw, format!("{}: {error}", place()));
            }
        }
    }

    /// The tenant and the id that a JSON object names.
    pub fn tenant_and_id<'a>(&self, text: &'a [u8]) -> Result<[Option<Cow<'a, str>>; 2], String> {
        self.fields(text).map(|[tenant_id, id, ..]| [tenant_id, id])
    }

    fn fields<'a>(&self, text: &'a [u8]) -> Result<Fields<'a>, String> {
        let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
        let mut found = Found::default();
        let mut reader = serde_json::Deserializer::from_str(text);
        ObjectReader { events: self, found: &mut found }
            .deserialize(&mut reader)
            .and_then(|()| reader.end())
            .map_err(|error| error.to_string())?;
        for (at, first) in &self.shared {
            let value = found.standard.get(*first).copied().flatten();
            found.standard.get_mut(*at).into_iter().for_each(|field| *field = value);
        }
        found.fields(self.columns)
    }
}

fn text_event<'f>(fields: &'f Fields<'_>) -> TextEvent<'f> {
    let [tenant_id, id, event_name, external_customer_id, timestamp, ingested_at, properties, deleted] =
        fields.each_ref().map(|field| field.as_deref());
    TextEvent { tenant_id, id, event_name, external_customer_id, timestamp, ingested_at, properties, deleted }
}

/// The raw values of one object.
#[derive(Default)]
struct Found<'a> {
    standard: [Option<&'a RawValue>; 8],
    cloud_event: [Option<&'a RawValue>; CLOUD_EVENTS.len()],
}

impl<'a> Found<'a> {
    /// The texts of all fields.
    fn fields(&self, columns: &ColumnMap) -> Result<Fields<'a>, String> {
        let is_cloud_event = self.cloud_event.get(SPECVERSION).is_some_and(Option::is_some);
        let mut fields: Fields<'a> = Default::default();
        for ((text, raw), field) in fields.iter_mut().zip(self.standard).zip(Field::ALL) {
            let raw = raw.or_else(|| {
                let attributes = CLOUD_EVENTS.iter().zip(self.cloud_event).take(DATA_BASE64);
                let mut found = attributes.filter(|((_, of), raw)| *of == field && raw.is_some()).map(|(_, raw)| raw);
                (is_cloud_event && !columns.is_mapped(field)).then(|| found.next().flatten()).flatten()
            });
            *text = match raw {
                Some(raw) => field_text(field, raw.get()).map_err(|error| format!("{} {error}", columns.name(field)))?,
                None => None,
            };
        }
        let encoded = self.cloud_event.get(DATA_BASE64).copied().flatten().filter(|raw| is_cloud_event && raw.get() != "null");
        if let Some(encoded) = encoded {
            let [.., properties, _] = &mut fields;
            let [.., own, _] = self.standard;
            if columns.name(Field::Properties) == DATA || (own.is_none() && !columns.is_mapped(Field::Properties)) {
                let json = if properties.is_some() { Err("stands beside `data`: keep one".into()) } else { decoded(encoded) };
                // What is no object becomes a dead letter where a meter wants the event, and shows this text.
                let unusable = |problem| serde_json::Value::from(format!("data_base64 {problem}")).to_string();
                *properties = Some(Cow::Owned(json.unwrap_or_else(unusable)));
            }
        }
        Ok(fields)
    }
}

/// The JSON text in base64.
fn decoded(raw: &RawValue) -> Result<String, String> {
    let text = field_text(Field::Id, raw.get())?.unwrap_or_default();
    let bytes = STANDARD.decode(text.as_bytes()).map_err(|error| format!("is no base64: {error}"))?;
    let json = String::from_utf8(bytes).ok().filter(|json| json == "null" || json.trim_start().starts_with('{'));
    json.ok_or_else(|| "holds no JSON object: send the usage as JSON in `data`".to_owned())
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

struct ObjectReader<'e, 'f, 'a> {
    events: &'e JsonEvents<'e>,
    found: &'f mut Found<'a>,
}

impl<'a> DeserializeSeed<'a> for ObjectReader<'_, '_, 'a> {
    type Value = ();
    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'a> Visitor<'a> for ObjectReader<'_, '_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object with one event")
    }

    fn visit_map<M: MapAccess<'a>>(self, mut map: M) -> Result<(), M::Error> {
        while let Some((standard, cloud_event)) = map.next_key_seed(KeyReader(self.events))? {
            let standard = standard.and_then(|at| self.found.standard.get_mut(at));
            let cloud_event = cloud_event.and_then(|at| self.found.cloud_event.get_mut(at));
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
struct KeyReader<'e>(&'e JsonEvents<'e>);

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
