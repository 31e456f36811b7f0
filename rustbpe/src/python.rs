//! The Python face: `rustbpe.Tokenizer`, a superset of PyPI's rustbpe 0.1.0.
//!
//! The GIL is held only while texts are taken from Python. Counting and merging run on threads of
//! their own, and the calling thread looks for Ctrl-C and reports progress in between.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{sync_channel, Receiver};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyByteArray, PyBytes, PyIterator, PyString};

use crate::{train, Encoder, Pair, PieceCounts, Splitter, Watch, GPT4_PATTERN};

/// Bytes of text that are taken from Python before the GIL is given back: about a millisecond.
const BATCH_BYTES: usize = 1 << 20;
/// Between two looks at signals, and between two calls of `progress`.
const LOOK: Duration = Duration::from_millis(50);

/// A byte-level BPE vocabulary with its split pattern; untrained it holds the 256 bytes.
#[pyclass]
pub struct Tokenizer {
    encoder: Encoder,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Self { encoder: Encoder::from_merges(splitter(GPT4_PATTERN)?, &[]) })
    }

    /// Rebuild a tokenizer from what `get_pattern` and `get_mergeable_ranks` gave.
    #[staticmethod]
    fn from_ranks(
        py: Python<'_>,
        pattern: &str,
        mergeable_ranks: Vec<(Vec<u8>, u32)>,
    ) -> PyResult<Self> {
        let mut ordered = mergeable_ranks;
        ordered.sort_by_key(|(_, rank)| *rank);
        if ordered.iter().zip(0..).any(|((_, rank), place)| *rank != place) {
            return Err(PyValueError::new_err("ranks must be 0, 1, 2, ..., each once"));
        }
        let tokens: Vec<Vec<u8>> = ordered.into_iter().map(|(bytes, _)| bytes).collect();
        let splitter = splitter(pattern)?;
        let encoder = py.detach(|| Encoder::from_tokens(splitter, &tokens));
        Ok(Self { encoder: encoder.map_err(PyValueError::new_err)? })
    }

    /// Learn up to `vocab_size` tokens, bytes included; fewer when the texts have no more pairs.
    #[pyo3(signature = (
        iterator, vocab_size, buffer_size=8192, pattern=None, *, threads=None, progress=None
    ))]
    #[allow(clippy::too_many_arguments)] // the signature of PyPI's rustbpe, and two keywords
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: u32,
        buffer_size: usize,
        pattern: Option<&str>,
        threads: Option<usize>,
        progress: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        if vocab_size < 256 || buffer_size == 0 {
            return Err(PyValueError::new_err(format!(
                "vocab_size={vocab_size} must be at least 256, one token for every byte, and \
                 buffer_size={buffer_size} at least 1"
            )));
        }
        let splitter = splitter(pattern.unwrap_or(GPT4_PATTERN))?;
        let threads = thread_count(threads)?;
        let texts = PyIterator::from_object(iterator)?;
        let mut report = Report { callback: progress, last: Instant::now() };
        let counts = count(&texts, buffer_size, &splitter, threads, &mut report)?;
        let merges = learn(py, counts, vocab_size, threads, &mut report)?;
        self.encoder = py.detach(|| Encoder::from_merges(splitter, &merges));
        Ok(())
    }

    fn get_pattern(&self) -> &str {
        self.encoder.pattern()
    }

    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.encoder
            .tokens()
            .zip(0..)
            .map(|(token, rank)| (PyBytes::new(py, token), rank))
            .collect()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder.vocab_size()
    }

    /// The ids of a text.
    fn encode(&self, py: Python<'_>, text: PyBackedStr) -> PyResult<Vec<u32>> {
        py.detach(|| self.encoder.encode(&text)).map_err(PyValueError::new_err)
    }

    /// The ids of a text as numpy uint32 (T,).
    fn encode_array<'py>(&self, py: Python<'py>, text: PyBackedStr) -> PyResult<Bound<'py, PyAny>> {
        let ids = py.detach(|| self.encoder.encode(&text)).map_err(PyValueError::new_err)?;
        to_numpy(&py.import("numpy")?, &ids)
    }

    /// The ids of every text as numpy uint32 (T,), on several threads.
    #[pyo3(signature = (texts, *, threads=None))]
    fn batch_encode<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        threads: Option<usize>,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let threads = thread_count(threads)?;
        let borrowed: Vec<&str> = texts.iter().map(|text| &**text).collect();
        let encoded = py.detach(|| self.encoder.encode_batch(&borrowed, threads));
        let numpy = py.import("numpy")?;
        let encoded = encoded.map_err(PyValueError::new_err)?;
        encoded.iter().map(|ids| to_numpy(&numpy, ids)).collect()
    }

    fn decode(&self, py: Python<'_>, ids: Vec<u32>) -> PyResult<String> {
        let bytes = py.detach(|| self.encoder.decode(&ids)).map_err(PyValueError::new_err)?;
        String::from_utf8(bytes).map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }
}

fn splitter(pattern: &str) -> PyResult<Splitter> {
    Splitter::new(pattern).map_err(PyValueError::new_err)
}

fn thread_count(asked: Option<usize>) -> PyResult<usize> {
    match asked {
        Some(0) => Err(PyValueError::new_err("threads=0 must be at least 1")),
        Some(threads) => Ok(threads),
        None => Ok(thread::available_parallelism().map_or(1, usize::from)),
    }
}

fn to_numpy<'py>(numpy: &Bound<'py, PyModule>, ids: &[u32]) -> PyResult<Bound<'py, PyAny>> {
    let bytes = PyByteArray::new_with(numpy.py(), 4 * ids.len(), |buffer| {
        buffer.copy_from_slice(bytemuck::cast_slice(ids));
        Ok(())
    })?;
    numpy.call_method1("frombuffer", (bytes, "uint32"))
}

/// Tells the caller how far training is, not too often.
struct Report<'py> {
    callback: Option<Bound<'py, PyAny>>,
    last: Instant,
}

impl Report<'_> {
    /// `progress(stage, done, total)`; `total` is None where it is not known.
    fn tell(&mut self, stage: &str, done: usize, total: Option<usize>) -> PyResult<()> {
        if let Some(callback) = &self.callback {
            if self.last.elapsed() >= LOOK || Some(done) == total {
                callback.call1((stage, done, total))?;
                self.last = Instant::now();
            }
        }
        Ok(())
    }
}

/// Take the texts from Python and count their pieces on `threads` threads.
fn count(
    texts: &Bound<'_, PyIterator>,
    buffer_size: usize,
    splitter: &Splitter,
    threads: usize,
    report: &mut Report<'_>,
) -> PyResult<PieceCounts> {
    let py = texts.py();
    let failure: Mutex<Option<String>> = Mutex::default();
    let failed = AtomicBool::new(false);
    let (sender, receiver) = sync_channel::<Vec<String>>(threads + 1);
    let receiver = Mutex::new(receiver);
    let fail = |reason: String| {
        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        failed.store(true, Ordering::Relaxed);
    };
    let work = || {
        let mut counts = PieceCounts::default();
        while let Some(batch) = receive(&receiver) {
            for text in batch.iter().take_while(|_| !failed.load(Ordering::Relaxed)) {
                counts.add_text(splitter, text).unwrap_or_else(fail);
            }
        }
        counts
    };
    let parts = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut texts = texts.clone();
        let mut taken = 0;
        while !failed.load(Ordering::Relaxed) {
            let batch = take_batch(&mut texts, buffer_size, taken)?;
            if batch.is_empty() {
                break;
            }
            taken += batch.len();
            py.check_signals()?;
            report.tell("counting", taken, None)?;
            // the workers hold the other end until this one is dropped
            py.detach(|| sender.send(batch).unwrap_or_default());
        }
        drop(sender);
        Ok::<_, PyErr>(py.detach(|| {
            workers.into_iter().map(|worker| worker.join()).collect::<Result<Vec<_>, _>>()
        }))
    })?;
    if let Some(reason) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(PyValueError::new_err(reason));
    }
    let mut parts = parts.map_err(|_| PyRuntimeError::new_err("a counting thread died"))?;
    py.detach(|| {
        let mut all = parts.pop().unwrap_or_default();
        parts.into_iter().for_each(|part| all.merge(part));
        Ok(all)
    })
}

/// The next texts: `buffer_size` of them, or about `BATCH_BYTES`; empty at the end.
fn take_batch(
    texts: &mut Bound<'_, PyIterator>,
    buffer_size: usize,
    taken: usize,
) -> PyResult<Vec<String>> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while batch.len() < buffer_size && bytes < BATCH_BYTES {
        let Some(item) = texts.next() else { break };
        let item = item?;
        let text = item.cast::<PyString>().map_err(|_| {
            let kind = item.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
            let place = taken + batch.len();
            PyTypeError::new_err(format!("the iterator must yield str, item {place} is {kind}"))
        })?;
        let text = text.to_str()?.to_owned();
        bytes += text.len();
        batch.push(text);
    }
    Ok(batch)
}

fn receive(receiver: &Mutex<Receiver<Vec<String>>>) -> Option<Vec<String>> {
    receiver.lock().unwrap_or_else(PoisonError::into_inner).recv().ok()
}

/// Train on a thread of its own while this one looks for Ctrl-C.
fn learn(
    py: Python<'_>,
    counts: PieceCounts,
    vocab_size: u32,
    threads: usize,
    report: &mut Report<'_>,
) -> PyResult<Vec<Pair>> {
    let watch = Watch::default();
    let wanted = vocab_size as usize - 256;
    let merges = thread::scope(|scope| {
        let trainer = scope.spawn(|| train(counts, vocab_size, threads, &watch));
        let mut looked = Ok(());
        let mut nap = Duration::from_micros(100);
        while !trainer.is_finished() && looked.is_ok() {
            py.detach(|| thread::sleep(nap));
            nap = (2 * nap).min(LOOK);
            let merges = watch.merges.load(Ordering::Relaxed);
            looked = py.check_signals().and_then(|()| report.tell("merging", merges, Some(wanted)));
        }
        watch.stop.store(looked.is_err(), Ordering::Relaxed);
        let merges = py.detach(|| trainer.join());
        looked.map(|()| merges)
    })?;
    let merges = merges
        .map_err(|_| PyRuntimeError::new_err("the training thread died"))?
        .map_err(PyValueError::new_err)?;
    report.tell("merging", merges.len(), Some(merges.len()))?;
    Ok(merges)
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("UNICODE_VERSION", crate::UNICODE_VERSION)?;
    module.add_class::<Tokenizer>()
}
