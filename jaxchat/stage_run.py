"""A stage's run, from its first step or its newest checkpoint to its last step or a signal.

What the training scripts do alike once they know what their stage is made of; that is theirs
(base_train and chat_rl) and finetune.py's.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

from jaxchat.backend import Backend
from jaxchat.checkpoint import CheckpointStore, fresh_start
from jaxchat.engine import Engine
from jaxchat.progress import OnProgress
from jaxchat.request import Completion, Request
from jaxchat.sampling_params import SamplingParams
from jaxchat.schedule import StepSchedule
from jaxchat.stages import Resume
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import open_tracker
from jaxchat.train_loop import EXIT_INTERRUPTED, run_loop
from jaxchat.training_stage import Loader, LoopConfig, LoopResult, Samples, Stage

OpenLoader: TypeAlias = Callable[[Mapping[str, Any] | None], AbstractContextManager[Loader]]
"""A loader that continues at a state; at the beginning where that is None."""


def begin(
    store: CheckpointStore, backend: Backend, facts: Mapping[str, Any], *, resume: Resume
) -> dict[str, Any]:
    """Where a run starts: the meta of its newest checkpoint, which `backend` then holds.

    `facts` is what the run is made of; ValueError when the checkpoint is of another one. Fresh with
    `resume` "never".
    """
    restored = store.restore(backend, facts) if resume == "auto" else None
    return restored or fresh_start()


def greedy_replies(
    backend: Backend, tokenizer: Tokenizer, prompts: Mapping[str, Sequence[int]], *, max_tokens: int
) -> list[tuple[str, Completion]]:
    """What the model says to prompts, each under its name, that fit into its context."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    context = backend.config.sequence_len
    fitting = {name: Request(ids, params) for name, ids in prompts.items() if len(ids) <= context}
    replies = Engine(backend, tokenizer).complete(fitting.values())
    return list(zip(fitting, replies, strict=True))


def carry_out(
    store: CheckpointStore,
    backend: Backend,
    loop: LoopConfig,
    start: Mapping[str, Any],
    *,
    started: float,
    open_loader: OpenLoader,
    schedule: Callable[[int], StepSchedule],
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    resume: Resume,
    run: str | None,
    tensorboard: bool,
    evaluate: Callable[[OnProgress], Mapping[str, float]],
    sample: Callable[[], Samples] | None = None,
    best_by: str | None = None,
) -> LoopResult:
    """Train from `start` on; `config`, the options as they came to be, is saved beside `meta`.

    `started` is when this process took the stage up (time.monotonic); earlier ones add their time.
    `run` is a name for Weights & Biases; the callables and `best_by` are `Stage`'s. Exits with
    EXIT_INTERRUPTED after a signal.
    """
    if resume == "never":
        store.set_aside(backend)
    tracker = open_tracker(
        store.directory,
        run=run,
        run_id=start["run"],
        tensorboard=tensorboard,
        config=config,
        resume_step=start["step"],
    )
    before = start.get("wall_seconds", start["train_seconds"])  # older checkpoints lack it
    with open_loader(start["loader"]) as loader:
        stage = Stage(
            backend=backend,
            loader=loader,
            schedule=schedule,
            store=store,
            tracker=tracker,
            meta={**meta, "run": start["run"], "config": config},
            evaluate=evaluate,
            sample=sample,
            agree=backend.agree,
            wall_seconds=lambda: before + time.monotonic() - started,
            best_by=best_by,
        )
        result = run_loop(
            stage,
            loop,
            start_step=start["step"],
            train_seconds=start["train_seconds"],
            guard_state=start.get("guard"),
        )
    tracker.close()
    if result.interrupted:
        raise SystemExit(EXIT_INTERRUPTED)
    return result
