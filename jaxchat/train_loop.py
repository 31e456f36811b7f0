"""The loop around the step: data in, metrics out, checkpoints, evaluations, and clean exits.

Every training stage runs this loop; a stage brings its backend, loader and schedule. A checkpoint
is written before anything else happens at its step, so neither an evaluation nor a sample can cost
a run. Metrics are read one step late: the device never waits for the host to look at a loss.
"""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jaxchat import peers
from jaxchat.checkpoint import CheckpointStore
from jaxchat.progress import TrainingProgress, format_duration
from jaxchat.spikes import SpikeGuard
from jaxchat.step_runner import StepRunner
from jaxchat.training_stage import LoopConfig, LoopResult, Samples, Stage

EXIT_INTERRUPTED = 143
"""Exit status after a signal: saved, but not finished."""

CONTINUES = "the same command continues from there (without --resume never)"
"""What is said of a run that was stopped."""


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
    step = saved = start_step
    samples: Samples = ()
    runner = StepRunner(stage, config, SpikeGuard(config.spikes, guard_state), train_seconds)
    with (
        _signals() as asked_to_stop,
        TrainingProgress(config.num_iterations, start_step) as progress,
    ):

        def asked() -> bool:
            """Whether to stop; a run at its last step has finished, whoever asks."""
            return step < config.num_iterations and stage.agree(bool(asked_to_stop))

        while True:
            last = step == config.num_iterations
            stopping = asked()
            if step > saved and (stopping or _due(step, config.save_every, last)):
                saved = _save(stage, step, runner, progress)
            if not stopping and (step == 0 or _due(step, config.eval_every, last)):
                runner.flush(progress)
                stopping = not _evaluate(stage, step, runner, progress, asked)
            if stopping:
                if step > saved:
                    _save(stage, step, runner, progress)
                kept = f"step {step} is saved; {CONTINUES}" if step else "no step was done"
                progress.say(f"stopped by {(asked_to_stop or ['another process'])[0]}; {kept}")
                stage.store.finish()
                return _result(stage, step, runner, interrupted=True)
            if stage.sample is not None and step and _due(step, config.sample_every, last):
                runner.flush(progress)
                progress.doing("sampling")
                samples = stage.sample()
                progress.say("\n".join(f"  {prompt!r} -> {text!r}" for prompt, text in samples))
            if last:
                stage.store.finish()
                return _result(stage, step, runner, interrupted=False, samples=samples)
            runner.step(step, progress)
            step += 1


def _due(step: int, every: int | None, last: bool) -> bool:
    return last or (every is not None and step > 0 and step % every == 0)


def _save(stage: Stage, step: int, runner: StepRunner, progress: TrainingProgress) -> int:
    """Returns the step that is saved now."""
    runner.flush(progress)
    own = {
        "loader": stage.loader.state(),
        "train_seconds": runner.train_seconds,
        "wall_seconds": stage.wall_seconds(),
        "guard": runner.guard.state(),
    }
    stage.store.save(step, stage.backend, {**stage.meta, **own})
    return step


def _result(
    stage: Stage, step: int, runner: StepRunner, *, interrupted: bool, samples: Samples = ()
) -> LoopResult:
    return LoopResult(step, runner.train_seconds, stage.wall_seconds(), interrupted, samples)


class _AskedToStop(Exception):
    """Ends an evaluation that would keep whoever asks waiting."""


def _evaluate(
    stage: Stage,
    step: int,
    runner: StepRunner,
    progress: TrainingProgress,
    asked: Callable[[], bool],
) -> bool:
    """Whether it came to its end, or was broken off because somebody had `asked`."""

    def on_progress(share: float) -> None:
        progress.doing(f"validating {share:.0%}")
        if asked():
            raise _AskedToStop

    started = time.monotonic()
    try:
        figures = stage.evaluate(on_progress)
    except _AskedToStop:
        return False
    stage.tracker.log(step, figures)
    runner.validation = figures
    if stage.best_by is not None:
        stage.store.note_validation(step, figures[stage.best_by])
    shown = " | ".join(f"{name} {value:.4f}" for name, value in figures.items())
    took = format_duration(time.monotonic() - started)
    progress.say(f"step {step}/{progress.num_steps} | {shown} ({took})")
    return True


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
