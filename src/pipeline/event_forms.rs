//! An event in other forms: as bytes for digests, as JSON for people.

use super::enrich::Value;
use crate::model::digest::frame;
use crate::model::properties::write_json_text;
use crate::model::timestamp::Timestamp;
use crate::source::EventRef;

/// What an event contributes to a window, for the window's digest: which event,
/// when, and the value. A re-sent copy that changes none of them changes nothing.
pub fn contribution<'b>(event: &EventRef<'_>, t: Timestamp, value: &Value<'_>, bytes: &'b mut Vec<u8>) -> &'b [u8] {
    bytes.clear();
    frame(bytes, event.tenant_id.map(str::as_bytes));
    frame(bytes, event.id.map(str::as_bytes));
    bytes.extend_from_slice(&t.nanos().to_le_bytes());
    match value {
        Value::Event => bytes.push(0),
        Value::Number(number) => bytes.extend_from_slice(&number.to_le_bytes()),
        Value::Distinct(text) => bytes.extend_from_slice(text.as_bytes()),
        Value::Operation { text, is_add } => {
            bytes.push(u8::from(*is_add));
            bytes.extend_from_slice(text.as_bytes());
        }
    }
    bytes
}

/// The event as JSON, for people and for retries.
pub fn event_json(event: &EventRef<'_>, raw: Option<&str>) -> String {
    let mut json = String::from("{");
    let mut field = |name: &str, write: &mut dyn FnMut(&mut String)| {
        if json.len() > 1 {
            json.push(',');
        }
        write_json_text(name, &mut json);
        json.push(':');
        write(&mut json);
    };
    if let Some(raw) = raw {
        field("raw", &mut |json| write_json_text(raw, json));
    }
    let texts = [
        ("tenant_id", event.tenant_id.map(str::to_owned)),
        ("id", event.id.map(str::to_owned)),
        ("event_name", event.event_name.map(str::to_owned)),
        ("external_customer_id", event.external_customer_id.map(str::to_owned)),
        ("timestamp", event.timestamp.map(|t| t.to_string())),
        ("ingested_at", event.ingested_at.map(|t| t.to_string())),
    ];
    for (name, text) in &texts {
        if let Some(text) = text {
            field(name, &mut |json| write_json_text(text, json));
        }
    }
    if let Some(properties) = event.properties {
        let is_json = serde_json::from_str::<serde::de::IgnoredAny>(properties).is_ok();
        field("properties", &mut |json| if is_json { json.push_str(properties) } else { write_json_text(properties, json) });
    }
    json.push('}');
    json
}
