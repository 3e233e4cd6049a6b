//! Events in columns, a batch at a time.

use arrow::array::{
    Array, BooleanArray, BooleanBuilder, Int32Array, Int64Array, Int64Builder, StringArray, StringBuilder, StringViewArray,
};

use crate::model::property::write_json_text;
use crate::model::timestamp::Timestamp;

/// Rows a reader puts into one batch.
pub const BATCH_ROWS: usize = 8192;

/// A batch of events. Every column has one entry a row; instants are nanoseconds.
#[derive(Debug)]
pub struct EventBatch {
    pub tenant_id: Texts,
    pub id: Texts,
    pub event_name: Texts,
    pub external_customer_id: Texts,
    pub timestamp: Int64Array,
    pub ingested_at: Int64Array,
    pub properties: Texts,
    pub deleted: BooleanArray,
    /// Rows with something wrong, in order.
    pub problems: Vec<Problem>,
}

/// A column of text in the layout that its source delivers: none is copied into another.
#[derive(Debug)]
pub enum Texts {
    Plain(StringArray),
    /// Slices of the source's own buffers.
    Views(StringViewArray),
    /// A few values that repeat, and each row's place among them.
    Dictionary {
        keys: Int32Array,
        values: StringArray,
    },
}

impl Texts {
    /// A column of nulls.
    pub fn nulls(rows: usize) -> Self {
        Texts::Plain(StringArray::new_null(rows))
    }

    pub fn len(&self) -> usize {
        match self {
            Texts::Plain(texts) => texts.len(),
            Texts::Views(texts) => texts.len(),
            Texts::Dictionary { keys, .. } => keys.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[inline]
    pub fn get(&self, row: usize) -> Option<&str> {
        match self {
            Texts::Plain(texts) => (!texts.is_null(row)).then(|| texts.value(row)),
            Texts::Views(texts) => (!texts.is_null(row)).then(|| texts.value(row)),
            Texts::Dictionary { keys, values } => {
                let key = usize::try_from(keys.value(row)).ok().filter(|_| !keys.is_null(row))?;
                (!values.is_null(key)).then(|| values.value(key))
            }
        }
    }

    /// Whether some row has no text, or none to speak of.
    pub fn has_gaps(&self) -> bool {
        match self {
            Texts::Plain(texts) => texts.null_count() > 0 || texts.iter().any(|text| text == Some("")),
            Texts::Views(texts) => texts.null_count() > 0 || texts.lengths().any(|length| length == 0),
            Texts::Dictionary { keys, values } => {
                keys.null_count() > 0 || values.null_count() > 0 || values.iter().any(|text| text == Some(""))
            }
        }
    }
}

impl From<StringArray> for Texts {
    fn from(texts: StringArray) -> Self {
        Texts::Plain(texts)
    }
}

/// Why a row is no event.
#[derive(Debug, Clone)]
pub struct Problem {
    pub row: usize,
    /// Names the file, the line or row, and what is wrong.
    pub detail: String,
    /// The text of a row that could not be taken apart at all.
    pub raw: Option<String>,
}

impl Problem {
    /// `place` is where the row stands.
    pub fn missing(row: usize, field: &str, place: &str) -> Problem {
        Problem { row, detail: format!("{place}: `{field}` is missing"), raw: None }
    }
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub struct EventRef<'a> {
    pub tenant_id: Option<&'a str>,
    pub id: Option<&'a str>,
    pub event_name: Option<&'a str>,
    pub external_customer_id: Option<&'a str>,
    pub timestamp: Option<Timestamp>,
    pub ingested_at: Option<Timestamp>,
    pub properties: Option<&'a str>,
    pub deleted: bool,
    pub problem: Option<&'a Problem>,
}

impl EventBatch {
    pub fn len(&self) -> usize {
        self.id.len()
    }

    pub fn is_empty(&self) -> bool {
        self.id.is_empty()
    }

    /// Whether some row may lack a field that every event needs.
    pub fn may_have_gaps(&self) -> bool {
        let texts = [&self.tenant_id, &self.id, &self.event_name, &self.external_customer_id];
        texts.into_iter().any(Texts::has_gaps) || self.timestamp.null_count() > 0
    }

    /// The rows in order, each with its problem if it has one.
    pub fn rows(&self) -> impl Iterator<Item = EventRef<'_>> {
        let mut problems = self.problems.iter().peekable();
        (0..self.len()).map(move |row| EventRef { problem: problems.next_if(|problem| problem.row == row), ..self.row(row) })
    }

    /// Of one row, what the usual key is made of, and its time.
    #[inline]
    pub fn key(&self, row: usize) -> EventRef<'_> {
        EventRef {
            tenant_id: self.tenant_id.get(row),
            id: self.id.get(row),
            timestamp: instant(&self.timestamp, row),
            ..EventRef::EMPTY
        }
    }

    /// One row, without its problem.
    #[inline]
    pub fn row(&self, row: usize) -> EventRef<'_> {
        EventRef {
            tenant_id: self.tenant_id.get(row),
            id: self.id.get(row),
            event_name: self.event_name.get(row),
            external_customer_id: self.external_customer_id.get(row),
            timestamp: instant(&self.timestamp, row),
            ingested_at: instant(&self.ingested_at, row),
            properties: self.properties.get(row),
            deleted: !self.deleted.is_null(row) && self.deleted.value(row),
            problem: None,
        }
    }
}

fn instant(column: &Int64Array, row: usize) -> Option<Timestamp> {
    (!column.is_null(row)).then(|| Timestamp::from_nanos(column.value(row)))
}

impl EventRef<'_> {
    /// A row of nothing.
    pub const EMPTY: EventRef<'static> = EventRef {
        tenant_id: None,
        id: None,
        event_name: None,
        external_customer_id: None,
        timestamp: None,
        ingested_at: None,
        properties: None,
        deleted: false,
        problem: None,
    };

    /// Why nothing can be made of it, if so.
    #[inline]
    pub fn fault(&self) -> Option<String> {
        let missing = || self.missing_field().map(|field| format!("`{field}` is missing"));
        self.problem.map(|problem| problem.detail.clone()).or_else(missing)
    }

    /// What is missing of the fields that every event needs; a void needs only its key.
    #[inline]
    pub fn missing_field(&self) -> Option<&'static str> {
        let texts = [self.tenant_id, self.id, self.event_name, self.external_customer_id];
        if self.timestamp.is_some() && texts.iter().all(|text| text.is_some_and(|text| !text.is_empty())) {
            return None;
        }
        missing_field(texts, self.timestamp.is_some(), self.deleted)
    }
}

fn missing_field(texts: [Option<&str>; 4], has_time: bool, deleted: bool) -> Option<&'static str> {
    let [tenant_id, id, event_name, external_customer_id] = texts.map(|text| text.is_some_and(|text| !text.is_empty()));
    let needed = [
        ("tenant_id", tenant_id),
        ("id", id),
        ("event_name", event_name || deleted),
        ("external_customer_id", external_customer_id || deleted),
        ("timestamp", has_time || deleted),
    ];
    needed.into_iter().find(|(_, given)| !given).map(|(name, _)| name)
}

/// Whether an event is deleted, as text formats say it.
pub fn flag(text: Option<&str>) -> Result<bool, String> {
    match text {
        None | Some("" | "false" | "False" | "FALSE" | "0" | "null") => Ok(false),
        Some("true" | "True" | "TRUE" | "1") => Ok(true),
        Some(other) => Err(format!("deleted `{other}` is neither true nor false")),
    }
}

/// One event as a text format delivers it.
#[derive(Debug, Default)]
pub struct TextEvent<'a> {
    pub tenant_id: Option<&'a str>,
    pub id: Option<&'a str>,
    pub event_name: Option<&'a str>,
    pub external_customer_id: Option<&'a str>,
    pub timestamp: Option<&'a str>,
    pub ingested_at: Option<&'a str>,
    pub properties: Option<&'a str>,
    pub deleted: Option<&'a str>,
}

impl TextEvent<'_> {
    fn missing_field(&self, deleted: bool) -> Option<&'static str> {
        let texts = [self.tenant_id, self.id, self.event_name, self.external_customer_id];
        missing_field(texts, self.timestamp.is_some_and(|text| !text.is_empty()), deleted)
    }
}

/// The fields of an event that could not be read, as they were written: the beginning of a JSON object.
#[derive(Default)]
struct Unread(String);

impl Unread {
    fn add(&mut self, field: &str, text: &str) {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        write_json_text(field, &mut self.0);
        self.0.push(':');
        write_json_text(text, &mut self.0);
    }
}

/// Collects the rows of text formats into batches.
#[derive(Debug, Default)]
pub struct BatchBuilder {
    tenant_id: StringBuilder,
    id: StringBuilder,
    event_name: StringBuilder,
    external_customer_id: StringBuilder,
    timestamp: Int64Builder,
    ingested_at: Int64Builder,
    properties: StringBuilder,
    deleted: BooleanBuilder,
    problems: Vec<Problem>,
    rows: usize,
}

impl BatchBuilder {
    pub fn is_full(&self) -> bool {
        self.rows >= BATCH_ROWS
    }

    /// Adds a row. `place` says where it stands, for what is wrong with it.
    pub fn push(&mut self, event: &TextEvent<'_>, place: impl Fn() -> String) {
        self.push_ingested(event, None, place);
    }

    /// Adds a row that was ingested at `default` unless it says otherwise.
    pub fn push_ingested(&mut self, event: &TextEvent<'_>, default: Option<Timestamp>, place: impl Fn() -> String) {
        let mut problem = None;
        // Nothing of an event is lost.
        let mut unread = Unread::default();
        let mut instant = |field: &str, text: Option<&str>| {
            let text = text.filter(|text| !text.is_empty())?;
            match text.parse::<Timestamp>() {
                Ok(instant) => Some(instant.nanos()),
                Err(error) => {
                    problem = Some(format!("{}: {field} {error}", place()));
                    unread.add(field, text);
                    None
                }
            }
        };
        self.timestamp.append_option(instant("timestamp", event.timestamp));
        let ingested_at = instant("ingested_at", event.ingested_at);
        self.ingested_at.append_option(ingested_at.or(default.map(Timestamp::nanos)));
        let deleted = flag(event.deleted).unwrap_or_else(|error| {
            problem = Some(format!("{}: {error}", place()));
            unread.add("deleted", event.deleted.unwrap_or_default());
            false
        });
        self.deleted.append_value(deleted);
        self.tenant_id.append_option(event.tenant_id);
        self.id.append_option(event.id);
        self.event_name.append_option(event.event_name);
        self.external_customer_id.append_option(event.external_customer_id);
        self.properties.append_option(event.properties);
        if let Some(detail) = problem {
            self.problems.push(Problem { row: self.rows, detail, raw: Some(unread.0 + "}") });
        } else if let Some(field) = event.missing_field(deleted) {
            self.problems.push(Problem::missing(self.rows, field, &place()));
        }
        self.rows += 1;
    }

    /// Adds a row that could not be taken apart.
    pub fn push_unreadable(&mut self, raw: String, detail: String) {
        self.problems.push(Problem { row: self.rows, detail, raw: Some(raw) });
        for column in
            [&mut self.tenant_id, &mut self.id, &mut self.event_name, &mut self.external_customer_id, &mut self.properties]
        {
            column.append_null();
        }
        self.timestamp.append_null();
        self.ingested_at.append_null();
        self.deleted.append_value(false);
        self.rows += 1;
    }

    /// The rows so far; the builder starts anew.
    pub fn finish(&mut self) -> EventBatch {
        self.rows = 0;
        EventBatch {
            tenant_id: self.tenant_id.finish().into(),
            id: self.id.finish().into(),
            event_name: self.event_name.finish().into(),
            external_customer_id: self.external_customer_id.finish().into(),
            timestamp: self.timestamp.finish(),
            ingested_at: self.ingested_at.finish(),
            properties: self.properties.finish().into(),
            deleted: self.deleted.finish(),
            problems: std::mem::take(&mut self.problems),
        }
    }
}
