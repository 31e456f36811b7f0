//! Byte-pair encoding, exact: a trainer, an encoder, and their Python bindings.
//!
//! Training counts the pieces that a split pattern cuts from text, then merges the most frequent
//! adjacent pair until the vocabulary is full: largest count first, ties by the smallest (left id,
//! right id). Byte `b` is id `b`, merge `i` is id `256 + i`. Encoding applies the same merges in
//! order of rank inside each piece. The algorithm knows no Python; `python.rs` knows no algorithm.

mod classes;
mod count;
mod encode;
mod key;
mod layout;
mod memo;
mod merge;
mod neighbours;
mod pairs;
mod parallel;
mod phase;
mod pieces;
mod split;
mod train;
mod unicode_tables;
mod vocabulary;

#[cfg(feature = "python")]
mod feed;
#[cfg(feature = "python")]
mod python;

pub use count::PieceCounts;
pub use encode::Encoder;
pub use split::Splitter;
pub use train::{train, Watch};
pub use unicode_tables::UNICODE_VERSION;

/// An adjacent pair of token ids.
pub type Pair = (u32, u32);

/// What can go wrong, in words for the user.
pub type Result<T> = std::result::Result<T, String>;

/// The split pattern of GPT-4 (`cl100k_base`), the default of training.
pub const GPT4_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);

/// jaxchat's split pattern: GPT-4's with numbers cut into at most two digits.
pub const SPLIT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);

/// The split pattern of GPT-2.
pub const GPT2_PATTERN: &str =
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
