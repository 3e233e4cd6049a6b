//! The keys of splits, kept in files, so that a later run need not read them again. What is
//! missing or damaged is read anew; what cannot be written is done without.

use std::fs;
use std::path::{Path, PathBuf};

use rustc_hash::FxHashSet;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::keys::{KeyHashes, SplitKeys};
use crate::source::{Field, Split};

/// A folder with a file of keys for each split of a job's source.
#[derive(Debug, Clone, Default)]
pub struct KeyCache {
    /// `None` where there is no place for it.
    pub folder: Option<PathBuf>,
    /// The job's digest: other settings may make other keys of the same rows.
    pub job: String,
    /// Whether it is brought up to date: plans that nobody saves only read it.
    pub writes: bool,
}

/// Changes when the same rows get other keys: kept ones are of no use then.
const VERSION: u32 = 2;

/// The hashes that repeat, in a file of their own.
const REPEATED: &str = "repeated.keys";

impl KeyCache {
    /// The keys of a split as they were read once.
    pub fn load(&self, fields: &[Field], split: &Split) -> Option<SplitKeys> {
        let path = self.folder.as_ref()?.join(file_name(split));
        read(&path, self.identity(fields, &[split]))
    }

    /// The hashes that occur more than once over all of `splits`.
    pub fn load_repeated(&self, fields: &[Field], splits: &[&Split]) -> Option<KeyHashes> {
        let path = self.folder.as_ref()?.join(REPEATED);
        read(&path, self.identity(fields, splits)).map(|keys| keys.hashes)
    }

    /// Changes when the keys may have changed.
    fn identity(&self, fields: &[Field], splits: &[&Split]) -> u64 {
        let mut text = format!("{VERSION} {fields:?} {}", self.job);
        for split in splits {
            let (label, fingerprint) = (split.label(), &split.fingerprint);
            text.push_str(&format!("\n{}:{label}|{fingerprint}", label.len()));
        }
        xxh3_64(text.as_bytes())
    }

    /// Keeps the keys of all `splits` and nothing else.
    pub fn keep(&self, fields: &[Field], splits: &[Split], keys: &[SplitKeys], repeated: impl Iterator<Item = u64>) {
        let Some(folder) = self.folder.as_ref().filter(|_| self.writes) else { return };
        if let Err(error) = fs::create_dir_all(folder) {
            return tracing::debug!("{}: no key cache: {error}", folder.display());
        }
        for (split, keys) in splits.iter().zip(keys) {
            write(&folder.join(file_name(split)), &keys.encode(self.identity(fields, &[split])));
        }
        let all: Vec<_> = splits.iter().collect();
        let repeated = SplitKeys { hashes: KeyHashes::of(repeated.collect()), ..SplitKeys::default() };
        write(&folder.join(REPEATED), &repeated.encode(self.identity(fields, &all)));
        remove_others(folder, splits);
    }
}

fn file_name(split: &Split) -> String {
    format!("{:032x}.keys", xxh3_128(split.label().as_bytes()))
}

fn read(path: &Path, identity: u64) -> Option<SplitKeys> {
    let bytes = fs::read(path).ok()?;
    let keys = SplitKeys::decode(&bytes, identity);
    if let Err(error) = &keys {
        tracing::debug!("{}: {error}, so the keys are read again", path.display());
    }
    keys.ok()
}

/// Writes a file as a whole, unless it is there already.
fn write(path: &Path, bytes: &[u8]) {
    let partial = path.with_extension("partial");
    let written = || -> std::io::Result<()> {
        if fs::read(path).is_ok_and(|known| known == bytes) {
            return Ok(());
        }
        fs::write(&partial, bytes)?;
        fs::rename(&partial, path)
    };
    if let Err(error) = written() {
        tracing::debug!("{}: cannot be written: {error}", path.display());
    }
}

/// Removes the keys of splits that are gone.
fn remove_others(folder: &Path, splits: &[Split]) {
    let known: FxHashSet<_> = splits.iter().map(file_name).collect();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_ours = Path::new(&name).extension().is_some_and(|extension| extension == "keys" || extension == "partial");
        if is_ours && name != REPEATED && !known.contains(&name) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
