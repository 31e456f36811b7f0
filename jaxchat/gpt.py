"""The model: a decoder-only transformer in two generations, leaf to root.

`torch_ref/gpt.py` is the same file in PyTorch: the same classes and functions in the same order,
held together by tests/parity. Weights are float32 and stored (out, in); activations are in one
explicit compute dtype; norms, rotary angles, softmax and logits are float32. The switches of
`GPTConfig` tell the modern architecture (nanochat at 92d63d4) from the classic one. Left out: the
loss (loss.py), the optimizer (optim.py), and where arrays live (sharding.py).

Letters: B batch, T time, D width, H query heads, K key/value heads, C head width, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxchat import attention as kernels
from jaxchat import sampling
from jaxchat.config import GATE_CHANNELS, SMEAR_CHANNELS, GPTConfig
from jaxchat.kv_cache import AnyCache
from jaxchat.remat import Gather, recomputed
from jaxchat.sampling_params import SamplingParams

NORM_EPS = 1e-6

FEW_ROWS = 16
"""Up to this many vectors, a CPU multiplies with the weight on the left."""


def norm(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """RMS norm without weights, statistics in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + NORM_EPS)
    return (wide * scale).astype(x.dtype)


def rotary_angles(
    positions: Int[Array | np.ndarray, "B T"], head_dim: int, base: float
) -> tuple[Float[Array, "B T 1 C"], Float[Array, "B T 1 C"]]:
    """Cosine, and sine with its sign, of each channel's rotation: one frequency per pair.

    Of positions in a NumPy array they are constants. XLA computes others again wherever they are
    multiplied: 64 times in a training step of depth 4.
    """
    xp = np if isinstance(positions, np.ndarray) else jnp
    frequencies = base ** -(np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    angles = positions[:, :, None, None].astype(np.float32) * frequencies[None, None, None]
    cos, sin = xp.cos(angles), xp.sin(angles)
    both = xp.concatenate([cos, cos], axis=-1), xp.concatenate([sin, -sin], axis=-1)
    return jnp.asarray(both[0]), jnp.asarray(both[1])


def apply_rotary(x: Float[Array, "B T H C"], cos: Array, sin: Array) -> Float[Array, "B T H C"]:
    """Rotate the pairs (x_i, x_{i + C/2}) by their position's angles (arXiv 2104.09864)."""
    wide = x.astype(jnp.float32)
    other = jnp.roll(wide, x.shape[-1] // 2, axis=-1)  # of each pair
    return (wide * cos + other * sin).astype(x.dtype)


class Linear(nnx.Module):
    """y = x W^T, no bias; W is (out, in) in float32 and multiplied in the dtype of x."""

    def __init__(self, in_features: int, out_features: int) -> None:
        self.weight = nnx.Param(jnp.zeros((out_features, in_features), jnp.float32))

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        return product(x, self.weight[...].astype(x.dtype), x.dtype)

    def wide(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """The same product, not rounded to the dtype of x: a float32 result."""
        return product(x, self.weight[...].astype(x.dtype), jnp.float32)


def product(
    x: Float[Array, "*B I"], weight: Float[Array, "O I"], dtype: DTypeLike
) -> Float[Array, "*B O"]:
    """x W^T, rounded to `dtype`."""
    if math.prod(x.shape[:-1]) <= FEW_ROWS and jax.default_backend() == "cpu":
        return _few_rows(x, weight, dtype)
    return jnp.matmul(x, weight.T, preferred_element_type=dtype)


def _few_rows(
    x: Float[Array, "*B I"], weight: Float[Array, "O I"], dtype: DTypeLike
) -> Float[Array, "*B O"]:
    """x W^T as (W x^T)^T, for decoding on a CPU: the barrier keeps XLA from swapping it back.

    Reads W at memory speed where the plain product does not: 27 GB/s against 11 for 8 rows of 768
    (2 cores, jax 0.10). PyTorch's kernels choose by themselves, so torch_ref has no such trick.
    """
    columns = x.reshape(-1, x.shape[-1]).T  # (I, rows)
    product = jnp.matmul(weight, columns, preferred_element_type=dtype)
    product = jax.lax.optimization_barrier(product)
    return product.T.reshape(*x.shape[:-1], len(weight))


class Embedding(nnx.Module):
    """A table of rows, looked up by token id."""

    def __init__(self, num_embeddings: int, features: int) -> None:
        self.weight = nnx.Param(jnp.zeros((num_embeddings, features), jnp.float32))

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.weight[...][ids]


class CausalSelfAttention(nnx.Module):
    """Rotary, query/key-normed, windowed attention, with gated value embeddings on some layers."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        self.layer, self.window = layer, config.window_sizes[layer]
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim, self.qk_gain = config.head_dim, config.qk_gain
        kv_dim = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        has_gate = config.has_value_embed(layer)
        self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head) if has_gate else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        value_embed: Float[Array, "B T E"] | None,
        cos_sin: tuple[Array, Array],
        cache: AnyCache | None,
        valid: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        rows, length, _ = x.shape
        q = self.c_q(x).reshape(rows, length, self.n_head, self.head_dim)
        k = self.c_k(x).reshape(rows, length, self.n_kv_head, self.head_dim)
        v = self.c_v(x).reshape(rows, length, self.n_kv_head, self.head_dim)
        if self.ve_gate is not None:
            assert value_embed is not None, "a layer with a gate needs its value embedding"
            gate = 3 * jax.nn.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, K)
            v = v + gate[..., None] * value_embed.reshape(v.shape).astype(v.dtype)
        q = apply_rotary(norm(q), *cos_sin) * self.qk_gain
        k = apply_rotary(norm(k), *cos_sin) * self.qk_gain
        if cache is None:
            stored, y = None, kernels.attention(q, k, v, window=self.window)
        else:
            # torch writes into one cache in place; decode steps add to one that they only read
            y, stored = cache.attend(self.layer, q, k, v, valid, self.window)
        return self.c_proj(y.reshape(rows, length, -1)), stored


class MLP(nnx.Module):
    """relu(x W1)^2 W2 (arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.c_proj(jnp.square(jax.nn.relu(self.c_fc(x))))


class Block(nnx.Module):
    """Attention and MLP, each on the normed stream and added back to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        value_embed: Float[Array, "B T E"] | None,
        cos_sin: tuple[Array, Array],
        cache: AnyCache | None,
        valid: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        mixed, stored = self.attn(norm(x), value_embed, cos_sin, cache, valid)
        x = x + mixed
        return x + self.mlp(norm(x)), stored


class GPT(nnx.Module):
    """Token ids in, logits out; `init_weights` draws the weights, which start as zeros."""

    def __init__(self, config: GPTConfig, dtype: DTypeLike = jnp.float32) -> None:
        self.config, self.dtype = config, dtype
        vocab, width = config.padded_vocab_size, config.n_embd
        kv_dim = config.n_kv_head * config.head_dim
        layers = range(config.n_layer)
        self.wte = Embedding(vocab, width)
        self.h = nnx.List([Block(config, layer) for layer in layers])
        self.lm_head = Linear(width, vocab)
        self.value_embeds = nnx.Dict(
            {str(i): Embedding(vocab, kv_dim) for i in layers if config.has_value_embed(i)}
        )
        if config.residual_scalars:
            self.resid_lambdas = nnx.Param(jnp.zeros(config.n_layer, jnp.float32))
            self.x0_lambdas = nnx.Param(jnp.zeros(config.n_layer, jnp.float32))
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nnx.Param(jnp.zeros(1, jnp.float32))
        if config.backout:
            self.backout_lambda = nnx.Param(jnp.zeros(1, jnp.float32))

    def init_weights(self, rngs: nnx.Rngs) -> None:
        """Draw every weight; output projections start at zero in both generations."""
        modern = self.config.residual_scalars
        draw = _modern_matrix if modern else _classic_matrix
        _normal(self.wte.weight, rngs, 0.8 if modern else 1.0)
        _normal(self.lm_head.weight, rngs, 0.001 if modern else 0.0)
        for block in self.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                draw(linear.weight, rngs, 1.0)
            draw(block.mlp.c_fc.weight, rngs, 0.4)
            if block.attn.ve_gate is not None:
                _uniform(block.attn.ve_gate.weight, rngs, 0.0, 0.02)
        bound = math.sqrt(3 / self.config.n_embd)
        for table in self.value_embeds.values():
            _uniform(table.weight, rngs, -bound, bound)
        if self.config.residual_scalars:
            self.resid_lambdas[...] = jnp.linspace(1.15, 1.05, self.config.n_layer)
            self.x0_lambdas[...] = jnp.linspace(0.20, 0.05, self.config.n_layer)
        if self.config.smear:
            _uniform(self.smear_gate.weight, rngs, 0.0, 0.02)
        if self.config.backout:
            self.backout_lambda[...] = jnp.full(1, 0.2, jnp.float32)

    def hidden(
        self,
        ids: Int[Array, "B T"],
        cache: AnyCache | None = None,
        valid: Int[Array, " B"] | None = None,
        remat: str = "none",
        gather: Gather | None = None,
    ) -> tuple[Float[Array, "B T D"], AnyCache | None]:
        """The final normed state of every position, and the cache with these tokens appended.

        With a cache, row b's tokens continue it at `cache.lengths[b]`, and only the first
        `valid[b]` of them count (all, when None): the rest is padding. `remat` and
        `gather` are for training (remat.py).
        """
        config = self.config
        if valid is None:
            valid = jnp.full(len(ids), ids.shape[1], jnp.int32)
        positions = np.arange(ids.shape[1])[None]  # one row serves all
        if cache is not None:
            positions = cache.lengths[:, None] + positions
        cos_sin = rotary_angles(positions, config.head_dim, config.rope_base)
        x = x0 = x_mid = self._smear(self._embed(ids), cache)
        stored: list[Any] = []
        for i, block in enumerate(self.h):
            if config.residual_scalars:
                x = _scalar(self.resid_lambdas, i, x) * x + _scalar(self.x0_lambdas, i, x) * x0
            value_embed = self.value_embeds[str(i)](ids) if config.has_value_embed(i) else None
            run = recomputed(block, remat, gather)
            x, layer_cache = run(x, value_embed, cos_sin, cache, valid)
            stored.append(layer_cache)
            if i == config.n_layer // 2:
                x_mid = x
        if config.backout:
            x = x - _scalar(self.backout_lambda, 0, x) * x_mid
        if cache is not None:
            cache = cache.advance(stored, ids, valid)
        return norm(x), cache

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Soft-capped float32 logits of hidden states, the padded vocabulary cropped."""
        logits = self.lm_head.wide(hidden)[..., : self.config.vocab_size]
        return self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        return self.logits(self.hidden(ids)[0])

    def generate(self, ids: list[int], params: SamplingParams, row: int = 0) -> Iterator[int]:
        """The slow oracle: re-reads the whole text for every token, without a cache."""
        prompt, ids = list(ids), list(ids)
        for _ in range(params.max_tokens):
            logits = np.asarray(self(jnp.asarray([ids]))[0, -1])
            uniform = sampling.uniform(params.seed, row, len(ids))
            history = sampling.History(prompt, ids[len(prompt) :])
            ids.append(sampling.sample(logits, params, uniform, history))
            yield ids[-1]

    def _embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return norm(self.wte(ids).astype(self.dtype))

    def _embed_newest(self, cache: AnyCache) -> Float[Array, "B 1 D"]:
        """The un-smeared embedding of each row's last token; zero where a row is empty."""
        embedded = self._embed(cache.newest_ids()[:, None])
        return jnp.where((cache.lengths > 0)[:, None, None], embedded, jnp.zeros_like(embedded))

    def _smear(self, x: Float[Array, "B T D"], cache: AnyCache | None) -> Float[Array, "B T D"]:
        """Add a gated share of the previous token's un-smeared embedding; the first has none."""
        if not self.config.smear:
            return x
        before = jnp.zeros_like(x[:, :1]) if cache is None else self._embed_newest(cache)
        previous = jnp.concatenate([before, x[:, :-1]], axis=1)
        gate = jax.nn.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))  # (B, T, 1)
        return x + _scalar(self.smear_lambda, 0, x) * gate * previous


def _scalar(param: nnx.Param, index: int, like: Array) -> Float[Array, ""]:
    """One learned scalar in the dtype of the stream: a float32 one would widen it silently."""
    return param[...][index].astype(like.dtype)


def _normal(param: nnx.Param, rngs: nnx.Rngs, std: float) -> None:
    param[...] = std * jax.random.normal(rngs.params(), param.shape)


def _uniform(param: nnx.Param, rngs: nnx.Rngs, low: float, high: float) -> None:
    param[...] = jax.random.uniform(rngs.params(), param.shape, minval=low, maxval=high)


def _modern_matrix(param: nnx.Param, rngs: nnx.Rngs, share: float) -> None:
    """Uniform with the standard deviation 1/sqrt(in) of the usual normal, times `share`."""
    bound = share * math.sqrt(3 / param.shape[1])
    _uniform(param, rngs, -bound, bound)


def _classic_matrix(param: nnx.Param, rngs: nnx.Rngs, share: float) -> None:
    """Normal with std min(1, sqrt(out/in)) / sqrt(in) (arXiv 2310.17813)."""
    del share
    fan_out, fan_in = param.shape
    _normal(param, rngs, min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
