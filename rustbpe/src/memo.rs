//! What has been encoded before: a piece's ids by its bytes.
//!
//! The one idea: text repeats its pieces, so an encoder is mostly a lookup. A memo starts with
//! every token of the vocabulary and learns pieces up to a bounded size; each thread has its own,
//! so nothing is locked while encoding.

use std::collections::HashMap;

use crate::key::{hash_key, pack, FoldState, INLINE};

/// Most slots a memo grows to (of 32 bytes).
const MOST_SLOTS: usize = 1 << 19;
/// Most long pieces that are kept, and the longest of them: longer ones hardly repeat.
const MOST_LONG: usize = 1 << 16;
const LONGEST: usize = 256;

/// No id.
const NONE: u32 = u32::MAX;
/// In the last place: the ids are in the arena, at the offset and of the number before it.
const ELSEWHERE: u32 = u32::MAX - 1;

#[derive(Clone, Copy)]
struct Slot {
    /// 0 where the slot is free.
    key: u128,
    ids: [u32; 4],
}

const FREE: Slot = Slot { key: 0, ids: [NONE; 4] };

#[derive(Clone)]
pub(crate) struct Memo {
    slots: Vec<Slot>,
    used: usize,
    arena: Vec<u32>,
    long: HashMap<Box<[u8]>, (u32, u32), FoldState>,
}

impl Memo {
    /// One that knows every token.
    pub(crate) fn new<'a>(tokens: impl ExactSizeIterator<Item = &'a [u8]>) -> Self {
        let slots = vec![FREE; (4 * tokens.len()).next_power_of_two()];
        let mut memo = Self { slots, used: 0, arena: Vec::new(), long: HashMap::default() };
        for (id, token) in tokens.enumerate() {
            let id = id as u32;
            if token.len() > INLINE {
                let start = memo.keep(&[id]);
                memo.long.insert(token.into(), (start, 1));
            } else if !token.is_empty() {
                let key = pack(token, 0, token.len());
                memo.learn(key, hash_key(key), &[id]);
            }
        }
        memo
    }

    /// Append the ids of a short piece; false when it is not known.
    #[inline(always)]
    pub(crate) fn recall(&self, key: u128, hash: usize, out: &mut Vec<u32>) -> bool {
        let mask = self.slots.len() - 1;
        let mut at = hash & mask;
        loop {
            let slot = &self.slots[at];
            if slot.key == key {
                match slot.ids {
                    [id, NONE, ..] => out.push(id),
                    [a, b, NONE, _] => out.extend_from_slice(&[a, b]),
                    [a, b, c, NONE] => out.extend_from_slice(&[a, b, c]),
                    [start, count, _, ELSEWHERE] => {
                        out.extend_from_slice(&self.arena[start as usize..][..count as usize]);
                    }
                    ids => out.extend_from_slice(&ids),
                }
                return true;
            }
            if slot.key == 0 {
                return false;
            }
            at = (at + 1) & mask;
        }
    }

    /// Remember the ids of a short piece that is not known, if there is room.
    pub(crate) fn learn(&mut self, key: u128, hash: usize, ids: &[u32]) {
        if 2 * self.used >= self.slots.len() {
            if self.slots.len() >= MOST_SLOTS {
                return;
            }
            self.grow();
        }
        let mut stored = [NONE; 4];
        if ids.len() <= 4 {
            stored[..ids.len()].copy_from_slice(ids);
        } else {
            stored = [self.keep(ids), ids.len() as u32, NONE - 2, ELSEWHERE];
        }
        self.insert(Slot { key, ids: stored }, hash);
        self.used += 1;
    }

    /// Append the ids of a long piece; false when it is not known.
    pub(crate) fn recall_long(&self, piece: &[u8], out: &mut Vec<u32>) -> bool {
        let Some(&(start, count)) = self.long.get(piece) else { return false };
        out.extend_from_slice(&self.arena[start as usize..][..count as usize]);
        true
    }

    /// Remember the ids of a long piece that is not known, if there is room.
    pub(crate) fn learn_long(&mut self, piece: &[u8], ids: &[u32]) {
        if piece.len() <= LONGEST && self.long.len() < MOST_LONG {
            let start = self.keep(ids);
            self.long.insert(piece.into(), (start, ids.len() as u32));
        }
    }

    fn keep(&mut self, ids: &[u32]) -> u32 {
        self.arena.extend_from_slice(ids);
        (self.arena.len() - ids.len()) as u32
    }

    fn insert(&mut self, slot: Slot, hash: usize) {
        let mask = self.slots.len() - 1;
        let mut at = hash & mask;
        while self.slots[at].key != 0 {
            at = (at + 1) & mask;
        }
        self.slots[at] = slot;
    }

    #[cold]
    fn grow(&mut self) {
        let doubled = vec![FREE; 2 * self.slots.len()];
        for slot in std::mem::replace(&mut self.slots, doubled) {
            if slot.key != 0 {
                self.insert(slot, hash_key(slot.key));
            }
        }
    }
}
