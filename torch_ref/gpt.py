"""The model: a decoder-only transformer in two generations, leaf to root.

`jaxchat/gpt.py` is the same file in JAX: the same classes and functions in the same order, held
together by tests/parity. Weights are float32 and stored (out, in); activations are in one
explicit compute dtype; norms, rotary angles, softmax and logits are float32. The switches of
`GPTConfig` tell the modern architecture (nanochat at 92d63d4) from the classic one. Left out: the
loss (loss.py), the optimizer (optim.py), and devices (runtime.py).

Letters: B batch, T time, D width, H query heads, K key/value heads, C head width, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor, nn

from jaxchat import sampling
from jaxchat.config import GATE_CHANNELS, SMEAR_CHANNELS, GPTConfig
from jaxchat.sampling_params import SamplingParams
from torch_ref import attention as kernels
from torch_ref.kv_cache import KVCache
from torch_ref.remat import recomputed

NORM_EPS = 1e-6


def norm(x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """RMS norm without weights, statistics in float32 (arXiv 1910.07467)."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


def rotary_angles(
    positions: Int[Tensor, "B T"], head_dim: int, base: float
) -> tuple[Float[Tensor, "B T 1 C"], Float[Tensor, "B T 1 C"]]:
    """Cosine, and sine with its sign, of each channel's rotation: one frequency per pair.

    Computed at every call; JAX has constants in a compiled step.
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[:, :, None, None].float() * base ** -(channels / head_dim)
    cos, sin = torch.cos(angles), torch.sin(angles)
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)


def apply_rotary(x: Float[Tensor, "B T H C"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H C"]:
    """Rotate the pairs (x_i, x_{i + C/2}) by their position's angles (arXiv 2104.09864)."""
    wide = x.float()
    other = wide.roll(x.shape[-1] // 2, dims=-1)  # of each pair
    return (wide * cos + other * sin).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T, no bias; W is (out, in) in float32 and multiplied in the dtype of x."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return product(x, self.weight.to(x.dtype), x.dtype)

    def wide(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """The same product, not rounded to the dtype of x: a float32 result."""
        return product(x, self.weight.to(x.dtype), torch.float32)


def product(
    x: Float[Tensor, "*B I"], weight: Float[Tensor, "O I"], dtype: torch.dtype
) -> Float[Tensor, "*B O"]:
    """x W^T, rounded to `dtype`.

    In JAX one call asks for wider results. Here that is CUDA's alone; elsewhere halves are widened
    first, and as their products are exact in float32, only the order of sums differs.
    """
    if dtype == x.dtype:
        return F.linear(x, weight)
    if x.is_cuda:
        rows = torch.mm(x.reshape(-1, x.shape[-1]), weight.T, out_dtype=dtype)
        return rows.reshape(*x.shape[:-1], len(weight))
    return F.linear(x.to(dtype), weight.to(dtype))


class Embedding(nn.Module):
    """A table of rows, looked up by token id."""

    def __init__(self, num_embeddings: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_embeddings, features))

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return F.embedding(ids, self.weight)


class CausalSelfAttention(nn.Module):
    """Rotary, query/key-normed, windowed attention, with gated value embeddings on some layers."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window_sizes[layer]
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim, self.qk_gain = config.head_dim, config.qk_gain
        kv_dim = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_dim)
        self.c_v = Linear(config.n_embd, kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        has_gate = config.has_value_embed(layer)
        self.ve_gate: Linear | None = Linear(GATE_CHANNELS, config.n_kv_head) if has_gate else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        value_embed: Float[Tensor, "B T E"] | None,
        cos_sin: tuple[Tensor, Tensor],
        cache: KVCache | None,
        valid: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor] | None]:
        rows, length, _ = x.shape
        q = self.c_q(x).reshape(rows, length, self.n_head, self.head_dim)
        k = self.c_k(x).reshape(rows, length, self.n_kv_head, self.head_dim)
        v = self.c_v(x).reshape(rows, length, self.n_kv_head, self.head_dim)
        if self.ve_gate is not None:
            assert value_embed is not None, "a layer with a gate needs its value embedding"
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, K)
            v = v + gate[..., None] * value_embed.reshape(v.shape).to(v.dtype)
        q = apply_rotary(norm(q), *cos_sin) * self.qk_gain
        k = apply_rotary(norm(k), *cos_sin) * self.qk_gain
        if cache is None:
            stored, y = None, kernels.attention(q, k, v, window=self.window)
        else:
            # written in place; JAX returns what it has stored, and steps that decode add to a copy
            y, stored = cache.attend(self.layer, q, k, v, valid, self.window)
        return self.c_proj(y.reshape(rows, length, -1)), stored


class MLP(nn.Module):
    """relu(x W1)^2 W2 (arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added back to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        value_embed: Float[Tensor, "B T E"] | None,
        cos_sin: tuple[Tensor, Tensor],
        cache: KVCache | None,
        valid: Int[Tensor, " B"],
    ) -> tuple[Float[Tensor, "B T D"], tuple[Tensor, Tensor] | None]:
        mixed, stored = self.attn(norm(x), value_embed, cos_sin, cache, valid)
        x = x + mixed
        return x + self.mlp(norm(x)), stored


class GPT(nn.Module):
    """Token ids in, logits out; `init_weights` draws the weights, which start as zeros."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        vocab, width = config.padded_vocab_size, config.n_embd
        kv_dim = config.n_kv_head * config.head_dim
        layers = range(config.n_layer)
        self.wte = Embedding(vocab, width)
        self.h = nn.ModuleList([Block(config, layer) for layer in layers])
        self.lm_head = Linear(width, vocab)
        self.value_embeds = nn.ModuleDict(
            {str(i): Embedding(vocab, kv_dim) for i in layers if config.has_value_embed(i)}
        )
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.zeros(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw every weight; output projections start at zero in both generations."""
        modern = self.config.residual_scalars
        draw = _modern_matrix if modern else _classic_matrix
        _normal(self.wte.weight, generator, 0.8 if modern else 1.0)
        _normal(self.lm_head.weight, generator, 0.001 if modern else 0.0)
        for block in self.h:
            assert isinstance(block, Block)
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                draw(linear.weight, generator, 1.0)
            draw(block.mlp.c_fc.weight, generator, 0.4)
            if block.attn.ve_gate is not None:
                _uniform(block.attn.ve_gate.weight, generator, 0.0, 0.02)
            block.attn.c_proj.weight.zero_()  # JAX always draws into zeros, here anew into the old
            block.mlp.c_proj.weight.zero_()
        bound = math.sqrt(3 / self.config.n_embd)
        for table in self.value_embeds.values():
            assert isinstance(table, Embedding)
            _uniform(table.weight, generator, -bound, bound)
        if self.config.residual_scalars:
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, self.config.n_layer))
            self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, self.config.n_layer))
        if self.config.smear:
            _uniform(self.smear_gate.weight, generator, 0.0, 0.02)
            self.smear_lambda.zero_()
        if self.config.backout:
            self.backout_lambda.fill_(0.2)

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        valid: Int[Tensor, " B"] | None = None,
        remat: str = "none",
    ) -> tuple[Float[Tensor, "B T D"], KVCache | None]:
        """The final normed state of every position, and the cache with these tokens appended.

        With a cache, row b's tokens continue it at `cache.lengths[b]`, and only the first
        `valid[b]` of them count (all, when None): the rest is padding. `remat` is for training
        (memory.py).
        """
        config = self.config
        if valid is None:
            valid = ids.new_full((len(ids),), ids.shape[1])
        starts = ids.new_zeros(1) if cache is None else cache.lengths  # one row serves all
        positions = starts[:, None] + torch.arange(ids.shape[1], device=ids.device)
        cos_sin = rotary_angles(positions, config.head_dim, config.rope_base)
        x = x0 = x_mid = self._smear(self._embed(ids), cache)
        stored: list[Any] = []
        for i, block in enumerate(self.h):
            if config.residual_scalars:
                x = _scalar(self.resid_lambdas, i, x) * x + _scalar(self.x0_lambdas, i, x) * x0
            value_embed = self.value_embeds[str(i)](ids) if config.has_value_embed(i) else None
            x, layer_cache = recomputed(block, remat)(x, value_embed, cos_sin, cache, valid)
            stored.append(layer_cache)
            if i == config.n_layer // 2:
                x_mid = x
        if config.backout:
            x = x - _scalar(self.backout_lambda, 0, x) * x_mid
        if cache is not None:
            cache = cache.advance(stored, ids, valid)
        return norm(x), cache

    def logits(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Soft-capped float32 logits of hidden states, the padded vocabulary cropped."""
        logits = self.lm_head.wide(hidden)[..., : self.config.vocab_size]
        return self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        return self.logits(self.hidden(ids)[0])

    def generate(self, ids: list[int], params: SamplingParams, row: int = 0) -> Iterator[int]:
        """The slow oracle: re-reads the whole text for every token, without a cache."""
        prompt, ids = list(ids), list(ids)
        for _ in range(params.max_tokens):
            with torch.no_grad():
                logits = self(torch.tensor([ids], device=self.wte.weight.device))[0, -1]
            uniform = sampling.uniform(params.seed, row, len(ids))
            history = sampling.History(prompt, ids[len(prompt) :])
            ids.append(sampling.sample(logits.cpu().numpy(), params, uniform, history))
            yield ids[-1]

    def _embed(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        return norm(self.wte(ids).to(self.dtype))

    def _embed_newest(self, cache: KVCache) -> Float[Tensor, "B 1 D"]:
        """The un-smeared embedding of each row's last token; zero where a row is empty."""
        embedded = self._embed(cache.newest_ids()[:, None])
        return torch.where((cache.lengths > 0)[:, None, None], embedded, 0.0)

    def _smear(self, x: Float[Tensor, "B T D"], cache: KVCache | None) -> Float[Tensor, "B T D"]:
        """Add a gated share of the previous token's un-smeared embedding; the first has none."""
        if not self.config.smear:
            return x
        before = torch.zeros_like(x[:, :1]) if cache is None else self._embed_newest(cache)
        previous = torch.cat([before, x[:, :-1]], dim=1)
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))  # (B, T, 1)
        return x + _scalar(self.smear_lambda, 0, x) * gate * previous


def _scalar(param: nn.Parameter, index: int, like: Tensor) -> Float[Tensor, ""]:
    """One learned scalar in the dtype of the stream: a float32 one would widen it silently."""
    return param[index].to(like.dtype)


def _normal(param: nn.Parameter, generator: torch.Generator, std: float) -> None:
    param.copy_(std * torch.randn(param.shape, generator=generator))


def _uniform(param: nn.Parameter, generator: torch.Generator, low: float, high: float) -> None:
    param.copy_(low + (high - low) * torch.rand(param.shape, generator=generator))


def _modern_matrix(param: nn.Parameter, generator: torch.Generator, share: float) -> None:
    """Uniform with the standard deviation 1/sqrt(in) of the usual normal, times `share`."""
    bound = share * math.sqrt(3 / param.shape[1])
    _uniform(param, generator, -bound, bound)


def _classic_matrix(param: nn.Parameter, generator: torch.Generator, share: float) -> None:
    """Normal with std min(1, sqrt(out/in)) / sqrt(in) (arXiv 2310.17813)."""
    del share
    fan_out, fan_in = param.shape
    _normal(param, generator, min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
