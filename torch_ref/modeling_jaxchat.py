"""A jaxchat model for `transformers`, in one file that travels with the weights.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

This is jaxchat's gpt.py once more, on transformers' interfaces: padded batches, its growing cache,
`generate`. It depends on torch and transformers only. The one idea beyond that: smearing needs the
token before the first new one, so the cache has a layer more than the model, and that one holds the
ids; it is reordered and cropped along with the keys and values. Weights keep jaxchat's names.
Left out: training beyond a loss, static caches, attention weights as output.

Letters: B batch, T new tokens, S tokens in the cache and new, H query heads, K key/value heads,
C head width, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

NORM_EPS = 1e-6

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this transformers calls it: `cache` from 5.24 on."""

GATE_CHANNELS, SMEAR_CHANNELS = 12, 24
"""Channels that the value-embedding gate and the smear gate read."""


class JaxchatConfig(PretrainedConfig):
    """The shape of a model, under the names of jaxchat's `GPTConfig`."""

    model_type = "jaxchat"
    keys_to_ignore_at_inference = [CACHE]  # noqa: RUF012 (transformers wants a list)
    attribute_map = {  # noqa: RUF012
        "max_position_embeddings": "sequence_len",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "hidden_size": "n_embd",
    }

    def __init__(
        self,
        sequence_len: int = 2048,
        vocab_size: int = 32768,
        n_layer: int = 12,
        n_head: int = 6,
        n_kv_head: int = 6,
        n_embd: int = 768,
        window_pattern: str = "SSSL",
        rope_base: float = 100_000.0,
        qk_gain: float = 1.2,
        logit_softcap: float = 15.0,
        value_embeds: bool = True,
        smear: bool = True,
        backout: bool = True,
        residual_scalars: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.sequence_len, self.vocab_size = sequence_len, vocab_size
        self.n_layer, self.n_head, self.n_kv_head = n_layer, n_head, n_kv_head
        self.n_embd, self.window_pattern, self.rope_base = n_embd, window_pattern, rope_base
        self.qk_gain, self.logit_softcap = qk_gain, logit_softcap
        self.value_embeds, self.smear, self.backout = value_embeds, smear, backout
        self.residual_scalars, self.use_cache = residual_scalars, use_cache
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    @property
    def windows(self) -> list[int]:
        """How many earlier positions each layer's queries see, besides their own."""
        short = -(-self.sequence_len // 4 // 128) * 128
        sizes = {"L": self.sequence_len, "S": min(short, self.sequence_len)}
        pattern = self.window_pattern
        letters = [pattern[i % len(pattern)] for i in range(self.n_layer - 1)]
        return [sizes[letter] for letter in [*letters, "L"]]

    def has_value_embed(self, layer: int) -> bool:
        """Value embeddings sit on every other layer, the last one included."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2


def norm(x: Tensor) -> Tensor:
    """RMS norm without weights, statistics in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + C/2}) of (B, H, T, C) by their position's angles."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Rotary, query/key-normed, windowed attention, with gated value embeddings on some layers."""

    def __init__(self, config: JaxchatConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.config = layer, config
        self.head_dim = config.n_embd // config.n_head
        kv_dim = config.n_kv_head * self.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.c_k = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, kv_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if config.has_value_embed(layer):
            self.ve_gate = nn.Linear(GATE_CHANNELS, config.n_kv_head, bias=False)

    def forward(
        self,
        x: Tensor,
        value_embed: Tensor | None,
        cos_sin: tuple[Tensor, Tensor],
        mask: Tensor,
        cache: Cache | None,
    ) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or K, T, C)
            for project in (self.c_q, self.c_k, self.c_v)
        )
        if value_embed is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, K)
            value = value_embed.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            v = v + gate.transpose(1, 2)[..., None] * value.to(v.dtype)
        q = norm(apply_rotary(q, *cos_sin)) * self.config.qk_gain
        k = norm(apply_rotary(k, *cos_sin)) * self.config.qk_gain
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """relu(x W1)^2 W2."""

    def __init__(self, config: JaxchatConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added back to it."""

    def __init__(self, config: JaxchatConfig, layer: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attn(norm(x), *context)
        return x + self.mlp(norm(x))


class JaxchatForCausalLM(PreTrainedModel, GenerationMixin):
    """Token ids in, soft-capped logits out."""

    config_class = JaxchatConfig
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: JaxchatConfig) -> None:
        super().__init__(config)
        vocab, width, layers = config.vocab_size, config.n_embd, range(config.n_layer)
        kv_dim = config.n_kv_head * (width // config.n_head)
        self.wte = nn.Embedding(vocab, width)
        self.h = nn.ModuleList([Block(config, layer) for layer in layers])
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(vocab, kv_dim) for i in layers if config.has_value_embed(i)}
        )
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of (B, T) ids that follow what the cache, by either name, holds.

        `attention_mask` is (B, S), 0 on padding, which may be on either side; `logits_to_keep`
        asks for the last positions only (0: all).
        """
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        real = attention_mask.bool()
        if position_ids is None:
            position_ids = (real.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        hidden = self._hidden(input_ids, real, position_ids, cache, past)
        logits = self.lm_head(hidden[:, -logits_to_keep:]).float()
        logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        named: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **named)

    def _hidden(
        self, ids: Tensor, real: Tensor, positions: Tensor, cache: Cache | None, past: int
    ) -> Tensor:
        """The final normed state (B, T, D) of every new token."""
        config = self.config
        x = x0 = x_mid = self._smear(ids, real, cache, past)
        cos_sin = self._rotary_angles(positions)
        masks = {window: _mask(real, past, window) for window in set(config.windows)}
        for i, (block, window) in enumerate(zip(self.h, config.windows, strict=True)):
            if config.residual_scalars:
                x = self.resid_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            value_embed = self.value_embeds[str(i)](ids) if config.has_value_embed(i) else None
            x = block(x, value_embed, cos_sin, masks[window], cache)
            if i == config.n_layer // 2:
                x_mid = x
        if config.backout:
            x = x - self.backout_lambda.to(x.dtype) * x_mid
        if cache is not None:
            self._remember(cache, ids)
        return norm(x)

    def _rotary_angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, 1, T, C / 2) of each position's rotation."""
        head_dim = self.config.n_embd // self.config.n_head
        channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions[:, None, :, None].float() * self.config.rope_base ** -(
            channels / head_dim
        )
        return torch.cos(angles), torch.sin(angles)

    def _smear(self, ids: Tensor, real: Tensor, cache: Cache | None, past: int) -> Tensor:
        """Embeddings with a gated share of their predecessors'; padding is nobody's predecessor."""
        x = norm(self.wte(ids))
        if not self.config.smear:
            return x
        before = torch.zeros_like(x[:, :1])
        if cache is not None and past:
            newest = cache.layers[self.config.n_layer].keys[:, 0, -1]  # (B, 1)
            before = norm(self.wte(newest))
        previous = torch.cat([before, x[:, :-1]], dim=1)
        follows = F.pad(real, (1, 0))[:, past:-1, None]  # whether the column before is real
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))  # (B, T, 1)
        return x + self.smear_lambda.to(x.dtype) * gate * previous.masked_fill(~follows, 0)

    def _remember(self, cache: Cache, ids: Tensor) -> None:
        """Append the ids to the layer behind the last one, as keys (B, 1, T, 1)."""
        if len(cache.layers) == self.config.n_layer:
            cache.layers.append(DynamicLayer())
        column = ids[:, None, :, None]
        cache.layers[self.config.n_layer].update(column, column)


def _mask(real: Tensor, past: int, window: int) -> Tensor:
    """(B, 1, T, S): causal, at most `window` back, no padding; everyone sees at least itself."""
    columns = torch.arange(real.shape[1], device=real.device)
    distance = columns[past:, None] - columns
    seen = (distance >= 0) & (distance <= window)
    return (seen & real[:, None, None]) | (distance == 0)
