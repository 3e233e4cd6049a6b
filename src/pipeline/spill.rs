//! Bytes in partitions: in memory up to a limit, beyond it in a temporary file. One
//! partition is taken up again at a time.

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
    pieces: Vec<Vec<(u64, usize)>>,
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
                none.insert(Spilled { file: tempfile::tempfile()?, end: 0, pieces: vec![Vec::new(); self.parts.len()] })
            }
        };
        for (part, pieces) in self.parts.iter_mut().zip(&mut spilled.pieces) {
            spilled.file.write_all(part)?;
            pieces.push((spilled.end, part.len()));
            spilled.end += part.len() as u64;
            part.clear();
        }
        self.bytes = 0;
        Ok(())
    }

    /// Appends one partition to `out`, in the order in which it was written; here it is
    /// gone then.
    ///
    /// # Errors
    /// Where the temporary file cannot be read.
    pub fn take(&mut self, at: usize, out: &mut Vec<u8>) -> Result<()> {
        if let Some(spilled) = &mut self.spilled {
            for (start, length) in spilled.pieces.get_mut(at).map(std::mem::take).unwrap_or_default() {
                spilled.file.seek(SeekFrom::Start(start))?;
                let read = (&mut spilled.file).take(length as u64).read_to_end(out)?;
                anyhow::ensure!(read == length, "the temporary file of {} broke off", self.of);
            }
        }
        if let Some(part) = self.parts.get_mut(at) {
            self.bytes -= part.len();
            out.append(&mut std::mem::take(part));
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn has_spilled(&self) -> bool {
        self.spilled.is_some()
    }
}
