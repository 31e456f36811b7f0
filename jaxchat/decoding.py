"""Generation on the device: prefill and decode as jitted pure functions of (weights, cache).

The one idea: few compiled shapes. A prompt is read in chunks whose lengths come from
`CHUNK_LENGTHS`, and both functions see only the first `bucket` positions of the cache, the smallest
bucket that holds what they attend to; everything else that varies is an array. A decode dispatch is
a `while_loop` that samples up to N tokens per row before the host hears of it, and returns early
when a row needs the host: behind the end of a reply or a call of a tool. The cache is donated and
updated in place. Several devices have a share of the rows each (spread_rows.py). Left out: which
request sits in which row, and what its tokens mean (engine.py).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxchat import device_sampling, devices, kv_cache, penalties, sharding, spread_rows
from jaxchat.backend import DecodeBatch, DecodeResult
from jaxchat.config import GPTConfig
from jaxchat.device_sampling import RowParams
from jaxchat.devices import on_host
from jaxchat.gpt import GPT
from jaxchat.kv_cache import Dispatch, Gains, KVCache
from jaxchat.params import Params, bind
from jaxchat.penalties import Penalties, Tally
from jaxchat.sampling_params import MAX_TOP_LOGPROBS

CHUNK_LENGTHS = (16, 64, 128, 256, 512)
"""Tokens read in one prefill call; prompts are padded up to one of these, longer ones cut."""

MIN_BUCKET = 256
"""Fewest cache positions that a step attends to; larger buckets double."""

STEPS_PER_LOOK = {"cpu": 1}
"""Decode steps between two looks at what has stopped, by platform."""

STEPS_PER_LOOK_ELSEWHERE = 8
"""A GPU that looks waits for its host: 0.6 ms on an H200, where a step of depth 24 takes 1.1."""

ROWS_PER_STOP = 8
"""A dispatch ends when one row in so many has stopped: the first of up to 15, the second of 16."""


class Decoder:
    """The compiled functions of one model, and its weights in the compute dtype."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        config: GPTConfig,
        mesh: Mesh | None = None,
    ) -> None:
        """`mesh`: the devices that share the rows, all of them with the weights; None for one."""
        self.config = config
        self._source: Params | None = None
        self._weights: Params = {}
        everywhere = None if mesh is None else sharding.place(mesh, sharding.REPLICATED)
        self._graphdef, self._everywhere = graphdef, everywhere
        self._cast = jax.jit(partial(_cast, graphdef), out_shardings=everywhere)
        read, write, decode = partial(_read, graphdef), _write, partial(_decode, graphdef)
        keep, copy_row = kv_cache.keep, _copy_row
        if mesh is not None and sharding.row_shares(mesh) > 1:
            read, write = spread_rows.reader(mesh, read), spread_rows.writer(mesh, write)
            decode, keep = spread_rows.decoder(mesh, decode), spread_rows.keeper(mesh, keep)
            copy_row = spread_rows.copier(mesh)
        self._read = jax.jit(read, static_argnames="bucket")
        self._write = jax.jit(write, static_argnames="bucket", donate_argnums=0)
        self._decode = jax.jit(
            decode,
            static_argnames="bucket",
            out_shardings=(None, everywhere),
            compiler_options=devices.decode_options(),
        )
        self._keep = jax.jit(keep, donate_argnums=0)
        self._copy_row = jax.jit(copy_row, static_argnames="bucket", donate_argnums=0)

    def prefill(
        self, params: Params, cache: KVCache, row: int, ids: np.ndarray, start: int
    ) -> tuple[KVCache, np.ndarray]:
        """See `Backend.prefill`. Raises ValueError when the tokens do not fit into the row."""
        if not len(ids) or start < 0 or start + len(ids) > cache.max_length:
            raise ValueError(
                f"cannot put {len(ids)} tokens at position {start} of a row of "
                f"{cache.max_length}: give 1 to {cache.max_length - start}"
            )
        weights = self.weights(params)
        logits = None
        for first in range(0, len(ids), CHUNK_LENGTHS[-1]):
            chunk = np.asarray(ids[first : first + CHUNK_LENGTHS[-1]], np.int32)
            begin = start + first
            bucket = _bucket(begin + len(chunk), cache.max_length)
            padded = np.zeros(min(_ceil(len(chunk), CHUNK_LENGTHS), bucket), np.int32)
            padded[: len(chunk)] = chunk
            where = _Place(*(on_host(x, jnp.int32) for x in (row, begin, len(chunk))))
            window, logits = self._read(weights, cache, padded, where, bucket=bucket)
            cache = self._write(cache, window, where, bucket=bucket)
        return cache, np.asarray(logits)

    def decode(self, params: Params, cache: KVCache, batch: DecodeBatch) -> DecodeResult:
        """See `Backend.decode`."""
        rows, most = batch.uniforms.shape
        assert len(batch.params) == rows, f"{len(batch.params)} params for {rows} rows"
        batch = batch.padded(len(cache.lengths))
        budgets = np.minimum(batch.budgets, most)
        needed = int((batch.lengths + budgets).max(where=budgets > 0, initial=1))
        if needed > cache.max_length:
            raise ValueError(
                f"a row would hold {needed} tokens, the cache has room for {cache.max_length}: "
                "lower its budget"
            )
        bucket = cache.max_length if batch.invariant else _bucket(needed, cache.max_length)
        gains, outputs = self._decode(
            self.weights(params), cache, self.inputs(batch), bucket=bucket
        )
        cache = self._keep(cache, gains)
        sampled = jax.device_get(outputs if batch.with_top else outputs[:3])
        return DecodeResult(cache, *(x[:rows] for x in sampled))

    def inputs(self, batch: DecodeBatch) -> "_DecodeInputs":
        """A batch as what `_decode` takes."""
        most = batch.uniforms.shape[1]
        stops = np.zeros(self.config.vocab_size, bool)
        stops[[id for id in batch.stop_ids if id < len(stops)]] = True
        return _DecodeInputs(
            tokens=on_host(batch.tokens, jnp.int32),
            lengths=on_host(batch.lengths, jnp.int32),
            budgets=on_host(np.minimum(batch.budgets, most), jnp.int32),
            uniforms=on_host(batch.uniforms, jnp.float32),
            prompt_lengths=on_host(batch.prompt_lengths, jnp.int32),
            params=device_sampling.row_params(batch.params),
            penalties=penalties.row_penalties(batch.params),
            with_top=on_host(batch.with_top, bool),
            stops=on_host(stops, bool),
            invariant=on_host(batch.invariant, bool),
        )

    def copy_row(self, cache: KVCache, source: int, target: int, length: int) -> KVCache:
        """See `Backend.copy_row`."""
        bucket = _bucket(length, cache.max_length)
        rows = (on_host(row, jnp.int32) for row in (source, target))
        return self._copy_row(cache, *rows, bucket=bucket)

    def warm_up(self, params: Params, cache: KVCache, steps: int) -> KVCache:
        """See `Backend.warm_up`: every chunk length and every step at the end of every bucket."""
        rows = len(cache.lengths)
        for bucket in _buckets(cache.max_length):
            for length in CHUNK_LENGTHS:
                ids = np.zeros(min(length, bucket), np.int32)
                cache, _ = self.prefill(params, cache, 0, ids, bucket - len(ids))
            idle = DecodeBatch(
                tokens=np.zeros(rows, np.int32),
                lengths=np.full(rows, bucket - 1, np.int32),
                budgets=np.eye(1, rows, dtype=np.int32)[0],
                uniforms=np.zeros((rows, steps), np.float32),
                prompt_lengths=np.zeros(rows, np.int32),
                params=(None,) * rows,
                stop_ids=frozenset(),
            )
            cache = self.decode(params, cache, idle).cache
            cache = self.copy_row(cache, 0, rows - 1, bucket)
        return cache

    def weights(self, params: Params) -> Params:
        """The weights in the compute dtype, converted once for each set of them."""
        if params is not self._source:
            ready = self._are_ready(params)
            self._source, self._weights = params, params if ready else self._cast(params)
        return self._weights

    def _are_ready(self, params: Params) -> bool:
        """Whether conversion would only copy them, as a jitted function does with its arguments."""
        dtype, place = _model(self._graphdef, params).dtype, self._everywhere
        return all(
            x.dtype == dtype and (place is None or x.sharding.is_equivalent_to(place, x.ndim))
            for x in params.values()
        )

    def forget_weights(self) -> None:
        """Give their memory back; they are converted anew when they are needed."""
        self._source, self._weights = None, {}


class _Place(NamedTuple):
    """Where a chunk goes: `count` tokens into `row` from position `start` on."""

    row: Int[Array, ""]
    start: Int[Array, ""]
    count: Int[Array, ""]


class _DecodeInputs(NamedTuple):
    """`DecodeBatch` as arrays."""

    tokens: Int[Array, " S"]
    lengths: Int[Array, " S"]
    budgets: Int[Array, " S"]
    uniforms: Float[Array, "S N"]
    prompt_lengths: Int[Array, " S"]
    params: RowParams
    penalties: Penalties
    with_top: Bool[Array, ""]
    stops: Bool[Array, " V"]
    invariant: Bool[Array, ""]


class _Outputs(NamedTuple):
    """What the rows have sampled so far."""

    tokens: Int[Array, "S N"]
    logprobs: Float[Array, "S N"]
    counts: Int[Array, " S"]
    top_ids: Int[Array, "S N K"]
    top_logprobs: Float[Array, "S N K"]


class _Loop(NamedTuple):
    """What one decoding step hands to the next."""

    step: Int[Array, ""]
    cache: Dispatch
    newest: Int[Array, " S"]
    stopped: Bool[Array, " S"]
    seen: Tally
    outputs: _Outputs


def _cast(graphdef: nnx.GraphDef, params: Params) -> Params:
    """Every weight in the dtype that the model multiplies it in: a cast per step saved."""
    dtype = _model(graphdef, params).dtype
    return {name: value.astype(dtype) for name, value in params.items()}


def _read(
    graphdef: nnx.GraphDef,
    params: Params,
    cache: KVCache,
    ids: Int[Array, " T"],
    place: _Place,
    *,
    bucket: int,
) -> tuple[KVCache, Float[Array, " V"]]:
    """The positions of a row that reading a chunk changes, and the logits after it."""
    model = _model(graphdef, params)
    row = kv_cache.read_row(cache, place.row, 0, bucket)._replace(lengths=place.start[None])
    hidden, row = model.hidden(ids[None], row, place.count[None])
    assert isinstance(row, KVCache)
    last = jax.lax.dynamic_index_in_dim(hidden[0], place.count - 1)
    first = _window_start(place, bucket, len(ids))
    return kv_cache.read_row(row, jnp.int32(0), first, len(ids)), model.logits(last)[0]


def _write(cache: KVCache, window: KVCache, place: _Place, *, bucket: int) -> KVCache:
    """Put what `_read` changed into the cache, in place.

    A program of its own: in one that also reads the row, XLA would work on copies of the cache.
    """
    first = _window_start(place, bucket, window.max_length)
    return kv_cache.write_row(cache, place.row, first, window)


def _window_start(place: _Place, bucket: int, length: int) -> Int[Array, ""]:
    """Where the window of `length` positions that holds a chunk begins: it ends in the bucket."""
    return jnp.minimum(place.start, bucket - length)


def _decode(
    graphdef: nnx.GraphDef, params: Params, cache: KVCache, inputs: _DecodeInputs, *, bucket: int
) -> tuple[Gains, _Outputs]:
    """What a dispatch adds to the cache, and what it sampled.

    The cache is only read: a program that also writes into it would work on copies (`_keep`).
    """
    model = _model(graphdef, params)
    rows, most = inputs.uniforms.shape

    def active(loop: _Loop) -> Bool[Array, " S"]:
        return ~loop.stopped & (loop.step < inputs.budgets)

    def step(loop: _Loop) -> _Loop:
        running = active(loop)
        hidden, cache = model.hidden(loop.newest[:, None], loop.cache, running.astype(jnp.int32))
        assert isinstance(cache, Dispatch)
        logits = model.logits(hidden[:, 0])
        choices = penalties.adjust(logits, inputs.penalties, loop.seen)
        tokens = device_sampling.sample(choices, inputs.params, inputs.uniforms[:, loop.step])
        tokens = jnp.where(running, tokens, loop.newest)
        top_ids, top_logprobs = device_sampling.alternatives(logits, inputs.with_top)
        outputs = _Outputs(
            loop.outputs.tokens.at[:, loop.step].set(tokens),
            loop.outputs.logprobs.at[:, loop.step].set(device_sampling.logprob(logits, tokens)),
            loop.outputs.counts + running.astype(jnp.int32),
            loop.outputs.top_ids.at[:, loop.step].set(top_ids),
            loop.outputs.top_logprobs.at[:, loop.step].set(top_logprobs),
        )
        stopped = loop.stopped | inputs.stops[tokens]
        seen = penalties.add(loop.seen, tokens, running)
        return _Loop(loop.step + 1, cache, tokens, stopped, seen, outputs)

    top = (rows, most, min(MAX_TOP_LOGPROBS, model.config.vocab_size))
    outputs = _Outputs(
        jnp.zeros((rows, most), jnp.int32),
        jnp.zeros((rows, most), jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(top, jnp.int32),
        jnp.zeros(top, jnp.float32),
    )
    windows = model.config.window_sizes
    part = kv_cache.begin_dispatch(cache, inputs.lengths, windows, bucket=bucket, steps=most)
    seen = penalties.tally(
        inputs.penalties,
        cache.ids[:, 0, :bucket, 0],
        inputs.tokens,
        inputs.lengths,
        inputs.prompt_lengths,
        model.config.vocab_size,
    )

    enough = _enough_stops(inputs)

    def goes_on(loop: _Loop) -> Bool[Array, ""]:
        return active(loop).any() & (jnp.sum(loop.stopped) < enough)

    looks = STEPS_PER_LOOK.get(jax.default_backend(), STEPS_PER_LOOK_ELSEWHERE)
    together = math.gcd(looks, most)  # past the last column nothing may be written

    def steps(loop: _Loop) -> _Loop:
        return jax.lax.fori_loop(0, together, lambda _, loop: step(loop), loop)

    first = _Loop(jnp.int32(0), part, inputs.tokens, jnp.zeros(rows, bool), seen, outputs)
    last = jax.lax.while_loop(goes_on, steps if together > 1 else step, first)
    return kv_cache.gains(last.cache), last.outputs


def _copy_row(
    cache: KVCache, source: Int[Array, ""], target: Int[Array, ""], *, bucket: int
) -> KVCache:
    return kv_cache.write_row(cache, target, 0, kv_cache.read_row(cache, source, 0, bucket))


def _model(graphdef: nnx.GraphDef, params: Params) -> GPT:
    model = bind(graphdef, params)
    assert isinstance(model, GPT)
    return model


def _enough_stops(inputs: _DecodeInputs) -> Int[Array, ""]:
    """The dispatch ends when so many rows have stopped: never before the last, where neighbours
    must not decide at which position a row's sums are cut."""
    some = jnp.maximum(1, jnp.sum(inputs.budgets > 0) // ROWS_PER_STOP)
    return jnp.where(inputs.invariant, len(inputs.budgets) + 1, some)


def _bucket(length: int, most: int) -> int:
    """The number of cache positions to work on: MIN_BUCKET doubled until `length` fits."""
    bucket = MIN_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, most)


def _buckets(most: int) -> list[int]:
    """Every bucket that `_bucket` can give."""
    buckets = [_bucket(1, most)]
    while buckets[-1] < most:
        buckets.append(_bucket(buckets[-1] + 1, most))
    return buckets


def _ceil(length: int, sizes: Sequence[int]) -> int:
    return next(size for size in sizes if size >= length)
