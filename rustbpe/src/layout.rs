//! The pieces in one flat array of symbols, and the counts of all its pairs.
//!
//! The one idea: there are millions of pairs and few frequent ones, so they are first counted into
//! far fewer counters than there are pairs, where pairs share one by chance. What a counter holds
//! is never less than the count of any of its pairs, so only pairs whose counter reaches a bound
//! are counted one by one, and none that reaches it is missed.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::key::hash_word;
use crate::pairs::{pack_pair, PairTable};
use crate::parallel::on_threads;
use crate::{PieceCounts, Result, Watch};

/// Between two pieces.
pub(crate) const GAP: u32 = u32::MAX;
/// The inside of a token of three or more slots, and where a second half began.
pub(crate) const INSIDE: u32 = u32::MAX - 1;

/// Counters that the pairs share.
const COUNTERS: usize = 1 << 18;
/// Slots that a thread goes through between two looks at whether to stop.
const STRIDE: usize = 1 << 16;
/// Slots for which another thread is worth its start.
const WORTH_A_THREAD: usize = 1 << 16;
/// More threads would spend more memory on counters than on the pieces.
const MOST_THREADS: usize = 8;
/// Slots per entry of the index into the runs.
const BLOCK: usize = 64;

/// Consecutive slots whose pieces occur equally often.
#[derive(Clone, Copy)]
struct Run {
    start: u32,
    weight: u64,
}

/// Every distinct piece of two bytes or more, one after the other with a `GAP` around each, the
/// most frequent first.
#[derive(Default)]
pub(crate) struct Layout {
    pub(crate) symbols: Vec<u32>,
    pub(crate) runs: Runs,
}

/// How often the piece of a slot occurs.
#[derive(Default)]
pub(crate) struct Runs {
    runs: Vec<Run>,
    /// The run of the first slot of every `BLOCK` slots.
    of_block: Vec<u32>,
}

impl Runs {
    fn begin(&mut self, start: usize, weight: u64) {
        if self.runs.last().is_none_or(|run| run.weight != weight) {
            self.runs.push(Run { start: start as u32, weight });
        }
    }

    fn index(&mut self, slots: usize) {
        let mut run = 0;
        self.of_block = (0..=slots / BLOCK)
            .map(|block| {
                while self.starts_by(run + 1, block * BLOCK) {
                    run += 1;
                }
                run as u32
            })
            .collect();
    }

    /// The weight of a slot. `run` is 0 at first and then where the last search ended: slots are
    /// asked for in ascending order.
    #[inline(always)]
    pub(crate) fn weight(&self, slot: usize, run: &mut usize) -> u64 {
        if self.starts_by(*run + 1, slot) {
            *run = (*run).max(self.of_block[slot / BLOCK] as usize);
            while self.starts_by(*run + 1, slot) {
                *run += 1;
            }
        }
        self.runs[*run].weight
    }

    #[inline(always)]
    fn starts_by(&self, run: usize, slot: usize) -> bool {
        self.runs.get(run).is_some_and(|run| run.start as usize <= slot)
    }
}

impl Layout {
    /// Errors when the pieces have 2^32 bytes or more together.
    pub(crate) fn new(counts: PieceCounts) -> Result<Self> {
        let mut pieces: Vec<(u64, u32, u32)> = Vec::with_capacity(counts.len());
        let mut bytes: Vec<u8> = Vec::new();
        counts.for_each(|piece, count| {
            if piece.len() > 1 {
                pieces.push((count, bytes.len() as u32, piece.len() as u32));
                bytes.extend_from_slice(piece);
            }
        });
        drop(counts);
        let slots = bytes.len() + pieces.len() + 1;
        if slots >= INSIDE as usize {
            return Err(format!("{slots} bytes of distinct pieces are too many: train on less"));
        }
        pieces.sort_unstable_by_key(|&(count, ..)| Reverse(count));
        let mut layout = Self { symbols: Vec::with_capacity(slots), runs: Runs::default() };
        layout.symbols.push(GAP);
        for (count, start, length) in pieces {
            layout.runs.begin(layout.symbols.len(), count);
            let piece = &bytes[start as usize..][..length as usize];
            layout.symbols.extend(piece.iter().map(|&byte| u32::from(byte)));
            layout.symbols.push(GAP);
        }
        layout.runs.index(slots);
        Ok(layout)
    }

    /// One slot a token again, and pieces that have become one token left out. In place: what is
    /// written never overtakes what is read.
    pub(crate) fn compact(&mut self, widths: &[u32]) {
        let old = std::mem::take(&mut self.runs);
        let (mut run, mut at, mut end) = (0, 1, 1);
        while at < self.symbols.len() {
            let weight = old.weight(at, &mut run);
            let start = end;
            while self.symbols[at] != GAP {
                let token = self.symbols[at];
                self.symbols[end] = token;
                end += 1;
                at += widths[token as usize] as usize;
            }
            at += 1;
            if end - start < 2 {
                end = start;
            } else {
                self.runs.begin(start, weight);
                self.symbols[end] = GAP;
                end += 1;
            }
        }
        self.symbols.truncate(end);
        self.runs.index(end);
    }

    /// The counts of all pairs that reach the largest count divided by `ratio`, and that bound; or
    /// a somewhat higher bound and the pairs that reach it. None when there is no pair.
    ///
    /// All tokens are one slot wide. O(slots), however many pairs there are.
    pub(crate) fn frequent_pairs(
        &self,
        ratio: u64,
        threads: usize,
        watch: &Watch,
    ) -> Option<(Vec<(u64, u64)>, u64)> {
        let shared = self.shared_counts(threads, watch)?;
        let mut bound = (shared.iter().max()? / ratio).max(1);
        loop {
            let counted = self.count_pairs(&shared, bound, threads, watch)?;
            let frequent: Vec<_> = counted.iter().filter(|&(_, count)| count >= bound).collect();
            // no pair may reach it where very many share a counter
            if !frequent.is_empty() || bound == 1 {
                return (!frequent.is_empty()).then_some((frequent, bound));
            }
            bound = (bound / ratio).max(1);
        }
    }

    /// Sums of the counts of the pairs that share a counter.
    fn shared_counts(&self, threads: usize, watch: &Watch) -> Option<Vec<u64>> {
        let parts = self.on_every_part(threads, |part| {
            let mut counters = vec![0; COUNTERS];
            self.for_each_pair(part, watch, |_, pair, weight| counters[counter(pair)] += weight);
            counters
        });
        sum(parts, |all, part| {
            all.iter_mut().zip(part).for_each(|(total, count)| *total += count);
        })
    }

    /// The counts of the pairs whose counter reaches `bound`.
    fn count_pairs(
        &self,
        shared: &[u64],
        bound: u64,
        threads: usize,
        watch: &Watch,
    ) -> Option<PairTable> {
        let parts = self.on_every_part(threads, |part| {
            let mut table = PairTable::with_capacity(1 << 14);
            self.for_each_pair(part, watch, |_, pair, weight| {
                if shared[counter(pair)] >= bound {
                    table.add(pair, weight);
                }
            });
            table
        });
        sum(parts, |all, part| part.iter().for_each(|(pair, count)| all.add(pair, count)))
    }

    /// Call `visit(value, place)` for every place, ascending, where a pair begins that `lookup`
    /// has a value for.
    pub(crate) fn places(
        &self,
        lookup: &PairTable,
        threads: usize,
        watch: &Watch,
        mut visit: impl FnMut(u64, u32),
    ) {
        let threads = self.parts(threads);
        // a stride of every thread at a time, so that little waits to be visited
        for start in (0..self.symbols.len()).step_by(threads * STRIDE) {
            let found = on_threads(threads, |thread| {
                let start = start + thread * STRIDE;
                let mut found: Vec<(u32, u32)> = Vec::with_capacity(STRIDE / 4);
                self.for_each_pair(start..start + STRIDE, watch, |place, pair, _| {
                    if let Some(value) = lookup.get(pair) {
                        found.push((value as u32, place as u32));
                    }
                });
                found
            });
            found.into_iter().flatten().for_each(|(value, place)| visit(u64::from(value), place));
        }
    }

    /// Call `visit(place, pair, weight)` for every adjacent pair that begins in `part`, unless
    /// told to stop.
    #[inline]
    fn for_each_pair(
        &self,
        part: Range<usize>,
        watch: &Watch,
        mut visit: impl FnMut(usize, u64, u64),
    ) {
        let mut run = 0;
        let last = part.end.min(self.symbols.len() - 1);
        for start in (part.start..last).step_by(STRIDE) {
            if watch.stop.load(Ordering::Relaxed) {
                return;
            }
            for at in start..last.min(start + STRIDE) {
                let (left, right) = (self.symbols[at], self.symbols[at + 1]);
                if left != GAP && right != GAP {
                    visit(at, pack_pair(left, right), self.runs.weight(at, &mut run));
                }
            }
        }
    }

    /// Run `work` on equal parts of the array at the same time; results in the parts' order.
    fn on_every_part<T: Send>(
        &self,
        threads: usize,
        work: impl Fn(Range<usize>) -> T + Sync,
    ) -> Vec<T> {
        let (slots, parts) = (self.symbols.len(), self.parts(threads));
        on_threads(parts, |part| work(slots * part / parts..slots * (part + 1) / parts))
    }

    fn parts(&self, threads: usize) -> usize {
        threads.clamp(1, MOST_THREADS.min(1 + self.symbols.len() / WORTH_A_THREAD))
    }
}

#[inline(always)]
fn counter(pair: u64) -> usize {
    hash_word(pair) % COUNTERS
}

/// All parts added to the first; None when there is none.
fn sum<T>(parts: Vec<T>, add: impl Fn(&mut T, T)) -> Option<T> {
    parts.into_iter().reduce(|mut all, part| {
        add(&mut all, part);
        all
    })
}
