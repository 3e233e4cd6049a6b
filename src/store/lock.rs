//! One run of a job at a time.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use anyhow::{Context, Result};

use crate::clock;
use crate::fault::{FaultKind, fault};

/// A lock that the operating system releases when the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock at `path`.
    ///
    /// # Errors
    /// A lock fault (exit code 6) that names the holder, or that the file cannot be written.
    pub fn take(path: &Path, job: &str) -> Result<Lock> {
        let context = || format!("lock {}: cannot be written; check the path of the store and its permissions", path.display());
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).with_context(context)?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).with_context(context)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                let holder = if holder.trim().is_empty() { "another process" } else { holder.trim() };
                return Err(fault(
                    FaultKind::LockHeld,
                    format!("job {job} is already running ({holder}); wait until it is done ({} is its lock)", path.display()),
                ));
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(context),
        }
        file.set_len(0).with_context(context)?;
        file.rewind().with_context(context)?;
        // One write: who finds the lock taken must not read half of it.
        let holder = format!("process {} since {}\n", std::process::id(), clock::now());
        file.write_all(holder.as_bytes()).with_context(context)?;
        Ok(Lock { _file: file })
    }
}
