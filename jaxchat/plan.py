"""What depth implies for training: tokens, batch size, learning rates, weight decay.

One pure function, `plan_training`, scales what was tuned at `REFERENCE_DEPTH`; scripts print what
it came to. Left out: how a step's rates move over the run (schedule.py).
"""

import math
from dataclasses import dataclass, replace

from jaxchat.config import (
    ASPECT_RATIO,
    GPTConfig,
    OptimizerConfig,
    flops_per_token,
    scaling_params,
)

REFERENCE_DEPTH = 12
"""Learning rates, batch size and weight decay are tuned at this depth and scaled from it."""

REFERENCE_BATCH_TOKENS = 2**19
"""The batch size, in tokens, at which `REFERENCE_DEPTH` was tuned."""


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
    (T_epoch framework, arXiv 2405.13698). ValueError for a number that is not above 0.
    """
    check_positive(
        num_iterations=num_iterations,
        target_flops=target_flops,
        target_param_data_ratio=target_param_data_ratio,
        total_batch_size=total_batch_size,
    )
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


def check_positive(**options: float | None) -> None:
    """ValueError, naming its flag, for an option that is given and not above 0, or not finite."""
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"{flag(name)} {value}: must be above 0")
    check_not_negative(**options)


def check_not_negative(**options: float | None) -> None:
    """The same for options that may be 0 as well, as learning rates may."""
    for name, value in options.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{flag(name)} {value}: must be at least 0, and finite")


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return f"--{name.replace('_', '-')}"


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
