"""Generation on the device: fill a cache row, then sample token after token for many rows.

The twin of `jaxchat/decoding.py`, eager: a loop that works on views of the cache, which hold only
the rows and positions in use, so that nothing need be padded to few shapes. Left out: which request
sits in which row, and what its tokens mean (jaxchat/engine.py).
"""

import numpy as np
import torch
from torch import Tensor

from jaxchat.backend import DecodeBatch, DecodeResult
from torch_ref import device_sampling
from torch_ref.gpt import GPT
from torch_ref.kv_cache import KVCache, read_rows, write_rows


@torch.no_grad()
def prefill(
    model: GPT, cache: KVCache, row: int, ids: np.ndarray, start: int
) -> tuple[KVCache, np.ndarray]:
    """See `Backend.prefill`. Raises ValueError when the tokens do not fit into the row."""
    end = start + len(ids)
    if not len(ids) or start < 0 or end > cache.max_length:
        raise ValueError(
            f"cannot put {len(ids)} tokens at position {start} of a row of {cache.max_length}: "
            f"give 1 to {cache.max_length - start}"
        )
    rows = slice(row, row + 1)
    part = read_rows(cache, rows, end)
    part = part._replace(lengths=torch.full_like(part.lengths, start))
    tokens = torch.from_numpy(np.asarray(ids, np.int64))[None].to(part.lengths.device)
    hidden, longer = model.hidden(tokens, part)
    assert longer is not None
    return write_rows(cache, rows, longer), model.logits(hidden[0, -1]).cpu().numpy()


@torch.no_grad()
def decode(model: GPT, cache: KVCache, batch: DecodeBatch) -> DecodeResult:
    """See `Backend.decode`."""
    size, width = batch.uniforms.shape
    tokens, logprobs = np.zeros((size, width), np.int32), np.zeros((size, width), np.float32)
    counts = np.zeros(size, np.int32)
    budgets = np.minimum(batch.budgets, width)
    live = np.flatnonzero(budgets > 0)
    cache.lengths.copy_(torch.from_numpy(batch.lengths))
    if len(live) == 0:
        return DecodeResult(cache, tokens, logprobs, counts)
    needed = int((batch.lengths + budgets)[live].max())
    if needed > cache.max_length:
        raise ValueError(
            f"a row would hold {needed} tokens, the cache has room for {cache.max_length}: "
            "lower its budget"
        )
    rows = slice(int(live[0]), int(live[-1]) + 1)
    part = read_rows(cache, rows, needed)
    part, sampled = _decode_rows(model, part, batch, rows)
    made, scores, counts[rows] = sampled
    mine = np.arange(made.shape[1]) < counts[rows, None]
    tokens[rows, : made.shape[1]] = made * mine
    logprobs[rows, : made.shape[1]] = np.where(mine, scores, np.float32(0))
    return DecodeResult(write_rows(cache, rows, part), tokens, logprobs, counts)


def _decode_rows(
    model: GPT, cache: KVCache, batch: DecodeBatch, rows: slice
) -> tuple[KVCache, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All rows step together until none is running; the tokens, log-probabilities and counts.

    Rows that do not run compute too, and nothing is kept of it.
    """
    device = cache.lengths.device

    def place(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(x[rows]).to(device, dtype)

    newest, budgets = place(batch.tokens), place(batch.budgets)
    uniforms = place(batch.uniforms, torch.float32)
    params = device_sampling.row_params(batch.params[rows], device)
    stops = torch.tensor(sorted(batch.stop_ids), dtype=torch.int64, device=device)
    counts, running = torch.zeros_like(budgets), budgets > 0
    tokens, logprobs = [], []
    for step in range(uniforms.shape[1]):
        hidden, longer = model.hidden(newest[:, None], cache, running.long())
        assert longer is not None
        cache, logits = longer, model.logits(hidden[:, 0])
        drawn, scores = device_sampling.sample(logits, params, uniforms[:, step])
        newest = torch.where(running, drawn, newest)
        tokens.append(newest)
        logprobs.append(scores)
        counts = counts + running
        stopped = (newest[:, None] == stops).any(dim=1)
        running = running & ~stopped & (counts < budgets)
        if not running.any().item():
            break
    made, scores = (torch.stack(x, dim=1).cpu().numpy() for x in (tokens, logprobs))
    return cache, (made, scores, counts.cpu().numpy())
