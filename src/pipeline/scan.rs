//! Reading the splits of a source on several threads.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Result, anyhow, bail};

use crate::source::{EventBatch, EventSource, Split, Wanted};
use crate::workers;

/// Called with the number of rows just read.
pub type Progress<'a> = &'a (dyn Fn(u64) + Sync);

/// What one thread found, and the rows of each split that it read.
struct Finished<W> {
    worker: W,
    rows: Vec<(usize, u64)>,
}

/// Reads every split once; where there are few, several threads may read one. Each thread has a
/// worker of its own; `visit` gets the index of the split with each batch. Returns the workers and
/// the rows by split.
///
/// # Errors
/// The first error of any thread, or where a split did not deliver what it announced.
pub fn scan<W: Send>(
    source: &dyn EventSource,
    splits: &[Split],
    wanted: Wanted<'_>,
    threads: usize,
    progress: Progress<'_>,
    new_worker: impl Fn() -> W + Sync,
    visit: impl Fn(&mut W, usize, &EventBatch) -> Result<()> + Sync,
) -> Result<(Vec<W>, Vec<u64>)> {
    // Threads that are done early take what is left.
    let most = if splits.len() < 2 * threads { (2 * threads).div_ceil(splits.len().max(1)) } else { 1 };
    let slices = splits.iter().enumerate().flat_map(|(index, split)| {
        let slices = if most > 1 { source.slices(split, most) } else { vec![split.clone()] };
        slices.into_iter().map(move |slice| (index, slice))
    });
    let slices: Vec<_> = slices.collect();
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> Result<Finished<W>> {
        let mut worker = new_worker();
        let mut rows = Vec::new();
        while let Some((index, split)) = slices.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut read = 0;
            let result = source.read(split, wanted, &mut |batch| {
                crate::interrupt::check()?;
                if failed.load(Ordering::Relaxed) {
                    bail!("stopped, because another part could not be read");
                }
                read += batch.len() as u64;
                visit(&mut worker, *index, batch)?;
                progress(batch.len() as u64);
                Ok(())
            });
            let complete = result.and_then(|()| check_complete(split, read));
            if let Err(error) = complete {
                // The error that came first is the one to tell.
                return if failed.swap(true, Ordering::Relaxed) { Ok(Finished { worker, rows }) } else { Err(error) };
            }
            rows.push((*index, read));
        }
        Ok(Finished { worker, rows })
    };
    let mut done = Vec::new();
    let mut rows = vec![0; splits.len()];
    for result in workers::spread(threads.min(slices.len()), work) {
        let finished = result.map_err(|_| anyhow!("a reading thread panicked: this is a bug in trueup"))??;
        done.push(finished.worker);
        for (index, read) in finished.rows {
            if let Some(total) = rows.get_mut(index) {
                *total += read;
            }
        }
    }
    Ok((done, rows))
}

/// Promise 8: what a split announces, it delivers.
fn check_complete(split: &Split, read: u64) -> Result<()> {
    match split.announced_rows {
        Some(announced) if announced != read => {
            bail!("{} announces {announced} rows but delivered {read}: it changed while it was read, run again", split.name)
        }
        _ => Ok(()),
    }
}
