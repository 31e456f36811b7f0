//! The Python face: `rustbpe.Tokenizer`, a superset of PyPI's rustbpe 0.1.0.
//!
//! The GIL is held only while texts are taken from Python (`feed.rs`). Counting and merging run on
//! threads of their own, and the calling thread looks for Ctrl-C and reports progress in between.

use std::ffi::CString;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyUserWarning, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyByteArray, PyBytes, PyIterator};

use crate::feed::{count, Report};
use crate::{train, Encoder, PieceCounts, Splitter, Watch, GPT4_PATTERN};

/// Longest pause between two looks at the training thread, which a short training waits for.
const NAP: Duration = Duration::from_millis(2);
/// More threads than any machine has: what is asked for beyond is an error in the asking.
const MOST_THREADS: usize = 1024;

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
        mergeable_ranks: Vec<(PyBackedBytes, u32)>,
    ) -> PyResult<Self> {
        let mut ordered = mergeable_ranks;
        ordered.sort_by_key(|(_, rank)| *rank);
        if ordered.iter().zip(0..).any(|((_, rank), place)| *rank != place) {
            return Err(PyValueError::new_err("ranks must be 0, 1, 2, ..., each once"));
        }
        let tokens: Vec<Vec<u8>> = ordered.iter().map(|(bytes, _)| bytes.to_vec()).collect();
        let splitter = splitter(pattern)?;
        let encoder = without_gil(py, || Encoder::from_tokens(splitter, &tokens))?;
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
        let mut report = Report::new(progress);
        let (splitter, counts) = count(&texts, buffer_size, splitter, threads, &mut report)?;
        self.encoder = learn(py, counts, splitter, vocab_size, threads, &mut report)?;
        let reached = self.encoder.vocab_size();
        if reached < vocab_size as usize {
            let reason = format!(
                "the texts are too small for a vocabulary of {vocab_size}: no pair is left to \
                 merge after {reached}"
            );
            let category = py.get_type::<PyUserWarning>();
            PyErr::warn(py, &category, &CString::new(reason)?, 1)?;
        }
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
        without_gil(py, || self.encoder.encode(&text))?.map_err(PyValueError::new_err)
    }

    /// The ids of a text as numpy uint32 (T,).
    fn encode_array<'py>(&self, py: Python<'py>, text: PyBackedStr) -> PyResult<Bound<'py, PyAny>> {
        let ids = without_gil(py, || self.encoder.encode(&text))?.map_err(PyValueError::new_err)?;
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
        let encoded = without_gil(py, || self.encoder.encode_batch(&borrowed, threads))?;
        let numpy = py.import("numpy")?;
        let encoded = encoded.map_err(PyValueError::new_err)?;
        encoded.iter().map(|ids| to_numpy(&numpy, ids)).collect()
    }

    fn decode(&self, py: Python<'_>, ids: Vec<u32>) -> PyResult<String> {
        let bytes =
            without_gil(py, || self.encoder.decode(&ids))?.map_err(PyValueError::new_err)?;
        String::from_utf8(bytes).map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }
}

fn splitter(pattern: &str) -> PyResult<Splitter> {
    Splitter::new(pattern).map_err(PyValueError::new_err)
}

fn thread_count(asked: Option<usize>) -> PyResult<usize> {
    match asked {
        Some(threads @ 1..=MOST_THREADS) => Ok(threads),
        Some(threads) => Err(PyValueError::new_err(format!(
            "threads={threads} must be at least 1 and at most {MOST_THREADS}"
        ))),
        None => Ok(thread::available_parallelism().map_or(1, usize::from)),
    }
}

fn to_numpy<'py>(numpy: &Bound<'py, PyModule>, ids: &[u32]) -> PyResult<Bound<'py, PyAny>> {
    let bytes = PyByteArray::new(numpy.py(), bytemuck::cast_slice(ids));
    numpy.call_method1("frombuffer", (bytes, "uint32"))
}

/// Train on a thread of its own while this one looks for Ctrl-C.
fn learn(
    py: Python<'_>,
    counts: PieceCounts,
    splitter: Splitter,
    vocab_size: u32,
    threads: usize,
    report: &mut Report<'_>,
) -> PyResult<Encoder> {
    let watch = Arc::new(Watch::default());
    let trainers = Arc::clone(&watch);
    // not joined when interrupted: it ends at its next look, and nobody needs to wait for that
    let trainer = thread::Builder::new()
        .spawn(move || {
            let merges = train(counts, vocab_size, threads, &trainers)?;
            crate::Result::Ok(Encoder::from_merges(splitter, &merges))
        })
        .map_err(|error| PyRuntimeError::new_err(format!("no thread to train on: {error}")))?;
    let wanted = vocab_size as usize - 256;
    let mut nap = Duration::from_micros(100);
    while !trainer.is_finished() {
        py.detach(|| thread::sleep(nap));
        nap = (2 * nap).min(NAP);
        let merges = watch.merges.load(Ordering::Relaxed);
        let looked = py.check_signals().and_then(|()| report.tell("merging", merges, Some(wanted)));
        if let Err(error) = looked {
            watch.stop.store(true, Ordering::Relaxed);
            return Err(error);
        }
    }
    let encoder = trainer
        .join()
        .map_err(|_| PyRuntimeError::new_err("the training thread died"))?
        .map_err(PyValueError::new_err)?;
    let learned = encoder.vocab_size() - 256;
    report.tell("merging", learned, Some(learned))?;
    Ok(encoder)
}

/// Run `work` without the GIL. A panic would be a bug of ours; it becomes an exception that a
/// program can catch.
fn without_gil<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    py.detach(|| catch_unwind(AssertUnwindSafe(work)))
        .map_err(|_| PyRuntimeError::new_err("a bug in rustbpe: see the message on stderr"))
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("UNICODE_VERSION", crate::UNICODE_VERSION)?;
    module.add_class::<Tokenizer>()
}
