//! The encoder: texts to ids, exactly as tiktoken does it, and back.
//!
//! Two tokens may merge when their bytes together are a token, whichever pair that token was
//! learned from; a piece that is a token is that token. The one idea is in `memo.rs`: most pieces
//! are looked up. Any input takes linear time.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::memo::Memo;
use crate::merge::{Parts, Ranks};
use crate::parallel::on_threads;
use crate::vocabulary::{check, Tokens};
use crate::{Pair, Result, Splitter};

/// Bytes of text that a thread takes at a time.
const SHARE: usize = 1 << 18;
/// Longest text: places in it have 32 bits.
const LONGEST: usize = u32::MAX as usize - 1;

/// A vocabulary that encodes and decodes. Safe to share between threads.
pub struct Encoder {
    splitter: Splitter,
    tokens: Tokens,
    ranks: Ranks,
    fresh: Memo,
    idle: Mutex<Vec<Memo>>,
}

impl Encoder {
    /// From merges in order of rank, as `train` gives them.
    pub fn from_merges(splitter: Splitter, merges: &[Pair]) -> Self {
        let mut tokens: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
        for &(left, right) in merges {
            tokens.push([&tokens[left as usize][..], &tokens[right as usize][..]].concat());
        }
        Self::new(splitter, &tokens)
    }

    /// From the bytes of every token in order of rank.
    ///
    /// Errors when the first 256 are not the single bytes, or when a token occurs twice or cannot
    /// be merged from two tokens.
    pub fn from_tokens(splitter: Splitter, tokens: &[Vec<u8>]) -> Result<Self> {
        check(tokens)?;
        Ok(Self::new(splitter, tokens))
    }

    fn new(splitter: Splitter, tokens: &[Vec<u8>]) -> Self {
        let (ranks, flat) = Ranks::new(tokens);
        let fresh = Memo::new(tokens.iter().map(|token| &token[..]));
        Self { splitter, tokens: flat, ranks, fresh, idle: Mutex::default() }
    }

    /// The split pattern.
    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The bytes of every token, in order of rank.
    pub fn tokens(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.tokens.len()).map(|id| self.tokens.get(id))
    }

    /// The ids of `text`. Errors as `Splitter::for_each` does.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.with_memo(|memo| self.encode_with(memo, text))
    }

    /// The ids of every text, on up to `threads` threads.
    pub fn encode_batch(&self, texts: &[&str], threads: usize) -> Result<Vec<Vec<u32>>> {
        let shares = shares(texts);
        let threads = threads.clamp(1, shares.len().max(1));
        let next = AtomicUsize::new(0);
        let parts = on_threads(threads, |_| {
            self.with_memo(|memo| {
                let mut done = Vec::new();
                while let Some(range) = shares.get(next.fetch_add(1, Ordering::Relaxed)) {
                    for index in range.clone() {
                        done.push((index, self.encode_with(memo, texts[index])?));
                    }
                }
                Ok(done)
            })
        });
        let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
        let mut encoded = vec![Vec::new(); texts.len()];
        for (index, ids) in parts.into_iter().flatten() {
            encoded[index] = ids;
        }
        Ok(encoded)
    }

    /// The bytes of `ids`. Errors on an id outside of the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for &id in ids {
            if id as usize >= self.tokens.len() {
                return Err(format!("id {id} is not in the vocabulary of {}", self.tokens.len()));
            }
            bytes.extend_from_slice(self.tokens.get(id as usize));
        }
        Ok(bytes)
    }

    /// Lend a memo that no other thread uses.
    fn with_memo<T>(&self, work: impl FnOnce(&mut Memo) -> T) -> T {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memo = { idle().pop() }.unwrap_or_else(|| self.fresh.clone());
        let result = work(&mut memo);
        idle().push(memo);
        result
    }

    fn encode_with(&self, memo: &mut Memo, text: &str) -> Result<Vec<u32>> {
        let bytes = text.as_bytes();
        if bytes.len() > LONGEST {
            return Err(format!("a text of {} bytes is too long: encode it in parts", bytes.len()));
        }
        let mut ids = Vec::with_capacity(bytes.len() / 3 + 8);
        let mut parts = Parts::new();
        self.splitter.for_each(text, |start, end| {
            if !memo.recall(bytes, start, end, &mut ids) {
                let first = ids.len();
                self.merge(&bytes[start..end], &mut parts, &mut ids);
                memo.learn(bytes, start, end, &ids[first..]);
            }
        })?;
        Ok(ids)
    }

    /// Apart from the loop, whose registers it would take.
    #[cold]
    #[inline(never)]
    fn merge(&self, piece: &[u8], parts: &mut Parts, ids: &mut Vec<u32>) {
        self.ranks.merge(piece, parts, ids);
    }
}

/// Consecutive texts of about `SHARE` bytes together.
fn shares(texts: &[&str]) -> Vec<Range<usize>> {
    let (mut found, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (index, text) in texts.iter().enumerate() {
        bytes += text.len() + 64;
        if bytes >= SHARE {
            found.push(start..index + 1);
            (start, bytes) = (index + 1, 0);
        }
    }
    if start < texts.len() {
        found.push(start..texts.len());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{train, PieceCounts, Watch, SPLIT_PATTERN};

    fn encoder(text: &str, vocab_size: u32) -> Encoder {
        let splitter = Splitter::new(SPLIT_PATTERN).unwrap();
        let mut counts = PieceCounts::default();
        counts.add_text(&splitter, text).unwrap();
        let merges = train(counts, vocab_size, 1, &Watch::default()).unwrap();
        Encoder::from_merges(splitter, &merges)
    }

    const TEXT: &str = "the theatre there, then thence: abcabcabcabd abab 1234 aaaaaaa bananas";

    #[test]
    fn what_is_remembered_is_what_was_merged() {
        let encoder = encoder(&TEXT.repeat(3), 330);
        for length in 1..120 {
            let piece = &"abcabdthebananaaa".repeat(8)[..length];
            let first = encoder.encode(piece).unwrap();
            assert_eq!(first, encoder.encode(piece).unwrap());
            assert_eq!(encoder.decode(&first).unwrap(), piece.as_bytes());
        }
    }

    #[test]
    fn a_token_may_be_reached_by_another_pair_than_it_was_learned_from() {
        let mut tokens: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
        tokens.extend([b"bc".to_vec(), b"ab".to_vec(), b"abc".to_vec(), b"xabc".to_vec()]);
        let splitter = Splitter::new(r"[\s\S]+").unwrap();
        let encoder = Encoder::from_tokens(splitter, &tokens).unwrap();
        assert_eq!(encoder.encode("zabc").unwrap(), [u32::from(b'z'), 258]);
        assert_eq!(encoder.encode("xabc").unwrap(), [259]);
    }

    #[test]
    fn threads_change_nothing() {
        let encoder = encoder(TEXT, 300);
        let texts: Vec<String> = (0..5000).map(|i| format!("{TEXT} {i}").repeat(i % 5)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let alone = encoder.encode_batch(&texts, 1).unwrap();
        assert_eq!(encoder.encode_batch(&texts, 4).unwrap(), alone);
        let each: Vec<_> = texts.iter().map(|text| encoder.encode(text).unwrap()).collect();
        assert_eq!(alone, each);
        assert!(encoder.encode_batch(&[], 4).unwrap().is_empty());
    }

    #[test]
    fn shares_hold_every_text_once_and_are_worth_a_thread() {
        let text = "x".repeat(SHARE / 3);
        for count in 0..9 {
            let found = shares(&vec![text.as_str(); count]);
            let texts: Vec<usize> = found.iter().cloned().flatten().collect();
            assert!(texts.into_iter().eq(0..count));
            assert!(found.iter().rev().skip(1).all(|share| share.len() == 3));
        }
    }

    #[test]
    fn impossible_vocabularies_are_errors() {
        let bytes: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
        let with = |more: &[&[u8]]| {
            let all: Vec<_> =
                bytes.iter().cloned().chain(more.iter().map(|t| t.to_vec())).collect();
            Encoder::from_tokens(Splitter::new(SPLIT_PATTERN).unwrap(), &all).err()
        };
        assert!(with(&[b"ab"]).is_none());
        assert!(with(&[b"abcd"]).is_some_and(|e| e.contains("token 256 is not the merge")));
        assert!(with(&[b"ab", b"ab"]).is_some_and(|e| e.contains("occurs again")));
        for some in [&bytes[1..], &bytes[..255]] {
            let missing = Encoder::from_tokens(Splitter::new("a").unwrap(), some);
            assert!(missing.err().is_some_and(|e| e.contains("single bytes")));
        }
    }
}
