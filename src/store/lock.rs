//! One run of a job at a time, and what a run that was interrupted wanted.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Seek as _, Write as _};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::fault::{FaultKind, fault};
use crate::model::timestamp::Timestamp;
use crate::pipeline::Request;

/// A lock that the operating system releases when the process ends, however it ends.
/// Its file says who holds it and what for; a run that comes to its end empties it.
#[derive(Debug)]
pub struct Lock {
    file: File,
    is_run: bool,
    /// What the holder before was doing, if it did not come to its end.
    pub interrupted: Option<Holder>,
}

/// Who holds a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub process: u32,
    pub since: Timestamp,
    /// What is computed; `None` for work that needs no repetition.
    pub request: Option<Request>,
    /// Whether the guard was overridden.
    #[serde(default)]
    pub yes: bool,
    /// The earlier run whose offsets are read again.
    #[serde(default)]
    pub snapshot: Option<String>,
}

/// What a run computes, for whoever has to resume it.
#[derive(Debug, Clone, Copy)]
pub struct Intent<'i> {
    pub request: &'i Request,
    /// As in [`Holder`].
    pub snapshot: Option<&'i str>,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {} since {}", self.process, self.since)
    }
}

impl Lock {
    /// Takes the lock at `path`, for a run or for work by hand; a lock whose holder is dead is taken over.
    ///
    /// # Errors
    /// A lock fault (exit code 6) that names the holder, or that the file cannot be written.
    pub fn take(path: &Path, job: &str, run: Option<Intent<'_>>, yes: bool) -> Result<Lock> {
        let mut lock = Lock::take_as_it_is(path, job)?;
        lock.is_run = run.is_some();
        // Work by hand leaves what is still to be resumed.
        if run.is_some() || lock.interrupted.is_none() {
            let holder = Holder {
                process: std::process::id(),
                since: clock::now(),
                request: run.map(|run| run.request.clone()),
                yes,
                snapshot: run.and_then(|run| run.snapshot).map(str::to_owned),
            };
            lock.write(&(serde_json::to_string(&holder)? + "\n"))
                .with_context(|| format!("lock {}: cannot be written", path.display()))?;
        }
        Ok(lock)
    }

    fn take_as_it_is(path: &Path, job: &str) -> Result<Lock> {
        let context = || format!("lock {}: cannot be written; check the path of the store and its permissions", path.display());
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).with_context(context)?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).with_context(context)?;
        let locked = file.try_lock();
        let mut text = String::new();
        let _ = file.read_to_string(&mut text);
        let holder = serde_json::from_str::<Holder>(&text).ok();
        match locked {
            Ok(()) => Ok(Lock { file, is_run: false, interrupted: holder.filter(|holder| holder.request.is_some()) }),
            Err(TryLockError::WouldBlock) => {
                let holder = holder.map_or_else(|| "another process".to_owned(), |holder| holder.to_string());
                Err(fault(
                    FaultKind::LockHeld,
                    format!("job {job} is already running ({holder}); wait until it is done ({} is its lock)", path.display()),
                ))
            }
            Err(TryLockError::Error(error)) => Err(error).with_context(context),
        }
    }

    /// Notes that the work came to its end, whatever that was. A run leaves nothing to
    /// be resumed; work by hand leaves what was there before.
    pub fn finish(mut self) {
        if self.is_run || self.interrupted.is_none() {
            let _ = self.write("");
        }
    }

    fn write(&mut self, text: &str) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        // One write: who finds the lock taken must not read half of it.
        self.file.write_all(text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_run_is_known_by_all_that_it_was_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let request = Request { allow_closed: true, ..Request::default() };
        let run = Some(Intent { request: &request, snapshot: Some("earlier") });
        assert_eq!(Lock::take(&path, "job", run, true).unwrap().interrupted, None);
        // Work by hand in between leaves it, and so does asking for it.
        Lock::take(&path, "job", None, false).unwrap().finish();
        let lock = Lock::take(&path, "job", None, false).unwrap();
        let holder = lock.interrupted.clone().unwrap();
        assert_eq!((holder.request, holder.yes, holder.snapshot.as_deref()), (Some(request.clone()), true, Some("earlier")));
        lock.finish();
        // A run that comes to its end does not.
        Lock::take(&path, "job", Some(Intent { request: &request, snapshot: None }), false).unwrap().finish();
        assert_eq!(Lock::take(&path, "job", None, false).unwrap().interrupted, None);
    }

    #[test]
    fn a_lock_that_says_nothing_of_snapshots_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        std::fs::write(&path, r#"{"process": 7, "since": "2026-01-01T00:00:00Z", "request": {"range": null, "scope": {}}}"#)
            .unwrap();
        let holder = Lock::take(&path, "job", None, false).unwrap().interrupted.unwrap();
        assert_eq!((holder.process, holder.request, holder.snapshot), (7, Some(Request::default()), None));
    }
}
