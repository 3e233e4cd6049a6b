//! Bytes in partitions: in memory up to a limit, beyond it in a file. One partition is taken
//! up again at a time. The file is a temporary one, or one that can be kept.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::xxh3_64;

/// Partitions that one thread writes.
#[derive(Debug)]
pub struct Partitions {
    /// What they hold, for people.
    of: &'static str,
    parts: Vec<Vec<u8>>,
    bytes: usize,
    most_in_memory: usize,
    spilled: Option<Spilled>,
    /// Where everything is kept that is taken up, if it is.
    keep_in: Option<PathBuf>,
    taken: Vec<Piece>,
    /// Why nothing can be kept any more.
    failure: Option<io::Error>,
}

/// What was written to a file.
#[derive(Debug)]
struct Spilled {
    file: SpillFile,
    end: u64,
    /// For each partition, where its pieces begin, and their lengths.
    pieces: Vec<VecDeque<(u64, usize)>>,
}

#[derive(Debug)]
enum SpillFile {
    /// It has no name, and is gone with the process.
    Temporary(File),
    Kept(NamedTempFile),
}

/// A file in `folder` that is removed unless it is kept. What a process leaves that was killed
/// is known by the end of its name.
///
/// # Errors
/// Where the folder cannot be written.
pub fn partial(folder: &Path) -> io::Result<NamedTempFile> {
    // Kept files are for whoever may read the folder, which temporary ones are not.
    let open = |path: &Path| File::options().create_new(true).read(true).write(true).open(path);
    tempfile::Builder::new().prefix("matches-").suffix(".partial").make_in(folder, open)
}

/// Bytes of one partition in a file that is kept; those of a partition follow each other in
/// the order in which they were written.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Piece {
    pub part: usize,
    pub start: u64,
    pub length: u64,
    pub checksum: u64,
}

/// What is left of partitions that were taken up as a whole.
#[derive(Debug)]
pub struct KeptFile {
    pub file: NamedTempFile,
    pub pieces: Vec<Piece>,
    pub length: u64,
}

impl SpillFile {
    fn create(keep_in: Option<&Path>) -> io::Result<SpillFile> {
        match keep_in {
            Some(folder) => partial(folder).map(SpillFile::Kept),
            None => tempfile::tempfile().map(SpillFile::Temporary),
        }
    }

    fn file(&mut self) -> &mut File {
        match self {
            SpillFile::Temporary(file) => file,
            SpillFile::Kept(file) => file.as_file_mut(),
        }
    }
}

impl Partitions {
    /// So many partitions, with a limit of bytes in memory for all of them.
    pub fn new(of: &'static str, count: usize, most_in_memory: usize) -> Self {
        Partitions {
            of,
            parts: vec![Vec::new(); count],
            bytes: 0,
            most_in_memory,
            spilled: None,
            keep_in: None,
            taken: Vec::new(),
            failure: None,
        }
    }

    /// Keeps in a file of the folder whatever is taken up.
    #[must_use]
    pub fn kept_in(self, folder: Option<&Path>) -> Self {
        Partitions { keep_in: folder.map(Path::to_owned), ..self }
    }

    /// Lets `write` append to a partition.
    ///
    /// # Errors
    /// Where the file cannot be written.
    #[inline]
    pub fn append(&mut self, at: usize, write: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let Some(part) = self.parts.get_mut(at) else { return Ok(()) };
        let before = part.len();
        write(part);
        self.bytes += part.len() - before;
        if self.bytes > self.most_in_memory {
            let folder = std::env::temp_dir();
            self.spill().with_context(|| format!("setting {} aside in {} (TMPDIR names another)", self.of, folder.display()))?;
        }
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        let mut parts = std::mem::take(&mut self.parts);
        let mut written = self.write_all(&mut parts);
        if let Err(error) = &mut written
            && self.keep_in.is_some()
        {
            let failure = std::mem::replace(error, io::ErrorKind::Other.into());
            written = self.keep_no_more(failure).and_then(|()| self.write_all(&mut parts));
        }
        self.parts = parts;
        self.bytes = 0;
        written
    }

    /// Writes all parts to the file, and empties those that were written.
    fn write_all(&mut self, parts: &mut [Vec<u8>]) -> io::Result<()> {
        // A part that was large once may stay small from now on.
        let room = self.most_in_memory / parts.len().max(1);
        let spilled = self.file(parts.len())?;
        for (at, part) in parts.iter_mut().enumerate().filter(|(_, part)| !part.is_empty()) {
            let start = spilled.write(part)?;
            if let Some(pieces) = spilled.pieces.get_mut(at) {
                pieces.push_back((start, part.len()));
            }
            part.clear();
            part.shrink_to(room);
        }
        Ok(())
    }

    /// Goes on in a temporary file: what is kept is worth less than the run.
    fn keep_no_more(&mut self, failure: io::Error) -> io::Result<()> {
        (self.keep_in, self.failure) = (None, Some(failure));
        let Some(spilled) = &mut self.spilled else { return Ok(()) };
        let mut temporary = tempfile::tempfile()?;
        let kept = spilled.file.file();
        kept.seek(SeekFrom::Start(0))?;
        io::copy(&mut kept.take(spilled.end), &mut temporary)?;
        spilled.file = SpillFile::Temporary(temporary);
        Ok(())
    }

    fn file(&mut self, parts: usize) -> io::Result<&mut Spilled> {
        match &mut self.spilled {
            Some(spilled) => Ok(spilled),
            none => {
                match &self.keep_in {
                    Some(folder) => tracing::info!(of = self.of, folder = %folder.display(), "writing a file for later runs"),
                    None => {
                        tracing::info!(of = self.of, folder = %std::env::temp_dir().display(), "spilling to a temporary file");
                    }
                }
                let file = SpillFile::create(self.keep_in.as_deref())?;
                Ok(none.insert(Spilled { file, end: 0, pieces: vec![VecDeque::new(); parts] }))
            }
        }
    }

    /// Takes the next piece of one partition, in the order in which it was written, in place
    /// of what `out` held; false where nothing is left. What was appended at once is in one piece.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn next(&mut self, at: usize, out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        if let Some(spilled) = &mut self.spilled
            && let Some((start, length)) = spilled.pieces.get_mut(at).and_then(VecDeque::pop_front)
        {
            spilled.file.file().seek(SeekFrom::Start(start))?;
            let read = spilled.file.file().take(length as u64).read_to_end(out)?;
            anyhow::ensure!(read == length, "the temporary file of {} broke off", self.of);
            self.take(at, start, out);
            return Ok(true);
        }
        let Some(part) = self.parts.get_mut(at).filter(|part| !part.is_empty()) else { return Ok(false) };
        self.bytes -= part.len();
        *out = std::mem::take(part);
        if self.keep_in.is_some() {
            let parts = self.parts.len();
            match self.file(parts).and_then(|spilled| spilled.write(out)) {
                Ok(start) => self.take(at, start, out),
                Err(error) => (self.keep_in, self.failure) = (None, Some(error)),
            }
        }
        Ok(true)
    }

    fn take(&mut self, part: usize, start: u64, bytes: &[u8]) {
        if self.keep_in.is_some() {
            self.taken.push(Piece { part, start, length: bytes.len() as u64, checksum: xxh3_64(bytes) });
        }
    }

    /// What can be kept, once everything is taken up; `None` where there was nothing.
    ///
    /// # Errors
    /// Where it could not be written.
    pub fn into_kept(self) -> io::Result<Option<KeptFile>> {
        match (self.failure, self.spilled) {
            (Some(failure), _) => Err(failure),
            (None, Some(Spilled { file: SpillFile::Kept(file), end, .. })) => {
                Ok(Some(KeptFile { file, pieces: self.taken, length: end }))
            }
            _ => Ok(None),
        }
    }

    #[cfg(test)]
    pub fn has_spilled(&self) -> bool {
        self.spilled.is_some()
    }
}

impl Spilled {
    /// Returns where the bytes begin.
    fn write(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let (start, file) = (self.end, self.file.file());
        file.seek(SeekFrom::Start(start))?;
        file.write_all(bytes)?;
        self.end += bytes.len() as u64;
        Ok(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_kept_is_set_aside_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let of = |folder: &Path| Partitions::new("numbers", 2, 8).kept_in(Some(folder));
        let fill = |partitions: &mut Partitions, from: u8| {
            (from..from + 20).for_each(|number| partitions.append(usize::from(number % 2), |out| out.push(number)).unwrap());
        };
        let check = |mut partitions: Partitions, numbers: u8| {
            let (mut piece, mut found) = (Vec::new(), Vec::new());
            for at in 0..2 {
                while partitions.next(at, &mut piece).unwrap() {
                    found.extend_from_slice(&piece);
                }
            }
            found.sort_unstable();
            assert_eq!(found, (0..numbers).collect::<Vec<_>>());
            assert!(partitions.into_kept().is_err());
        };
        // There is no such folder.
        let mut partitions = of(&folder.path().join("nowhere"));
        fill(&mut partitions, 0);
        check(partitions, 20);
        // What was written before it failed is taken along.
        let mut partitions = of(folder.path());
        fill(&mut partitions, 0);
        assert!(partitions.has_spilled());
        partitions.keep_no_more(io::ErrorKind::StorageFull.into()).unwrap();
        fill(&mut partitions, 20);
        check(partitions, 40);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
