//! The trainer: counts of distinct pieces in, merges out.
//!
//! The rule: merge the pair with the largest count, of equals the smallest (left id, right id).
//! Counts are those of overlapping adjacent pairs. The one idea: a pair's count can only fall once
//! its newer id exists. So pairs that are born with a count below a threshold are not tracked at
//! all; when no tracked pair reaches the threshold, the array is compacted, all pairs are counted
//! anew and the threshold is lowered. A few such phases track some 50,000 pairs instead of
//! millions, and the result is exact.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::layout::Layout;
use crate::pairs::unpack_pair;
use crate::phase::Phase;
use crate::{Pair, PieceCounts, Result};

/// A phase tracks the pairs that reach the largest count divided by this.
const THRESHOLD_RATIO: u64 = 32;

/// Learn up to `vocab_size - 256` merges, in order; fewer when no pair is left.
///
/// `watch` shows how far training is, and can end it with an error. The result depends on the
/// counts only, not on their order or on `threads`. Time O(pieces' bytes) a phase and O(changed
/// places) a merge; memory 4 bytes a slot and 4 a tracked place. Errors when the pieces have 2^32
/// bytes or more together.
pub fn train(
    counts: PieceCounts,
    vocab_size: u32,
    threads: usize,
    watch: &Watch,
) -> Result<Vec<Pair>> {
    let mut layout = Layout::new(counts)?;
    // a merge shortens the array, so there cannot be more of them than slots
    let wanted = (vocab_size as usize).saturating_sub(256).min(layout.symbols.len());
    let mut merges: Vec<Pair> = Vec::new();
    let mut threshold = u64::MAX;
    while merges.len() < wanted && threshold > 1 {
        let frequent = layout.frequent_pairs(THRESHOLD_RATIO, threads, watch);
        watch.look()?;
        let Some((frequent, bound)) = frequent else { break };
        threshold = bound;
        let vocab_size = 256 + wanted;
        let mut phase = Phase::new(&mut layout, &frequent, threshold, vocab_size, threads, watch);
        drop(frequent);
        while merges.len() < wanted {
            watch.merges.store(merges.len(), Ordering::Relaxed);
            watch.look()?;
            let Some(pair) = phase.pop() else { break };
            phase.merge(pair, 256 + merges.len() as u32);
            merges.push(unpack_pair(pair));
        }
        let widths = phase.widths;
        layout.compact(&widths);
    }
    Ok(merges)
}

/// What another thread sees of a training run, and its way to end it.
#[derive(Default)]
pub struct Watch {
    /// Merges learned so far.
    pub merges: AtomicUsize,
    /// Set it to stop.
    pub stop: AtomicBool,
}

impl Watch {
    fn look(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err("training was interrupted".into()),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cmp::Reverse;

    use super::*;

    fn counts(pieces: &[(&[u8], u64)]) -> PieceCounts {
        let mut counts = PieceCounts::default();
        for &(piece, count) in pieces {
            counts.add(piece, count);
        }
        counts
    }

    fn learn(pieces: &[(&[u8], u64)], vocab_size: u32) -> Vec<Pair> {
        train(counts(pieces), vocab_size, 2, &Watch::default()).unwrap()
    }

    /// The rule, word for word.
    fn brute_force(pieces: &[(&[u8], u64)], vocab_size: u32) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, u64)> = pieces
            .iter()
            .map(|(piece, count)| (piece.iter().map(|&b| u32::from(b)).collect(), *count))
            .collect();
        let mut merges = Vec::new();
        while merges.len() + 256 < vocab_size as usize {
            let mut pairs: std::collections::BTreeMap<Pair, u64> = Default::default();
            for (ids, count) in &words {
                ids.windows(2).for_each(|w| *pairs.entry((w[0], w[1])).or_default() += count);
            }
            let best = pairs.iter().max_by_key(|(pair, count)| (**count, Reverse(**pair)));
            let Some((&(a, b), _)) = best else { break };
            let new = 256 + merges.len() as u32;
            merges.push((a, b));
            for (ids, _) in &mut words {
                let mut merged = Vec::new();
                let mut at = 0;
                while at < ids.len() {
                    let hit = ids[at..].starts_with(&[a, b]);
                    merged.push(if hit { new } else { ids[at] });
                    at += if hit { 2 } else { 1 };
                }
                *ids = merged;
            }
        }
        merges
    }

    /// Pseudo-random numbers below a bound.
    fn numbers(mut state: u64) -> impl FnMut(u64) -> u64 {
        move |below| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        }
    }

    #[test]
    fn the_most_frequent_pair_comes_first_and_ties_go_to_the_smallest() {
        let merges = learn(&[(b"ab", 3), (b"cd", 3), (b"ef", 5)], 259);
        assert_eq!(merges, [(101, 102), (97, 98), (99, 100)]);
    }

    #[test]
    fn overlapping_pairs_are_counted_and_merged_left_to_right() {
        assert_eq!(learn(&[(b"aaa", 1)], 300), [(97, 97), (256, 97)]);
    }

    #[test]
    fn a_small_corpus_gives_the_vocabulary_that_it_can() {
        assert_eq!(learn(&[(b"ab", 1)], 1000).len(), 1);
        assert_eq!(learn(&[(b"a", 9)], 1000).len(), 0);
        assert_eq!(learn(&[], 1000).len(), 0);
    }

    #[test]
    fn counts_beyond_32_bits_do_not_wrap() {
        let most = u64::from(u32::MAX) + 2;
        assert_eq!(learn(&[(b"ab", most), (b"cd", 3)], 257), [(97, 98)]);
    }

    #[test]
    fn merges_are_those_of_brute_force_on_random_pieces() {
        let mut random = numbers(1);
        for round in 0..300 {
            let letters = 1 + random(6);
            let owned: Vec<(Vec<u8>, u64)> = (0..1 + random(30))
                .map(|_| {
                    let length = 1 + random(24);
                    let piece = (0..length).map(|_| b'a' + random(letters) as u8).collect();
                    (piece, 1 + random(if round % 2 == 0 { 4 } else { 5000 }))
                })
                .collect();
            let mut distinct: std::collections::BTreeMap<&[u8], u64> = Default::default();
            owned.iter().for_each(|(p, c)| *distinct.entry(p).or_default() += c);
            let pieces: Vec<(&[u8], u64)> = distinct.into_iter().collect();
            assert_eq!(learn(&pieces, 300), brute_force(&pieces, 300), "round {round}");
        }
    }

    #[test]
    fn merges_of_a_corpus_for_many_threads_are_those_of_brute_force() {
        let mut random = numbers(7);
        let mut distinct: std::collections::BTreeMap<Vec<u8>, u64> = Default::default();
        for _ in 0..20_000 {
            let piece = (0..2 + random(20)).map(|_| b'a' + random(26) as u8).collect();
            *distinct.entry(piece).or_default() += 1 + random(9);
        }
        let pieces: Vec<(&[u8], u64)> = distinct.iter().map(|(p, c)| (p.as_slice(), *c)).collect();
        let expected = brute_force(&pieces, 266);
        for threads in [1, 2, 3, 8] {
            let found = train(counts(&pieces), 266, threads, &Watch::default()).unwrap();
            assert_eq!(found, expected, "{threads} threads");
        }
    }

    #[test]
    fn training_stops_when_told_to() {
        let watch = Watch { stop: true.into(), ..Watch::default() };
        let result = train(counts(&[(b"ab", 1), (b"abc", 2)]), 300, 1, &watch);
        assert!(result.unwrap_err().contains("interrupted"));
    }
}
