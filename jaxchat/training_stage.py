"""What a training stage brings to the loop (train_loop.py), and what it gets back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from jaxchat.backend import Backend
from jaxchat.checkpoint import CheckpointStore
from jaxchat.dataloader import Batch
from jaxchat.plan import check_positive, flag
from jaxchat.progress import OnProgress
from jaxchat.schedule import StepSchedule
from jaxchat.spikes import SpikeRule
from jaxchat.tracker import Tracker

Samples: TypeAlias = Sequence[tuple[str, str]]
"""Prompts and how a model continues them."""


class Loader(Protocol):
    """Batches of `rows` packed rows, and the state that continues after the ones handed out.

    `position` says where these end and costs nothing; `state` makes a state of it, also later. Of
    several processes all must ask for a state.
    """

    @property
    def passes(self) -> float:
        """How often all there is has been handed out."""
        ...

    @property
    def position(self) -> Any: ...

    def __next__(self) -> Batch: ...

    def state(self, position: Any = None) -> dict[str, Any]: ...


@dataclass(frozen=True)
class LoopConfig:
    """How long a loop runs and how often it does what; None means only at the end."""

    num_iterations: int
    """Optimizer steps in all."""
    micro_batches: int
    """Micro-batches that one optimizer step accumulates."""
    flops_per_token: float
    """Training cost, for the utilisation figure."""
    eval_every: int | None = None
    """Steps between evaluations."""
    save_every: int | None = None
    """Steps between checkpoints."""
    sample_every: int | None = None
    """Steps between samples."""
    spikes: SpikeRule = field(default_factory=SpikeRule)
    """Which steps are skipped, and how many at most."""

    def __post_init__(self) -> None:
        check_positive(num_iterations=self.num_iterations)
        for name in ("eval_every", "save_every", "sample_every"):
            every = getattr(self, name)
            if every is not None and every < 1:
                raise ValueError(
                    f"{flag(name)} {every}: give at least 1; more steps than the run has mean only "
                    "at its end"
                )


@dataclass(frozen=True)
class LoopResult:
    """Where a loop stopped."""

    step: int
    """Optimizer steps done, earlier runs included."""
    train_seconds: float
    """Time spent in training steps, earlier runs included."""
    wall_seconds: float
    """Time of the whole stage, evaluations and saves included, earlier runs too."""
    interrupted: bool
    """Whether a signal ended the loop; a checkpoint of `step` is on disk."""
    samples: Samples = ()
    """By the final weights, of a stage that has any."""


@dataclass(frozen=True)
class Stage:
    """What a stage brings to the loop."""

    backend: Backend
    loader: Loader
    schedule: Callable[[int], StepSchedule]
    """The moving hyper-parameters of a step, counted from 0."""
    store: CheckpointStore
    tracker: Tracker
    meta: Mapping[str, Any]
    """What goes into every checkpoint beside the loop's own state."""
    evaluate: Callable[[OnProgress], Mapping[str, float]]
    """Validation figures of the present weights, e.g. `{"val/bpb": ...}`.

    Of several processes all must say equally often how far they are, as any may be asked to stop.
    """
    sample: Callable[[], Samples] | None = None
    """A few continuations by the present weights."""
    agree: Callable[[bool], bool] = bool
    """`Backend.agree`, where processes may be asked to stop at different times."""
    wall_seconds: Callable[[], float] = float
    """Time of the whole stage so far, earlier runs included."""
    best_by: str | None = None
    """The validation figure whose lowest value's checkpoint is kept."""
