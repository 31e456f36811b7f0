//! Cutting text into pieces: two families of patterns by hand, every other through a regex engine.
//!
//! Merges never cross the end of a piece, and the pieces cover the text: what a pattern does not
//! match would be lost silently, so it is an error.

use fancy_regex::Regex;

use crate::pieces::Family;
use crate::Result;

/// A compiled split pattern.
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

enum Engine {
    Hand(Family),
    Regex(Box<Regex>),
}

impl Splitter {
    /// Compile `pattern`. Errors when it is empty or not a pattern.
    pub fn new(pattern: &str) -> Result<Self> {
        let engine = match Family::of(pattern) {
            Some(family) => Engine::Hand(family),
            None => Engine::Regex(Box::new(compile(pattern)?)),
        };
        Ok(Self { pattern: pattern.to_owned(), engine })
    }

    /// The same pattern through the regex engine whatever it is: the oracle of the tests.
    pub fn with_regex(pattern: &str) -> Result<Self> {
        let engine = Engine::Regex(Box::new(compile(pattern)?));
        Ok(Self { pattern: pattern.to_owned(), engine })
    }

    /// The pattern as it was given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Call `visit(start, end)` for every piece of `text`, in order; the pieces cover it.
    ///
    /// O(bytes) for the patterns known by hand. Errors when the engine gives up, or when some of
    /// the text is outside of every match: it would be lost silently.
    #[inline]
    pub fn for_each(&self, text: &str, mut visit: impl FnMut(usize, usize)) -> Result<()> {
        self.for_each_while(text, |start, end| {
            visit(start, end);
            true
        })
    }

    /// The same until `visit` answers false.
    #[inline]
    pub fn for_each_while(
        &self,
        text: &str,
        mut visit: impl FnMut(usize, usize) -> bool,
    ) -> Result<()> {
        match &self.engine {
            Engine::Hand(family) => {
                let bytes = text.as_bytes();
                let mut start = 0;
                while start < bytes.len() {
                    let end = family.piece_end(bytes, start);
                    if !visit(start, end) {
                        break;
                    }
                    start = end;
                }
                Ok(())
            }
            Engine::Regex(regex) => {
                let mut end = 0;
                for found in regex.find_iter(text) {
                    let found = found.map_err(|e| format!("the split pattern failed: {e}"))?;
                    if found.start() != end {
                        return Err(outside(text, end));
                    }
                    if found.end() > found.start() && !visit(found.start(), found.end()) {
                        return Ok(());
                    }
                    end = found.end();
                }
                if end == text.len() {
                    Ok(())
                } else {
                    Err(outside(text, end))
                }
            }
        }
    }
}

fn compile(pattern: &str) -> Result<Regex> {
    if pattern.is_empty() {
        return Err("the split pattern is empty".into());
    }
    Regex::new(pattern).map_err(|error| format!("bad split pattern: {error}"))
}

fn outside(text: &str, start: usize) -> String {
    let snippet: String = text[start..].chars().take(20).collect();
    format!("the split pattern does not match {snippet:?}; it must cover every character")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GPT4_PATTERN, SPLIT_PATTERN};

    #[test]
    fn the_usual_patterns_are_known_by_hand() {
        let by_hand = |pattern| matches!(Splitter::new(pattern).unwrap().engine, Engine::Hand(_));
        assert!([SPLIT_PATTERN, GPT4_PATTERN, crate::GPT2_PATTERN].into_iter().all(by_hand));
        assert!(!by_hand(r"\s+|\S+"));
    }

    #[test]
    fn text_outside_of_the_pattern_is_an_error() {
        let splitter = Splitter::new(r"\p{L}+").unwrap();
        let error = splitter.for_each("abc 123", |_, _| ()).unwrap_err();
        assert!(error.contains("\" 123\""), "{error}");
        assert!(Splitter::new("").is_err());
        assert!(Splitter::new("(").is_err());
    }

    #[test]
    fn a_match_of_nothing_is_no_piece() {
        let splitter = Splitter::new("b|a*").unwrap();
        for (text, expected) in [("", vec![]), ("baab", vec!["b", "aa", "b"])] {
            let mut pieces = Vec::new();
            splitter.for_each(text, |start, end| pieces.push(&text[start..end])).unwrap();
            assert_eq!(pieces, expected);
        }
    }
}
