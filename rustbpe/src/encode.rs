//! The encoder: pieces to ids by merging the lowest-ranked pair first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use fancy_regex::Regex;
use rustc_hash::FxHashMap;

use crate::{Pair, Result};

const DEAD: u32 = u32::MAX;

/// A vocabulary that encodes and decodes.
pub struct Encoder {
    pattern: Regex,
    ranks: FxHashMap<Vec<u8>, u32>,
    tokens: Vec<Vec<u8>>,
    merges: FxHashMap<Pair, u32>,
}

impl Encoder {
    /// From merges in order of rank.
    pub fn from_merges(pattern: Regex, merges: &[Pair]) -> Self {
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
        for &(left, right) in merges {
            let bytes = [&tokens[left as usize][..], &tokens[right as usize][..]].concat();
            tokens.push(bytes);
        }
        let ranks = index(&tokens);
        let merges = merges.iter().enumerate().map(|(i, &p)| (p, 256 + i as u32)).collect();
        Self { pattern, ranks, tokens, merges }
    }

    /// From token bytes in order of rank: the merge of a token is what encoding its bytes with the
    /// tokens before it ends in. Errors when that is not a pair.
    pub fn from_tokens(pattern: Regex, tokens: Vec<Vec<u8>>) -> Result<Self> {
        if tokens.len() < 256 || (0..256).any(|b| tokens[b] != [b as u8]) {
            return Err("the first 256 tokens must be the single bytes in order".into());
        }
        let mut encoder = Self::from_merges(pattern, &[]);
        for (rank, bytes) in tokens.into_iter().enumerate().skip(256) {
            let mut ids = Vec::new();
            encoder.encode_piece(&bytes, &mut ids);
            let [left, right] = ids[..] else {
                return Err(format!("token {rank} is not the merge of two tokens before it"));
            };
            encoder.merges.insert((left, right), rank as u32);
            encoder.ranks.insert(bytes.clone(), rank as u32);
            encoder.tokens.push(bytes);
        }
        Ok(encoder)
    }

    /// The bytes of every token, in order of rank.
    pub fn tokens(&self) -> &[Vec<u8>] {
        &self.tokens
    }

    /// The ids of `text`. Errors when the pattern fails or leaves text out.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut end = 0;
        for found in self.pattern.find_iter(text) {
            let found = found.map_err(|error| format!("the split pattern failed: {error}"))?;
            if found.start() != end {
                break;
            }
            end = found.end();
            self.encode_piece(found.as_str().as_bytes(), &mut ids);
        }
        if end != text.len() {
            return Err(format!("the split pattern does not match the text from byte {end} on"));
        }
        Ok(ids)
    }

    /// The bytes of `ids`. Errors on an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for &id in ids {
            let Some(token) = self.tokens.get(id as usize) else {
                return Err(format!("id {id} is not in the vocabulary of {}", self.tokens.len()));
            };
            bytes.extend_from_slice(token);
        }
        Ok(bytes)
    }

    /// Merge the lowest-ranked pair until none is left. O(n log n) in the piece's bytes.
    fn encode_piece(&self, piece: &[u8], out: &mut Vec<u32>) {
        if let Some(&rank) = self.ranks.get(piece) {
            out.push(rank);
            return;
        }
        let n = piece.len();
        let mut ids: Vec<u32> = piece.iter().map(|&b| u32::from(b)).collect();
        let mut next: Vec<usize> = (1..=n).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut heap = BinaryHeap::new();
        for i in 0..n.saturating_sub(1) {
            self.offer(&mut heap, &ids, i, i + 1);
        }
        while let Some(Reverse((rank, left))) = heap.pop() {
            let right = next[left];
            let stale = right >= n || ids[left] == DEAD;
            if stale || self.merges.get(&(ids[left], ids[right])) != Some(&rank) {
                continue;
            }
            ids[left] = rank;
            ids[right] = DEAD;
            next[left] = next[right];
            if next[left] < n {
                previous[next[left]] = left;
                self.offer(&mut heap, &ids, left, next[left]);
            }
            if previous[left] < n {
                self.offer(&mut heap, &ids, previous[left], left);
            }
        }
        out.extend(ids.into_iter().filter(|&id| id != DEAD));
    }

    fn offer(
        &self,
        heap: &mut BinaryHeap<Reverse<(u32, usize)>>,
        ids: &[u32],
        left: usize,
        right: usize,
    ) {
        if let Some(&rank) = self.merges.get(&(ids[left], ids[right])) {
            heap.push(Reverse((rank, left)));
        }
    }
}

fn index(tokens: &[Vec<u8>]) -> FxHashMap<Vec<u8>, u32> {
    tokens.iter().enumerate().map(|(rank, bytes)| (bytes.clone(), rank as u32)).collect()
}
