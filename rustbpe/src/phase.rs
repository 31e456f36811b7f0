//! Merging between two compactions: a merge costs what it changes.
//!
//! The one idea: a token of several bytes keeps its id in its first and its last slot, so its
//! neighbours are found without links, and every tracked pair has the list of places where it
//! begins. Invariant: the count of a tracked pair is true whenever no merge is under way, and its
//! places are all of its own and some where it was.

use std::collections::{BinaryHeap, HashMap};

use crate::key::FoldState;
use crate::layout::{Layout, Runs, GAP, INSIDE};
use crate::neighbours::Neighbours;
use crate::pairs::{pack_pair, unpack_pair, PairTable};
use crate::Watch;

/// No tracked pair.
const UNTRACKED: u32 = u32::MAX;

/// A pair whose count is kept up to date.
#[derive(Default)]
struct Tracked {
    count: u64,
    /// Where it begins, ascending; places where it is no longer are told by their symbols.
    places: Vec<u32>,
}

/// The time between two compactions.
pub(crate) struct Phase<'a> {
    symbols: &'a mut [u32],
    runs: &'a Runs,
    /// Slots that a token takes.
    pub(crate) widths: Vec<u32>,
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
    /// Track the `frequent` pairs, whose counts reach `threshold`. O(slots).
    pub(crate) fn new(
        layout: &'a mut Layout,
        frequent: &[(u64, u64)],
        threshold: u64,
        vocab_size: usize,
        threads: usize,
        watch: &Watch,
    ) -> Self {
        let mut lookup = PairTable::with_capacity(2 * frequent.len());
        let mut tracked = Vec::with_capacity(frequent.len());
        let mut numbers = HashMap::with_capacity_and_hasher(frequent.len(), FoldState::default());
        for (number, &(pair, count)) in frequent.iter().enumerate() {
            lookup.add(pair, number as u64);
            numbers.insert(pair, number as u32);
            tracked.push(Tracked { count, places: Vec::new() });
        }
        layout.places(&lookup, threads, watch, |number, place| {
            tracked[number as usize].places.push(place);
        });
        let Layout { symbols, runs } = layout;
        Self {
            widths: vec![1; vocab_size],
            threshold,
            numbers,
            tracked,
            free: Vec::new(),
            heap: frequent.iter().map(|&(pair, count)| (count, !pair)).collect(),
            left: Neighbours::new(vocab_size),
            right: Neighbours::new(vocab_size),
            born: Vec::new(),
            symbols,
            runs,
        }
    }

    /// The pair to merge next; None when no tracked pair reaches the threshold.
    pub(crate) fn pop(&mut self) -> Option<u64> {
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
    pub(crate) fn merge(&mut self, pair: u64, new: u32) {
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
            let weight = self.runs.weight(first, &mut run);
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
}
