//! How often each piece occurs: an open-addressing table for short ones, a map for the rest.
//!
//! The one idea: a corpus is a hundred times as many pieces as distinct ones, so counting is bound
//! by cache misses. Keys are stored in the slots, and the slots of `BATCH` pieces are read before
//! the first is needed, which lets the processor wait for all of them at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::key::{hash_key, pack, unpack, FoldState, BATCH, INLINE};
use crate::{Result, Splitter};

/// 24 bytes: a `u128` would be aligned to 16 and take 32.
#[derive(Clone, Copy, Default)]
struct Slot {
    /// The low and the high half of a piece's key; 0 where the slot is free.
    key: [u64; 2],
    count: u64,
}

impl Slot {
    fn is_free(&self) -> bool {
        self.key[1] == 0
    }

    fn packed(&self) -> u128 {
        u128::from(self.key[1]) << 64 | u128::from(self.key[0])
    }
}

fn halves(key: u128) -> [u64; 2] {
    [key as u64, (key >> 64) as u64]
}

/// Distinct pieces and their counts.
pub struct PieceCounts {
    slots: Vec<Slot>,
    used: usize,
    long: HashMap<Box<[u8]>, u64, FoldState>,
}

impl Default for PieceCounts {
    fn default() -> Self {
        Self { slots: vec![Slot::default(); 1 << 14], used: 0, long: HashMap::default() }
    }
}

impl PieceCounts {
    /// Count the pieces that `splitter` cuts from `text`.
    ///
    /// O(bytes). Errors as `Splitter::for_each` does; some pieces may then have been counted.
    pub fn add_text(&mut self, splitter: &Splitter, text: &str) -> Result<()> {
        self.add_text_until(splitter, text, &AtomicBool::new(false))
    }

    /// The same, given up soon after `stop` is set.
    pub fn add_text_until(
        &mut self,
        splitter: &Splitter,
        text: &str,
        stop: &AtomicBool,
    ) -> Result<()> {
        let bytes = text.as_bytes();
        let mut batch = [(0_u128, 0_usize); BATCH];
        let mut waiting = 0;
        splitter.for_each_while(text, |start, end| {
            if end - start > INLINE {
                self.add_long(&bytes[start..end], 1);
                return true;
            }
            let key = pack(bytes, start, end);
            batch[waiting] = (key, hash_key(key));
            waiting += 1;
            if waiting == BATCH {
                self.add_batch(&batch);
                waiting = 0;
                return !stop.load(Ordering::Relaxed);
            }
            true
        })?;
        self.add_batch(&batch[..waiting]);
        Ok(())
    }

    /// Count `piece` `count` times.
    pub fn add(&mut self, piece: &[u8], count: u64) {
        if piece.len() > INLINE {
            self.add_long(piece, count);
        } else if !piece.is_empty() {
            let key = pack(piece, 0, piece.len());
            self.add_key(key, hash_key(key), count);
        }
    }

    /// Take the counts of another table, which is empty then and keeps its room.
    pub fn take(&mut self, other: &mut Self) {
        for slot in other.slots.iter_mut().filter(|slot| !slot.is_free()) {
            let Slot { count, .. } = *slot;
            self.add_key(slot.packed(), hash_key(slot.packed()), count);
            *slot = Slot::default();
        }
        other.used = 0;
        for (piece, count) in other.long.drain() {
            *self.long.entry(piece).or_default() += count;
        }
    }

    /// Number of distinct pieces.
    pub fn len(&self) -> usize {
        self.used + self.long.len()
    }

    /// Whether nothing has been counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Call `visit(piece, count)` for every piece, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| !slot.is_free()) {
            let (bytes, length) = unpack(slot.packed());
            visit(&bytes[..length], slot.count);
        }
        for (piece, &count) in &self.long {
            visit(piece, count);
        }
    }

    fn add_batch(&mut self, batch: &[(u128, usize)]) {
        // reading the slots ahead is what overlaps the misses; the sum keeps the reads alive
        let mask = self.slots.len() - 1;
        let touched = batch.iter().fold(0, |all, &(_, hash)| all ^ self.slots[hash & mask].count);
        std::hint::black_box(touched);
        for &(key, hash) in batch {
            self.add_key(key, hash, 1);
        }
    }

    #[inline(always)]
    fn add_key(&mut self, key: u128, hash: usize, count: u64) {
        let mask = self.slots.len() - 1;
        let key = halves(key);
        let mut at = hash & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.key == key {
                slot.count += count;
                return;
            }
            if slot.is_free() {
                *slot = Slot { key, count };
                self.used += 1;
                if self.used * 4 > self.slots.len() * 3 {
                    self.grow();
                }
                return;
            }
            at = (at + 1) & mask;
        }
    }

    fn add_long(&mut self, piece: &[u8], count: u64) {
        match self.long.get_mut(piece) {
            Some(total) => *total += count,
            None => {
                self.long.insert(piece.into(), count);
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        let doubled = vec![Slot::default(); 2 * self.slots.len()];
        let old = std::mem::replace(&mut self.slots, doubled);
        let mask = self.slots.len() - 1;
        for slot in old.into_iter().filter(|slot| !slot.is_free()) {
            let mut at = hash_key(slot.packed()) & mask;
            while !self.slots[at].is_free() {
                at = (at + 1) & mask;
            }
            self.slots[at] = slot;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::SPLIT_PATTERN;

    #[test]
    fn counts_are_those_of_a_plain_map() {
        let text = "the cat's 12345 the the\n\n  incomprehensibilities, x\u{301}! ".repeat(500)
            + &(0..20_000).map(|i| format!("w{i} ")).collect::<String>();
        let splitter = Splitter::new(SPLIT_PATTERN).unwrap();
        let mut expected: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
        splitter
            .for_each(&text, |start, end| {
                *expected.entry(text.as_bytes()[start..end].to_vec()).or_default() += 3;
            })
            .unwrap();
        let (mut once, mut twice) = (PieceCounts::default(), PieceCounts::default());
        once.add_text(&splitter, &text).unwrap();
        twice.add_text(&splitter, &text).unwrap();
        twice.add_text(&splitter, &text).unwrap();
        once.take(&mut twice);
        assert!(twice.is_empty());
        let mut found = BTreeMap::new();
        once.for_each(|piece, count| assert!(found.insert(piece.to_vec(), count).is_none()));
        assert_eq!(found, expected);
        assert_eq!(once.len(), expected.len());
    }
}
