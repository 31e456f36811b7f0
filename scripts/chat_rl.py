"""Reinforcement learning on word problems: the model keeps what led to right answers.

    python -m scripts.chat_rl                    # GSM8K, the deepest finetuned model, one pass
    python -m scripts.chat_rl --data offline --questions 4 --samples 8 --num-iterations 50
    python -m scripts.chat_rl --data mine.jsonl

Every step answers some questions several times with the weights of that moment, pays 1 for a right
answer, and makes each token of a reply as much likelier as its reply was better than the mean of
its question. A file of your own has a question a line: {"question", "answer"}, where the answer's
last line is such as "#### 42" or "#### Paris", or {"question", "choices", "answer"}; one in twenty
is held out to measure on. Rates fall from a twentieth of the base run's to zero. The same command
continues a run that was stopped or killed.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

from jaxchat import cli, runtime
from jaxchat.artifacts import base_dir
from jaxchat.backend import DEFAULT_BACKEND, BackendName
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import OptimizerConfig, ScheduleConfig, flops_per_token
from jaxchat.finetune_options import Inherited, check_seed
from jaxchat.memory import NO_SAVINGS, Savings, savings_of
from jaxchat.plan import REFERENCE_BATCH_TOKENS, TrainingPlan, check_not_negative, check_positive
from jaxchat.policy_gradient import RolloutConfig, RolloutLoader, pass_at_k
from jaxchat.progress import OnProgress, unheard
from jaxchat.report import Curve, KeyValues, Part, Report, model_facts
from jaxchat.schedule import schedule_at
from jaxchat.stage_run import begin, carry_out
from jaxchat.stages import (
    LoadedModel,
    Resume,
    StageName,
    find_output,
    find_source,
    how_to_talk,
    load_model,
    recorded,
    tag_of,
)
from jaxchat.tasks.base import Task
from jaxchat.tasks.mixtures import default_source, rl_tasks
from jaxchat.tracker import METRICS, read_metrics
from jaxchat.training_report import series
from jaxchat.training_stage import LoopConfig, LoopResult

SCHEDULE = ScheduleConfig(warmup_steps=0, warmdown_ratio=1.0, final_lr_frac=0.0)
"""Straight down to zero."""

PASS_AT = (1, 2, 4, 8)
"""k of the pass@k that are reported."""

MOST_ROWS = 8
"""Rollouts per device and micro-batch where nobody says how many."""


@dataclass(frozen=True)
class Config:
    """Every option of reinforcement learning."""

    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "sft"
    """Stage of the model to start from: base, mid, sft or rl."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Which model of that stage; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Which checkpoint to start from; the newest when not set."""
    output_tag: str | None = None
    """Name of the result; that of the model it is made of when not set."""
    data: str | None = None
    """hub (GSM8K), offline (generated), or a jsonl file of your own; the hub's if downloaded."""

    num_iterations: int | None = None
    """Optimizer steps; one pass over the questions when not set."""
    questions: int = RolloutConfig.questions
    """Questions of one optimizer step."""
    samples: int = RolloutConfig.samples
    """Replies to each question."""
    max_tokens: int = RolloutConfig.max_tokens
    """Longest reply."""
    temperature: float = RolloutConfig.temperature
    """How freely replies are chosen: 1 as the model means them."""
    top_k: int = RolloutConfig.top_k
    """Choose among so many of the likeliest tokens; 0 for all."""
    slots: int = RolloutConfig.slots
    """Replies that a device writes at the same time: lower it when memory runs out."""
    device_batch_size: int | None = None
    """Rollouts per device and micro-batch: as many as divide a step, 8 at most, when not set."""
    card: int | None = None
    """Preset of what saves memory on a card of 8, 16, 24 or 80 GB, not what the source saved."""
    remat: str | None = None
    """Compute activations twice: none, products (kept), block, offload; the source's if unset."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory; as the source's run did when not set."""
    lr_frac: float = 0.05
    """Share of the base run's learning rates to start with."""

    eval_every: int = 60
    """Steps between measurements of pass@k."""
    eval_questions: int = 400
    """Held-out questions of a measurement."""
    eval_samples: int = 8
    """Replies to each of them."""
    save_every: int | None = 60
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest first."""
    resume: Resume = "auto"
    """auto: continue what is there; never: start anew, and set what is there aside."""
    seed: int = 42
    """Seed of the order of the questions and of every reply."""
    backend: BackendName = DEFAULT_BACKEND
    """jax or torch."""
    mesh: str = "auto"
    """How devices share the work: auto, or axis sizes such as data=2,fsdp=4 or tensor=2."""
    run: str | None = None
    """Weights & Biases run name; WANDB_RUN when not set, none when that is not set either."""
    tensorboard: bool = False
    """Write TensorBoard events beside the checkpoints."""

    def __post_init__(self) -> None:
        check_positive(
            num_iterations=self.num_iterations,
            questions=self.questions,
            max_tokens=self.max_tokens,
            slots=self.slots,
            device_batch_size=self.device_batch_size,
            lr_frac=self.lr_frac,
            keep_checkpoints=self.keep_checkpoints,
            eval_every=self.eval_every,
            save_every=self.save_every,
            eval_questions=self.eval_questions,
            eval_samples=self.eval_samples,
        )
        check_not_negative(temperature=self.temperature)
        check_seed(self.seed)
        self.savings(NO_SAVINGS)
        self.rollouts()

    def savings(self, inherited: Savings) -> Savings:
        """What the source's run saved, or the card's preset, with what is asked for in its place.

        ValueError, naming the flag, for what there is not.
        """
        return savings_of(self.card, self.remat, self.offload_optimizer, before=inherited)

    def rollouts(self) -> RolloutConfig:
        """ValueError, naming it, for a value out of range."""
        return RolloutConfig(
            questions=self.questions,
            samples=self.samples,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            slots=self.slots,
        )


def main(config: Config) -> None:
    """Train, measure, and add a section to the report."""
    Report(base_dir()).check_writable()
    ends = ("rl", config.source, config.model_tag, config.step, config.output_tag)
    found, output = find_source(*ends), find_output(*ends)
    source = config.data or default_source()
    task, judged = rl_tasks(source)
    model = load_model(
        config.source,
        backend=config.backend,
        model_tag=found.tag,
        step=found.step,
        mesh=config.mesh,
    )
    store = CheckpointStore(output, keep=config.keep_checkpoints)
    config = replace(config, device_batch_size=settled_rows(config, model.backend.devices.count))
    with store.claim():
        train(config, model, store, task, judged)


def train(
    config: Config, model: LoadedModel, store: CheckpointStore, task: Task, judged: Task
) -> None:
    """The run, in a folder that no other process writes to."""
    started = time.monotonic()
    plan, optimizer = plan_of(config, model, task)
    loop = loop_of(config, model, plan)
    before = recorded(store, model.backend, "rollouts", resume=config.resume)
    facts = as_before(facts_of(config, model, task, plan, optimizer), before)
    inherited = Inherited.of(model.meta)
    savings = config.savings(inherited.savings_on(model.backend.name))
    model.backend.start_training(optimizer, plan, savings)
    start = begin(store, model.backend, facts, resume=config.resume)
    runtime.print0(
        f"Reinforcement learning of {model.tag} from {config.source} step {model.meta['step']} on "
        f"{model.backend.devices.description} with {model.backend.name}\n"
        f"{len(task):,} questions of {task.name}\n"
        f"{plan.num_iterations:,} steps of {config.questions} x {config.samples} replies "
        f"({loop.micro_batches} micro-batches); learning rates x "
        f"{plan.lr_scale * config.lr_frac:.3f}"
    )
    if start["step"]:
        runtime.print0(f"continuing at step {start['step']}")
    result = carry_out(
        store,
        model.backend,
        loop,
        start,
        started=started,
        open_loader=partial(train_loader, config, model, task),
        schedule=lambda step: schedule_at(step, SCHEDULE, plan),
        meta=facts | inherited.meta,
        config=asdict(config) | asdict(savings),
        resume=config.resume,
        run=config.run,
        tensorboard=config.tensorboard,
        evaluate=partial(measure, config, model, judged),
    )
    if runtime.is_first_process():
        report(config, model, task, store, result)


def plan_of(config: Config, model: LoadedModel, task: Task) -> tuple[TrainingPlan, OptimizerConfig]:
    """How long, and the base run's rates at `lr_frac`; Muon decays no weights."""
    inherited = Inherited.of(model.meta)
    steps = config.num_iterations or max(1, len(task) // config.questions)
    plan = TrainingPlan(
        total_batch_size=inherited.total_batch_size,
        num_iterations=steps,
        lr_scale=math.sqrt(inherited.total_batch_size / REFERENCE_BATCH_TOKENS),
        weight_decay=0.0,
        target_tokens=0,  # known only once they have been written
    )
    return plan, inherited.optimizer.scaled(config.lr_frac)


def settled_rows(config: Config, devices: int) -> int:
    """Rollouts per device and micro-batch: those asked for, or the most that divide a step.

    ValueError where they do not.
    """
    rows, asked = config.rollouts().rows, config.device_batch_size
    words = f"{config.questions} questions x {config.samples} samples = {rows} rollouts"
    if rows % devices:
        raise ValueError(
            f"{words} are not a multiple of {devices} devices; use --questions "
            f"{-(-config.questions // devices) * devices}"
        )
    most = rows // devices
    if asked is None:
        return max(n for n in range(1, MOST_ROWS + 1) if most % n == 0)
    if most % asked:
        raise ValueError(
            f"{words} are not a multiple of device_batch_size={asked} x {devices} device(s); use "
            f"--device-batch-size {math.gcd(most, asked)}"
        )
    return asked


def loop_of(config: Config, model: LoadedModel, plan: TrainingPlan) -> LoopConfig:
    assert config.device_batch_size is not None, "settled_rows has settled it"
    micro = config.device_batch_size * model.backend.devices.count
    return LoopConfig(
        num_iterations=plan.num_iterations,
        micro_batches=config.rollouts().rows // micro,
        flops_per_token=flops_per_token(model.backend.config),
        eval_every=config.eval_every,
        save_every=config.save_every,
    )


def facts_of(
    config: Config, model: LoadedModel, task: Task, plan: TrainingPlan, optimizer: OptimizerConfig
) -> dict[str, Any]:
    """What a run is made of: a checkpoint of other facts is another run's.

    How many replies are written at the same time changes none of them.
    """
    rollouts = asdict(config.rollouts())
    return {
        "tokenizer": model.tokenizer.fingerprint,
        "source": {
            "stage": config.source,
            "step": model.meta["step"],
            "run": model.meta.get("run"),
        },
        "data": task.fingerprint,
        "plan": asdict(plan),
        "optimizer": asdict(optimizer),
        "rollouts": {name: value for name, value in rollouts.items() if name != "slots"},
        "seed": config.seed,
    }


def as_before(facts: dict[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """With the `slots` that a run may have been begun with when they still were a fact of it."""
    if before is None or "slots" not in before:
        return facts
    return facts | {"rollouts": facts["rollouts"] | {"slots": before["slots"]}}


def train_loader(
    config: Config, model: LoadedModel, task: Task, state: Mapping[str, Any] | None
) -> RolloutLoader:
    return RolloutLoader(
        task,
        model.backend,
        model.tokenizer,
        config.rollouts(),
        seed=config.seed,
        process_index=model.backend.devices.process,
        process_count=model.backend.devices.processes,
        state=state,
    )


def measure(
    config: Config, model: LoadedModel, judged: Task, on_progress: OnProgress
) -> Mapping[str, float]:
    """pass@k on held-out questions.

    Several processes may need different numbers of steps for their replies: they tell nothing.
    """
    alone = model.backend.devices.processes == 1
    found = pass_at_k(
        judged,
        model.backend,
        model.tokenizer,
        config.rollouts(),
        questions=config.eval_questions,
        samples=config.eval_samples,
        ks=PASS_AT,
        on_progress=on_progress if alone else unheard,
    )
    return {f"val/{name}": value for name, value in found.items()}


def report(
    config: Config,
    model: LoadedModel,
    task: Task,
    store: CheckpointStore,
    result: LoopResult,
) -> None:
    """Add the section: the reward and pass@k over the run."""
    tag = tag_of("rl", store.directory)
    rows = read_metrics(store.directory / METRICS)
    passes = {k: series(rows, f"val/pass@{k}") for k in PASS_AT}
    passes = {k: line for k, line in passes.items() if line[0]}
    first, last = ({f"pass@{k}": line[1][i] for k, line in passes.items()} for i in (0, -1))
    parts: list[Part] = [
        KeyValues({name: f"{first[name]:.4f} -> {last[name]:.4f}" for name in last}, "Outcome"),
        Curve("Reward", "step", "mean reward of a step", {task.name: series(rows, "train/reward")}),
        Curve(
            "Held-out questions",
            "step",
            "chance that one of k replies is right",
            {f"pass@{k}": line for k, line in passes.items()},
        ),
        KeyValues({name: str(value) for name, value in asdict(config).items()}, "Options"),
        model_facts("rl", tag, store.read_meta(result.step)),
    ]
    Report(base_dir()).add(
        "chat_rl",
        f"Reinforcement learning ({task.name})",
        parts,
        wall_seconds=result.wall_seconds,
        figures=last,
    )
    shown = ", ".join(f"{name} {first[name]:.4f} -> {last[name]:.4f}" for name in last)
    runtime.print0(
        f"{tag}: {result.step} steps in {result.train_seconds:.0f} s; {shown}; "
        f"saved in {store.path(result.step)}"
    )
    runtime.print0(how_to_talk("rl", tag))


if __name__ == "__main__":
    cli.run(main, Config)
