//! Tokens by rank, ranks by bytes, and which vocabularies can be merged at all.

use std::collections::{BTreeSet, HashMap};

use crate::key::FoldState;
use crate::Result;

/// The bytes of every token, in order of rank.
#[derive(Default)]
pub(crate) struct Tokens {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Tokens {
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(crate) fn push(&mut self, token: &[u8]) {
        self.bytes.extend_from_slice(token);
        self.ends.push(self.bytes.len());
    }

    pub(crate) fn get(&self, id: usize) -> &[u8] {
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start..self.ends[id]]
    }
}

/// Ranks by the bytes of tokens.
pub(crate) struct Known<'a> {
    pub(crate) ranks: HashMap<&'a [u8], u32, FoldState>,
    /// Every length that a token has, ascending.
    lengths: Vec<usize>,
}

impl<'a> Known<'a> {
    pub(crate) fn new(tokens: &'a [Vec<u8>]) -> Self {
        let ranks = tokens.iter().zip(0..).map(|(token, rank)| (&token[..], rank)).collect();
        let lengths: BTreeSet<usize> = tokens.iter().map(Vec::len).collect();
        Self { ranks, lengths: lengths.into_iter().collect() }
    }

    /// Every pair of tokens that together are `token`.
    ///
    /// Only cuts at the length of a token are tried: a token may be a megabyte long.
    pub(crate) fn halves<'b>(&'b self, token: &'b [u8]) -> impl Iterator<Item = (u32, u32)> + 'b {
        let shorter = self.lengths.iter().take_while(|&&length| length < token.len());
        shorter.filter_map(|&length| {
            self.lengths.binary_search(&(token.len() - length)).ok()?;
            let (left, right) = token.split_at(length);
            Some((*self.ranks.get(left)?, *self.ranks.get(right)?))
        })
    }
}

/// Errors when the first 256 tokens are not the single bytes, or when a token occurs twice or
/// cannot be merged from two tokens.
pub(crate) fn check(tokens: &[Vec<u8>]) -> Result<()> {
    if tokens.len() < 256 || (0..256).any(|byte| tokens[byte] != [byte as u8]) {
        return Err("the first 256 tokens must be the single bytes in order".into());
    }
    let known = Known::new(tokens);
    for (rank, token) in tokens.iter().enumerate().skip(256) {
        let last = known.ranks[&token[..]];
        if last as usize != rank {
            return Err(format!("token {rank} occurs again as token {last}"));
        }
        if known.halves(token).next().is_none() {
            return Err(format!("token {rank} is not the merge of two tokens"));
        }
    }
    Ok(())
}
