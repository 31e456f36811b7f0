//! The splitter written by hand against the regex engine, which is tiktoken's too.

use rustbpe::{Splitter, GPT2_PATTERN, GPT4_PATTERN, SPLIT_PATTERN};

const PATTERNS: [&str; 3] = [SPLIT_PATTERN, GPT4_PATTERN, GPT2_PATTERN];

fn pieces<'a>(splitter: &Splitter, text: &'a str) -> Vec<&'a str> {
    let mut found = Vec::new();
    splitter.for_each(text, |start, end| found.push(&text[start..end])).unwrap();
    found
}

/// Characters on every boundary of the patterns, and some of each class from far away.
const ALPHABET: &[char] = &[
    'a',
    'z',
    'A',
    's',
    'S',
    'd',
    'm',
    't',
    'l',
    'L',
    'v',
    'e',
    'E',
    'r',
    '\u{17F}',
    '\'',
    '\'',
    ' ',
    ' ',
    ' ',
    '\t',
    '\n',
    '\n',
    '\r',
    '\u{B}',
    '\u{85}',
    '\u{A0}',
    '\u{2028}',
    '\u{3000}',
    '0',
    '7',
    '9',
    '\u{B2}',
    '\u{660}',
    '\u{2167}',
    '-',
    '.',
    '_',
    '!',
    '\u{2019}',
    '\u{301}',
    'é',
    'ß',
    'Ω',
    '中',
    '文',
    '\u{10400}',
    '\u{1F600}',
    '\u{200D}',
    '\u{0}',
    '@',
    '[',
    '`',
    '{',
];

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn pieces_by_hand_are_those_of_the_regex_engine() {
    let mut state = 0x9E37_79B9_7F4A_7C15;
    for pattern in PATTERNS {
        let hand = Splitter::new(pattern).unwrap();
        let regex = Splitter::with_regex(pattern).unwrap();
        for round in 0..30_000 {
            let length = random(&mut state) % 24;
            let text: String = (0..length)
                .map(|_| match random(&mut state) {
                    // now and then any character at all
                    x if x % 16 == 0 => char::from_u32((x >> 8) as u32 % 0x11_0000).unwrap_or('x'),
                    x => ALPHABET[(x >> 8) as usize % ALPHABET.len()],
                })
                .collect();
            assert_eq!(pieces(&hand, &text), pieces(&regex, &text), "round {round}: {text:?}");
        }
    }
}

/// A tenth of all characters, between neighbours of every class. The class of each one there is is
/// compared in src/classes.rs; the rest of the splitter knows classes and ASCII only.
#[test]
fn characters_of_all_scripts_are_cut_as_the_regex_engine_cuts_them() {
    let dense = '\0'..='\u{3000}';
    let all: Vec<char> = dense.chain(('\u{3000}'..=char::MAX).step_by(11)).collect();
    let hand = Splitter::new(SPLIT_PATTERN).unwrap();
    let regex = Splitter::with_regex(SPLIT_PATTERN).unwrap();
    for characters in all.chunks(4096) {
        let text: String =
            characters.iter().flat_map(|&c| [c, 's', ' ', c, c, '\'', c, '7', '\n', c]).collect();
        assert_eq!(pieces(&hand, &text), pieces(&regex, &text), "from {:?}", characters[0]);
    }
}
