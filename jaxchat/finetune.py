"""Midtraining and supervised finetuning: the pretraining loop on conversations.

The two stages differ in what they read and where they start, so a script brings a `Lesson` and its
defaults, and everything else is here. What the options leave open is inherited: batch, learning
rates and optimizer of the base run, and what saved memory in the run that the weights come from.
Muon's weight decay is off, as upstream's. Left out: what the conversations are (tasks/) and how
they are packed (chat_packing.py).
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxchat import runtime
from jaxchat.artifacts import base_dir
from jaxchat.backend import Backend
from jaxchat.chat_loader import ChatLoader
from jaxchat.chat_packing import Forecast, PackingStats, forecast
from jaxchat.checkpoint import CheckpointStore, load_arrays
from jaxchat.config import OptimizerConfig, ScheduleConfig, flops_per_token
from jaxchat.conversation import render_for_completion
from jaxchat.dataloader import NUM_STREAMS
from jaxchat.finetune_options import FinetuneOptions, Inherited, batch_for, optimizer_of
from jaxchat.loss_eval import bits_per_byte, conversation_batches
from jaxchat.micro_batch import settle_rows
from jaxchat.plan import REFERENCE_BATCH_TOKENS, TrainingPlan, micro_batches
from jaxchat.progress import OnProgress
from jaxchat.report import KeyValues, Report, Table, model_facts
from jaxchat.schedule import schedule_at
from jaxchat.stage_run import begin, carry_out, greedy_replies
from jaxchat.stages import (
    LoadedModel,
    find_output,
    find_source,
    how_to_talk,
    load_model,
    recorded,
    tag_of,
)
from jaxchat.tasks.base import Task, TaskSequence
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import METRICS, read_metrics
from jaxchat.training_report import series, training_parts
from jaxchat.training_stage import LoopConfig, LoopResult

SAMPLE_TOKENS = 64
"""Length of the replies that a run shows."""


@dataclass(frozen=True)
class Lesson:
    """What a stage teaches."""

    stage: str
    """`mid` or `sft`: where its checkpoints go."""
    script: str
    """Name of its section in the report."""
    title: str
    """Heading of that section."""
    train: TaskSequence
    val: Task
    questions: Sequence[str]
    """What the model is asked when it shows samples."""

    @property
    def parts(self) -> list[tuple[str, int]]:
        """Names and rows of what the training mixture is made of."""
        rows = Counter[str]()
        for task in self.train.tasks:
            rows[task.name] += len(task)
        return list(rows.items())


@dataclass(frozen=True)
class _Run:
    """A lesson bound to a model: everything that options and source decide together."""

    options: FinetuneOptions
    lesson: Lesson
    model: LoadedModel
    store: CheckpointStore
    inherited: Inherited
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    plan: TrainingPlan
    foreseen: Forecast
    facts: Mapping[str, Any]

    @property
    def backend(self) -> Backend:
        return self.model.backend

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def sequence_len(self) -> int:
        return self.backend.config.sequence_len

    @property
    def tag(self) -> str:
        """The result's."""
        return tag_of(self.lesson.stage, self.store.directory)


def finetune(options: FinetuneOptions, lesson: Lesson) -> None:
    """Train the source's model on the lesson, save it, and add a section to the report."""
    run = _prepare(options, lesson)
    with run.store.claim():
        _train(run)


def _train(run: _Run) -> None:
    """The run, in a folder that no other process writes to."""
    started = time.monotonic()
    options, backend, plan = run.options, run.backend, run.plan
    savings = options.savings(run.inherited.savings_on(backend.name))
    backend.start_training(run.optimizer, plan, savings)
    if options.warm_start:
        load_arrays(backend, run.model.path, run.model.meta, training=True)
    start = begin(run.store, backend, run.facts, resume=options.resume)
    rows = settle_rows(
        backend,
        plan,
        sequence_len=run.sequence_len,
        asked=options.device_batch_size,
        before=start.get("config", {}).get("device_batch_size"),
        card=options.card,
        new_model=False,
    )
    run = replace(run, options=replace(options, device_batch_size=rows))
    loop = LoopConfig(
        num_iterations=plan.num_iterations,
        micro_batches=micro_batches(
            plan,
            sequence_len=run.sequence_len,
            device_batch_size=rows,
            devices=backend.devices.count,
        ),
        flops_per_token=flops_per_token(backend.config),
        eval_every=options.eval_every,
        save_every=options.save_every,
        sample_every=options.sample_every,
    )
    _describe(run, loop, start["step"])
    result = carry_out(
        run.store,
        backend,
        loop,
        start,
        started=started,
        open_loader=partial(_train_loader, run),
        schedule=lambda step: schedule_at(step, run.schedule, plan),
        meta={**run.facts, **run.inherited.meta},
        config=_settled(run) | asdict(savings),
        resume=options.resume,
        run=options.run,
        tensorboard=options.tensorboard,
        evaluate=lambda on_progress: {"val/bpb": _validate(run, rows, on_progress)},
        sample=lambda: _sample(run),
    )
    _report(run, result)


def _prepare(options: FinetuneOptions, lesson: Lesson) -> _Run:
    """Load the source and settle what the options leave open."""
    ends = (lesson.stage, options.source, options.model_tag, options.step, options.output_tag)
    found, output = find_source(*ends), find_output(*ends)
    store = CheckpointStore(output, keep=options.keep_checkpoints)
    model = load_model(
        options.source,
        backend=options.backend,
        model_tag=found.tag,
        step=found.step,
        mesh=options.mesh,
    )
    meta = model.meta
    inherited = Inherited.of(meta)
    optimizer = optimizer_of(options, inherited.optimizer)
    schedule = ScheduleConfig(
        warmup_steps=0,
        warmdown_ratio=options.warmdown_ratio,
        final_lr_frac=options.final_lr_frac,
    )
    length = model.backend.config.sequence_len
    foreseen = forecast(lesson.train, model.tokenizer, sequence_len=length)
    tokens = length * foreseen.rows
    batch = _batch(options, model.backend, store, inherited, pass_tokens=tokens)
    steps = options.num_iterations or max(1, round(options.epochs * tokens / batch))
    plan = TrainingPlan(
        total_batch_size=batch,
        num_iterations=steps,
        lr_scale=math.sqrt(batch / REFERENCE_BATCH_TOKENS),
        weight_decay=0.0,
        target_tokens=batch * steps,
    )
    facts = {
        "tokenizer": model.tokenizer.fingerprint,
        "source": {
            "stage": options.source,
            "step": meta["step"],
            "run": meta.get("run"),
            "warm_start": options.warm_start,
        },
        "data": lesson.train.fingerprint,
        "plan": asdict(plan),
        "optimizer": asdict(optimizer),
        "schedule": asdict(schedule),
        "seed": options.seed,
    }
    return _Run(
        options=options,
        lesson=lesson,
        model=model,
        store=store,
        inherited=inherited,
        optimizer=optimizer,
        schedule=schedule,
        plan=plan,
        foreseen=foreseen,
        facts=facts,
    )


def _batch(
    options: FinetuneOptions,
    backend: Backend,
    store: CheckpointStore,
    inherited: Inherited,
    *,
    pass_tokens: float,
) -> int:
    """Tokens per step: those asked for, those of the run that goes on here, or what data allows.

    What data allows depends on devices and micro-batches, which may be others by then.
    """
    before = recorded(store, backend, "plan", resume=options.resume)
    if options.total_batch_size is not None:
        return options.total_batch_size
    if before is not None:
        return before["total_batch_size"]
    devices = backend.devices
    dealt = math.lcm(devices.count, NUM_STREAMS if devices.processes > 1 else 1)
    rows = dealt * (options.device_batch_size or 1)
    return batch_for(
        inherited.total_batch_size,
        pass_tokens=pass_tokens,
        unit=backend.config.sequence_len * rows,
    )


def _settled(run: _Run) -> dict[str, Any]:
    """The options as JSON, with the model that they came to."""
    options = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(run.options).items()
    }
    return {**options, "model_tag": run.model.tag, "output_tag": run.tag}


def _describe(run: _Run, loop: LoopConfig, start_step: int) -> None:
    plan, lesson = run.plan, run.lesson
    parts = ", ".join(f"{name} {count:,}" for name, count in lesson.parts)
    misfits = run.foreseen.misfits()
    fit = f"{misfits}\n" if misfits else ""
    runtime.print0(
        f"{lesson.title} of {run.model.tag} from {run.options.source} step "
        f"{run.model.meta['step']} on {run.backend.devices.description} with {run.backend.name}\n"
        f"{len(lesson.train):,} conversations ({parts})\n"
        f"{fit}"
        f"{plan.num_iterations:,} steps of {plan.total_batch_size:,} tokens "
        f"({loop.micro_batches} micro-batches); learning rates x "
        f"{plan.lr_scale * run.options.init_lr_frac:.3f}"
    )
    if start_step:
        runtime.print0(f"continuing at step {start_step}")


def _train_loader(run: _Run, state: Mapping[str, Any] | None) -> ChatLoader:
    return ChatLoader(
        run.lesson.train,
        run.tokenizer,
        rows_per_batch=run.plan.total_batch_size // run.sequence_len,
        sequence_len=run.sequence_len,
        seed=run.options.seed,
        process_index=run.backend.devices.process,
        process_count=run.backend.devices.processes,
        state=state,
        gather=run.backend.gather,
    )


def _validate(run: _Run, device_batch_size: int, on_progress: OnProgress) -> float:
    """Bits per byte of what the model should say in validation, or `eval_tokens` of it."""
    taken = conversation_batches(
        run.lesson.val,
        run.tokenizer,
        on_progress,
        tokens=run.options.eval_tokens,
        rows_per_batch=device_batch_size * run.backend.devices.count,
        sequence_len=run.sequence_len,
    )
    return bits_per_byte(run.backend, taken, run.tokenizer.token_bytes)


def _sample(run: _Run) -> list[tuple[str, str]]:
    """Question and greedy reply, for each of the lesson's questions."""
    conversations = {
        q: {"messages": [{"role": "user", "content": q}]} for q in run.lesson.questions
    }
    prompts = {q: render_for_completion(run.tokenizer, c) for q, c in conversations.items()}
    replies = greedy_replies(run.backend, run.tokenizer, prompts, max_tokens=SAMPLE_TOKENS)
    return [(question, reply.transcript) for question, reply in replies]


def _report(run: _Run, result: LoopResult) -> None:
    """Add the section: what was taught, the curves, and what the model answers."""
    if not runtime.is_first_process():
        return
    rows = read_metrics(run.store.directory / METRICS)
    settings = _settled(run) | {"hardware": run.backend.devices.description}
    parts, figures = training_parts(
        rows, settings, asdict(run.plan), result.samples, result.train_seconds
    )
    shares = {name: f"{100 * series(rows, name)[1][-1]:.2f}%" for name in PackingStats().shares()}
    Report(base_dir()).add(
        run.lesson.script,
        run.lesson.title,
        [
            Table(["conversations of", "rows"], run.lesson.parts, "The mixture"),
            KeyValues(shares, "Packing: shares of conversations and of tokens"),
            *parts,
            model_facts(run.lesson.stage, run.tag, run.store.read_meta(result.step)),
        ],
        wall_seconds=result.wall_seconds,
        figures=figures,
    )
    runtime.print0(
        f"{run.tag}: {result.step} steps in {result.train_seconds:.0f} s of "
        f"training, validation {figures['val bpb']:.4f} bits per byte, "
        f"saved in {run.store.path(result.step)}"
    )
    runtime.print0(how_to_talk(run.lesson.stage, run.tag))
