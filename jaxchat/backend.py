"""What a backend can do: the seam between the pipeline and the framework that runs it.

`JaxBackend` and `torch_ref`'s `TorchBackend` implement `Backend`; scripts, evaluation and the
Engine see only this file, numpy arrays and opaque caches. A backend owns one model (and, while
training, its optimizer state) on its devices. Nothing here imports jax or torch: the class is
looked up by name, so `--help` stays fast and a machine needs only the framework it uses.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from jaxchat.config import GPTConfig, OptimizerConfig
from jaxchat.memory import NO_SAVINGS, Savings, StepMemory
from jaxchat.plan import TrainingPlan
from jaxchat.sampling_params import SamplingParams
from jaxchat.schedule import StepSchedule
from jaxchat.spikes import NO_LIMITS, Limits

IGNORE = -1
"""Target id of a position that does not count."""

BackendName: TypeAlias = Literal["jax", "torch"]

BACKENDS = {
    "jax": "jaxchat.jax_backend:JaxBackend",
    "torch": "torch_ref.torch_backend:TorchBackend",
}

DEFAULT_BACKEND: BackendName = "torch" if sys.platform == "darwin" else "jax"

Cache = Any
"""A backend's own KV cache; callers only hand it back."""


class DeviceInfo(NamedTuple):
    """The hardware a backend runs on."""

    platform: str
    """`cpu`, `gpu`, `tpu` or `mps`."""
    count: int
    """Devices that share a batch: micro-batches are a multiple of it."""
    description: str
    """For people: `8 x NVIDIA H100 80GB HBM3`."""
    peak_flops: float | None
    """Peak bf16 FLOP/s of all devices, whatever they compute in; None where nobody states one."""
    processes: int = 1
    """Processes of the run that read rows of their own; `train_step` takes a process's share."""
    process: int = 0
    """This one among them."""
    memory_bytes: int | None = None
    """What one device may hold while training; None where steps do not say what they need."""


class Scores(NamedTuple):
    """What a model thinks of given text."""

    nll: np.ndarray
    """(B, T) float32: nats of each target, 0 where the target is ignored."""
    greedy: np.ndarray
    """(B, T) int32: the most likely next token at each position."""


class Snapshot(NamedTuple):
    """The arrays of a checkpoint without their framework: any backend continues from them."""

    params: dict[str, np.ndarray]
    """As `Backend.get_params` gives them."""
    optimizer: dict[str, np.ndarray] | None
    """As `Backend.get_optimizer_state` gives it; None when it was not asked for."""


@dataclass(frozen=True)
class DecodeBatch:
    """One dispatch of decoding: every array has one entry per cache row."""

    tokens: np.ndarray
    """(S,) int32: the newest token of each row, not yet in the cache."""
    lengths: np.ndarray
    """(S,) int32: tokens each row holds in the cache."""
    budgets: np.ndarray
    """(S,) int32: most tokens to sample in this dispatch; 0 leaves a row alone."""
    uniforms: np.ndarray
    """(S, N) float32: the random number of each row's next N tokens; N bounds the dispatch."""
    prompt_lengths: np.ndarray
    """(S,) int32: where each row's reply begins; penalties tell prompt and reply apart."""
    params: tuple[SamplingParams | None, ...]
    """The sampling parameters of each row; None for rows left alone."""
    stop_ids: frozenset[int]
    """Tokens after which a row waits for the host."""
    invariant: bool = False
    """Whether what a row gets must not depend on the others, whatever the dtype rounds."""

    @property
    def with_top(self) -> bool:
        """Whether any row asks for alternatives."""
        return any(row is not None and row.top_logprobs for row in self.params)

    def padded(self, rows: int) -> "DecodeBatch":
        """The same with idle rows behind its own, `rows` in all."""
        missing = rows - len(self.tokens)

        def longer(x: np.ndarray) -> np.ndarray:
            return np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])

        return self._with(longer, (*self.params, *[None] * missing)) if missing else self

    def part(self, rows: slice) -> "DecodeBatch":
        """Some of the rows."""
        return self._with(lambda x: x[rows], self.params[rows])

    def _with(
        self,
        change: Callable[[np.ndarray], np.ndarray],
        params: tuple[SamplingParams | None, ...],
    ) -> "DecodeBatch":
        names = ("tokens", "lengths", "budgets", "uniforms", "prompt_lengths")
        return replace(self, params=params, **{name: change(getattr(self, name)) for name in names})


class DecodeResult(NamedTuple):
    """What a dispatch sampled; row b's tokens are `tokens[b, :counts[b]]`, a stop id included."""

    cache: Cache
    tokens: np.ndarray
    """(S, N) int32."""
    logprobs: np.ndarray
    """(S, N) float32: log-probability of each token under the unfiltered distribution."""
    counts: np.ndarray
    """(S,) int32. The cache has grown by as many tokens: the last sampled one is not yet in it."""
    top_ids: np.ndarray | None = None
    """(S, N, MAX_TOP_LOGPROBS) int32: the likeliest tokens; None where no row asked for any."""
    top_logprobs: np.ndarray | None = None
    """(S, N, MAX_TOP_LOGPROBS) float32: theirs, under the unfiltered distribution."""


class PromptScores(NamedTuple):
    """What a model thinks of a prompt of T tokens; entry t is about token t, given those before.

    Nothing comes before the first token: its entries mean nothing.
    """

    logprobs: np.ndarray
    """(T,) float32."""
    top_ids: np.ndarray
    """(T, MAX_TOP_LOGPROBS) int32: what the model would rather have read, best first."""
    top_logprobs: np.ndarray
    """(T, MAX_TOP_LOGPROBS) float32."""


class Backend(Protocol):
    """A model on its devices: build it with a config, then `init`, `load` or `set_params`."""

    name: str
    config: GPTConfig
    devices: DeviceInfo

    def __init__(
        self,
        config: GPTConfig,
        *,
        dtype: str | None = None,
        device: int | None = None,
        mesh: str | None = None,
    ) -> None:
        """`dtype`: compute dtype by name; None takes `JAXCHAT_DTYPE` or the device's default.

        `device`: the number of the one local device to use (a replica of a server); None uses
        every device of the process. ValueError where there is no such device.

        `mesh`: how devices share the work, as `data=2,fsdp=4`; None leaves it to the backend.
        ValueError when the devices, or the backend, cannot.
        """
        ...

    # --- weights -------------------------------------------------------------------------------

    def init(self, seed: int) -> None:
        """Draw fresh weights."""
        ...

    def get_params(self) -> dict[str, np.ndarray]:
        """Every weight by dotted name, float32, in the (out, in) layout; padded vocabulary."""
        ...

    def set_params(self, params: Mapping[str, np.ndarray]) -> None:
        """Replace the weights. ValueError lists missing, extra and misshapen names."""
        ...

    def save(self, directory: Path) -> None:
        """Write the weights, and the optimizer state when training, into a new directory.

        May return before the bytes are on disk; `wait` blocks until they are.
        """
        ...

    def load(self, directory: Path) -> None:
        """Read what `save` wrote: weights, and the optimizer state when training has started."""
        ...

    def wait(self) -> None:
        """Block until saves are on disk and raise what went wrong in them."""
        ...

    @classmethod
    def read(cls, directory: Path, *, optimizer: bool) -> Snapshot:
        """Read what `save` wrote as numpy arrays, for another backend to continue from.

        Needs no model and no device of this framework. FileNotFoundError or ValueError where a
        file is missing or damaged.
        """
        ...

    # --- training ------------------------------------------------------------------------------

    def start_training(
        self, optimizer: OptimizerConfig, plan: TrainingPlan, savings: Savings = NO_SAVINGS
    ) -> None:
        """Make a fresh optimizer state for the present weights.

        ValueError where this framework cannot save memory so.
        """
        ...

    def agree(self, asked: bool) -> bool:
        """Whether any process asks: the same answer on all of them, perhaps one call late.

        Call it equally often on all.
        """
        ...

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every process that reads rows of its own. A collective."""
        ...

    def train_step(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        schedule: StepSchedule,
        weights: np.ndarray | None = None,
        limits: Limits = NO_LIMITS,
    ) -> Mapping[str, Any]:
        """One optimizer step on (A, B, T) int32: A micro-batches of B rows.

        The loss is the sum over targets of weight x nats, divided by the number of counted targets
        (those from 0 on); `weights` (A, B, T) float32 are ones when not given.
        A step that is not finite, or above one of the `limits`, changes nothing.
        Returns scalars (`loss` in nats per counted target, `grad_norm`, `skipped` 0 or 1) that may
        still be on their way: converting one to float waits for it.
        """
        ...

    def step_memory(self, shape: tuple[int, int, int]) -> StepMemory | None:
        """What a `train_step` on (A, B, T), all processes' rows together, needs of each device.

        Compiles the step and runs nothing. None where memory is taken as it is needed.
        """
        ...

    def get_optimizer_state(self) -> dict[str, np.ndarray]:
        """The whole state, the same on every backend, once training has started.

        `muon.momentum.<out>x<in>` and `muon.second_moment.<out>x<in>` stack the matrices of one
        shape, layer 2 before layer 10; `adam.mu.<weight>` and `adam.nu.<weight>` are shaped as
        their weight; `adam.count.<group>` is the number of updates made.
        """
        ...

    def set_optimizer_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from this state. ValueError lists missing, extra and misshapen names."""
        ...

    # --- evaluation ----------------------------------------------------------------------------

    def score(self, inputs: np.ndarray, targets: np.ndarray) -> Scores:
        """Teacher-forced scores of (B, T) int32; targets below 0 are ignored.

        Compiles once per shape: callers pad to few shapes.
        """
        ...

    def logits(self, inputs: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(B, V) float32: of each row of (B, T) int32, the logits after the token at `positions`.

        Compiles once per shape, as `score` does; positions are (B,) int32.
        """
        ...

    # --- generation ----------------------------------------------------------------------------

    def new_cache(self, rows: int, max_length: int) -> Cache:
        """An empty KV cache of `rows` conversations of at most `max_length` tokens."""
        ...

    def prefill(
        self, cache: Cache, row: int, ids: np.ndarray, start: int
    ) -> tuple[Cache, np.ndarray]:
        """Put `ids` (n,) into `row` from position `start` on, replacing what stood there.

        Returns the cache and the (V,) float32 logits after the last of them. `start` may be any
        position up to the number of tokens that the row holds: what lies before it is kept, what
        lies behind the new tokens is forgotten. A row can thus be continued or rewound to a common
        prefix; whatever the first new token needs of its predecessor (smearing needs the un-smeared
        embedding) must follow from what the row holds at `start` - 1, so a cache keeps the ids.
        ValueError when they do not fit into the row. The passed cache must not be used again.
        """
        ...

    def copy_row(self, cache: Cache, source: int, target: int, length: int) -> Cache:
        """Make `target` hold the first `length` tokens of `source`, as if prefilled with them.

        The passed cache must not be used again.
        """
        ...

    def decode(self, cache: Cache, batch: DecodeBatch) -> DecodeResult:
        """Feed each row's newest token, sample the next, and repeat on the device.

        A row stops at its budget or after a stop id. The dispatch ends when all rows have, or
        earlier: rows that need the host should not wait for the others, which go on in the next.
        The sampler is `jaxchat.sampling.sample`. The passed cache must not be used again.
        """
        ...

    def score_prompt(self, ids: np.ndarray) -> PromptScores:
        """Log-probabilities of the tokens of one text (T,), and their alternatives."""
        ...

    def warm_up(self, cache: Cache, steps: int) -> Cache:
        """Compile whatever generation with such a cache and dispatches of `steps` may need.

        Afterwards the rows hold nothing of use. The passed cache must not be used again.
        """
        ...


def backend_class(name: str) -> type[Backend]:
    """The class behind `--backend NAME`."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    module, attribute = BACKENDS[name].split(":")
    return getattr(importlib.import_module(module), attribute)
