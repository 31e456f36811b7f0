//! The trainer: counts of distinct pieces in, merges out.
//!
//! The rule: merge the pair with the largest count, of equals the smallest (left id, right id).
//! Counts are those of overlapping adjacent pairs. Two ideas make it fast.
//!
//! 1. Pieces lie in one flat array of symbols, heaviest first. A token of several bytes keeps its
//!    id in its first and its last slot, so neighbours are found without links, and every pair has
//!    the list of places where it begins: a merge costs what it changes.
//! 2. A pair's count can only fall once its newer id exists. So pairs that are born with a count
//!    below a threshold are not tracked at all; when no tracked pair reaches the threshold, the
//!    array is compacted, all pairs are counted anew and the threshold is lowered. Five or six such
//!    phases track some 50,000 pairs instead of millions, and the result is exact.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::key::{FoldState, BATCH};
use crate::pairs::{pack_pair, unpack_pair, PairTable};
use crate::{Pair, PieceCounts, Result};

/// Between two pieces.
const GAP: u32 = u32::MAX;
/// The inside of a token of three or more slots, and where a second half began.
const INSIDE: u32 = u32::MAX - 1;
/// No tracked pair.
const UNTRACKED: u32 = u32::MAX;

/// A phase tracks the pairs that reach the largest count divided by this.
const THRESHOLD_RATIO: u64 = 32;
const INTERRUPTED: &str = "training was interrupted";

/// Slots between two looks at whether to stop.
const SLOTS_PER_LOOK: usize = 1 << 20;
/// Slots per entry of the index into the runs.
const BLOCK: usize = 64;

/// Learn up to `vocab_size - 256` merges, in order; fewer when no pair is left.
///
/// `watch` shows how far training is, and can end it with an error. The result depends on the counts
/// only, not on their order or on `threads`. Time O(pieces' bytes) a phase and O(changed places) a merge; memory 4 bytes a slot
/// and 4 a tracked place. Errors when the pieces have 2^32 bytes or more together.
pub fn train(
    counts: PieceCounts,
    vocab_size: u32,
    threads: usize,
    watch: &Watch,
) -> Result<Vec<Pair>> {
    let mut layout = Layout::new(counts)?;
    let wanted = (vocab_size as usize).saturating_sub(256);
    let mut merges: Vec<Pair> = Vec::new();
    let mut threshold = u64::MAX;
    while merges.len() < wanted && threshold > 1 {
        let counted = layout.count_pairs(threads, watch);
        if watch.stop.load(Ordering::Relaxed) {
            return Err(INTERRUPTED.into());
        }
        let Some(most) = counted.iter().map(|(_, count)| count).max() else { break };
        threshold = (most / THRESHOLD_RATIO).max(1);
        let mut phase = Phase::new(&mut layout, &counted, threshold, 256 + wanted, threads, watch);
        drop(counted);
        while merges.len() < wanted {
            watch.merges.store(merges.len(), Ordering::Relaxed);
            if watch.stop.load(Ordering::Relaxed) {
                return Err(INTERRUPTED.into());
            }
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

/// Consecutive slots whose pieces occur equally often.
#[derive(Clone, Copy)]
struct Run {
    start: u32,
    weight: u64,
}

/// Every distinct piece of two bytes or more, one after the other with a `GAP` around each.
#[derive(Default)]
struct Layout {
    symbols: Vec<u32>,
    runs: Vec<Run>,
}

impl Layout {
    fn new(counts: PieceCounts) -> Result<Self> {
        let mut pieces: Vec<(u64, usize, usize)> = Vec::with_capacity(counts.len());
        let mut bytes: Vec<u8> = Vec::new();
        counts.for_each(|piece, count| {
            if piece.len() > 1 {
                pieces.push((count, bytes.len(), piece.len()));
                bytes.extend_from_slice(piece);
            }
        });
        drop(counts);
        let slots = bytes.len() + pieces.len() + 1;
        if slots >= INSIDE as usize {
            return Err(format!("{slots} bytes of distinct pieces are too many: train on less"));
        }
        pieces.sort_unstable_by_key(|&(count, ..)| Reverse(count));
        let mut layout = Self { symbols: Vec::with_capacity(slots), runs: Vec::new() };
        layout.symbols.push(GAP);
        for (count, start, length) in pieces {
            layout.begin_run(count);
            layout.symbols.extend(bytes[start..start + length].iter().map(|&b| u32::from(b)));
            layout.symbols.push(GAP);
        }
        Ok(layout)
    }

    fn begin_run(&mut self, weight: u64) {
        if self.runs.last().is_none_or(|run| run.weight != weight) {
            self.runs.push(Run { start: self.symbols.len() as u32, weight });
        }
    }

    /// One slot a token again, and pieces that have become one token left out.
    fn compact(&mut self, widths: &[u32]) {
        let old = std::mem::take(self);
        self.symbols.push(GAP);
        let mut cursor = Cursor::new(&old.runs);
        let mut at = 1;
        while at < old.symbols.len() {
            self.begin_run(cursor.weight(at));
            let start = self.symbols.len();
            while old.symbols[at] != GAP {
                let token = old.symbols[at];
                self.symbols.push(token);
                at += widths[token as usize] as usize;
            }
            at += 1;
            if self.symbols.len() - start < 2 {
                self.symbols.truncate(start);
            } else {
                self.symbols.push(GAP);
            }
        }
    }

    /// The count of every adjacent pair. All tokens are one slot wide.
    fn count_pairs(&self, threads: usize, watch: &Watch) -> PairTable {
        let parts = self.on_every_part(threads, |part| {
            let mut table = PairTable::with_capacity(1 << 14);
            let mut batch = [(0, 0); BATCH];
            let mut waiting = 0;
            let mut flush = |batch: &[(u64, u64)]| {
                let touched = batch.iter().fold(0, |all, &(key, _)| all ^ table.touch(key));
                std::hint::black_box(touched);
                for &(key, weight) in batch {
                    table.add(key, weight);
                }
            };
            self.for_each_pair(part, watch, |_, key, weight| {
                batch[waiting] = (key, weight);
                waiting += 1;
                if waiting == BATCH {
                    flush(&batch);
                    waiting = 0;
                }
            });
            flush(&batch[..waiting]);
            table
        });
        let mut parts = parts.into_iter();
        let mut all = parts.next().unwrap_or_else(|| PairTable::with_capacity(0));
        for part in parts {
            for (key, count) in part.iter() {
                all.add(key, count);
            }
        }
        all
    }

    /// Call `visit(place, pair, weight)` for every adjacent pair that begins in `part`, unless
    /// told to stop.
    fn for_each_pair(
        &self,
        part: Range<usize>,
        watch: &Watch,
        mut visit: impl FnMut(usize, u64, u64),
    ) {
        let mut cursor = Cursor::new(&self.runs);
        for start in part.clone().step_by(SLOTS_PER_LOOK) {
            if watch.stop.load(Ordering::Relaxed) {
                return;
            }
            let end = (start + SLOTS_PER_LOOK).min(part.end).min(self.symbols.len() - 1);
            for at in start..end {
                let (left, right) = (self.symbols[at], self.symbols[at + 1]);
                if left != GAP && right != GAP {
                    visit(at, pack_pair(left, right), cursor.weight(at));
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
        let (slots, parts) = (self.symbols.len(), threads.clamp(1, 1 + self.symbols.len() / 65536));
        let work = &work;
        thread::scope(|scope| {
            let range = |part: usize| slots * part / parts..slots * (part + 1) / parts;
            let others: Vec<_> =
                (1..parts).map(|part| scope.spawn(move || work(range(part)))).collect();
            let mut results = vec![work(range(0))];
            for other in others {
                results.push(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            results
        })
    }
}

/// The weight of slots that are asked for in ascending order.
struct Cursor<'a> {
    runs: &'a [Run],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn new(runs: &'a [Run]) -> Self {
        Self { runs, at: 0 }
    }

    #[inline(always)]
    fn weight(&mut self, slot: usize) -> u64 {
        if self.runs.get(self.at + 1).is_some_and(|next| next.start as usize <= slot) {
            // far on a first call, one run further on the others
            let rest = &self.runs[self.at + 1..];
            self.at += if rest.get(1).is_some_and(|next| next.start as usize <= slot) {
                rest.partition_point(|run| run.start as usize <= slot)
            } else {
                1
            };
        }
        self.runs[self.at].weight
    }
}

/// A pair whose count is kept up to date.
#[derive(Default)]
struct Tracked {
    count: u64,
    /// Where it begins, ascending; places where it is no longer are told by their symbols.
    places: Vec<u32>,
}

/// The time between two compactions.
struct Phase<'a> {
    symbols: &'a mut [u32],
    runs: &'a [Run],
    /// The run of the first slot of every `BLOCK` slots.
    run_of_block: Vec<u32>,
    /// Slots that a token takes.
    widths: Vec<u32>,
    threshold: u64,
    numbers: HashMap<u64, u32, FoldState>,
    tracked: Vec<Tracked>,
    free: Vec<u32>,
    /// Count and inverted pair: the top is the next merge, once its count is up to date.
    heap: BinaryHeap<(u64, u64)>,
    left: Neighbours,
    right: Neighbours,
    /// New pairs of a merge: which neighbour, and where it begins.
    born: Vec<(Origin, u32)>,
}

/// Which new pair a place belongs to: with the n-th left or right neighbour, or with itself.
#[derive(Clone, Copy)]
enum Origin {
    Left(u32),
    Right(u32),
    Itself,
}

impl<'a> Phase<'a> {
    fn new(
        layout: &'a mut Layout,
        counted: &PairTable,
        threshold: u64,
        vocab_size: usize,
        threads: usize,
        watch: &Watch,
    ) -> Self {
        let frequent: Vec<(u64, u64)> =
            counted.iter().filter(|&(_, count)| count >= threshold).collect();
        let mut lookup = PairTable::with_capacity(4 * frequent.len());
        let mut tracked = Vec::with_capacity(frequent.len());
        let mut numbers = HashMap::with_capacity_and_hasher(frequent.len(), FoldState::default());
        for (number, &(key, count)) in frequent.iter().enumerate() {
            lookup.add(key, number as u64);
            numbers.insert(key, number as u32);
            tracked.push(Tracked { count, places: Vec::new() });
        }
        let parts = layout.on_every_part(threads, |part| {
            let mut found: Vec<(u32, u32)> = Vec::new();
            layout.for_each_pair(part, watch, |place, key, _| {
                if let Some(number) = lookup.get(key) {
                    found.push((number as u32, place as u32));
                }
            });
            found
        });
        let mut sizes = vec![0; tracked.len()];
        parts.iter().flatten().for_each(|&(number, _)| sizes[number as usize] += 1);
        for (pair, size) in tracked.iter_mut().zip(sizes) {
            pair.places.reserve_exact(size);
        }
        for (number, place) in parts.into_iter().flatten() {
            tracked[number as usize].places.push(place);
        }
        let Layout { symbols, runs } = layout;
        Self {
            run_of_block: index_runs(runs, symbols.len()),
            widths: vec![1; vocab_size],
            threshold,
            numbers,
            tracked,
            free: Vec::new(),
            heap: frequent.iter().map(|&(key, count)| (count, !key)).collect(),
            left: Neighbours::new(vocab_size),
            right: Neighbours::new(vocab_size),
            born: Vec::new(),
            symbols,
            runs,
        }
    }

    /// The pair to merge next; None when no tracked pair reaches the threshold.
    fn pop(&mut self) -> Option<u64> {
        while let Some((count, inverted)) = self.heap.pop() {
            let key = !inverted;
            let Some(&number) = self.numbers.get(&key) else { continue };
            let present = self.tracked[number as usize].count;
            if present == count {
                return Some(key);
            }
            if present >= self.threshold {
                self.heap.push((present, inverted));
            } else {
                self.forget(key);
            }
        }
        None
    }

    /// Stop tracking a pair and return its places.
    fn forget(&mut self, key: u64) -> Vec<u32> {
        let Some(number) = self.numbers.remove(&key) else { return Vec::new() };
        self.free.push(number);
        std::mem::take(&mut self.tracked[number as usize].places)
    }

    /// Replace the pair by `new`, left to right, and keep all counts true.
    fn merge(&mut self, pair: u64, new: u32) {
        let (a, b) = unpack_pair(pair);
        let places = self.forget(pair);
        let (width_a, width_b) = (self.width(a), self.width(b));
        let width = width_a + width_b;
        self.widths[new as usize] = width as u32;
        let mut doubled = 0; // weight of pairs of the new token with itself
        let mut run = 0;
        for place in places {
            let first = place as usize;
            let second = first + width_a;
            if self.symbols[first] != a || self.symbols[second] != b {
                continue; // merged away since the place was noted
            }
            let weight = self.weight_at(first, &mut run);
            let (before, after) = (self.symbols[first - 1], self.symbols[first + width]);
            if before == new {
                doubled += weight;
                self.born.push((Origin::Itself, (first - width) as u32));
            } else if before != GAP {
                let origin = Origin::Left(self.left.add(before, weight));
                self.born.push((origin, (first - self.width(before)) as u32));
            }
            if after != GAP {
                self.born.push((Origin::Right(self.right.add(after, weight)), place));
            }
            if width_a > 1 {
                self.symbols[second - 1] = INSIDE;
            }
            if width_b > 1 {
                self.symbols[second] = INSIDE;
            }
            self.symbols[first] = new;
            self.symbols[first + width - 1] = new;
        }
        self.settle(a, b, new, doubled);
    }

    /// Lower the counts of the pairs that a merge has taken apart and track those it has made.
    fn settle(&mut self, a: u32, b: u32, new: u32, doubled: u64) {
        let (left, right) = (self.left.drain(), self.right.drain());
        let mut of_left = Vec::with_capacity(left.len());
        for (id, weight) in left {
            self.lower(pack_pair(id, a), weight);
            of_left.push(self.track(pack_pair(id, new), weight));
        }
        let mut of_right = Vec::with_capacity(right.len());
        for (id, weight) in right {
            self.lower(pack_pair(b, id), weight);
            // where the right neighbour was merged in turn, the pair is (new, new)
            let weight = if id == a { weight - doubled } else { weight };
            of_right.push(self.track(pack_pair(new, id), weight));
        }
        let of_itself = self.track(pack_pair(new, new), doubled);
        for (origin, place) in self.born.drain(..) {
            let number = match origin {
                Origin::Left(n) => of_left[n as usize],
                Origin::Right(n) => of_right[n as usize],
                Origin::Itself => of_itself,
            };
            if number != UNTRACKED {
                self.tracked[number as usize].places.push(place);
            }
        }
    }

    fn lower(&mut self, key: u64, weight: u64) {
        if let Some(&number) = self.numbers.get(&key) {
            self.tracked[number as usize].count -= weight;
        }
    }

    fn track(&mut self, key: u64, count: u64) -> u32 {
        if count < self.threshold {
            return UNTRACKED;
        }
        let number = self.free.pop().unwrap_or_else(|| {
            self.tracked.push(Tracked::default());
            self.tracked.len() as u32 - 1
        });
        self.tracked[number as usize].count = count;
        self.numbers.insert(key, number);
        self.heap.push((count, !key));
        number
    }

    #[inline(always)]
    fn width(&self, id: u32) -> usize {
        self.widths[id as usize] as usize
    }

    /// The weight of a slot; `run` is where the last search ended, and slots come in ascending
    /// order.
    #[inline(always)]
    fn weight_at(&self, slot: usize, run: &mut usize) -> u64 {
        *run = (*run).max(self.run_of_block[slot / BLOCK] as usize);
        while self.runs.get(*run + 1).is_some_and(|next| next.start as usize <= slot) {
            *run += 1;
        }
        self.runs[*run].weight
    }
}

fn index_runs(runs: &[Run], slots: usize) -> Vec<u32> {
    let mut run = 0;
    (0..=slots / BLOCK)
        .map(|block| {
            while runs.get(run + 1).is_some_and(|next| next.start as usize <= block * BLOCK) {
                run += 1;
            }
            run as u32
        })
        .collect()
}

/// Weights by neighbouring id, gathered over one merge.
struct Neighbours {
    /// 0 where an id has not been met.
    weight: Vec<u64>,
    number: Vec<u32>,
    met: Vec<u32>,
}

impl Neighbours {
    fn new(vocab_size: usize) -> Self {
        Self { weight: vec![0; vocab_size], number: vec![0; vocab_size], met: Vec::new() }
    }

    /// Add to the weight of `id`; returns how many others were met before it.
    #[inline(always)]
    fn add(&mut self, id: u32, weight: u64) -> u32 {
        let at = id as usize;
        if self.weight[at] == 0 {
            self.number[at] = self.met.len() as u32;
            self.met.push(id);
        }
        self.weight[at] += weight;
        self.number[at]
    }

    /// Every id with its weight, in the order in which they were met; all are forgotten.
    fn drain(&mut self) -> Vec<(u32, u64)> {
        let weight = &mut self.weight;
        self.met.drain(..).map(|id| (id, std::mem::take(&mut weight[id as usize]))).collect()
    }
}

#[cfg(test)]
mod tests {
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
        let mut state = 1_u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
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
    fn training_stops_when_told_to() {
        let watch = Watch { stop: true.into(), ..Watch::default() };
        let result = train(counts(&[(b"ab", 1), (b"abc", 2)]), 300, 1, &watch);
        assert!(result.unwrap_err().contains("interrupted"));
    }
}
