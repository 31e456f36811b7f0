//! The Python face: `rustbpe.Tokenizer`, compatible with PyPI's rustbpe 0.1.0.

use fancy_regex::Regex;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyIterator};

use crate::{count_pieces, train, Encoder, PieceCounts, GPT4_PATTERN};

/// A byte-level BPE tokenizer.
#[pyclass]
pub struct Tokenizer {
    pattern: String,
    encoder: Encoder,
}

fn compile(pattern: &str) -> PyResult<Regex> {
    if pattern.is_empty() {
        return Err(PyValueError::new_err("the split pattern is empty"));
    }
    Regex::new(pattern).map_err(|error| PyValueError::new_err(format!("bad pattern: {error}")))
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let encoder = Encoder::from_merges(compile(GPT4_PATTERN)?, &[]);
        Ok(Self { pattern: GPT4_PATTERN.into(), encoder })
    }

    #[staticmethod]
    fn from_ranks(pattern: &str, mergeable_ranks: Vec<(Vec<u8>, u32)>) -> PyResult<Self> {
        let mut ordered = mergeable_ranks;
        ordered.sort_by_key(|(_, rank)| *rank);
        let tokens = ordered.into_iter().map(|(bytes, _)| bytes).collect();
        let encoder =
            Encoder::from_tokens(compile(pattern)?, tokens).map_err(PyValueError::new_err)?;
        Ok(Self { pattern: pattern.into(), encoder })
    }

    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: u32,
        buffer_size: usize,
        pattern: Option<&str>,
    ) -> PyResult<()> {
        if vocab_size < 256 || buffer_size == 0 {
            return Err(PyValueError::new_err(format!(
                "vocab_size={vocab_size} must be at least 256 and buffer_size={buffer_size} \
                 at least 1"
            )));
        }
        let pattern = pattern.unwrap_or(GPT4_PATTERN);
        let regex = compile(pattern)?;
        let mut counts = PieceCounts::default();
        let mut texts = PyIterator::from_object(iterator)?;
        loop {
            let mut buffer: Vec<String> = Vec::with_capacity(buffer_size);
            for text in texts.by_ref().take(buffer_size) {
                buffer.push(text?.extract()?);
            }
            if buffer.is_empty() {
                break;
            }
            py.check_signals()?;
            py.detach(|| {
                buffer.iter().try_for_each(|text| count_pieces(&regex, text, &mut counts))
            })
            .map_err(PyValueError::new_err)?;
        }
        let merges = py.detach(|| train(&counts, vocab_size));
        self.encoder = Encoder::from_merges(regex, &merges);
        self.pattern = pattern.into();
        Ok(())
    }

    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let tokens = self.encoder.tokens().iter();
        tokens.enumerate().map(|(rank, bytes)| (PyBytes::new(py, bytes), rank as u32)).collect()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder.tokens().len()
    }

    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        py.detach(|| self.encoder.encode(text)).map_err(PyValueError::new_err)
    }

    fn batch_encode(&self, py: Python<'_>, texts: Vec<String>) -> PyResult<Vec<Vec<u32>>> {
        py.detach(|| texts.iter().map(|text| self.encoder.encode(text)).collect::<Result<_, _>>())
            .map_err(PyValueError::new_err)
    }

    fn decode(&self, ids: Vec<u32>) -> PyResult<String> {
        let bytes = self.encoder.decode(&ids).map_err(PyValueError::new_err)?;
        String::from_utf8(bytes).map_err(|error| PyRuntimeError::new_err(error.to_string()))
    }
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
