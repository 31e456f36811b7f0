"""Every hyper-parameter of the project, as frozen dataclasses, and the arithmetic that ties them.

There is one dial, `depth`: `GPTConfig.from_depth` turns it into a shape, `plan_training` turns the
shape into tokens, batch size and learning rates. Nothing here touches jax, torch or the disk, so
both backends and every test read the same numbers. Left out: what a *run* chooses (cadences,
paths), which belongs to the scripts.

Architecture and optimizer follow nanochat at commit 92d63d4 (2026-07-03).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

VOCAB_PAD = 64
"""Embedding rows are padded to a multiple of this, so that matmuls and shards stay even."""

REFERENCE_DEPTH = 12
"""Learning rates, batch size and weight decay are tuned at this depth and scaled from it."""

REFERENCE_BATCH_TOKENS = 2**19
"""The batch size, in tokens, at which `REFERENCE_DEPTH` was tuned."""

ASPECT_RATIO = 64
"""Width per layer; the width is rounded up to whole heads."""

HEAD_DIM = 128
"""Width of an attention head."""

GATE_CHANNELS = 12
"""Channels of the normed input that the value-embedding gate reads."""

SMEAR_CHANNELS = 24
"""Channels of the normed embedding that the smear gate reads."""


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
    """Logits are squashed to (-softcap, softcap) by a tanh."""
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


@dataclass(frozen=True)
class TrainingPlan:
    """What depth implies: how long, how wide a batch, and the scaled rates."""

    total_batch_size: int
    """Tokens per optimizer step."""
    num_iterations: int
    """Optimizer steps."""
    lr_scale: float
    """Factor on every batch-scaled learning rate."""
    weight_decay: float
    """Muon's weight decay at the first step; it falls to zero along a cosine."""
    target_tokens: int
    """Tokens the run sees in all."""


def plan_training(
    config: GPTConfig,
    optimizer: OptimizerConfig,
    *,
    aspect_ratio: int = ASPECT_RATIO,
    target_param_data_ratio: float = 12.0,
    target_flops: float | None = None,
    num_iterations: int | None = None,
    total_batch_size: int | None = None,
) -> TrainingPlan:
    """Batch size, horizon and rate scales of a model.

    The horizon is the first one given of `num_iterations`, `target_flops` and the ratio of tokens
    to scaling parameters. The batch grows as (D / D_12)^0.383 (arXiv 2505.13738), learning rates
    with its square root, and weight decay with the square root of the batch over the horizon
    (T_epoch framework, arXiv 2405.13698).
    """
    reference = _reference_shape(config, aspect_ratio)
    ratio_tokens = target_param_data_ratio * scaling_params(config)
    reference_tokens = target_param_data_ratio * scaling_params(reference)
    batch = total_batch_size or 2 ** round(
        math.log2(REFERENCE_BATCH_TOKENS * (ratio_tokens / reference_tokens) ** 0.383)
    )
    if num_iterations is None:
        tokens = ratio_tokens
        if target_flops is not None:
            tokens = target_flops / flops_per_token(config)
        num_iterations = max(1, round(tokens / batch))
    batch_scale = math.sqrt(batch / REFERENCE_BATCH_TOKENS)
    return TrainingPlan(
        total_batch_size=batch,
        num_iterations=num_iterations,
        lr_scale=batch_scale,
        weight_decay=optimizer.weight_decay * batch_scale * reference_tokens / ratio_tokens,
        target_tokens=batch * num_iterations,
    )


def micro_batches(
    plan: TrainingPlan, *, sequence_len: int, device_batch_size: int, devices: int
) -> int:
    """How many micro-batches of `device_batch_size` rows per device make one optimizer step.

    ValueError, with sizes that would do, when they do not make a whole number.
    """
    if device_batch_size < 1:
        raise ValueError(f"device_batch_size={device_batch_size} must be at least 1")
    micro_tokens = device_batch_size * devices * sequence_len
    count, rest = divmod(plan.total_batch_size, micro_tokens)
    if rest or not count:
        raise ValueError(
            f"total_batch_size={plan.total_batch_size:,} tokens is not a multiple of "
            f"device_batch_size={device_batch_size} x {devices} device(s) x "
            f"sequence_len={sequence_len} = {micro_tokens:,}; use --total-batch-size "
            f"{max(1, count) * micro_tokens} or a smaller --device-batch-size"
        )
    return count


def _reference_shape(config: GPTConfig, aspect_ratio: int) -> GPTConfig:
    """The depth-12 relative of `config`: same vocabulary, head width, aspect ratio and switches."""
    shape = GPTConfig.from_depth(
        REFERENCE_DEPTH, aspect_ratio=aspect_ratio, head_dim=config.head_dim
    )
    return replace(
        config,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_kv_head=shape.n_head,
        n_embd=shape.n_embd,
    )


MAX_TOP_LOGPROBS = 20
"""Most alternatives reported beside a token, as in OpenAI's API."""

MAX_LOGIT_BIAS = 300
"""Most tokens whose logits one request may bias, as in OpenAI's API."""

MAX_REPETITION_PENALTY = 10.0
"""Logits are within 15, so that more changes nothing."""

MIN_REPETITION_PENALTY = 0.1
"""Far smaller ones divide logits to infinity, and the softmax of that is not a number."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request turns logits into tokens."""

    max_tokens: int = 256
    """Most tokens to generate."""
    temperature: float = 1.0
    """0 is greedy: the exact argmax."""
    top_k: int | None = None
    """Keep the k most likely tokens; None or 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    min_p: float = 0.0
    """Drop tokens below this share of the most likely one's probability."""
    seed: int = 0
    """Key of the request's random numbers."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the reply already holds."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for every time that the reply already holds it."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or reply hold, and multiplies negative ones
    (CTRL, arXiv 1909.05858)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), each token at most once."""
    ignore_eos: bool = False
    """Whether `assistant_end` and `bos` are tokens like any other (for benchmarks)."""
    top_logprobs: int = 0
    """How many of the likeliest tokens are reported beside every chosen one."""

    @property
    def adjusts(self) -> bool:
        """Whether the choice is made from other logits than the model's."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties) or bool(self.logit_bias)

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": self.max_tokens >= 1,
            "temperature": self.temperature >= 0 and math.isfinite(self.temperature),
            "top_k": self.top_k is None or self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "seed": 0 <= self.seed < 2**63,
            "stop": all(self.stop),
            "presence_penalty": -2 <= self.presence_penalty <= 2,
            "frequency_penalty": -2 <= self.frequency_penalty <= 2,
            "repetition_penalty": (
                MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_REPETITION_PENALTY
            ),
            "logit_bias": _is_bias(self.logit_bias),
            "top_logprobs": 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
        }
        bad = [f"{name}={getattr(self, name)!r}" for name, good in checks.items() if not good]
        if bad:
            raise ValueError(f"sampling parameters out of range: {', '.join(bad)}")


def _is_bias(pairs: tuple[tuple[int, float], ...]) -> bool:
    """Whether this is a list of distinct tokens with biases from -100 to 100."""
    return (
        len(pairs) <= MAX_LOGIT_BIAS
        and len({token for token, _ in pairs}) == len(pairs)
        and all(token >= 0 and -100 <= bias <= 100 for token, bias in pairs)
    )
