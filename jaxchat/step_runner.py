"""Optimizer steps, each read and logged after the next has been dispatched.

The device never waits for the host to look at a loss. What is read goes to the tracker, to the
progress line and to the rule that skips steps (spikes.py); of a skipped one the evidence is kept.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxchat import runtime
from jaxchat.artifacts import json_numbers
from jaxchat.dataloader import Batch
from jaxchat.progress import TrainingProgress
from jaxchat.schedule import StepSchedule
from jaxchat.spikes import Diverged, SpikeGuard, keep_evidence
from jaxchat.training_stage import LoopConfig, Stage

SHOWN_FIGURES = ("train/reward",)
"""Figures of a loader that the progress line shows; the metrics file has all of them."""

SKIPPED = "skipped"
"""Folder of the batches that were skipped, beside the checkpoints."""


class StepRunner:
    """Runs steps and logs each one after the next has been dispatched."""

    def __init__(
        self, stage: Stage, config: LoopConfig, guard: SpikeGuard, train_seconds: float
    ) -> None:
        self._stage, self._config, self.guard = stage, config, guard
        self._clock = _Clock(train_seconds)
        self._pending: _Pending | None = None
        self._smooth_loss, self._bias = 0.0, 1.0
        self.validation: Mapping[str, float] = {}
        """The latest validation figures, for the progress line."""

    @property
    def train_seconds(self) -> float:
        """Time spent in steps, earlier runs included."""
        return self._clock.seconds

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
            "train/epoch": stage.loader.passes,
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
            "epoch": f"{scalars['train/epoch']:.2f}",
        }


class _Pending(NamedTuple):
    """A step that has been dispatched and not yet read."""

    step: int
    metrics: Mapping[str, Any]
    facts: dict[str, float]
    batch: Batch
    position: Any
    """Where the loader stood before the batch."""
    schedule: StepSchedule


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
