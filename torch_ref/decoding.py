"""Generation on the device: fill a cache row, then sample token after token for many rows.

The twin of `jaxchat/decoding.py`, eager: a loop that works on views of the cache, which hold only
the rows and positions in use, so that nothing need be padded to few shapes. Left out: which request
sits in which row, and what its tokens mean (jaxchat/engine.py).
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jaxchat.backend import DecodeBatch, DecodeResult, PromptScores
from torch_ref import device_sampling, penalties
from torch_ref.gpt import GPT
from torch_ref.kv_cache import KVCache, read_rows, write_rows

CHUNK = 64
"""Positions of a prompt whose logits exist at the same time."""


@torch.no_grad()
def prefill(
    model: GPT, cache: KVCache, row: int, ids: np.ndarray, start: int
) -> tuple[KVCache, Float[Tensor, " V"]]:
    """See `Backend.prefill`, whose logits these are, still on the device."""
    rows = slice(row, row + 1)
    part = read_rows(cache, rows, start + len(ids))
    part = part._replace(lengths=torch.full_like(part.lengths, start))
    tokens = torch.from_numpy(np.asarray(ids, np.int64))[None].to(part.lengths.device)
    hidden, longer = model.hidden(tokens, part)
    assert longer is not None
    return write_rows(cache, rows, longer), model.logits(hidden[0, -1])


def check_place(cache: KVCache, ids: np.ndarray, start: int) -> None:
    """ValueError when tokens do not fit into a row."""
    if not len(ids) or start < 0 or start + len(ids) > cache.max_length:
        raise ValueError(
            f"cannot put {len(ids)} tokens at position {start} of a row of {cache.max_length}: "
            f"give 1 to {cache.max_length - start}"
        )


def check_room(cache: KVCache, batch: DecodeBatch) -> None:
    """ValueError when rows would grow beyond the cache."""
    budgets = np.minimum(batch.budgets, batch.uniforms.shape[1])
    needed = int((batch.lengths + budgets).max(where=budgets > 0, initial=0))
    if needed > cache.max_length:
        raise ValueError(
            f"a row would hold {needed} tokens, the cache has room for {cache.max_length}: "
            "lower its budget"
        )


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
    rows = slice(int(live[0]), int(live[-1]) + 1)
    if batch.invariant:
        rows, needed = slice(0, size), cache.max_length
    part = read_rows(cache, rows, needed)
    part, sampled = _decode_rows(model, part, batch, rows)
    steps = slice(0, sampled.tokens.shape[1])
    counts[rows] = sampled.counts
    mine = np.arange(steps.stop) < counts[rows, None]
    tokens[rows, steps] = sampled.tokens * mine
    logprobs[rows, steps] = np.where(mine, sampled.logprobs, np.float32(0))
    result = DecodeResult(write_rows(cache, rows, part), tokens, logprobs, counts)
    if sampled.top_ids is None:
        return result
    shape = (size, width, sampled.top_ids.shape[2])
    top_ids, top_logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    top_ids[rows, steps], top_logprobs[rows, steps] = sampled.top_ids, sampled.top_logprobs
    return result._replace(top_ids=top_ids, top_logprobs=top_logprobs)


@torch.no_grad()
def score_prompt(model: GPT, ids: np.ndarray) -> PromptScores:
    """See `Backend.score_prompt`."""
    if not 1 <= len(ids) <= model.config.sequence_len:
        raise ValueError(
            f"a text of {len(ids)} tokens cannot be scored: "
            f"this model reads 1 to {model.config.sequence_len}"
        )
    tokens = torch.from_numpy(np.asarray(ids, np.int64)).to(model.wte.weight.device)
    hidden, _ = model.hidden(tokens[None])
    before = hidden[0].roll(1, dims=0)  # position t holds what predicts token t
    parts = []
    for states, targets in zip(before.split(CHUNK), tokens.split(CHUNK), strict=True):
        logits = model.logits(states)
        scored = device_sampling.logprob(logits, targets)
        parts.append((scored, *device_sampling.alternatives(logits)))
    logprobs, top_ids, top_logprobs = (
        torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)
    )
    return PromptScores(logprobs, top_ids.astype(np.int32), top_logprobs)


class _Sampled(NamedTuple):
    """`DecodeResult` without the cache, as long as the dispatch was."""

    tokens: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None


def _decode_rows(
    model: GPT, cache: KVCache, batch: DecodeBatch, rows: slice
) -> tuple[KVCache, _Sampled]:
    """All rows step together until none is running.

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
    seen = penalties.tally(
        batch.params[rows],
        cache.ids[:, 0, :, 0],
        newest,
        place(batch.lengths),
        place(batch.prompt_lengths),
        model.config.vocab_size,
    )
    steps = []
    for step in range(uniforms.shape[1]):
        hidden, longer = model.hidden(newest[:, None], cache, running.long())
        assert longer is not None
        cache, logits = longer, model.logits(hidden[:, 0])
        choices = penalties.adjust(logits, seen)
        drawn = device_sampling.sample(choices, params, uniforms[:, step])
        newest = torch.where(running, drawn, newest)
        penalties.add(seen, newest, running)
        top = device_sampling.alternatives(logits) if batch.with_top else ()
        steps.append((newest, device_sampling.logprob(logits, newest), *top))
        counts = counts + running
        stopped = (newest[:, None] == stops).any(dim=1)
        running = running & ~stopped & (counts < budgets)
        if not running.any().item():
            break
    tokens, logprobs, *top = (
        torch.stack(column, dim=1).cpu().numpy() for column in zip(*steps, strict=True)
    )
    top_ids, top_logprobs = top or (None, None)
    return cache, _Sampled(tokens, logprobs, counts.cpu().numpy(), top_ids, top_logprobs)
