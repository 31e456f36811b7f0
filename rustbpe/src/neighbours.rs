//! Weights by neighbouring id, gathered over one merge.
//!
//! The one idea: a merge meets the same few neighbours at thousands of places, so their weights are
//! added up in arrays indexed by id, and each pair's count changes once.

/// Ids, in the order in which they were met.
pub(crate) struct Neighbours {
    /// 0 where an id has not been met.
    weight: Vec<u64>,
    number: Vec<u32>,
    met: Vec<u32>,
}

impl Neighbours {
    pub(crate) fn new(vocab_size: usize) -> Self {
        Self { weight: vec![0; vocab_size], number: vec![0; vocab_size], met: Vec::new() }
    }

    /// Add to the weight of `id`; returns how many others were met before it.
    #[inline(always)]
    pub(crate) fn add(&mut self, id: u32, weight: u64) -> u32 {
        let at = id as usize;
        if self.weight[at] == 0 {
            self.number[at] = self.met.len() as u32;
            self.met.push(id);
        }
        self.weight[at] += weight;
        self.number[at]
    }

    /// Every id with its weight, in the order in which they were met; all are forgotten.
    pub(crate) fn drain(&mut self) -> Vec<(u32, u64)> {
        let weight = &mut self.weight;
        self.met.drain(..).map(|id| (id, std::mem::take(&mut weight[id as usize]))).collect()
    }
}
