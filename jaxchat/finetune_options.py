"""What midtraining and finetuning can be told, and what they take over when they are not."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from jaxchat import cli
from jaxchat.backend import DEFAULT_BACKEND, BackendName
from jaxchat.config import OptimizerConfig
from jaxchat.memory import NO_SAVINGS, Savings, savings_of
from jaxchat.plan import REFERENCE_BATCH_TOKENS, check_not_negative, check_positive
from jaxchat.stages import Resume, StageName


@dataclass(frozen=True)
class FinetuneOptions:
    """Options that midtraining and finetuning share; None inherits from the source's run."""

    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "base"
    """Stage of the model to start from: base, mid, sft or rl."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Which model of that stage; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Which checkpoint to start from; the newest when not set."""
    output_tag: str | None = None
    """Name of the result; that of the model it is made of when not set."""
    data: cli.repeatable[tuple[str, ...]] = ()
    """hub, offline, or a jsonl file of your own; several are mixed. The hub's if downloaded."""
    identity: Path | None = None
    """Conversations that say who the model is: a jsonl file of {"messages": [...]}."""

    num_iterations: int | None = None
    """Optimizer steps; as many as `epochs` take when not set."""
    epochs: float = 1.0
    """Passes over the mixture."""
    device_batch_size: int | None = None
    """Rows per device and micro-batch; as many as its memory holds when not set."""
    card: int | None = None
    """Preset for a card of 8, 16, 24 or 80 GB, in place of what the source's run saved."""
    remat: str | None = None
    """Compute activations twice: none, products (kept), block, offload; the source's if unset."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory; as the source's run did when not set."""
    total_batch_size: int | None = None
    """Tokens per optimizer step; the base run's when not set, or less for a pass of few steps."""
    embedding_lr: float | None = None
    """Learning rate of the token embedding (AdamW)."""
    unembedding_lr: float | None = None
    """Learning rate of the output head (AdamW)."""
    matrix_lr: float | None = None
    """Learning rate of the matrices (Muon)."""
    init_lr_frac: float = 1.0
    """Factor on every learning rate, of those that the base run began with."""
    warmdown_ratio: float = 0.5
    """Share of the run over which the learning rate falls."""
    final_lr_frac: float = 0.0
    """Where the learning rate ends."""
    warm_start: bool = False
    """Continue with the optimizer state of the source's run, not a fresh one."""

    eval_every: int = 150
    """Steps between evaluations on the validation conversations."""
    eval_tokens: int = 20 * 2**19
    """Validation tokens per evaluation, at most all there are."""
    sample_every: int | None = None
    """Steps between samples."""
    save_every: int | None = None
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest first."""
    resume: Resume = "auto"
    """auto: continue what is there; never: start anew, and set what is there aside."""
    seed: int = 42
    """Seed of the order of the conversations."""
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
            epochs=self.epochs,
            device_batch_size=self.device_batch_size,
            total_batch_size=self.total_batch_size,
            init_lr_frac=self.init_lr_frac,
            eval_every=self.eval_every,
            eval_tokens=self.eval_tokens,
            sample_every=self.sample_every,
            save_every=self.save_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        check_not_negative(
            embedding_lr=self.embedding_lr,
            unembedding_lr=self.unembedding_lr,
            matrix_lr=self.matrix_lr,
        )
        check_seed(self.seed)
        self.savings(NO_SAVINGS)

    def savings(self, inherited: Savings) -> Savings:
        """What the source's run saved, or the card's preset, with what is asked for in its place.

        ValueError, naming the flag, for what there is not.
        """
        return savings_of(self.card, self.remat, self.offload_optimizer, before=inherited)


MOST_SEED = 2**31 - 1
"""The upper half of a reply's seed is the run's, and the whole of it has 63 bits."""


def check_seed(seed: int) -> None:
    """ValueError, naming the flag, for a number that no generator takes."""
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"--seed {seed}: give a number from 0 to {MOST_SEED}")


LEAST_STEPS = 10
"""Steps of a pass below which the source's batch is too large: a few hundred conversations would be
one step, several times over."""

BASE_OPTIMIZER = "base_optimizer"
"""Where the checkpoints of later stages say what the base run's optimizer was."""

BASE_BATCH = "base_batch_size"
"""Where they say how many tokens its step had: theirs may have been cut to little data."""


@dataclass(frozen=True)
class Inherited:
    """What a checkpoint says of the run that made it; the project's defaults where it says nothing,
    as an imported one does."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The base run's, whatever stages lie between: their fractions are of the same rates."""
    total_batch_size: int = REFERENCE_BATCH_TOKENS
    """The base run's too."""
    savings: Savings = NO_SAVINGS
    backend: str | None = None
    """What trained it."""

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> "Inherited":
        known: dict[str, Any] = {}
        if optimizer := meta.get(BASE_OPTIMIZER, meta.get("optimizer")):
            known["optimizer"] = OptimizerConfig.from_dict(optimizer)
        if "plan" in meta:
            own = meta["plan"]["total_batch_size"]  # older checkpoints of later stages say no more
            known["total_batch_size"] = meta.get(BASE_BATCH, own)
        config = meta.get("config", {})
        if "offload_optimizer" in config:
            known["savings"] = Savings(config["remat"], config["offload_optimizer"])
            known["backend"] = meta.get("backend")
        return cls(**known)

    @property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint passes on of the base run, for `of` to find."""
        return {BASE_OPTIMIZER: asdict(self.optimizer), BASE_BATCH: self.total_batch_size}

    def savings_on(self, backend: str) -> Savings:
        """The run's, if this framework trained it: the other has other ways."""
        return self.savings if backend == self.backend else NO_SAVINGS


def batch_for(batch: int, *, pass_tokens: float, unit: int) -> int:
    """`batch` tokens, halved until a pass over the data has `LEAST_STEPS` steps.

    But it stays a multiple of `unit` tokens, a row for every device.
    """
    while pass_tokens < LEAST_STEPS * batch and batch % (2 * unit) == 0:
        batch //= 2
    return batch


def optimizer_of(options: FinetuneOptions, inherited: OptimizerConfig) -> OptimizerConfig:
    """The source's learning rates, where the options name no others, times `init_lr_frac`."""
    base, wte, head = inherited, options.embedding_lr, options.unembedding_lr
    if options.matrix_lr is not None:
        base = replace(base, matrix_lr=options.matrix_lr)
    if wte is not None:
        base = replace(
            base, wte=replace(base.wte, lr=wte), value_embeds=replace(base.value_embeds, lr=wte / 2)
        )
    if head is not None:
        base = replace(base, lm_head=replace(base.lm_head, lr=head))
    return base.scaled(options.init_lr_frac)
