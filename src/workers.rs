//! Threads that share work.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;

/// Does `work` on up to `count` threads at once, of which this is one, and gives what each made
/// of it, or how it panicked. Where the operating system has no more threads, there are fewer.
pub fn spread<T: Send>(count: usize, work: impl Fn() -> T + Sync) -> Vec<thread::Result<T>> {
    thread::scope(|scope| {
        let start = |_| thread::Builder::new().spawn_scoped(scope, &work).ok();
        let others: Vec<_> = (1..count).map_while(start).collect();
        let ours = catch_unwind(AssertUnwindSafe(&work));
        std::iter::once(ours).chain(others.into_iter().map(thread::ScopedJoinHandle::join)).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn everybody_works_and_a_panic_is_told() {
        let next = AtomicU32::new(0);
        let results = spread(4, || {
            let at = next.fetch_add(1, Ordering::Relaxed);
            assert_ne!(at, 2);
            at
        });
        let mut made: Vec<_> = results.iter().flatten().copied().collect();
        made.sort_unstable();
        assert_eq!((results.len(), made), (4, vec![0, 1, 3]));
        assert_eq!(spread(0, || 7).len(), 1);
    }
}
