//! An event in other forms: as bytes for digests, as JSON for people.

use xxhash_rust::xxh3::{xxh3_64_with_seed, xxh3_128, xxh3_128_with_seed};

use super::accumulator::Measured;
use crate::model::property::write_json_text;
use crate::model::timestamp::Timestamp;
use crate::source::EventRef;

/// Which event, and when: a hash.
pub fn identity(event: &EventRef<'_>, t: Timestamp) -> u128 {
    let tenant = xxh3_64_with_seed(event.tenant_id.unwrap_or_default().as_bytes(), t.nanos().cast_unsigned());
    xxh3_128_with_seed(event.id.unwrap_or_default().as_bytes(), tenant)
}

/// What an event contributes to a window, for the window's digest: which event, when, and
/// the value. A re-sent copy that changes none of them changes nothing.
pub fn contribution(identity: u128, value: &Measured<'_>) -> u128 {
    let with = |value: u128, kind: u64| {
        let mut bytes = [0; 32];
        // In halves, as they are in registers: the processor waits where it reads more at once
        // than was written at once.
        let halves = [identity, identity >> 64, value, value >> 64].map(|half| u64::try_from(half & u128::from(u64::MAX)));
        for (to, half) in bytes.chunks_exact_mut(8).zip(halves) {
            to.copy_from_slice(&half.unwrap_or_default().to_le_bytes());
        }
        xxh3_128_with_seed(&bytes, kind)
    };
    match *value {
        Measured::Event => identity,
        Measured::Number(number) => with(number.to_bits(), 0),
        Measured::Distinct(value) => with(value, 0),
        Measured::Text(text) => with(xxh3_128(text.as_bytes()), 0),
        Measured::Operation { value, is_add } => with(value, 1 + u64::from(is_add)),
    }
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
