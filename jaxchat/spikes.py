"""Steps that would hurt: when to skip one, what to keep of it, when to give up.

The one idea (OLMo's skip-step optimizer, arXiv 2501.00656): a step whose loss or gradient norm is
not finite, or lies far above the rolling mean of the steps before it, leaves weights and optimizer
state as they were. The step itself decides, on the device, against `Limits` that the host computed
from older steps, so nobody waits. Metrics are read a step late: the limits of step t know the steps
up to t - 2, also right after a resume, so a continued run skips what the whole run would have.
Steps without a gradient (of a policy whose replies are all equally good) change nothing either, but
are not skipped; and they are no history: beside them, every step that teaches would be a spike.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxchat.artifacts import atomic_write, json_numbers

LOSS_FLOOR = 0.02
"""Least standard deviation of the loss, as a share of its mean: six of them are 12%."""

GRAD_NORM_FLOOR = 2 / 3
"""The same of the gradient norm, whose tail is heavy: six of them are five times the mean."""


class Limits(NamedTuple):
    """A step above either is skipped; a backend may hold them as arrays."""

    loss: Any
    grad_norm: Any


NO_LIMITS = Limits(math.inf, math.inf)
"""Only what is not finite is skipped."""


@dataclass(frozen=True)
class SpikeRule:
    """When a step is a spike, and how many are too many."""

    window: int = 128
    """Steps that the rolling statistics cover."""
    sigmas: float = 6.0
    """Standard deviations above the mean at which a step is skipped."""
    min_history: int = 32
    """Steps to have seen before anything finite is a spike."""
    max_skipped: int = 16
    """Skipped steps within a window that end the run."""

    def __post_init__(self) -> None:
        if not 2 <= self.min_history <= self.window or self.max_skipped < 1 or self.sigmas <= 0:
            raise ValueError(
                f"window={self.window}, min_history={self.min_history}, sigmas={self.sigmas}, "
                f"max_skipped={self.max_skipped}: give 2 <= min_history <= window, and positive "
                "sigmas and max_skipped"
            )


class Diverged(ValueError):
    """Too many steps were skipped."""


class _Seen(NamedTuple):
    """One step that has been read."""

    step: int
    loss: float
    grad_norm: float
    skipped: bool


class SpikeGuard:
    """The rolling statistics of one run; `state` continues them."""

    def __init__(self, rule: SpikeRule, state: Mapping[str, Any] | None = None) -> None:
        self.rule = rule
        self._seen = [] if state is None else [_restored(*row) for row in state["seen"]]

    def limits(self, step: int) -> Limits:
        """What optimizer step `step` may reach, by the steps up to `step` - 2."""
        old = [s for s in self._seen if step - 2 - self.rule.window < s.step <= step - 2]
        good = [s for s in old if not s.skipped and s.grad_norm > 0]
        if len(good) < self.rule.min_history:
            return NO_LIMITS
        return Limits(
            self._limit([s.loss for s in good], LOSS_FLOOR),
            self._limit([s.grad_norm for s in good], GRAD_NORM_FLOOR),
        )

    def note(self, step: int, loss: float, grad_norm: float, *, skipped: bool) -> None:
        """Take in the figures of a step. Raises Diverged when that makes too many skipped ones."""
        self._seen.append(_Seen(step, loss, grad_norm, skipped))
        # one more than a window, because limits() leaves the newest out
        self._seen = self._seen[-self.rule.window - 1 :]
        count = sum(s.skipped for s in self._seen[-self.rule.window :])
        if skipped and count >= self.rule.max_skipped:
            raise Diverged(
                f"{count} of the last {len(self._seen)} steps were skipped, the last one with loss "
                f"{loss:.4g} and gradient norm {grad_norm:.4g} (limits {_shown(self.limits(step))})"
            )

    def state(self) -> dict[str, Any]:
        """Everything a later guard needs, ready for JSON."""
        return {
            "seen": [
                [s.step, *json_numbers({"l": s.loss, "g": s.grad_norm}).values(), s.skipped]
                for s in self._seen
            ]
        }

    def _limit(self, values: list[float], floor: float) -> float:
        mean = float(np.mean(values))
        return mean + self.rule.sigmas * max(float(np.std(values)), floor * abs(mean))


def keep_evidence(
    directory: Path,
    step: int,
    batch: Mapping[str, np.ndarray | None],
    record: Mapping[str, Any],
    *,
    process: int = 0,
) -> Path:
    """Write the token ids of a skipped step, and its figures beside them; returns the first file.

    The record holds the loader's state before the batch, from which a loader reads it again. The
    weights are not among them: they are those of the step before, and the same command gives them
    again from any earlier checkpoint, on a CPU bit for bit.
    """
    path = directory / f"step_{step:06d}.{process}.npz"
    with atomic_write(path, "wb") as file:
        arrays: dict[str, Any] = {name: x for name, x in batch.items() if x is not None}
        np.savez_compressed(file, **arrays)
    with atomic_write(path.with_suffix(".json")) as file:
        json.dump(record, file, indent=1)
    return path


def _restored(step: int, loss: float | None, grad_norm: float | None, skipped: bool) -> _Seen:
    return _Seen(
        step,
        math.nan if loss is None else loss,
        math.nan if grad_norm is None else grad_norm,
        skipped,
    )


def _shown(limits: Limits) -> str:
    return f"{limits.loss:.4g} and {limits.grad_norm:.4g}"
