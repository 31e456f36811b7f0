"""The rows of a KV cache over the processes: each generates for its own.

The twin of `jaxchat/spread_rows.py`: every process is called alike, with all rows, holds the i-th
share of them, and returns what all have sampled. Without torchrun the one process has them all.
"""

import numpy as np
import torch

from jaxchat.backend import DecodeBatch, DecodeResult
from jaxchat.sampling_params import MAX_TOP_LOGPROBS
from torch_ref import decoding, kv_cache
from torch_ref.gpt import GPT
from torch_ref.kv_cache import KVCache
from torch_ref.sharding import Ranks


def prefill(
    ranks: Ranks, model: GPT, cache: KVCache, row: int, ids: np.ndarray, start: int
) -> tuple[KVCache, np.ndarray]:
    """A chunk of a prompt, read by the process that has its row; the logits for all."""
    decoding.check_place(cache, ids, start)
    owner, local = divmod(row, len(cache.lengths))
    logits = torch.zeros(model.config.vocab_size, device=cache.lengths.device)
    if owner == ranks.rank:
        cache, logits = decoding.prefill(model, cache, local, ids, start)
    ranks.send_to_all(logits, owner)
    return cache, logits.cpu().numpy()


def decode(ranks: Ranks, model: GPT, cache: KVCache, batch: DecodeBatch) -> DecodeResult:
    """A dispatch of every process's own rows, and what all of them sampled."""
    decoding.check_room(cache, batch)
    if ranks.world == 1:
        return decoding.decode(model, cache, batch)
    held = len(cache.lengths)
    own = slice(ranks.rank * held, (ranks.rank + 1) * held)
    result = decoding.decode(model, cache, batch.padded(ranks.world * held).part(own))
    if batch.with_top and result.top_ids is None:  # others' rows have asked
        shape = (*result.tokens.shape, min(MAX_TOP_LOGPROBS, model.config.vocab_size))
        zeros = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        result = result._replace(top_ids=zeros[0], top_logprobs=zeros[1])
    cache, *sampled = result
    placed = (torch.from_numpy(x).to(cache.lengths.device) for x in sampled if x is not None)
    everyones = (ranks.gather(x).cpu().numpy()[: len(batch.tokens)] for x in placed)
    return DecodeResult(cache, *everyones)


def copy_row(ranks: Ranks, cache: KVCache, source: int, target: int, length: int) -> KVCache:
    """Make row `target` hold the first `length` tokens of row `source`, wherever they are."""
    held = len(cache.lengths)
    (sender, source), (receiver, target) = divmod(source, held), divmod(target, held)
    if sender == receiver == ranks.rank:
        return kv_cache.copy_row(cache, source, target, length)
    if ranks.rank == sender != receiver:
        for x in (*cache.keys, *cache.values, cache.ids):
            ranks.send(x[source, :, :length], receiver)
    if ranks.rank == receiver != sender:
        for x in (*cache.keys, *cache.values, cache.ids):
            x[target, :, :length] = ranks.receive(x[target, :, :length], sender)
        cache.lengths[target] = length
    return cache
