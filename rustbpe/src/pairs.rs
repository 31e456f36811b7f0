//! A table from pairs of ids to numbers.

use crate::key::hash_word;
use crate::Pair;

/// A pair as one number that orders like the pair.
#[inline(always)]
pub(crate) fn pack_pair(left: u32, right: u32) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

/// The inverse of `pack_pair`.
#[inline(always)]
pub(crate) fn unpack_pair(key: u64) -> Pair {
    ((key >> 32) as u32, key as u32)
}

/// Marks a free slot: no id reaches `u32::MAX`.
const FREE: u64 = u64::MAX;

/// Open addressing over packed pairs.
pub(crate) struct PairTable {
    slots: Vec<(u64, u64)>,
    used: usize,
}

impl PairTable {
    /// Room for `entries` without growing.
    pub(crate) fn with_capacity(entries: usize) -> Self {
        Self { slots: vec![(FREE, 0); (2 * entries.max(8)).next_power_of_two()], used: 0 }
    }

    #[inline(always)]
    pub(crate) fn get(&self, key: u64) -> Option<u64> {
        let mask = self.slots.len() - 1;
        let mut at = hash_word(key) & mask;
        loop {
            match self.slots[at] {
                (found, value) if found == key => return Some(value),
                (FREE, _) => return None,
                _ => at = (at + 1) & mask,
            }
        }
    }

    /// Add `amount` to the number of `key`, 0 where there was none.
    #[inline(always)]
    pub(crate) fn add(&mut self, key: u64, amount: u64) {
        let mask = self.slots.len() - 1;
        let mut at = hash_word(key) & mask;
        loop {
            let slot = &mut self.slots[at];
            if slot.0 == key {
                slot.1 += amount;
                return;
            }
            if slot.0 == FREE {
                *slot = (key, amount);
                self.used += 1;
                if self.used * 3 > self.slots.len() * 2 {
                    self.grow();
                }
                return;
            }
            at = (at + 1) & mask;
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.slots.iter().copied().filter(|&(key, _)| key != FREE)
    }

    #[cold]
    fn grow(&mut self) {
        let mut larger = Self::with_capacity(self.slots.len());
        for (key, value) in self.iter() {
            larger.add(key, value);
        }
        *self = larger;
    }
}
