//! Event files: Parquet, NDJSON and CSV, plain, gzip or zstd.

mod chosen;
pub(crate) mod csv;
mod ndjson;
mod parquet;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};
use rustc_hash::FxHashSet;

pub use self::parquet::metadata as parquet_metadata;
use super::{ColumnMap, EventBatch, EventSource, Part, RowChoice, Selection, Split, Wanted};

/// Event files by glob patterns.
#[derive(Debug)]
pub struct FileSource {
    patterns: Vec<FilePattern>,
    columns: ColumnMap,
}

/// A pattern matches nothing.
#[derive(Debug, thiserror::Error)]
#[error("source path `{0}` matches no file: check source.paths in the job file (paths are relative to it)")]
pub struct NoFile(String);

/// A glob pattern of a job file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePattern {
    /// For messages: the folder and the pattern as they are.
    shown: String,
    /// For matching: only what people wrote is a pattern, the folder's name is none.
    glob: String,
    /// The folder that everything which matches lies in.
    base: PathBuf,
}

/// What makes a name a pattern.
const SPECIAL: [char; 3] = ['*', '?', '['];

impl FilePattern {
    /// The pattern `written`, relative to `folder`; `None` where the folder's name is not UTF-8.
    pub fn new(folder: &Path, written: &str) -> Option<Self> {
        let escaped = PathBuf::from(glob::Pattern::escape(folder.to_str()?));
        let names = Path::new(written).components().take_while(|name| !name.as_os_str().to_string_lossy().contains(SPECIAL));
        Some(FilePattern {
            shown: folder.join(written).display().to_string(),
            glob: escaped.join(written).display().to_string(),
            base: folder.join(names.collect::<PathBuf>()).components().collect(),
        })
    }

    /// The files that match. Folders are passed over; anything else that is no file is an error.
    fn files(&self) -> Result<Vec<PathBuf>> {
        self.reject_unreadable_names()?;
        let mut files = Vec::new();
        for path in self.matches(&self.glob)? {
            let metadata = path.metadata().with_context(|| {
                format!("events file {}: cannot be read (a link that leads nowhere?): repair or remove it", path.display())
            })?;
            if metadata.is_file() {
                files.push(path);
            } else if !metadata.is_dir() {
                bail!("events file {}: is no regular file: remove it or narrow source.paths", path.display());
            }
        }
        if files.is_empty() {
            bail!(NoFile(self.shown.clone()));
        }
        Ok(files)
    }

    /// Whether a file is one of those that match, by its canonical path.
    pub fn matches_file(&self, path: &Path) -> bool {
        let files = self.files().unwrap_or_default();
        files.iter().any(|file| file.canonicalize().is_ok_and(|file| file == path))
    }

    fn matches(&self, pattern: &str) -> Result<Vec<PathBuf>> {
        let invalid = || format!("source path `{}` is no glob pattern", self.shown);
        if pattern.contains("**") {
            // As paths are made of names.
            let names: PathBuf = Path::new(pattern).components().collect();
            let pattern = glob::Pattern::new(&names.display().to_string()).with_context(invalid)?;
            return Walk::of(&self.base, pattern);
        }
        let paths = glob::glob(pattern).with_context(invalid)?;
        paths.map(|entry| entry.with_context(|| format!("reading what `{}` matches", self.shown))).collect()
    }

    /// The glob passes over names that are not UTF-8, and with them over events.
    fn reject_unreadable_names(&self) -> Result<()> {
        let mut folder = PathBuf::new();
        for component in Path::new(&self.glob).components() {
            let pattern = component.as_os_str().to_string_lossy();
            if pattern.contains(SPECIAL) {
                let matching =
                    glob::Pattern::new(&pattern).with_context(|| format!("source path `{}` is no glob pattern", self.shown))?;
                let parent = if folder.as_os_str().is_empty() { ".".to_owned() } else { folder.display().to_string() };
                for parent in self.matches(&parent)?.iter().filter(|parent| parent.is_dir()) {
                    reject_unreadable_names_in(parent, &matching)?;
                }
            }
            folder.push(component);
        }
        Ok(())
    }
}

/// What matches in a folder and below. Links to folders are followed, but not in circles; a file is
/// found once, by a name without links if that matches.
struct Walk {
    pattern: glob::Pattern,
    found: Vec<PathBuf>,
    /// Links to folders, for when all that need no link are seen, with the folders that led there.
    links: Vec<(PathBuf, Vec<PathBuf>)>,
}

impl Walk {
    fn of(base: &Path, pattern: glob::Pattern) -> Result<Vec<PathBuf>> {
        let mut walk = Walk { pattern, found: Vec::new(), links: vec![(base.to_owned(), Vec::new())] };
        while !walk.links.is_empty() {
            let (folder, mut roots) = walk.links.remove(0);
            let Ok(root) = here(&folder).canonicalize() else { continue };
            // From there, everything would come again.
            if roots.iter().any(|known| known.starts_with(&root)) {
                continue;
            }
            roots.push(root);
            walk.look_at(&folder, &roots)?;
        }
        let mut seen = FxHashSet::default();
        walk.found.retain(|path| path.canonicalize().map_or(true, |real| seen.insert(real)));
        Ok(walk.found)
    }

    fn look_at(&mut self, folder: &Path, roots: &[PathBuf]) -> Result<()> {
        crate::interrupt::check()?;
        let here = here(folder);
        let reading = || format!("reading folder {}", here.display());
        if !here.is_dir() {
            return Ok(());
        }
        self.take(folder);
        for entry in here.read_dir().with_context(reading)? {
            let entry = entry.with_context(reading)?;
            let path = folder.join(entry.file_name());
            let kind = entry.file_type().with_context(reading)?;
            if kind.is_dir() {
                self.look_at(&path, roots)?;
            } else if kind.is_symlink() && path.is_dir() {
                let mut roots = roots.to_vec();
                roots.push(here.canonicalize().with_context(reading)?);
                self.links.push((path, roots));
            } else {
                self.take(&path);
            }
        }
        Ok(())
    }

    fn take(&mut self, path: &Path) {
        const OPTIONS: glob::MatchOptions =
            glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: false };
        if self.pattern.matches_path_with(path, OPTIONS) {
            self.found.push(path.to_owned());
        }
    }
}

/// The folder that a path names; an empty one is where we are.
fn here(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}

/// What to say of a file that cannot be read to its end.
fn broken(path: &Path, lines: u64) -> String {
    let name = path.extension().unwrap_or_default().to_string_lossy();
    let what = match name.as_ref() {
        "gz" | "zst" => format!("is truncated, damaged, or no .{name} file"),
        _ => "cannot be read".to_owned(),
    };
    let place = if lines > 0 { format!(" (after line {lines})") } else { String::new() };
    format!("events file {} {what}{place}: replace it and run again", path.display())
}

fn reject_unreadable_names_in(folder: &Path, pattern: &glob::Pattern) -> Result<()> {
    for entry in folder.read_dir().with_context(|| format!("reading folder {}", folder.display()))? {
        let path = entry.with_context(|| format!("reading folder {}", folder.display()))?.path();
        let name = path.file_name().unwrap_or_default();
        if name.to_str().is_none() && pattern.matches(&name.to_string_lossy()) {
            bail!("events file {}: its name is not UTF-8: rename it or narrow source.paths", path.display());
        }
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Parquet,
    Ndjson,
    Csv,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Plain,
    Gzip,
    Zstd,
}

impl FileSource {
    /// Files that match any of the `patterns`.
    pub fn new(patterns: Vec<FilePattern>, columns: ColumnMap) -> Self {
        Self { patterns, columns }
    }

    /// The files, sorted, each once.
    ///
    /// # Errors
    /// Where a pattern matches nothing, or something that cannot be read.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for pattern in &self.patterns {
            files.append(&mut pattern.files()?);
        }
        files.sort();
        files.dedup();
        Ok(files)
    }
}

/// Files whose first rows a probe reads.
const PROBED: usize = 100;

/// Ends the reading of a file of which enough was seen.
#[derive(Debug, thiserror::Error)]
#[error("enough was read")]
struct Enough;

impl EventSource for FileSource {
    fn probe(&self) -> Result<String> {
        // Splitting opens the Parquet files, so that a damaged one is found.
        let splits = self.splits(&Selection::default())?;
        let mut files: Vec<_> = splits.iter().collect();
        files.dedup_by_key(|split| &split.name);
        // The first rows tell whether columns are missing.
        for split in files.iter().take(PROBED) {
            match self.read(split, Wanted::Whole, &mut |_| Err(Enough.into())) {
                Err(error) if !error.is::<Enough>() => return Err(error),
                _ => {}
            }
        }
        Ok(format!("{} file{}", files.len(), if files.len() == 1 { "" } else { "s" }))
    }

    fn reads_rows_without_time(&self, _: &Selection) -> bool {
        // Files are read as a whole.
        true
    }

    fn splits(&self, _: &Selection) -> Result<Vec<Split>> {
        let mut splits = Vec::new();
        for path in self.files()? {
            let (format, compression) = format_of(&path)?;
            let split = Split {
                name: path.display().to_string(),
                identity: path.canonicalize().unwrap_or_else(|_| path.clone()).display().to_string(),
                fingerprint: fingerprint(&path)?,
                evidence: None,
                announced_rows: None,
                part: Part::Whole,
            };
            if format == Format::Parquet && compression == Compression::Plain {
                parquet::splits(&path, &split, &mut splits)?;
            } else {
                splits.push(split);
            }
        }
        Ok(splits)
    }

    fn check_unchanged(&self, splits: &[Split]) -> Result<()> {
        // The splits of a file follow each other.
        for split in splits.chunk_by(|a, b| a.name == b.name).filter_map(<[Split]>::first) {
            if fingerprint(Path::new(&split.name))? != split.fingerprint {
                bail!("{} changed while it was read: run again", split.name);
            }
        }
        Ok(())
    }

    fn slices(&self, split: &Split, most: usize) -> Vec<Split> {
        match split.part {
            Part::RowGroup(group) => parquet::slices(split, group, most as u64),
            _ => vec![split.clone()],
        }
    }

    fn read(&self, split: &Split, wanted: Wanted<'_>, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<()> {
        let path = Path::new(&split.name);
        let (format, compression) = format_of(path)?;
        match format {
            Format::Parquet => parquet::read(path, compression, split, &self.columns, wanted, sink),
            Format::Ndjson => ndjson::read(path, open(path, compression)?, &self.columns, sink),
            Format::Csv => csv::read(path, open(path, compression)?, &self.columns, sink),
        }
    }

    fn read_chosen(&self, split: &Split, choice: &dyn RowChoice, sink: &mut dyn FnMut(&EventBatch) -> Result<()>) -> Result<u64> {
        let path = Path::new(&split.name);
        if let (Part::RowGroup(group), (Format::Parquet, Compression::Plain)) = (&split.part, format_of(path)?) {
            return chosen::read(path, *group, &self.columns, choice, sink);
        }
        // Text is taken apart line by line in any case.
        self.read(split, Wanted::Whole, sink)?;
        Ok(0)
    }
}

/// Changes when a file does: its length and time.
fn fingerprint(path: &Path) -> Result<String> {
    let metadata = path.metadata().with_context(|| format!("events file {}", path.display()))?;
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(format!("{}:{}", metadata.len(), modified.map_or(0, |since| since.as_nanos())))
}

/// The text without the byte order mark that some programs write first.
pub fn without_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// Format and compression by the file's name.
fn format_of(path: &Path) -> Result<(Format, Compression)> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_ascii_lowercase();
    let (stem, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "zst" | "zstd")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::Plain),
    };
    let format = match stem.rsplit_once('.') {
        Some((_, "parquet")) => Format::Parquet,
        Some((_, "ndjson" | "jsonl")) => Format::Ndjson,
        Some((_, "csv")) => Format::Csv,
        _ => bail!(
            "events file {}: the name does not end in .parquet, .ndjson, .jsonl or .csv (also with .gz or .zst): \
             rename it or narrow source.paths",
            path.display()
        ),
    };
    Ok((format, compression))
}

/// The decompressed bytes of a file.
fn open(path: &Path, compression: Compression) -> Result<Box<dyn Read>> {
    const BUFFER: usize = 256 * 1024;
    let file = File::open(path).with_context(|| format!("events file {}", path.display()))?;
    let file = BufReader::with_capacity(BUFFER, file);
    Ok(match compression {
        Compression::Plain => Box::new(file),
        // Members may be concatenated, as `cat a.gz b.gz` and log rotation leave them.
        Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(file)),
        Compression::Zstd => {
            Box::new(zstd::Decoder::with_buffer(file).with_context(|| format!("events file {}", path.display()))?)
        }
    })
}
