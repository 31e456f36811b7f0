//! The encoder: pieces to ids by merging the lowest-ranked pair first, exactly as tiktoken does.
//!
//! Two tokens may merge when their bytes together are a token, whichever pair that token was
//! learned from; a piece that is a token is that token. The one idea is in `memo.rs`: most pieces
//! are looked up. Any input takes O(n log n) time in the bytes of its longest piece.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use crate::key::{hash_key, pack, FoldState, BATCH, INLINE};
use crate::memo::Memo;
use crate::pairs::{pack_pair, PairTable};
use crate::{Pair, Result, Splitter};

/// No merge, or no position.
const NONE: u32 = u32::MAX;
/// Up to this many bytes a piece is merged by looking at all of it for every merge.
const SHORT: usize = 48;
/// Bytes of text that a thread takes at a time.
const SHARE: usize = 1 << 18;

/// A vocabulary that encodes and decodes. Safe to share between threads.
pub struct Encoder {
    splitter: Splitter,
    tokens: Tokens,
    ranks: PairTable,
    /// Ranks of pairs of bytes, `NONE` where they are no token.
    byte_ranks: Vec<u32>,
    fresh: Memo,
    idle: Mutex<Vec<Memo>>,
}

/// The bytes of every token, in order of rank.
struct Tokens {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Tokens {
    fn len(&self) -> usize {
        self.ends.len()
    }

    fn push(&mut self, parts: &[&[u8]]) {
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        self.ends.push(self.bytes.len());
    }

    fn get(&self, id: usize) -> &[u8] {
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id]]
    }
}

/// Ranks by the bytes of tokens.
struct Known<'a> {
    ranks: HashMap<&'a [u8], u32, FoldState>,
    /// Every length that a token has, ascending.
    lengths: Vec<usize>,
}

impl<'a> Known<'a> {
    fn new(tokens: &'a [Vec<u8>]) -> Self {
        let ranks = tokens.iter().zip(0..).map(|(token, rank)| (&token[..], rank)).collect();
        let lengths: BTreeSet<usize> = tokens.iter().map(Vec::len).collect();
        Self { ranks, lengths: lengths.into_iter().collect() }
    }

    /// Every pair of tokens that together are `token`.
    ///
    /// Only cuts at the length of a token are tried: a token may be a megabyte long.
    fn halves<'b>(&'b self, token: &'b [u8]) -> impl Iterator<Item = (u32, u32)> + 'b {
        let shorter = self.lengths.iter().take_while(|&&length| length < token.len());
        shorter.filter_map(|&length| {
            self.lengths.binary_search(&(token.len() - length)).ok()?;
            let (left, right) = token.split_at(length);
            Some((*self.ranks.get(left)?, *self.ranks.get(right)?))
        })
    }
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
        if tokens.len() < 256 || (0..256).any(|byte| tokens[byte] != [byte as u8]) {
            return Err("the first 256 tokens must be the single bytes in order".into());
        }
        let known = Known::new(tokens);
        for (rank, token) in tokens.iter().enumerate().skip(256) {
            let last = known.ranks[&token[..]];
            if last as usize != rank {
                return Err(format!("token {rank} occurs again as token {last}"));
            }
            if known.halves(token).next().is_none() {
                return Err(format!("token {rank} is not the merge of two tokens"));
            }
        }
        Ok(Self::new(splitter, tokens))
    }

    fn new(splitter: Splitter, tokens: &[Vec<u8>]) -> Self {
        let known = Known::new(tokens);
        let mut ranks = PairTable::with_capacity(2 * tokens.len());
        let mut byte_ranks = vec![NONE; 1 << 16];
        let mut flat = Tokens { bytes: Vec::new(), ends: Vec::new() };
        for (rank, token) in tokens.iter().enumerate() {
            flat.push(&[token]);
            for (left, right) in known.halves(token) {
                ranks.add(pack_pair(left, right), rank as u64);
                if left < 256 && right < 256 {
                    byte_ranks[(left << 8 | right) as usize] = rank as u32;
                }
            }
        }
        let fresh = Memo::new(tokens.iter().map(|token| &token[..]));
        Self { splitter, tokens: flat, ranks, byte_ranks, fresh, idle: Mutex::default() }
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
        let work = || {
            self.with_memo(|memo| {
                let mut done = Vec::new();
                while let Some(range) = shares.get(next.fetch_add(1, Ordering::Relaxed)) {
                    for index in range.clone() {
                        done.push((index, self.encode_with(memo, texts[index])?));
                    }
                }
                Ok(done)
            })
        };
        let parts: Result<Vec<_>> = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut parts = vec![work()];
            for other in others {
                parts.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            parts.into_iter().collect()
        });
        let mut encoded = vec![Vec::new(); texts.len()];
        for (index, ids) in parts?.into_iter().flatten() {
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
        let mut ids = Vec::with_capacity(bytes.len() / 3 + 8);
        let mut batch = [(0_u128, 0_usize, 0_usize, 0_usize); BATCH];
        let mut waiting = 0;
        let mut work = Work::default();
        self.splitter.for_each(text, |start, end| {
            let key = if end - start > INLINE { 0 } else { pack(bytes, start, end) };
            batch[waiting] = (key, hash_key(key), start, end);
            waiting += 1;
            if waiting == BATCH {
                self.encode_pieces(memo, bytes, &batch, &mut work, &mut ids);
                waiting = 0;
            }
        })?;
        self.encode_pieces(memo, bytes, &batch[..waiting], &mut work, &mut ids);
        Ok(ids)
    }

    #[inline]
    fn encode_pieces(
        &self,
        memo: &mut Memo,
        text: &[u8],
        pieces: &[(u128, usize, usize, usize)],
        work: &mut Work,
        ids: &mut Vec<u32>,
    ) {
        // reading the slots ahead is what overlaps the misses; the sum keeps the reads alive
        let touched = pieces.iter().fold(0, |all, piece| all ^ memo.touch(piece.1));
        std::hint::black_box(touched);
        for &(key, hash, start, end) in pieces {
            let first = ids.len();
            if key != 0 {
                if !memo.recall(key, hash, ids) {
                    self.merge_piece(&text[start..end], work, ids);
                    memo.learn(key, hash, &ids[first..]);
                }
            } else if !memo.recall_long(&text[start..end], ids) {
                self.merge_piece(&text[start..end], work, ids);
                memo.learn_long(&text[start..end], &ids[first..]);
            }
        }
    }

    /// Merge until no two neighbours are a token; of equal ranks the leftmost first.
    #[cold]
    fn merge_piece(&self, piece: &[u8], work: &mut Work, out: &mut Vec<u32>) {
        if piece.len() <= SHORT {
            self.merge_short(piece, &mut work.parts, out);
        } else {
            self.merge_long(piece, out);
        }
    }

    /// O(n^2) in bytes, for few of them: everything is in the first cache.
    fn merge_short(&self, piece: &[u8], parts: &mut Vec<(u32, u32)>, out: &mut Vec<u32>) {
        parts.clear();
        parts.extend(piece.iter().enumerate().map(|(at, &byte)| {
            let rank = match piece.get(at + 1) {
                Some(&next) => self.byte_ranks[usize::from(byte) << 8 | usize::from(next)],
                None => NONE,
            };
            (u32::from(byte), rank)
        }));
        while let Some((at, rank)) = lowest(parts) {
            parts[at].0 = rank;
            parts.remove(at + 1);
            parts[at].1 = parts.get(at + 1).map_or(NONE, |next| self.rank(rank, next.0));
            if at > 0 {
                parts[at - 1].1 = self.rank(parts[at - 1].0, rank);
            }
        }
        out.extend(parts.iter().map(|part| part.0));
    }

    /// O(n log n) in bytes: a heap of pairs over a doubly linked list.
    fn merge_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        let n = piece.len() as u32;
        let mut ids: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
        let mut next: Vec<u32> = (1..=n).collect();
        let mut previous: Vec<u32> = (0..n).map(|at| at.wrapping_sub(1)).collect();
        let rank_at = |ids: &[u32], left: u32, right: u32| {
            let rank = self.rank(ids[left as usize], ids[right as usize]);
            (rank != NONE).then_some(Reverse((rank, left)))
        };
        let first: Vec<_> = (1..n).filter_map(|right| rank_at(&ids, right - 1, right)).collect();
        let mut heap = BinaryHeap::from(first);
        while let Some(Reverse((rank, left))) = heap.pop() {
            let at = left as usize;
            let right = next[at];
            if ids[at] == NONE || right == n || self.rank(ids[at], ids[right as usize]) != rank {
                continue; // one of the two has been merged away
            }
            ids[at] = rank;
            ids[right as usize] = NONE;
            next[at] = next[right as usize];
            if next[at] < n {
                previous[next[at] as usize] = left;
                heap.extend(rank_at(&ids, left, next[at]));
            }
            if previous[at] != NONE {
                heap.extend(rank_at(&ids, previous[at], left));
            }
        }
        out.extend(ids.into_iter().filter(|&id| id != NONE));
    }

    #[inline(always)]
    fn rank(&self, left: u32, right: u32) -> u32 {
        self.ranks.get(pack_pair(left, right)).map_or(NONE, |rank| rank as u32)
    }
}

/// Memory that is used again from piece to piece.
#[derive(Default)]
struct Work {
    /// Id, and rank of its merge with the next.
    parts: Vec<(u32, u32)>,
}

/// The place of the lowest rank, the leftmost of equals; None when nothing merges.
fn lowest(parts: &[(u32, u32)]) -> Option<(usize, u32)> {
    let (mut place, mut rank) = (0, NONE);
    for (at, part) in parts.iter().enumerate() {
        if part.1 < rank {
            (place, rank) = (at, part.1);
        }
    }
    (rank != NONE).then_some((place, rank))
}

/// Consecutive texts of about `SHARE` bytes together.
fn shares(texts: &[&str]) -> Vec<std::ops::Range<usize>> {
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
    fn short_long_and_remembered_pieces_give_the_same_ids() {
        let encoder = encoder(&TEXT.repeat(3), 330);
        for length in 1..120 {
            let piece = "abcabdthebananaaa".repeat(8)[..length].to_owned();
            let (mut short, mut long) = (Vec::new(), Vec::new());
            encoder.merge_short(piece.as_bytes(), &mut Vec::new(), &mut short);
            encoder.merge_long(piece.as_bytes(), &mut long);
            assert_eq!(short, long, "{piece}");
            let first = encoder.encode(&piece).unwrap();
            assert_eq!(first, encoder.encode(&piece).unwrap());
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
        assert!(encoder.encode_batch(&[], 4).unwrap().is_empty());
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
        let unordered = Encoder::from_tokens(Splitter::new("a").unwrap(), &bytes[1..]);
        assert!(unordered.err().is_some_and(|e| e.contains("single bytes")));
    }
}
