//! Pieces of up to 15 bytes as one number, and the hash of numbers.
//!
//! The one idea: almost every piece fits into 15 bytes, and then its bytes and its length are a
//! `u128` that is compared, hashed and stored without touching memory elsewhere.

use std::hash::{BuildHasherDefault, Hasher};

/// The longest piece that is stored inside its key.
pub(crate) const INLINE: usize = 15;

/// How many lookups are prepared together, so that their cache misses overlap.
pub(crate) const BATCH: usize = 32;

/// The bytes of a piece from the lowest up, and its length in the highest byte. Never 0.
///
/// The piece is `text[start..end]`, of 1 to `INLINE` bytes.
#[inline(always)]
pub(crate) fn pack(text: &[u8], start: usize, end: usize) -> u128 {
    let length = end - start;
    let bytes = match text.get(start..start + 16).map(<[u8; 16]>::try_from) {
        Some(Ok(word)) => u128::from_le_bytes(word) & ((1 << (8 * length)) - 1),
        _ => {
            let mut word = [0; 16];
            word[..length].copy_from_slice(&text[start..end]);
            u128::from_le_bytes(word)
        }
    };
    bytes | (length as u128) << 120
}

/// The longest piece whose key has 64 bits.
pub(crate) const INLINE_SHORT: usize = 7;

/// `pack` for a piece of 1 to `INLINE_SHORT` bytes, its length in the highest byte as well.
#[inline(always)]
pub(crate) fn pack_short(text: &[u8], start: usize, end: usize) -> u64 {
    let length = end - start;
    let bytes = match text.get(start..start + 8).map(<[u8; 8]>::try_from) {
        Some(Ok(word)) => u64::from_le_bytes(word) & ((1 << (8 * length)) - 1),
        _ => {
            let mut word = [0; 8];
            word[..length].copy_from_slice(&text[start..end]);
            u64::from_le_bytes(word)
        }
    };
    bytes | (length as u64) << 56
}

/// What a table looks pieces up by; its default is no piece's.
pub(crate) trait Key: Copy + Default + PartialEq {
    /// Whose low bits are good enough to index a table.
    fn hash(self) -> usize;
}

impl Key for u64 {
    #[inline(always)]
    fn hash(self) -> usize {
        let mixed = hash_word(self ^ 0xC2B2_AE3D_27D4_EB4F);
        mixed ^ mixed >> 29
    }
}

impl Key for u128 {
    #[inline(always)]
    fn hash(self) -> usize {
        hash_key(self)
    }
}

/// The piece of a key: the first `length` bytes.
#[inline]
pub(crate) fn unpack(key: u128) -> ([u8; 16], usize) {
    (key.to_le_bytes(), (key >> 120) as usize)
}

/// A hash of a piece's key whose low bits are good enough to index a table.
#[inline(always)]
pub(crate) fn hash_key(key: u128) -> usize {
    let (low, high) = (key as u64, (key >> 64) as u64);
    let mixed = fold(low ^ 0x9E37_79B9_7F4A_7C15, high ^ 0xC2B2_AE3D_27D4_EB4F | 1);
    (mixed ^ mixed >> 29) as usize
}

/// The same for a 64-bit number.
#[inline(always)]
pub(crate) fn hash_word(word: u64) -> usize {
    fold(word, 0x9E37_79B9_7F4A_7C15) as usize
}

#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}

/// Hashes byte strings eight bytes at a time, for the standard maps of long pieces.
#[derive(Default, Clone, Copy)]
pub(crate) struct FoldHasher(u64);

pub(crate) type FoldState = BuildHasherDefault<FoldHasher>;

impl Hasher for FoldHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = fold(self.0 ^ word ^ 0x9E37_79B9_7F4A_7C15, 0xC2B2_AE3D_27D4_EB4F);
    }

    fn write_usize(&mut self, number: usize) {
        self.write_u64(number as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_pieces_apart_wherever_they_stand() {
        let text = b"a\0b the quick brown fox";
        assert_ne!(pack(text, 0, 1), pack(text, 0, 2)); // a trailing zero counts
        assert_eq!(pack(text, 3, 7), pack(b" the", 0, 4)); // with and without 16 bytes behind
        let (bytes, length) = unpack(pack(text, 4, 19));
        assert_eq!(&bytes[..length], b"the quick brown");
    }

    #[test]
    fn short_keys_do_as_well() {
        let text = b"a\0b the quick";
        assert_ne!(pack_short(text, 0, 1), pack_short(text, 0, 2));
        assert_eq!(pack_short(text, 3, 7), pack_short(b" the", 0, 4));
        for end in 1..=INLINE_SHORT {
            let key = pack_short(text, 0, end).to_le_bytes();
            assert_eq!((&key[..end], usize::from(key[7])), (&text[..end], end));
        }
    }
}
