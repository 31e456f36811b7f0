//! The trainer: distinct pieces with counts in, merges out.

use std::collections::BinaryHeap;

use fancy_regex::Regex;
use rustc_hash::{FxHashMap, FxHashSet};

use crate::{Pair, Result};

/// How often each piece of text occurs.
pub type PieceCounts = FxHashMap<Vec<u8>, u64>;

/// Add the pieces that `pattern` cuts from `text` to `counts`.
///
/// Errors when the regex engine gives up, or when some of the text is outside every match: it
/// would be lost silently.
pub fn count_pieces(pattern: &Regex, text: &str, counts: &mut PieceCounts) -> Result<()> {
    let mut end = 0;
    for found in pattern.find_iter(text) {
        let found = found.map_err(|error| format!("the split pattern failed: {error}"))?;
        if found.start() != end {
            return Err(outside(text, end));
        }
        end = found.end();
        match counts.get_mut(found.as_str().as_bytes()) {
            Some(count) => *count += 1,
            None => {
                counts.insert(found.as_str().as_bytes().to_vec(), 1);
            }
        }
    }
    if end == text.len() {
        Ok(())
    } else {
        Err(outside(text, end))
    }
}

fn outside(text: &str, start: usize) -> String {
    let snippet: String = text[start..].chars().take(20).collect();
    format!("the split pattern does not match {snippet:?}; it must cover every character")
}

/// A candidate merge: the heap gives the largest count, then the smallest pair.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    count: u64,
    pair: std::cmp::Reverse<Pair>,
}

struct Word {
    ids: Vec<u32>,
    count: u64,
}

/// Learn up to `vocab_size - 256` merges, in order; fewer when no pair is left.
///
/// Counts are those of overlapping adjacent pairs. Deterministic whatever the order of `counts`.
/// Time O(merges x pieces that hold the merged pair), memory O(distinct pieces).
pub fn train(counts: &PieceCounts, vocab_size: u32) -> Vec<Pair> {
    let mut words: Vec<Word> = counts
        .iter()
        .filter(|(piece, _)| piece.len() > 1)
        .map(|(piece, &count)| Word { ids: piece.iter().map(|&b| u32::from(b)).collect(), count })
        .collect();
    let mut pair_counts: FxHashMap<Pair, u64> = FxHashMap::default();
    let mut places: FxHashMap<Pair, FxHashSet<u32>> = FxHashMap::default();
    for (index, word) in words.iter().enumerate() {
        for pair in pairs(&word.ids) {
            *pair_counts.entry(pair).or_default() += word.count;
            places.entry(pair).or_default().insert(index as u32);
        }
    }
    let mut heap: BinaryHeap<Candidate> = pair_counts
        .iter()
        .map(|(&pair, &count)| Candidate { count, pair: std::cmp::Reverse(pair) })
        .collect();
    let mut merges = Vec::new();
    while merges.len() + 256 < vocab_size as usize {
        let Some(Candidate { count, pair }) = heap.pop() else { break };
        let pair = pair.0;
        let present = pair_counts.get(&pair).copied().unwrap_or(0);
        if present != count {
            if present > 0 {
                heap.push(Candidate { count: present, pair: std::cmp::Reverse(pair) });
            }
            continue;
        }
        let new_id = 256 + merges.len() as u32;
        merges.push(pair);
        let mut grown = FxHashSet::default();
        for index in places.remove(&pair).unwrap_or_default() {
            let word = &mut words[index as usize];
            for old in pairs(&word.ids) {
                if let Some(total) = pair_counts.get_mut(&old) {
                    *total -= word.count;
                }
            }
            merge_in_place(&mut word.ids, pair, new_id);
            for new in pairs(&word.ids) {
                *pair_counts.entry(new).or_default() += word.count;
                if new.0 == new_id || new.1 == new_id {
                    places.entry(new).or_default().insert(index);
                    grown.insert(new);
                }
            }
        }
        for new in grown {
            let count = pair_counts.get(&new).copied().unwrap_or(0);
            heap.push(Candidate { count, pair: std::cmp::Reverse(new) });
        }
    }
    merges
}

fn pairs(ids: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    ids.windows(2).map(|w| (w[0], w[1]))
}

/// Replace every occurrence of `pair`, left to right, by `new_id`.
pub(crate) fn merge_in_place(ids: &mut Vec<u32>, pair: Pair, new_id: u32) {
    let mut write = 0;
    let mut read = 0;
    while read < ids.len() {
        if read + 1 < ids.len() && (ids[read], ids[read + 1]) == pair {
            ids[write] = new_id;
            read += 2;
        } else {
            ids[write] = ids[read];
            read += 1;
        }
        write += 1;
    }
    ids.truncate(write);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(pieces: &[(&str, u64)]) -> PieceCounts {
        pieces.iter().map(|(piece, count)| (piece.as_bytes().to_vec(), *count)).collect()
    }

    #[test]
    fn the_most_frequent_pair_comes_first_and_ties_go_to_the_smallest() {
        let merges = train(&counts(&[("ab", 3), ("cd", 3), ("ef", 5)]), 259);
        assert_eq!(merges, [(101, 102), (97, 98), (99, 100)]);
    }

    #[test]
    fn overlapping_pairs_are_counted_and_merged_left_to_right() {
        let merges = train(&counts(&[("aaa", 1)]), 300);
        assert_eq!(merges, [(97, 97), (256, 97)]);
    }

    #[test]
    fn a_small_corpus_gives_the_vocabulary_that_it_can() {
        assert_eq!(train(&counts(&[("ab", 1)]), 1000).len(), 1);
    }
}
