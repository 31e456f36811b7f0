//! Merging one piece: the pair of the lowest rank first, of equal ranks the leftmost.
//!
//! Two ways with the same result: a scan for few bytes, places in order of rank for many.

use std::collections::BTreeMap;

use crate::pairs::{pack_pair, PairTable};
use crate::vocabulary::{Known, Tokens};

/// No merge, or no position.
const NONE: u32 = u32::MAX;
/// Up to this many bytes a piece is merged by looking at all of it for every merge.
const SHORT: usize = 48;

/// Which token two neighbours are together.
pub(crate) struct Ranks {
    pairs: PairTable,
    /// Of pairs of bytes, `NONE` where they are no token.
    of_bytes: Vec<u32>,
}

/// Memory that is used again from piece to piece: id, and rank of its merge with the next.
pub(crate) type Parts = Vec<(u32, u32)>;

impl Ranks {
    pub(crate) fn new(tokens: &[Vec<u8>]) -> (Self, Tokens) {
        let known = Known::new(tokens);
        let mut pairs = PairTable::with_capacity(2 * tokens.len());
        let mut of_bytes = vec![NONE; 1 << 16];
        let mut flat = Tokens::default();
        for (rank, token) in tokens.iter().enumerate() {
            flat.push(token);
            for (left, right) in known.halves(token) {
                pairs.add(pack_pair(left, right), rank as u64);
                if left < 256 && right < 256 {
                    of_bytes[(left << 8 | right) as usize] = rank as u32;
                }
            }
        }
        (Self { pairs, of_bytes }, flat)
    }

    /// Append the ids of a piece of less than 2^32 bytes.
    #[cold]
    pub(crate) fn merge(&self, piece: &[u8], parts: &mut Parts, out: &mut Vec<u32>) {
        if piece.len() <= SHORT {
            self.merge_short(piece, parts, out);
        } else {
            self.merge_long(piece, out);
        }
    }

    /// O(n^2) in bytes, for few of them: everything is in the first cache.
    fn merge_short(&self, piece: &[u8], parts: &mut Parts, out: &mut Vec<u32>) {
        parts.clear();
        parts.extend(piece.iter().enumerate().map(|(at, &byte)| {
            let rank = match piece.get(at + 1) {
                Some(&next) => self.of_bytes[usize::from(byte) << 8 | usize::from(next)],
                None => NONE,
            };
            (u32::from(byte), rank)
        }));
        while let Some((at, rank)) = lowest(parts) {
            parts[at].0 = rank;
            parts.remove(at + 1);
            parts[at].1 = parts.get(at + 1).map_or(NONE, |next| self.get(rank, next.0));
            if at > 0 {
                parts[at - 1].1 = self.get(parts[at - 1].0, rank);
            }
        }
        out.extend(parts.iter().map(|part| part.0));
    }

    /// O(n) in bytes for a given vocabulary: places wait by the rank of their merge.
    ///
    /// All places of a rank are merged together, from left to right. They come as one ascending
    /// run for every rank whose merges made them, so the sort, which merges runs, costs at most the
    /// logarithm of the vocabulary for each. A merge can make a pair of a lower rank only where
    /// the vocabulary is not one that training gives; such a pair goes first, and the rest waits.
    fn merge_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        let n = piece.len() as u32;
        let mut ids: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
        let mut next: Vec<u32> = (1..=n).collect();
        let mut previous: Vec<u32> = (0..n).map(|at| at.wrapping_sub(1)).collect();
        let mut waiting: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (left, pair) in (0..).zip(piece.windows(2)) {
            let rank = self.of_bytes[usize::from(pair[0]) << 8 | usize::from(pair[1])];
            if rank != NONE {
                waiting.entry(rank).or_default().push(left);
            }
        }
        while let Some((rank, mut places)) = waiting.pop_first() {
            places.sort();
            let mut places = places.into_iter();
            let mut lowest = NONE;
            while rank < lowest {
                let Some(left) = places.next() else { break };
                let (at, right) = (left as usize, next[left as usize]);
                if ids[at] == NONE || right == n || self.get(ids[at], ids[right as usize]) != rank {
                    continue; // one of the two has been merged away
                }
                ids[at] = rank;
                ids[right as usize] = NONE;
                next[at] = next[right as usize];
                let mut wait = |left: u32, right: u32| {
                    let rank = self.get(ids[left as usize], ids[right as usize]);
                    if rank != NONE {
                        waiting.entry(rank).or_default().push(left);
                        lowest = lowest.min(rank);
                    }
                };
                if previous[at] != NONE {
                    wait(previous[at], left);
                }
                if next[at] < n {
                    wait(left, next[at]);
                    previous[next[at] as usize] = left;
                }
            }
            if places.len() > 0 {
                waiting.entry(rank).or_default().extend(places);
            }
        }
        out.extend(ids.into_iter().filter(|&id| id != NONE));
    }

    #[inline(always)]
    fn get(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(pack_pair(left, right)).map_or(NONE, |rank| rank as u32)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Every token of the word that is written twice, and some that overlap: no order of ranks
    /// that training would give.
    fn unordered() -> Ranks {
        let mut tokens: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
        let more = ["bc", "abcab", "abca", "ab", "abc", "cab", "aaaa", "aa", "ana", "an", "na"];
        tokens.extend(more.iter().map(|token| token.as_bytes().to_vec()));
        Ranks::new(&tokens).0
    }

    #[test]
    fn both_ways_give_the_same_ids_whatever_the_order_of_ranks() {
        let ranks = unordered();
        let mut state = 7_u64;
        for round in 0..2_000 {
            let piece: Vec<u8> = (0..round % 120)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    b"abcna"[(state >> 33) as usize % 5]
                })
                .collect();
            let (mut short, mut long) = (Vec::new(), Vec::new());
            ranks.merge_short(&piece, &mut Vec::new(), &mut short);
            ranks.merge_long(&piece, &mut long);
            assert_eq!(short, long, "{}", String::from_utf8_lossy(&piece));
        }
    }
}
