"""The shape of a model and the rules of its optimizer, as frozen dataclasses.

There is one dial, `depth`: `GPTConfig.from_depth` turns it into a shape, and plan.py the shape into
tokens, batch size and learning rates. Nothing here touches jax, torch or the disk, so both backends
and every test read the same numbers. Left out: what a *run* chooses (cadences, paths), which
belongs to the scripts.

Architecture and optimizer follow nanochat at commit 92d63d4 (2026-07-03).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

VOCAB_PAD = 64
"""Embedding rows are padded to a multiple of this, so that matmuls and shards stay even."""

ASPECT_RATIO = 64
"""Width per layer; the width is rounded up to whole heads."""

HEAD_DIM = 128
"""Width of an attention head."""

GATE_CHANNELS = 12
"""Channels of the normed input that the value-embedding gate reads."""

SMEAR_CHANNELS = 24
"""Channels of the normed embedding that the smear gate reads."""

MAX_SOFTCAP = 60.0
"""Up to this, the exponentials of a whole vocabulary's logits add up in float32."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The defaults are the modern preset; see `classic`."""

    sequence_len: int = 2048
    """Longest context, in tokens."""
    vocab_size: int = 32768
    """Tokens the model can emit, specials included (before padding)."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 6
    """Query heads."""
    n_kv_head: int = 6
    """Key/value heads; fewer than `n_head` is grouped-query attention."""
    n_embd: int = 768
    """Width of the residual stream."""
    window_pattern: str = "SSSL"
    """Attention reach, tiled over the layers: L everything, S a quarter; the last is always L."""
    rope_base: float = 100_000.0
    """Base of the rotary frequencies."""
    qk_gain: float = 1.2
    """Factor on the normed queries and keys."""
    logit_softcap: float = 15.0
    """Logits are squashed to (-softcap, softcap) by a tanh; at most `MAX_SOFTCAP`."""
    value_embeds: bool = True
    """Every other layer adds a gated per-token embedding to its values."""
    smear: bool = True
    """Every token's embedding takes a learned share of its predecessor's."""
    backout: bool = True
    """The final hidden state subtracts a learned share of the middle layer's."""
    residual_scalars: bool = True
    """Every layer rescales the stream and adds a share of the embedding back."""

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}; "
                f"use n_embd={-(-self.n_embd // self.n_head) * self.n_head}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary works on halves")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise ValueError(f"window_pattern={self.window_pattern!r} may only hold S and L")
        if not 0 < self.logit_softcap <= MAX_SOFTCAP:
            raise ValueError(
                f"logit_softcap={self.logit_softcap} must be above 0 and at most {MAX_SOFTCAP}"
            )
        if self.smear and self.n_embd < SMEAR_CHANNELS:
            raise ValueError(f"n_embd={self.n_embd} is below the {SMEAR_CHANNELS} that smear reads")

    @classmethod
    def from_depth(
        cls,
        depth: int,
        *,
        aspect_ratio: int = ASPECT_RATIO,
        head_dim: int = HEAD_DIM,
        vocab_size: int = vocab_size,
        sequence_len: int = sequence_len,
        window_pattern: str = window_pattern,
        preset: str = "modern",
    ) -> "GPTConfig":
        """The family member of `depth` layers: width = depth x aspect ratio, up to whole heads."""
        if depth < 1 or aspect_ratio < 1 or head_dim < 2:
            raise ValueError(
                f"depth={depth}, aspect_ratio={aspect_ratio} and head_dim={head_dim} "
                "must be positive, and head_dim even"
            )
        if preset not in ("modern", "classic"):
            raise ValueError(f"preset={preset!r}: choose 'modern' or 'classic'")
        n_head = -(-depth * aspect_ratio // head_dim)
        modern = cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=n_head * head_dim,
            window_pattern=window_pattern,
        )
        return modern if preset == "modern" else modern.classic()

    def classic(self) -> "GPTConfig":
        """The same shape in the autumn-2025 architecture (transformers' `NanoChatForCausalLM`)."""
        return replace(
            self,
            window_pattern="L",
            rope_base=10_000.0,
            qk_gain=1.0,
            value_embeds=False,
            smear=False,
            backout=False,
            residual_scalars=False,
        )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_PAD) * VOCAB_PAD

    @property
    def window_sizes(self) -> tuple[int, ...]:
        """How many earlier positions each layer's queries see, besides their own."""
        short = -(-self.sequence_len // 4 // 128) * 128
        sizes = {"L": self.sequence_len, "S": min(short, self.sequence_len)}
        letters = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer)]
        return tuple(sizes[letter] for letter in [*letters[:-1], "L"])

    def has_value_embed(self, layer: int) -> bool:
        """Value embeddings sit on every other layer, the last one included."""
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2


def count_params(config: GPTConfig) -> dict[str, int]:
    """Parameters by group: wte, value_embeds, lm_head, matrices (inside blocks), scalars."""
    c = config
    kv_dim = c.n_kv_head * c.head_dim
    n_value_embeds = sum(c.has_value_embed(i) for i in range(c.n_layer))
    attention = 2 * c.n_embd * c.n_embd + 2 * c.n_embd * kv_dim
    mlp = 8 * c.n_embd * c.n_embd
    gates = n_value_embeds * c.n_kv_head * GATE_CHANNELS
    smear = SMEAR_CHANNELS + 1 if c.smear else 0
    return {
        "wte": c.padded_vocab_size * c.n_embd,
        "value_embeds": n_value_embeds * c.padded_vocab_size * kv_dim,
        "lm_head": c.padded_vocab_size * c.n_embd,
        "matrices": c.n_layer * (attention + mlp) + gates,
        "scalars": 2 * c.n_layer * c.residual_scalars + smear + c.backout,
    }


def scaling_params(config: GPTConfig) -> int:
    """The parameters that set the training horizon: block matrices and lm_head."""
    counts = count_params(config)
    return counts["matrices"] + counts["lm_head"]


def flops_per_token(config: GPTConfig, sequence_len: int | None = None) -> int:
    """Training FLOPs per token: 6 per matmul parameter, plus attention scores and mixing.

    Attention is counted as 12 x n_head x head_dim x min(window, T) per layer (PaLM, appendix B,
    arXiv 2204.02311), with each layer's own window.
    """
    length = sequence_len or config.sequence_len
    counts = count_params(config)
    matmul = counts["matrices"] + counts["lm_head"] + (SMEAR_CHANNELS if config.smear else 0)
    attention = sum(12 * config.n_embd * min(w, length) for w in config.window_sizes)
    return 6 * matmul + attention


@dataclass(frozen=True)
class AdamGroup:
    """One AdamW group at the reference batch size."""

    lr: float
    """Learning rate before any scaling."""
    beta1: float
    beta2: float
    weight_decay: float
    width_scaled: bool = False
    """Whether the learning rate falls with width as (n_embd / 768) ** -0.5."""
    batch_scaled: bool = True
    """Whether the learning rate grows with the square root of the batch size."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for the matrices inside blocks, AdamW groups for everything else."""

    matrix_lr: float = 0.02
    """Muon's learning rate, for a square matrix."""
    matrix_beta2: float = 0.9
    """Decay of Muon's per-row second moment (NorMuon, arXiv 2510.05491)."""
    weight_decay: float = 0.28
    """Muon's cautious weight decay at the reference horizon."""
    lm_head: AdamGroup = AdamGroup(0.008, 0.8, 0.96, 0.01, width_scaled=True)
    wte: AdamGroup = AdamGroup(0.3, 0.8, 0.995, 0.001, width_scaled=True)
    value_embeds: AdamGroup = AdamGroup(0.15, 0.8, 0.995, 0.01, width_scaled=True)
    resid_lambdas: AdamGroup = AdamGroup(0.005, 0.8, 0.95, 0.05)
    x0_lambdas: AdamGroup = AdamGroup(0.5, 0.96, 0.95, 0.0)
    gates: AdamGroup = AdamGroup(0.2, 0.8, 0.95, 0.0, batch_scaled=False)
    """Smear and backout."""
    eps: float = 1e-10
    """AdamW's epsilon."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OptimizerConfig":
        """What `asdict` made, as a checkpoint holds it."""
        restored: dict[str, Any] = {
            name: AdamGroup(**value) if isinstance(value, Mapping) else value
            for name, value in values.items()
        }
        return cls(**restored)

    def scaled(self, factor: float) -> "OptimizerConfig":
        """The same with every learning rate multiplied."""
        rates: dict[str, Any] = {
            name: replace(group, lr=factor * group.lr) for name, group in self.adam_groups.items()
        }
        return replace(self, matrix_lr=factor * self.matrix_lr, **rates)

    @property
    def adam_groups(self) -> Mapping[str, AdamGroup]:
        """The AdamW groups by the label their parameters carry."""
        names = ("lm_head", "wte", "value_embeds", "resid_lambdas", "x0_lambdas", "gates")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes from step to step; `jaxchat.schedule` evaluates it."""

    warmup_steps: int = 40
    """Steps of linear learning-rate warm-up."""
    warmdown_ratio: float = 0.65
    """Share of the run over which the learning rate falls."""
    final_lr_frac: float = 0.05
    """Where the learning rate ends, as a share of its peak."""
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float = 0.90
    momentum_warmup_steps: int = 400

    def __post_init__(self) -> None:
        if not 0 <= self.warmdown_ratio <= 1 or not 0 <= self.final_lr_frac <= 1:
            raise ValueError(
                f"warmdown_ratio={self.warmdown_ratio} and final_lr_frac={self.final_lr_frac} "
                "are shares: give values between 0 and 1"
            )
        if self.warmup_steps < 0 or self.momentum_warmup_steps < 1:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be at least 0 and "
                f"momentum_warmup_steps={self.momentum_warmup_steps} at least 1"
            )
