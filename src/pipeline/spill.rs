//! Bytes in partitions: in memory up to a limit, beyond it in a temporary file. One
//! partition is taken up again at a time.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use anyhow::{Context as _, Result};

/// Partitions that one thread writes.
#[derive(Debug)]
pub struct Partitions {
    /// What they hold, for people.
    of: &'static str,
    parts: Vec<Vec<u8>>,
    bytes: usize,
    most_in_memory: usize,
    spilled: Option<Spilled>,
}

/// What was written to a file; it has no name, and is gone with the process.
#[derive(Debug)]
struct Spilled {
    file: File,
    end: u64,
    /// For each partition, where its pieces begin, and their lengths.
    pieces: Vec<VecDeque<(u64, usize)>>,
}

impl Partitions {
    /// So many partitions, with a limit of bytes in memory for all of them.
    pub fn new(of: &'static str, count: usize, most_in_memory: usize) -> Self {
        Partitions { of, parts: vec![Vec::new(); count], bytes: 0, most_in_memory, spilled: None }
    }

    /// Lets `write` append to a partition.
    ///
    /// # Errors
    /// Where the temporary file cannot be written.
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
        let spilled = match &mut self.spilled {
            Some(spilled) => spilled,
            none => {
                tracing::info!(of = self.of, folder = %std::env::temp_dir().display(), "spilling to a temporary file");
                none.insert(Spilled { file: tempfile::tempfile()?, end: 0, pieces: vec![VecDeque::new(); self.parts.len()] })
            }
        };
        spilled.file.seek(SeekFrom::Start(spilled.end))?;
        // A part that was large once may stay small from now on.
        let room = self.most_in_memory / self.parts.len().max(1);
        let parts = self.parts.iter_mut().zip(&mut spilled.pieces);
        for (part, pieces) in parts.filter(|(part, _)| !part.is_empty()) {
            spilled.file.write_all(part)?;
            pieces.push_back((spilled.end, part.len()));
            spilled.end += part.len() as u64;
            part.clear();
            part.shrink_to(room);
        }
        self.bytes = 0;
        Ok(())
    }

    /// Takes the next piece of one partition, in the order in which it was written, in place
    /// of what `out` held; false where nothing is left. What was appended at once is in one piece.
    ///
    /// # Errors
    /// Where the temporary file cannot be read.
    pub fn next(&mut self, at: usize, out: &mut Vec<u8>) -> Result<bool> {
        out.clear();
        if let Some(spilled) = &mut self.spilled
            && let Some((start, length)) = spilled.pieces.get_mut(at).and_then(VecDeque::pop_front)
        {
            spilled.file.seek(SeekFrom::Start(start))?;
            let read = (&mut spilled.file).take(length as u64).read_to_end(out)?;
            anyhow::ensure!(read == length, "the temporary file of {} broke off", self.of);
            return Ok(true);
        }
        let Some(part) = self.parts.get_mut(at).filter(|part| !part.is_empty()) else { return Ok(false) };
        self.bytes -= part.len();
        *out = std::mem::take(part);
        Ok(true)
    }

    #[cfg(test)]
    pub fn has_spilled(&self) -> bool {
        self.spilled.is_some()
    }
}
