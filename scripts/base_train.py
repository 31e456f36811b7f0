"""Pretrain the base model: `--depth` decides its size, and everything else follows.

    python -m scripts.base_train --depth 12
    python -m scripts.base_train --depth 4 --sequence-len 512 --corpus embedded \\
        --device-batch-size 8 --total-batch-size 4096 --num-iterations 400    # on a CPU

The same command continues a run that was stopped or killed, and gives what the uninterrupted run
would have given, bit for bit.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from jaxchat import cli, runtime
from jaxchat.artifacts import base_dir
from jaxchat.backend import DEFAULT_BACKEND, Backend, BackendName, backend_class
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import (
    ASPECT_RATIO,
    HEAD_DIM,
    GPTConfig,
    OptimizerConfig,
    ScheduleConfig,
    count_params,
    flops_per_token,
)
from jaxchat.dataloader import PackedLoader
from jaxchat.dataset import Corpus, default_corpus, open_corpus
from jaxchat.finetune_options import check_seed
from jaxchat.loss_eval import bits_per_byte, text_batches
from jaxchat.memory import Savings, savings_of
from jaxchat.micro_batch import settle_rows
from jaxchat.plan import (
    TrainingPlan,
    check_not_negative,
    check_positive,
    micro_batches,
    plan_training,
)
from jaxchat.progress import OnProgress
from jaxchat.report import Report, model_facts
from jaxchat.schedule import schedule_at
from jaxchat.spikes import SpikeRule
from jaxchat.stage_run import begin, carry_out, greedy_replies
from jaxchat.stages import Resume, check_new_tag, how_to_talk, recorded, stage_directory
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import METRICS, read_metrics
from jaxchat.training_report import training_parts
from jaxchat.training_stage import LoopConfig, LoopResult

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "Returns the",
    "Parameters\n----------\n",
)
"""What the model continues when it is asked for samples."""

POSITIVE = (
    *("depth", "aspect_ratio", "head_dim", "sequence_len"),
    *("num_iterations", "target_flops", "target_param_data_ratio"),
    *("device_batch_size", "total_batch_size"),
    *("eval_every", "eval_tokens", "sample_every", "save_every", "keep_checkpoints", "max_skipped"),
)
"""Options that must be above 0 where they are given."""

NOT_NEGATIVE = (
    *("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr"),
    *("weight_decay", "warmup_steps"),
)
"""Those that may be 0 as well."""


@dataclass(frozen=True)
class Config:
    """Every option of pretraining; the defaults are those of the GPU tiers."""

    depth: int = 12
    """Transformer layers: the one dial."""
    aspect_ratio: int = ASPECT_RATIO
    """Width per layer, rounded up to whole heads."""
    head_dim: int = HEAD_DIM
    """Width of an attention head."""
    sequence_len: int = GPTConfig.sequence_len
    """Tokens a row holds."""
    window_pattern: str = GPTConfig.window_pattern
    """Attention reach by layer: S short, L long."""
    preset: str = "modern"
    """Architecture generation: modern or classic."""

    num_iterations: int | None = None
    """Optimizer steps; overrides the two horizons below."""
    target_flops: float | None = None
    """Train for this many FLOPs; overrides the ratio."""
    target_param_data_ratio: float = 12.0
    """Tokens per scaling parameter."""

    device_batch_size: int | None = None
    """Rows per device and micro-batch; as many as its memory holds when not set."""
    card: int | None = None
    """Preset for a card of 8, 16, 24 or 80 GB: the memory to fit into, and what saves some."""
    remat: str | None = None
    """Compute activations twice to save memory: none, products (kept), block, offload (to host)."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory."""
    total_batch_size: int | None = None
    """Tokens per optimizer step; the scaling rule decides when not set."""
    embedding_lr: float = OptimizerConfig.wte.lr
    """Learning rate of the token embedding (AdamW)."""
    unembedding_lr: float = OptimizerConfig.lm_head.lr
    """Learning rate of the output head (AdamW)."""
    matrix_lr: float = OptimizerConfig.matrix_lr
    """Learning rate of the matrices (Muon)."""
    scalar_lr: float = OptimizerConfig.x0_lambdas.lr
    """Learning rate of the residual scalars (AdamW); a hundredth of it on the residual ones."""
    weight_decay: float = OptimizerConfig.weight_decay
    """Cautious weight decay of the matrices at the reference horizon."""
    warmup_steps: int = ScheduleConfig.warmup_steps
    """Steps of learning-rate warm-up."""
    warmdown_ratio: float = ScheduleConfig.warmdown_ratio
    """Share of the run over which the learning rate falls."""
    final_lr_frac: float = ScheduleConfig.final_lr_frac
    """Where the learning rate ends."""

    eval_every: int = 250
    """Steps between evaluations on the validation split."""
    eval_tokens: int = 80 * 2**19
    """Validation tokens per evaluation, at most all there are."""
    sample_every: int | None = 2000
    """Steps between samples."""
    save_every: int | None = None
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep; the one that validated best is kept besides."""
    max_skipped: int = SpikeRule.max_skipped
    """Steps skipped as spikes, of any 128, that end the run."""

    corpus: str | None = None
    """climbmix, fineweb-edu, embedded, or the path of texts; what has been downloaded if unset."""
    model_tag: str | None = None
    """Name of the run; d<depth> when not set."""
    resume: Resume = "auto"
    """auto: continue what is there; never: start anew, and set what is there aside."""
    seed: int = 42
    """Seed of the weights and of the data order."""
    backend: BackendName = DEFAULT_BACKEND
    """jax or torch."""
    mesh: str = "auto"
    """How devices share the work: auto, or axis sizes such as data=2,fsdp=4 or tensor=2."""
    run: str | None = None
    """Weights & Biases run name; WANDB_RUN when not set, none when that is not set either."""
    tensorboard: bool = False
    """Write TensorBoard events beside the checkpoints."""

    def __post_init__(self) -> None:
        check_positive(**{name: getattr(self, name) for name in POSITIVE})
        check_not_negative(**{name: getattr(self, name) for name in NOT_NEGATIVE})
        check_seed(self.seed)
        check_new_tag("--model-tag", self.tag)
        self.savings()
        schedule_of(self)  # ValueError for shares that are none

    def savings(self) -> Savings:
        """ValueError for a card or a policy that there is not."""
        return savings_of(self.card, self.remat, self.offload_optimizer)

    @property
    def tag(self) -> str:
        return self.model_tag or f"d{self.depth}"


def main(config: Config) -> None:
    """Train to the horizon, evaluate, and add a section to the report."""
    Report(base_dir()).check_writable()
    store = CheckpointStore(stage_directory("base", config.tag), keep=config.keep_checkpoints)
    with store.claim():
        train(config, store)


def train(config: Config, store: CheckpointStore) -> None:
    """The run, in a folder that no other process writes to."""
    started = time.monotonic()
    tokenizer = Tokenizer.load(base_dir() / "tokenizer")
    shape = shape_of(config, tokenizer.vocab_size)
    backend = backend_class(config.backend)(shape, mesh=config.mesh)
    corpus = corpus_of(config, store, backend)
    optimizer, schedule = optimizer_of(config), schedule_of(config)
    plan = plan_of(config, backend.config, optimizer)
    batches_of(config, backend, plan, config.device_batch_size or 1)  # ValueError if none will do
    describe(backend, plan, corpus)
    facts = {
        "tokenizer": tokenizer.fingerprint,
        "corpus": corpus.fingerprint,
        "plan": asdict(plan),
        "optimizer": asdict(optimizer),
        "schedule": asdict(schedule),
        "seed": config.seed,
    }
    backend.init(config.seed)
    savings = config.savings()
    backend.start_training(optimizer, plan, savings)
    start = begin(store, backend, facts, resume=config.resume)
    if start["step"]:
        runtime.print0(f"continuing {config.tag} at step {start['step']}")
    rows = settle_rows(
        backend,
        plan,
        sequence_len=config.sequence_len,
        asked=config.device_batch_size,
        before=start.get("config", {}).get("device_batch_size"),
        card=config.card,
    )
    config = replace(config, device_batch_size=rows, **asdict(savings))
    loop = loop_of(config, backend, plan, rows)
    runtime.print0(f"micro-batches of a step: {loop.micro_batches}, each of {rows} rows per device")
    result = carry_out(
        store,
        backend,
        loop,
        start,
        started=started,
        open_loader=partial(train_loader, config, corpus, tokenizer, plan, backend),
        schedule=lambda step: schedule_at(step, schedule, plan),
        meta={**facts, "shards": corpus.shards},
        config=asdict(config),
        resume=config.resume,
        run=config.run,
        tensorboard=config.tensorboard,
        evaluate=lambda on_progress: {
            "val/bpb": validate(config, corpus, tokenizer, backend, rows, on_progress)
        },
        sample=lambda: sample(backend, tokenizer),
        best_by="val/bpb",
    )
    report(config, backend, plan, store, result)


def shape_of(config: Config, vocab_size: int) -> GPTConfig:
    """The model that the options describe."""
    return GPTConfig.from_depth(
        config.depth,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        vocab_size=vocab_size,
        sequence_len=config.sequence_len,
        window_pattern=config.window_pattern,
        preset=config.preset,
    )


def corpus_of(config: Config, store: CheckpointStore, backend: Backend) -> Corpus:
    """What is read; by a run that goes on, of shards those that it began with.

    More may have been downloaded since, which would put all documents into another order.
    """
    shards = recorded(store, backend, "shards", resume=config.resume)
    return open_corpus(config.corpus or default_corpus(), shards=shards)


def optimizer_of(config: Config) -> OptimizerConfig:
    """The optimizer defaults with the options' learning rates."""
    base = OptimizerConfig()
    return replace(
        base,
        matrix_lr=config.matrix_lr,
        weight_decay=config.weight_decay,
        wte=replace(base.wte, lr=config.embedding_lr),
        value_embeds=replace(base.value_embeds, lr=config.embedding_lr / 2),
        lm_head=replace(base.lm_head, lr=config.unembedding_lr),
        resid_lambdas=replace(base.resid_lambdas, lr=config.scalar_lr / 100),
        x0_lambdas=replace(base.x0_lambdas, lr=config.scalar_lr),
    )


def schedule_of(config: Config) -> ScheduleConfig:
    return ScheduleConfig(
        warmup_steps=config.warmup_steps,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )


def plan_of(config: Config, model: GPTConfig, optimizer: OptimizerConfig) -> TrainingPlan:
    return plan_training(
        model,
        optimizer,
        aspect_ratio=config.aspect_ratio,
        target_param_data_ratio=config.target_param_data_ratio,
        target_flops=config.target_flops,
        num_iterations=config.num_iterations,
        total_batch_size=config.total_batch_size,
    )


def loop_of(config: Config, backend: Backend, plan: TrainingPlan, rows: int) -> LoopConfig:
    return LoopConfig(
        num_iterations=plan.num_iterations,
        micro_batches=batches_of(config, backend, plan, rows),
        flops_per_token=flops_per_token(backend.config),
        eval_every=config.eval_every,
        save_every=config.save_every,
        sample_every=config.sample_every,
        spikes=SpikeRule(max_skipped=config.max_skipped),
    )


def batches_of(config: Config, backend: Backend, plan: TrainingPlan, rows: int) -> int:
    """Micro-batches of a step; ValueError where `rows` a device make no whole number of them."""
    return micro_batches(
        plan,
        sequence_len=config.sequence_len,
        device_batch_size=rows,
        devices=backend.devices.count,
    )


def describe(backend: Backend, plan: TrainingPlan, corpus: Corpus) -> None:
    """Print what depth came to, and what is read, before anything takes long."""
    model, counts = backend.config, count_params(backend.config)
    flops = plan.target_tokens * flops_per_token(model)
    runtime.print0(
        f"d{model.n_layer}: width {model.n_embd}, {model.n_head} heads of {model.head_dim}, "
        f"windows {'/'.join(map(str, model.window_sizes))}, {sum(counts.values()):,} parameters "
        f"({', '.join(f'{name} {count:,}' for name, count in counts.items())})\n"
        f"on {backend.devices.description} with {backend.name}\n"
        f"reading {corpus.name}\n"
        f"{plan.num_iterations:,} steps of {plan.total_batch_size:,} tokens = "
        f"{plan.target_tokens:,} tokens, {flops:.3e} FLOPs; learning rates x "
        f"{plan.lr_scale:.3f}, weight decay {plan.weight_decay:.3f}"
    )


def train_loader(
    config: Config,
    corpus: Corpus,
    tokenizer: Tokenizer,
    plan: TrainingPlan,
    backend: Backend,
    state: Mapping[str, Any] | None,
) -> PackedLoader:
    return PackedLoader(
        corpus,
        tokenizer,
        split="train",
        rows_per_batch=plan.total_batch_size // config.sequence_len,
        sequence_len=config.sequence_len,
        seed=config.seed,
        process_index=backend.devices.process,
        process_count=backend.devices.processes,
        state=state,
        gather=backend.gather,
    )


def validate(
    config: Config,
    corpus: Corpus,
    tokenizer: Tokenizer,
    backend: Backend,
    device_rows: int,
    on_progress: OnProgress,
) -> float:
    """Bits per byte of the present weights on the validation split, or `eval_tokens` of it."""
    taken = text_batches(
        corpus,
        tokenizer,
        on_progress,
        split="val",
        tokens=config.eval_tokens,
        rows_per_batch=device_rows * backend.devices.count,
        sequence_len=config.sequence_len,
    )
    return bits_per_byte(backend, taken, tokenizer.token_bytes)


def sample(backend: Backend, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Prompt and greedy continuation, for each of `PROMPTS`."""
    prompts = {prompt: [tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in PROMPTS}
    replies = greedy_replies(backend, tokenizer, prompts, max_tokens=32)
    return [(prompt, reply.text) for prompt, reply in replies]


def report(
    config: Config,
    backend: Backend,
    plan: TrainingPlan,
    store: CheckpointStore,
    result: LoopResult,
) -> None:
    """Add the section: what was trained, the curves, and what the model writes."""
    if not runtime.is_first_process():
        return
    rows = read_metrics(store.directory / METRICS)
    settings = asdict(config) | {"hardware": backend.devices.description}
    derived = asdict(plan) | {f"params {k}": v for k, v in count_params(backend.config).items()}
    parts, figures = training_parts(rows, settings, derived, result.samples, result.train_seconds)
    Report(base_dir()).add(
        "base_train",
        "Pretraining",
        [*parts, model_facts("base", config.tag, store.read_meta(result.step))],
        wall_seconds=result.wall_seconds,
        figures=figures,
    )
    runtime.print0(
        f"{config.tag}: {result.step} steps in {result.train_seconds:.0f} s of training, "
        f"validation {figures['val bpb']:.4f} bits per byte, saved in {store.path(result.step)}"
    )
    runtime.print0(how_to_talk("base", config.tag))


if __name__ == "__main__":
    cli.run(main, Config)
