//! Where a piece ends, for the families of GPT-4's and GPT-2's split patterns.
//!
//! The one idea: in these patterns the class of the first character decides which alternative can
//! match, so a piece is found in one pass without backtracking. The result is exactly the regex's:
//! tests/split.rs compares them on random text of all of Unicode.

use crate::classes::{class_at, is_ascii_letter, LETTER, NEWLINE, NUMBER, OTHER, SPACE};
use crate::GPT2_PATTERN;

/// The patterns that are known by hand.
#[derive(Clone, Copy)]
pub(crate) enum Family {
    /// `'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,max_digits}|
    /// ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+`
    Gpt4 { max_digits: u32 },
    /// `'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
}

const GPT4_HEAD: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
const GPT4_TAIL: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

impl Family {
    pub(crate) fn of(pattern: &str) -> Option<Self> {
        if pattern == GPT2_PATTERN {
            return Some(Family::Gpt2);
        }
        let digits = pattern.strip_prefix(GPT4_HEAD)?.strip_suffix(GPT4_TAIL)?;
        match digits.parse() {
            Ok(max_digits @ 1..=9) if digits.len() == 1 => Some(Family::Gpt4 { max_digits }),
            _ => None,
        }
    }

    /// The end of the piece that starts at `start`, greater than `start`.
    ///
    /// `text` is UTF-8 and `start < text.len()` the start of a character.
    #[inline]
    pub(crate) fn piece_end(self, text: &[u8], start: usize) -> usize {
        match self {
            Family::Gpt4 { max_digits } => gpt4_end(text, start, max_digits),
            Family::Gpt2 => gpt2_end(text, start),
        }
    }
}

#[inline(always)]
fn gpt4_end(text: &[u8], start: usize, max_digits: u32) -> usize {
    let (class, length) = class_at(text, start);
    let next = start + length;
    match class {
        LETTER => letters_end(text, next),
        NUMBER => numbers_end(text, next, max_digits - 1),
        NEWLINE => space_end(text, start, true),
        _ => {
            if text[start] == b'\'' {
                if let Some(end) = contraction_end(text, start, true) {
                    return end;
                }
            }
            if next == text.len() {
                return next;
            }
            match (class, class_at(text, next)) {
                (_, (LETTER, n)) => letters_end(text, next + n),
                (OTHER, _) => newlines_end(text, run_end(text, next, OTHER)),
                (_, (OTHER, n)) if text[start] == b' ' => {
                    newlines_end(text, run_end(text, next + n, OTHER))
                }
                _ => space_end(text, start, true),
            }
        }
    }
}

#[inline(always)]
fn gpt2_end(text: &[u8], start: usize) -> usize {
    let (class, length) = class_at(text, start);
    let next = start + length;
    match class {
        LETTER => letters_end(text, next),
        NUMBER => run_end(text, next, NUMBER),
        OTHER => match contraction_end(text, start, false) {
            Some(end) if text[start] == b'\'' => end,
            _ => run_end(text, next, OTHER),
        },
        _ if text[start] == b' ' && next < text.len() => match class_at(text, next) {
            (LETTER, n) => letters_end(text, next + n),
            (SPACE | NEWLINE, _) => space_end(text, start, false),
            (other, n) => run_end(text, next + n, other),
        },
        _ => space_end(text, start, false),
    }
}

/// The end of the letters from `at` on: eight ASCII letters at a time, then one character.
#[inline(always)]
fn letters_end(text: &[u8], mut at: usize) -> usize {
    loop {
        while let Some(Ok(word)) = text.get(at..at + 8).map(<[u8; 8]>::try_from) {
            let not_letters = !ascii_letters(u64::from_le_bytes(word)) & HIGH_BITS;
            if not_letters != 0 {
                at += not_letters.trailing_zeros() as usize / 8;
                if text[at].is_ascii() {
                    return at;
                }
                break;
            }
            at += 8;
        }
        while at < text.len() && is_ascii_letter(text[at]) {
            at += 1;
        }
        if at == text.len() {
            return at;
        }
        match class_at(text, at) {
            (LETTER, length) => at += length,
            _ => return at,
        }
    }
}

const HIGH_BITS: u64 = 0x8080_8080_8080_8080;

/// The high bit of every byte that is an ASCII letter.
#[inline(always)]
fn ascii_letters(word: u64) -> u64 {
    let lower = word | 0x2020_2020_2020_2020;
    let from_a = (lower | HIGH_BITS).wrapping_sub(0x6161_6161_6161_6161);
    let to_z = 0xFAFA_FAFA_FAFA_FAFA_u64.wrapping_sub(lower & !HIGH_BITS);
    from_a & to_z & !word & HIGH_BITS
}

#[inline]
fn numbers_end(text: &[u8], mut at: usize, most: u32) -> usize {
    for _ in 0..most {
        if at == text.len() {
            break;
        }
        match class_at(text, at) {
            (NUMBER, length) => at += length,
            _ => break,
        }
    }
    at
}

#[inline]
fn run_end(text: &[u8], mut at: usize, class: u8) -> usize {
    while at < text.len() {
        match class_at(text, at) {
            (found, length) if found == class => at += length,
            _ => break,
        }
    }
    at
}

#[inline]
fn newlines_end(text: &[u8], mut at: usize) -> usize {
    while at < text.len() && (text[at] == b'\n' || text[at] == b'\r') {
        at += 1;
    }
    at
}

/// White space: to the last line end where these count, else all but the last character of the
/// run, else all of it.
fn space_end(text: &[u8], start: usize, line_ends: bool) -> usize {
    let (mut at, mut last, mut characters, mut after_line_end) = (start, start, 0, None);
    while at < text.len() {
        let (class, length) = class_at(text, at);
        if class != SPACE && class != NEWLINE {
            break;
        }
        last = at;
        at += length;
        characters += 1;
        if class == NEWLINE {
            after_line_end = Some(at);
        }
    }
    match after_line_end {
        Some(end) if line_ends => end,
        _ if at == text.len() || characters < 2 => at,
        _ => last,
    }
}

/// The end of `'s`, `'ll` and the like at the apostrophe at `start`, if it is one of them.
///
/// Without regard to case, U+017F (long s) is an s.
#[inline]
fn contraction_end(text: &[u8], start: usize, any_case: bool) -> Option<usize> {
    let fold = |byte: u8| if any_case { byte.to_ascii_lowercase() } else { byte };
    let rest = &text[start + 1..];
    match (rest.first().copied().map(fold)?, rest.get(1).copied().map(fold)) {
        (b's' | b'd' | b'm' | b't', _) => Some(start + 2),
        (b'l', Some(b'l')) | (b'v' | b'r', Some(b'e')) => Some(start + 3),
        (0xC5, Some(0xBF)) if any_case => Some(start + 3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_are_found_eight_at_a_time_at_every_offset() {
        for stop in ['@', '[', '`', '{', '\u{80}', 'é', '0'] {
            for length in 0..20 {
                let text = format!("{}{stop}", "aZ".repeat(length));
                let expected = if stop == 'é' { text.len() } else { 2 * length };
                assert_eq!(letters_end(text.as_bytes(), 0), expected, "{text}");
            }
        }
    }
}
