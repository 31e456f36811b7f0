//! What has been encoded before: a piece's ids by its bytes.
//!
//! The one idea: text repeats its pieces, so an encoder is mostly a lookup. Most pieces have up to
//! seven bytes; in a table of their own they are looked up by one word. A memo starts with
//! every token of the vocabulary and learns pieces up to a bounded size; each thread has its own,
//! so nothing is locked while encoding.

use std::collections::HashMap;

use crate::key::{pack, pack_short, FoldState, Key, INLINE, INLINE_SHORT};

/// Most slots a table grows to (of 16 and of 32 bytes).
const MOST_SLOTS: usize = 1 << 19;
/// Most long pieces that are kept, and the longest of them: longer ones hardly repeat.
const MOST_LONG: usize = 1 << 16;
const LONGEST: usize = 256;

/// No id.
const NONE: u32 = u32::MAX;
/// Less their number, in the last place: the ids are in the arena, at the offset in the first.
const ELSEWHERE: u32 = NONE - 1;
/// Most ids of a piece that has a key: one a byte.
const MOST_IDS: u32 = INLINE as u32;

/// Ids by the key of a piece; a slot holds up to `IDS` of them, of more the place in the arena.
#[derive(Clone)]
struct Table<K, const IDS: usize> {
    slots: Vec<Slot<K, IDS>>,
    used: usize,
}

#[derive(Clone, Copy)]
struct Slot<K, const IDS: usize> {
    /// Zero where the slot is free.
    key: K,
    ids: [u32; IDS],
}

impl<K: Key, const IDS: usize> Table<K, IDS> {
    fn new(slots: usize) -> Self {
        Self { slots: vec![Slot { key: K::default(), ids: [NONE; IDS] }; slots], used: 0 }
    }

    /// Append the ids of a piece; false when it is not known.
    #[inline(always)]
    fn recall(&self, key: K, arena: &[u32], out: &mut Vec<u32>) -> bool {
        let mask = self.slots.len() - 1;
        let mut at = key.hash() & mask;
        loop {
            let slot = &self.slots[at];
            if slot.key == key {
                if slot.ids[1] == NONE {
                    out.push(slot.ids[0]);
                } else {
                    slot.append(arena, out);
                }
                return true;
            }
            if slot.key == K::default() {
                return false;
            }
            at = (at + 1) & mask;
        }
    }

    /// Remember the ids of a piece that is not known, if there is room.
    fn learn(&mut self, key: K, ids: &[u32], arena: &mut Vec<u32>) {
        if 2 * self.used >= self.slots.len() {
            if self.slots.len() >= MOST_SLOTS {
                return;
            }
            self.grow();
        }
        let mut stored = [NONE; IDS];
        if ids.len() <= IDS {
            stored[..ids.len()].copy_from_slice(ids);
        } else {
            stored = [0; IDS];
            stored[0] = arena.len() as u32;
            stored[IDS - 1] = ELSEWHERE - ids.len() as u32;
            arena.extend_from_slice(ids);
        }
        self.insert(Slot { key, ids: stored });
        self.used += 1;
    }

    fn insert(&mut self, slot: Slot<K, IDS>) {
        let mask = self.slots.len() - 1;
        let mut at = slot.key.hash() & mask;
        while self.slots[at].key != K::default() {
            at = (at + 1) & mask;
        }
        self.slots[at] = slot;
    }

    #[cold]
    fn grow(&mut self) {
        let old = std::mem::replace(self, Self::new(2 * self.slots.len()));
        self.used = old.used;
        for slot in old.slots {
            if slot.key != K::default() {
                self.insert(slot);
            }
        }
    }
}

impl<K, const IDS: usize> Slot<K, IDS> {
    /// The ids of a slot that holds several.
    #[inline]
    fn append(&self, arena: &[u32], out: &mut Vec<u32>) {
        let last = self.ids[IDS - 1];
        if (ELSEWHERE - MOST_IDS..ELSEWHERE).contains(&last) {
            let (start, count) = (self.ids[0] as usize, (ELSEWHERE - last) as usize);
            out.extend_from_slice(&arena[start..][..count]);
        } else {
            let count = self.ids.iter().filter(|&&id| id != NONE).count();
            out.extend_from_slice(&self.ids[..count]);
        }
    }
}

#[derive(Clone)]
pub(crate) struct Memo {
    short: Table<u64, 2>,
    medium: Table<u128, 4>,
    arena: Vec<u32>,
    long: HashMap<Box<[u8]>, (u32, u32), FoldState>,
}

impl Memo {
    /// One that knows every token.
    pub(crate) fn new<'a>(tokens: impl ExactSizeIterator<Item = &'a [u8]>) -> Self {
        let slots = (2 * tokens.len()).next_power_of_two(); // so that no token is refused
        let mut memo = Self {
            short: Table::new(slots),
            medium: Table::new(slots),
            arena: Vec::new(),
            long: HashMap::default(),
        };
        for (id, token) in tokens.enumerate().filter(|(_, token)| !token.is_empty()) {
            if token.len() > INLINE {
                memo.keep_long(token, &[id as u32]);
            } else {
                memo.learn(token, 0, token.len(), &[id as u32]);
            }
        }
        memo
    }

    /// Append the ids of the piece `text[start..end]`, not empty; false when it is not known.
    #[inline(always)]
    pub(crate) fn recall(&self, text: &[u8], start: usize, end: usize, out: &mut Vec<u32>) -> bool {
        if end - start <= INLINE_SHORT {
            self.short.recall(pack_short(text, start, end), &self.arena, out)
        } else if end - start <= INLINE {
            self.medium.recall(pack(text, start, end), &self.arena, out)
        } else {
            self.recall_long(&text[start..end], out)
        }
    }

    /// Remember the ids of a piece that is not known, if there is room.
    pub(crate) fn learn(&mut self, text: &[u8], start: usize, end: usize, ids: &[u32]) {
        if end - start <= INLINE_SHORT {
            self.short.learn(pack_short(text, start, end), ids, &mut self.arena);
        } else if end - start <= INLINE {
            self.medium.learn(pack(text, start, end), ids, &mut self.arena);
        } else if end - start <= LONGEST && self.long.len() < MOST_LONG {
            self.keep_long(&text[start..end], ids);
        }
    }

    fn keep_long(&mut self, piece: &[u8], ids: &[u32]) {
        self.long.insert(piece.into(), (self.arena.len() as u32, ids.len() as u32));
        self.arena.extend_from_slice(ids);
    }

    #[cold]
    #[inline(never)]
    fn recall_long(&self, piece: &[u8], out: &mut Vec<u32>) -> bool {
        let Some(&(start, count)) = self.long.get(piece) else { return false };
        out.extend_from_slice(&self.arena[start as usize..][..count as usize]);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_any_length_keep_any_number_of_ids() {
        let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
        let mut memo = Memo::new(bytes.iter().map(|byte| &byte[..]));
        let mut cases = Vec::new();
        for length in 2..=40_u32 {
            for count in 1..=length {
                let piece = format!("{count:_>width$}", width = length as usize);
                cases.push((piece, (0..count).map(|id| 1000 * length + id).collect::<Vec<_>>()));
            }
        }
        let mut found = Vec::new();
        for (piece, ids) in &cases {
            assert!(!memo.recall(piece.as_bytes(), 0, piece.len(), &mut found), "{piece}");
            memo.learn(piece.as_bytes(), 0, piece.len(), ids);
        }
        for (piece, ids) in &cases {
            let text = format!("{piece} and more");
            found.clear();
            assert!(memo.recall(text.as_bytes(), 0, piece.len(), &mut found), "{piece}");
            assert_eq!(&found, ids, "{piece}");
        }
        found.clear();
        assert!(memo.recall(b"a", 0, 1, &mut found));
        assert_eq!(found, [u32::from(b'a')]);
    }
}
