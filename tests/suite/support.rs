//! A folder of its own for each test, and the binary in it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use arrow::array::{ArrayRef, RecordBatch};
use parquet::arrow::ArrowWriter;
use rusqlite::types::ValueRef;

/// A temporary folder that vanishes with the test.
pub struct Workspace {
    folder: tempfile::TempDir,
}

/// A row of a table by column.
pub type Row = BTreeMap<String, String>;

/// What a command left behind.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The JSON document on stdout.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        assert_eq!(self.code, 0, "{self:?}");
        serde_json::from_str(&self.stdout).expect("one JSON document")
    }

    /// Fails unless the command ended with `code` and said every one of `parts` on stderr.
    #[track_caller]
    pub fn fails_with(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "`{part}` is missing in: {}", self.stderr);
        }
    }
}

impl Workspace {
    pub fn new() -> Self {
        Workspace { folder: tempfile::tempdir().unwrap() }
    }

    /// A copy of a folder of `fixtures/`.
    pub fn of(fixture: &str) -> Self {
        let workspace = Workspace::new();
        workspace.overlay(&fixtures().join(fixture));
        workspace
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Copies a folder over this one.
    pub fn overlay(&self, from: &Path) {
        copy(from, self.folder.path());
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub fn write_parquet(&self, name: &str, columns: Vec<(&str, ArrayRef)>) {
        let columns = columns.into_iter().map(|(name, array)| (name, array, true));
        let batch = RecordBatch::try_from_iter_with_nullable(columns).unwrap();
        let file = fs::File::create(self.path(name)).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Replaces a text that must be there.
    #[track_caller]
    pub fn edit(&self, name: &str, from: &str, to: &str) {
        let text = self.read(name);
        assert!(text.contains(from), "{name} has no `{from}`");
        self.write(name, text.replace(from, to));
    }

    pub fn trueup(&self, arguments: &[&str]) -> Outcome {
        let output = Command::new(env!("CARGO_BIN_EXE_trueup"))
            .args(arguments)
            .current_dir(self.folder.path())
            // The width of help texts.
            .env_remove("COLUMNS")
            .output()
            .expect("the binary runs");
        Outcome {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).expect("UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("UTF-8"),
        }
    }

    /// Starts the binary, whose output nobody reads.
    pub fn start(&self, arguments: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trueup"));
        command.args(arguments).current_dir(self.folder.path()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    }

    /// Runs job.yaml; must succeed.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> serde_json::Value {
        let mut all = vec!["run", "job.yaml", "--output", "json"];
        all.extend(arguments);
        self.trueup(&all).json()
    }

    /// Every table of the contract and every row in it; `None` where there is no store. SQLite must
    /// find nothing wrong with the file.
    #[track_caller]
    pub fn dump(&self) -> Option<Vec<Vec<Row>>> {
        if self.path("trueup.db").exists() {
            assert_eq!(self.query("PRAGMA integrity_check"), [Row::from([("integrity_check".to_owned(), "ok".to_owned())])]);
        }
        let tables = ["usage_windows", "usage_periods", "corrections", "dead_letters", "runs"];
        self.path("trueup.db").exists().then(|| tables.map(|table| self.query(&format!("SELECT * FROM {table}"))).to_vec())
    }

    /// Changes the store behind Trueup's back.
    pub fn tamper(&self, sql: &str) {
        let connection = rusqlite::Connection::open(self.path("trueup.db")).unwrap();
        connection.execute_batch(sql).unwrap();
    }

    /// Rows of a query on the store, each column as text; NULL is empty.
    pub fn query(&self, sql: &str) -> Vec<Row> {
        let connection = rusqlite::Connection::open(self.path("trueup.db")).unwrap();
        let mut statement = connection.prepare(sql).unwrap();
        let names: Vec<String> = statement.column_names().map(str::to_owned).collect();
        let mut rows = statement.query([]).unwrap();
        let mut result = Vec::new();
        while let Some(row) = rows.next().unwrap() {
            let cell = |(at, name): (usize, &String)| {
                let text = match row.get_ref(at).unwrap() {
                    ValueRef::Null => String::new(),
                    ValueRef::Integer(value) => value.to_string(),
                    other => other.as_str().unwrap().to_owned(),
                };
                (name.clone(), text)
            };
            result.push(names.iter().enumerate().map(cell).collect());
        }
        result
    }
}

/// A job over the files in `events`, with all four reference tables beside it.
pub fn job(name: &str, window: &str, store: &str) -> String {
    format!(
        r#"version: 1
job: {name}
source: {{kind: files, paths: ["events/*"]}}
reference:
  customers: {{path: customers.csv}}
  subscriptions: {{path: subscriptions.csv}}
  meters: {{path: meters.yaml}}
  prices: {{path: prices.yaml}}
window: {window}
store: {{kind: sqlite, path: {store}.db}}
"#
    )
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A text with everything that differs from run to run replaced: run ids, wall-clock
/// times, seconds, digests, versions, and who runs the tests.
pub fn normalised(text: &str) -> String {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
    let text = text.replace(&trueup::config::operator(), "<operator>");
    let mut out = String::new();
    for line in text.lines() {
        let is_timing = line.trim_start().starts_with("time ") || line.contains("\"seconds\": ");
        let mut rest = line;
        while !rest.is_empty() {
            let end = rest.find(|c| is_word(c) != rest.starts_with(is_word)).unwrap_or(rest.len());
            let (word, others) = rest.split_at(end);
            match placeholder(word) {
                // The date before a time of day belongs to it.
                Some("<time>") if word.len() == "10:00:00Z".len() => {
                    out.truncate(out.trim_end().len() - "2026-01-01".len());
                    out.push_str("<time>");
                }
                Some(name) => out.push_str(name),
                None if is_timing && word.parse::<f64>().is_ok() => out.push_str("<seconds>"),
                None => out.push_str(word),
            }
            rest = others;
        }
        out.truncate(out.trim_end_matches(' ').len());
        out.push('\n');
    }
    out
}

/// What stands for a word that differs from run to run.
fn placeholder(word: &str) -> Option<&'static str> {
    let is_hex = word.chars().all(|c| c.is_ascii_hexdigit());
    let lengths: Vec<_> = word.split('-').map(str::len).collect();
    let is_uuid = lengths == [8, 4, 4, 4, 12] && word.replace('-', "").chars().all(|c| c.is_ascii_hexdigit());
    let is_time_of_day = word.len() == "10:00:00Z".len() && word.ends_with('Z') && word.matches(':').count() == 2;
    match word {
        _ if is_uuid => Some("<run>"),
        _ if is_hex && matches!(word.len(), 32 | 64) => Some("<digest>"),
        _ if word.len() == 13 && word.bytes().all(|b| b.is_ascii_digit()) => Some("<version>"),
        // Windows begin at whole seconds, clocks are finer.
        _ if is_time_of_day || (word.contains('T') && word.contains('.') && word.ends_with('Z')) => Some("<time>"),
        _ => None,
    }
}
