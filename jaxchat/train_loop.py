"""The loop around the step: data in, metrics out, checkpoints, evaluations, and clean exits.

Every training stage runs this loop; a stage brings its backend, loader and schedule. A checkpoint
is written before anything else happens at its step, so neither an evaluation nor a sample can cost
a run. Metrics are read one step late: the device never waits for the host to look at a loss.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple, Protocol, TypeAlias

from jaxchat import peers, runtime
from jaxchat.artifacts import json_numbers
from jaxchat.backend import Backend
from jaxchat.checkpoint import CheckpointStore
from jaxchat.dataloader import Batch
from jaxchat.plan import check_positive, flag
from jaxchat.progress import TrainingProgress, format_duration
from jaxchat.schedule import StepSchedule
from jaxchat.spikes import Diverged, SpikeGuard, SpikeRule, keep_evidence
from jaxchat.tracker import Tracker

SHOWN_FIGURES = ("train/reward",)
"""Figures of a loader that the progress line shows; the metrics file has all of them."""

SKIPPED = "skipped"
"""Folder of the batches that were skipped, beside the checkpoints."""

EXIT_INTERRUPTED = 143
"""Exit status after a signal: saved, but not finished."""


Samples: TypeAlias = Sequence[tuple[str, str]]
"""Prompts and how a model continues them."""


class Loader(Protocol):
    """Batches of `rows` packed rows, and the state that continues after the ones handed out.

    `position` says where these end and costs nothing; `state` makes a state of it, also later. Of
    several processes all must ask for a state.
    """

    @property
    def epoch(self) -> int: ...

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
    evaluate: Callable[[], Mapping[str, float]]
    """Validation figures of the present weights, e.g. `{"val/bpb": ...}`."""
    sample: Callable[[], Samples] | None = None
    """A few continuations by the present weights."""
    agree: Callable[[bool], bool] = bool
    """`Backend.agree`, where processes may be asked to stop at different times."""
    best_by: str | None = None
    """The validation figure whose lowest value's checkpoint is kept."""


def run_loop(
    stage: Stage,
    config: LoopConfig,
    *,
    start_step: int = 0,
    train_seconds: float = 0.0,
    guard_state: Mapping[str, Any] | None = None,
) -> LoopResult:
    """Train from `start_step` to `config.num_iterations`, or until a signal asks to stop.

    `guard_state` is the checkpoint's `guard`. ValueError when too many steps had to be skipped.
    A run that loses one of its processes exits with `peers.EXIT_LOST`.
    """
    backend = stage.backend
    with (
        peers.exit_when_one_is_lost(backend.devices.processes, backend.gather),
        _keeping_what_is_saved(stage.store),
    ):
        return _run(stage, config, start_step, train_seconds, guard_state)


@contextmanager
def _keeping_what_is_saved(store: CheckpointStore) -> Iterator[None]:
    """Let a checkpoint that is being written arrive, whatever ends the run meanwhile.

    An interpreter that exits would break the writers off.
    """
    try:
        yield
    except BaseException:
        try:
            store.finish()
        except Exception as error:  # the first error is the one to hear of
            print(f"warning: the newest checkpoint could not be written: {error}", flush=True)
        raise


def _run(
    stage: Stage,
    config: LoopConfig,
    start_step: int,
    train_seconds: float,
    guard_state: Mapping[str, Any] | None,
) -> LoopResult:
    step, clock = start_step, _Clock(train_seconds)
    samples: Samples = ()
    reader = _MetricsReader(stage, config, clock, SpikeGuard(config.spikes, guard_state))
    with (
        _signals() as asked_to_stop,
        TrainingProgress(config.num_iterations, start_step) as progress,
    ):
        while True:
            last = step == config.num_iterations
            stopping = stage.agree(bool(asked_to_stop))
            if step > start_step and (stopping or _due(step, config.save_every, last)):
                reader.flush(progress)
                _save(stage, step, clock.seconds, reader.guard)
            if stopping and not last:
                progress.say(
                    f"stopped by {(asked_to_stop or ['another process'])[0]}; step {step} is saved"
                )
                stage.store.finish()
                return LoopResult(step, clock.seconds, interrupted=True)
            if _due(step, config.eval_every, last) or step == 0:
                reader.flush(progress)
                reader.validation = _evaluate(stage, step, progress)
                if stage.best_by is not None:
                    stage.store.note_validation(step, reader.validation[stage.best_by])
            if stage.sample is not None and step and _due(step, config.sample_every, last):
                reader.flush(progress)
                samples = stage.sample()
                progress.say("\n".join(f"  {prompt!r} -> {text!r}" for prompt, text in samples))
            if last:
                stage.store.finish()
                return LoopResult(step, clock.seconds, interrupted=False, samples=samples)
            reader.step(step, progress)
            step += 1


def _due(step: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and step > 0 and step % every == 0)


def _save(stage: Stage, step: int, train_seconds: float, guard: SpikeGuard) -> None:
    own = {
        "loader": stage.loader.state(),
        "train_seconds": train_seconds,
        "guard": guard.state(),
    }
    stage.store.save(step, stage.backend, {**stage.meta, **own})


def _evaluate(stage: Stage, step: int, progress: TrainingProgress) -> Mapping[str, float]:
    started = time.monotonic()
    figures = stage.evaluate()
    stage.tracker.log(step, figures)
    shown = " | ".join(f"{name} {value:.4f}" for name, value in figures.items())
    took = format_duration(time.monotonic() - started)
    progress.say(f"step {step}/{progress.num_steps} | {shown} ({took})")
    return figures


class _Clock:
    """Seconds spent training, evaluations and saves left out."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._started = self._last = 0.0
        self._laps: int | None = None
        """Since the start; None while the clock stands."""

    def start(self) -> None:
        if self._laps is None:
            self._started = self._last = time.monotonic()
            self._laps = 0

    def lap(self) -> float:
        """Seconds since the lap before."""
        assert self._laps is not None, "lap() before start()"
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self.seconds += elapsed
        self._laps += 1
        return elapsed

    def stop(self) -> float:
        """Take the last lap; returns the mean of all since the start, where the last means little:
        a step that had ended before it was asked for takes no time of its own."""
        self.lap()
        assert self._laps is not None
        mean, self._laps = (self._last - self._started) / self._laps, None
        return mean


class _Pending(NamedTuple):
    """A step that has been dispatched and not yet read."""

    step: int
    metrics: Mapping[str, Any]
    facts: dict[str, float]
    batch: Batch
    position: Any
    """Where the loader stood before the batch."""
    schedule: StepSchedule


class _MetricsReader:
    """Runs steps and logs each one after the next has been dispatched."""

    def __init__(self, stage: Stage, config: LoopConfig, clock: _Clock, guard: SpikeGuard) -> None:
        self._stage, self._config, self._clock, self.guard = stage, config, clock, guard
        self._pending: _Pending | None = None
        self._smooth_loss, self._bias = 0.0, 1.0
        self.validation: Mapping[str, float] = {}
        """The latest validation figures, for the progress line."""

    def step(self, step: int, progress: TrainingProgress) -> None:
        """Dispatch optimizer step `step` (from 0), then log the one before it."""
        self._clock.start()
        stage = self._stage
        position = stage.loader.position
        batch = next(stage.loader)
        cut = (self._config.micro_batches, -1, batch.inputs.shape[1])
        schedule = stage.schedule(step)
        inputs, targets = batch.inputs.reshape(cut), batch.targets.reshape(cut)
        weights = None if batch.weights is None else batch.weights.reshape(cut)
        limits = self.guard.limits(step)
        metrics = stage.backend.train_step(inputs, targets, schedule, weights, limits)
        facts = {
            "train/lr_multiplier": schedule.lr_multiplier,
            "train/batch_tokens": float(inputs.size * stage.backend.devices.processes),
            "train/epoch": float(stage.loader.epoch),
            **batch.figures,
        }
        self._log_pending(progress, self._clock.lap)
        self._pending = _Pending(step, metrics, facts, batch, position, schedule)

    def flush(self, progress: TrainingProgress) -> None:
        """Log the newest step and stop the clock."""
        self._log_pending(progress, self._clock.stop)

    def _log_pending(self, progress: TrainingProgress, seconds: Callable[[], float]) -> None:
        """`seconds` is asked when the step has ended."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        step, facts = pending.step + 1, pending.facts
        values = {name: float(value) for name, value in pending.metrics.items()}
        skipped = bool(values.pop("skipped"))
        scalars = {f"train/{name}": value for name, value in values.items()}
        speed = facts["train/batch_tokens"] / seconds()
        scalars |= facts | {"train/tokens_per_second": speed}
        if skipped:
            scalars["train/skipped"] = 1.0
        peak = self._stage.backend.devices.peak_flops
        if peak is not None:
            scalars["train/mfu"] = speed * self._config.flops_per_token / peak
        self._stage.tracker.log(step, scalars)
        if skipped:
            self._keep_evidence(pending, values, progress)
        self._note(pending.step, values, skipped)
        shown = {name: facts[name] for name in facts if name in SHOWN_FIGURES}
        progress.update(step, self._figures(scalars, shown))

    def _keep_evidence(
        self, pending: "_Pending", values: Mapping[str, float], progress: TrainingProgress
    ) -> None:
        limits = self.guard.limits(pending.step)
        record = {
            "step": pending.step + 1,
            **json_numbers(values),
            "limits": json_numbers(limits._asdict()),
            "schedule": pending.schedule._asdict(),
            "figures": pending.facts,
            "guard": self.guard.state(),
            "loader": self._stage.loader.state(pending.position),
        }
        batch = {name: getattr(pending.batch, name) for name in ("inputs", "targets", "weights")}
        path = keep_evidence(
            self._stage.store.directory / SKIPPED,
            pending.step + 1,
            batch,
            record,
            process=runtime.process_index(),
        )
        progress.say(
            f"step {pending.step + 1} skipped: loss {values['loss']:.4g} (limit "
            f"{limits.loss:.4g}), gradient norm {values['grad_norm']:.4g} (limit "
            f"{limits.grad_norm:.4g}); its batch is in {path}"
        )

    def _note(self, step: int, values: Mapping[str, float], skipped: bool) -> None:
        try:
            self.guard.note(step, values["loss"], values["grad_norm"], skipped=skipped)
        except Diverged as error:
            raise Diverged(
                f"step {step + 1}: {error}. Their batches are in "
                f"{self._stage.store.directory / SKIPPED}; look at the data, or start over with "
                "lower learning rates or a longer warm-up. The last checkpoint is untouched"
            ) from None

    def _figures(self, scalars: Mapping[str, float], extra: Mapping[str, float]) -> dict[str, str]:
        """What the progress line shows, by importance; the loss is a debiased moving average."""
        if "train/skipped" not in scalars:
            self._smooth_loss = 0.9 * self._smooth_loss + 0.1 * scalars["train/loss"]
            self._bias *= 0.9
        figures = {
            "loss": f"{self._smooth_loss / max(1 - self._bias, 0.1):.4f}",
            "tok/s": f"{scalars['train/tokens_per_second']:,.0f}",
        }
        for name, value in {**extra, **self.validation}.items():
            figures[name.replace("/", " ").removeprefix("train ")] = f"{value:.4f}"
        if "train/mfu" in scalars:
            figures["MFU"] = f"{100 * scalars['train/mfu']:.1f}%"
        return figures | {
            "lr x": f"{scalars['train/lr_multiplier']:.2f}",
            "epoch": f"{scalars['train/epoch']:.0f}",
        }


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect SIGTERM and SIGINT in a list instead of dying; a second SIGINT does interrupt."""
    caught: list[str] = []

    def note(number: int, _: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
