"""What changes from step to step, as plain Python functions of the step.

Both backends evaluate these on the host and pass the three numbers into their step as arrays: no
recompilation, and no second implementation to drift.
"""

import math
from typing import Any, NamedTuple

from jaxchat.config import ScheduleConfig
from jaxchat.plan import TrainingPlan


class StepSchedule(NamedTuple):
    """The moving hyper-parameters of one optimizer step; a backend may hold them as arrays."""

    lr_multiplier: Any
    """Factor on every learning rate."""
    momentum: Any
    """Muon's momentum."""
    weight_decay: Any
    """Muon's cautious weight decay."""


def schedule_at(step: int, config: ScheduleConfig, plan: TrainingPlan) -> StepSchedule:
    """The schedule of optimizer step `step`, counted from 0, of `plan.num_iterations`."""
    return StepSchedule(
        lr_multiplier=lr_multiplier(step, config, plan.num_iterations),
        momentum=muon_momentum(step, config, plan.num_iterations),
        weight_decay=weight_decay_at(step, plan),
    )


def lr_multiplier(step: int, config: ScheduleConfig, num_iterations: int) -> float:
    """Linear warm-up, a plateau at 1, then a linear warm-down to `final_lr_frac`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    warmdown_steps = round(config.warmdown_ratio * num_iterations)
    if step <= num_iterations - warmdown_steps:
        return 1.0
    progress = (num_iterations - step) / warmdown_steps
    return progress + (1.0 - progress) * config.final_lr_frac


def muon_momentum(step: int, config: ScheduleConfig, num_iterations: int) -> float:
    """Rises over the first steps, and falls while the learning rate does, once it has risen."""
    warmdown_steps = round(config.warmdown_ratio * num_iterations)
    warmdown_start = num_iterations - warmdown_steps
    if step < config.momentum_warmup_steps:
        share = step / config.momentum_warmup_steps
        return (1 - share) * config.momentum_start + share * config.momentum_peak
    if warmdown_steps and step >= warmdown_start:
        share = (step - warmdown_start) / warmdown_steps
        return config.momentum_peak * (1 - share) + config.momentum_end * share
    return config.momentum_peak


def weight_decay_at(step: int, plan: TrainingPlan) -> float:
    """Half a cosine from the plan's weight decay to zero."""
    return plan.weight_decay * 0.5 * (1 + math.cos(math.pi * step / plan.num_iterations))
