//! Texts on their way from Python to the threads that count their pieces.
//!
//! The one idea: the GIL is held for an eighth of a megabyte of text at a time, and never while
//! something is waited for, so other Python threads run and Ctrl-C is seen. A thread counts into a
//! small table that stays in its cache and empties it into the one that all share, so memory does
//! not grow with the number of threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyIterator, PySlice, PyString};

use crate::{PieceCounts, Result as Outcome, Splitter};

/// Between two calls of `progress`.
const LOOK: Duration = Duration::from_millis(50);

/// Text that is taken from Python before the GIL may change hands: some 0.1 ms.
const BATCH_BYTES: usize = 1 << 17;
/// What a text counts beside its bytes, so that a batch of empty ones ends too.
const TEXT_BYTES: usize = 16;
/// Characters of a long text that are taken at a time.
const SLICE_CHARS: usize = 1 << 18;
/// Distinct pieces in a thread's own table before it is emptied.
const OWN_PIECES: usize = 1 << 15;
/// While the threads are busy.
const NAP: Duration = Duration::from_micros(300);

/// Some texts, one after the other.
#[derive(Default)]
struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    fn texts(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Tells the caller how far training is, not too often.
pub(crate) struct Report<'py> {
    callback: Option<Bound<'py, PyAny>>,
    last: Instant,
}

impl<'py> Report<'py> {
    pub(crate) fn new(callback: Option<Bound<'py, PyAny>>) -> Self {
        Self { callback, last: Instant::now() }
    }

    /// `progress(stage, done, total)`; `total` is None where it is not known.
    pub(crate) fn tell(&mut self, stage: &str, done: usize, total: Option<usize>) -> PyResult<()> {
        if let Some(callback) = &self.callback {
            if self.last.elapsed() >= LOOK || Some(done) == total {
                callback.call1((stage, done, total))?;
                self.last = Instant::now();
            }
        }
        Ok(())
    }
}

/// What the counting threads share.
struct Counting {
    splitter: Splitter,
    batches: Mutex<Receiver<Batch>>,
    counts: Mutex<PieceCounts>,
    failure: Mutex<Option<String>>,
    /// Set when the rest need not be counted any more.
    stop: AtomicBool,
}

/// Take the texts from Python and count their pieces on `threads` threads.
///
/// When interrupted it does not wait for them: a thread may be moving a table of gigabytes, and
/// ends after that.
pub(crate) fn count(
    texts: &Bound<'_, PyIterator>,
    buffer_size: usize,
    splitter: Splitter,
    threads: usize,
    report: &mut Report<'_>,
) -> PyResult<(Splitter, PieceCounts)> {
    let py = texts.py();
    let (sender, receiver) = sync_channel(threads + 1);
    let counting = Arc::new(Counting {
        splitter,
        batches: Mutex::new(receiver),
        counts: Mutex::default(),
        failure: Mutex::default(),
        stop: AtomicBool::new(false),
    });
    let mut workers: Vec<JoinHandle<()>> = Vec::with_capacity(threads);
    for _ in 0..threads {
        let theirs = Arc::clone(&counting);
        match thread::Builder::new().spawn(move || theirs.run()) {
            Ok(worker) => workers.push(worker),
            Err(_) if !workers.is_empty() => break, // fewer do as well
            Err(error) => {
                return Err(PyRuntimeError::new_err(format!("no thread to count on: {error}")))
            }
        }
    }
    let fed = counting.feed(texts, buffer_size, sender, &workers, report).and_then(|()| {
        while !workers.iter().all(JoinHandle::is_finished) {
            py.detach(|| thread::sleep(NAP));
            py.check_signals()?;
        }
        Ok(())
    });
    if let Err(error) = fed {
        counting.stop.store(true, Ordering::Relaxed);
        return Err(error);
    }
    let died = || PyRuntimeError::new_err("a counting thread died");
    for worker in workers {
        worker.join().map_err(|_| died())?;
    }
    let counting = Arc::into_inner(counting).ok_or_else(died)?;
    match counting.failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(reason) => Err(PyValueError::new_err(reason)),
        None => {
            let counts = counting.counts.into_inner().unwrap_or_else(PoisonError::into_inner);
            Ok((counting.splitter, counts))
        }
    }
}

impl Counting {
    /// Count batches until there are no more.
    fn run(&self) {
        let mut own = PieceCounts::default();
        while let Some(batch) = self.next() {
            for text in batch.texts().take_while(|_| !self.stop.load(Ordering::Relaxed)) {
                if let Err(reason) = self.count(text, &mut own) {
                    let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
                    failure.get_or_insert(reason);
                    self.stop.store(true, Ordering::Relaxed);
                }
            }
        }
        if !self.stop.load(Ordering::Relaxed) {
            self.share(&mut own);
        }
    }

    fn next(&self) -> Option<Batch> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
    }

    fn count(&self, text: &str, own: &mut PieceCounts) -> Outcome<()> {
        own.add_text_until(&self.splitter, text, &self.stop)?;
        if own.len() >= OWN_PIECES {
            self.share(own);
        }
        Ok(())
    }

    fn share(&self, own: &mut PieceCounts) {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).take(own);
    }

    /// Send all texts to the threads, unless one of them fails.
    fn feed(
        &self,
        texts: &Bound<'_, PyIterator>,
        buffer_size: usize,
        sender: SyncSender<Batch>,
        workers: &[JoinHandle<()>],
        report: &mut Report<'_>,
    ) -> PyResult<()> {
        let py = texts.py();
        let mut texts = texts.clone();
        let mut taken = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let mut batch = take_batch(&mut texts, buffer_size, taken)?;
            if batch.ends.is_empty() {
                break;
            }
            taken += batch.ends.len();
            report.tell("counting", taken, None)?;
            loop {
                py.check_signals()?;
                match sender.try_send(batch) {
                    Ok(()) => break,
                    Err(TrySendError::Disconnected(_)) => return Ok(()),
                    Err(TrySendError::Full(same)) => batch = same,
                }
                py.detach(|| thread::sleep(NAP));
                // the second where all of them have died
                if self.stop.load(Ordering::Relaxed) || workers.iter().all(JoinHandle::is_finished)
                {
                    return Ok(());
                }
            }
            // a thread that waits for the GIL gets it here
            py.detach(|| ());
        }
        Ok(())
    }
}

/// The next texts: `buffer_size` of them, or about `BATCH_BYTES`; empty at the end.
fn take_batch(
    texts: &mut Bound<'_, PyIterator>,
    buffer_size: usize,
    taken: usize,
) -> PyResult<Batch> {
    let mut batch = Batch::default();
    while batch.ends.len() < buffer_size
        && batch.text.len() + TEXT_BYTES * batch.ends.len() < BATCH_BYTES
    {
        let Some(item) = texts.next() else { break };
        let item = item?;
        let text = item.cast::<PyString>().map_err(|_| {
            let kind = item.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
            let place = taken + batch.ends.len();
            PyTypeError::new_err(format!("the iterator must yield str, item {place} is {kind}"))
        })?;
        append(&mut batch.text, text)?;
        batch.ends.push(batch.text.len());
    }
    Ok(batch)
}

/// Append a text, a slice at a time where it is long: Python holds the GIL while it makes UTF-8,
/// and would keep a second copy of all of it.
fn append(to: &mut String, text: &Bound<'_, PyString>) -> PyResult<()> {
    let (py, chars) = (text.py(), text.len()?);
    if chars <= SLICE_CHARS {
        to.push_str(text.to_str()?);
        return Ok(());
    }
    for start in (0..chars).step_by(SLICE_CHARS) {
        let slice = PySlice::new(py, start as isize, (start + SLICE_CHARS) as isize, 1);
        to.push_str(text.get_item(slice)?.cast::<PyString>()?.to_str()?);
        py.check_signals()?;
        py.detach(|| ());
    }
    Ok(())
}
