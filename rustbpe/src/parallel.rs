//! The same work on several threads.

use std::thread;

/// Run `work` on 0, 1, ... `parts` - 1 at the same time; results in that order.
///
/// The calling thread takes the first part, and every part that the system gives no thread for. A
/// panic of `work` is passed on.
pub(crate) fn on_threads<T: Send>(parts: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let others: Vec<_> = (1..parts)
            .map(|part| thread::Builder::new().spawn_scoped(scope, move || work(part)).ok())
            .collect();
        let mut results = vec![work(0)];
        for (part, other) in (1..).zip(others) {
            results.push(match other.map(thread::ScopedJoinHandle::join) {
                Some(result) => result.unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                None => work(part),
            });
        }
        results
    })
}
