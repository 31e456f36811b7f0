//! The class of a character: letter, number, white space, line end or anything else.
//!
//! The one idea: ASCII is one lookup; the rest is two, through blocks of 128 characters. The
//! lookup is built at compile time from the runs in `unicode_tables.rs`. Left out: every other
//! property of Unicode.

use crate::unicode_tables::{MIXED_BLOCKS, RANGES};

/// Anything that is not one of the classes below.
pub(crate) const OTHER: u8 = 0;
/// `\p{L}`.
pub(crate) const LETTER: u8 = 1;
/// `\p{N}`.
pub(crate) const NUMBER: u8 = 2;
/// `\s` without CR and LF.
pub(crate) const SPACE: u8 = 3;
/// CR and LF.
pub(crate) const NEWLINE: u8 = 4;

const BLOCK_BITS: u32 = 7;
const BLOCK: usize = 1 << BLOCK_BITS;
const PAGES: usize = 0x11_0000 / BLOCK;
/// The first blocks are of one class each, `OTHER` to `SPACE`; the mixed ones follow.
const UNIFORM_BLOCKS: usize = 4;

struct Classes {
    block_of_page: [u8; PAGES],
    blocks: [[u8; BLOCK]; UNIFORM_BLOCKS + MIXED_BLOCKS],
}

static CLASSES: Classes = build();

/// One pass over the runs. Invariant: a page is mixed exactly when a run starts or ends inside it,
/// which is what `MIXED_BLOCKS` counts; a wrong count does not compile.
const fn build() -> Classes {
    const { assert!(UNIFORM_BLOCKS + MIXED_BLOCKS <= 256, "a block's number must fit into a byte") };
    let mut classes = Classes {
        block_of_page: [OTHER; PAGES],
        blocks: [[OTHER; BLOCK]; UNIFORM_BLOCKS + MIXED_BLOCKS],
    };
    let mut uniform = 0;
    while uniform < UNIFORM_BLOCKS {
        classes.blocks[uniform] = [uniform as u8; BLOCK];
        uniform += 1;
    }
    let mut next_block = UNIFORM_BLOCKS;
    let mut run = 0;
    while run < RANGES.len() {
        let (first, last, class) = RANGES[run];
        let mut page = first as usize / BLOCK;
        while page <= last as usize / BLOCK {
            let (low, high) = (page * BLOCK, page * BLOCK + BLOCK - 1);
            if first as usize <= low && high <= last as usize {
                classes.block_of_page[page] = class;
            } else {
                if classes.block_of_page[page] == OTHER {
                    classes.block_of_page[page] = next_block as u8;
                    next_block += 1;
                }
                let block = &mut classes.blocks[classes.block_of_page[page] as usize];
                let mut c = if low > first as usize { low } else { first as usize };
                while c <= high && c <= last as usize {
                    let newline = c == '\n' as usize || c == '\r' as usize;
                    block[c - low] = if newline { NEWLINE } else { class };
                    c += 1;
                }
            }
            page += 1;
        }
        run += 1;
    }
    assert!(next_block == UNIFORM_BLOCKS + MIXED_BLOCKS, "MIXED_BLOCKS does not fit RANGES");
    classes
}

/// Marks a byte that is not ASCII in `ASCII`.
const WIDE: u8 = u8::MAX;

static ASCII: [u8; 256] = {
    let mut table = [WIDE; 256];
    let mut c = 0;
    while c < 128 {
        table[c] = class_of(c as u32);
        c += 1;
    }
    table
};

/// Whether a byte is one of A-Z and a-z. O(1).
#[inline(always)]
pub(crate) fn is_ascii_letter(byte: u8) -> bool {
    ASCII[byte as usize] == LETTER
}

/// The class of a code point (of one outside Unicode: `OTHER`). O(1).
pub(crate) const fn class_of(code_point: u32) -> u8 {
    let page = (code_point >> BLOCK_BITS) as usize;
    if page >= PAGES {
        return OTHER;
    }
    CLASSES.blocks[CLASSES.block_of_page[page] as usize][code_point as usize % BLOCK]
}

/// Class and length in bytes of the character that starts at `text[at]`. O(1).
///
/// `text` is UTF-8 and `at < text.len()` the start of a character.
#[inline(always)]
pub(crate) fn class_at(text: &[u8], at: usize) -> (u8, usize) {
    match ASCII[text[at] as usize] {
        WIDE => wide_class_at(text, at),
        class => (class, 1),
    }
}

#[inline]
fn wide_class_at(text: &[u8], at: usize) -> (u8, usize) {
    let lead = u32::from(text[at]);
    let tail = |k: usize| u32::from(text[at + k] & 0x3F);
    if lead < 0xE0 {
        (class_of((lead & 0x1F) << 6 | tail(1)), 2)
    } else if lead < 0xF0 {
        (class_of((lead & 0xF) << 12 | tail(1) << 6 | tail(2)), 3)
    } else {
        (class_of((lead & 7) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3)), 4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_character_has_the_class_that_the_regex_engine_gives_it() {
        let classes = [(LETTER, r"\p{L}"), (NUMBER, r"\p{N}"), (SPACE, r"[\s&&[^\r\n]]")];
        let regexes = classes.map(|(class, p)| (class, fancy_regex::Regex::new(p).unwrap()));
        let mut utf8 = [0; 4];
        for c in '\0'..=char::MAX {
            let text = c.encode_utf8(&mut utf8);
            let matching = regexes.iter().find(|(_, regex)| regex.is_match(text).unwrap());
            let newline = c == '\n' || c == '\r';
            let expected = matching.map_or(if newline { NEWLINE } else { OTHER }, |(k, _)| *k);
            assert_eq!(class_at(text.as_bytes(), 0), (expected, text.len()), "{c:?}");
        }
    }
}
