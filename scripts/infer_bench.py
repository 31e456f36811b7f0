"""How fast a model answers: time to first token, time between tokens, tokens per second.

    python -m scripts.infer_bench                                 # the deepest finetuned model
    python -m scripts.infer_bench --depth 6 --vocab-size 8192     # fresh weights of that shape
    python -m scripts.infer_bench --depth 6 --backends jax        # one backend alone

Both backends are measured in one run, taking turns, so that what else the machine does falls on
both. The last line is one JSON document. The roofline is the memory traffic that a step cannot
avoid (every weight but the embedding tables once, and the cache that the rows hold) over the
bandwidth that the machine is measured to have.
"""

import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
from rich.console import Console
from rich.table import Table

from jaxchat import cli
from jaxchat.backend import Backend, BackendName, backend_class
from jaxchat.config import GPTConfig, count_params
from jaxchat.engine import TOKENS_PER_DISPATCH, Engine
from jaxchat.plan import check_positive
from jaxchat.request import Request
from jaxchat.sampling_params import SamplingParams
from jaxchat.stages import StageName, load_model
from jaxchat.tokenizer import SPECIAL_NAMES, Tokenizer

PROBE_BYTES = 1 << 28
"""Memory that a CPU's bandwidth is measured on: far beyond any cache."""

GPU_PROBE_BYTES = 1 << 33
"""An H200 seems to read 256 MB at 1.6 TB/s, 1 GB at 3.1, 4 GB at 3.5 and 8 GB at 4.1: beside less
than that, a launch and the host's wait are long."""

SMALLEST_VOCAB = 256 + len(SPECIAL_NAMES)
"""Every byte and every special token."""


@dataclass(frozen=True)
class Config:
    """What is measured."""

    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "sft"
    """Stage of the model, where no depth is given."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Model of that stage, such as d12; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Which checkpoint; the newest when not set."""
    depth: int | None = None
    """Fresh weights of the model of this depth, instead of a checkpoint."""
    vocab_size: int = 32768
    """Vocabulary of a fresh model."""
    sequence_len: int = 2048
    """Context of a fresh model."""
    aspect_ratio: int = 64
    """Width per layer of a fresh model."""
    backends: Annotated[tuple[BackendName, ...], cli.arg(aliases=["--backend"])] = (
        "jax",
        "torch",
    )
    """Frameworks to compare; ratios are against the last one."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Requests that are answered at the same time."""
    prompt_tokens: int = 128
    """Length of every prompt."""
    new_tokens: int = 256
    """Length of every reply."""
    rounds: int = 3
    """Measurements of each kind; medians are reported."""
    temperature: float = 0.0
    """0 is greedy."""
    tokens_per_dispatch: int = TOKENS_PER_DISPATCH
    """Tokens between two looks of the host."""
    sequential: int = 0
    """Also answer so many requests one after the other and at the same time, and compare."""

    def __post_init__(self) -> None:
        check_positive(
            batch_sizes=min(self.batch_sizes, default=0),
            backends=len(self.backends),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            rounds=self.rounds,
            tokens_per_dispatch=self.tokens_per_dispatch,
        )
        if self.sequential < 0:
            raise ValueError(f"--sequential {self.sequential}: must be at least 0")
        if self.new_tokens < 2:
            raise ValueError(
                f"new_tokens={self.new_tokens} leaves no time between two tokens to measure: "
                "take 2 or more"
            )
        if self.depth is not None:
            self.check_room(self.sequence_len)
            if self.vocab_size < SMALLEST_VOCAB:
                raise ValueError(
                    f"vocab_size={self.vocab_size} has no room for the 256 bytes and "
                    f"{len(SPECIAL_NAMES)} special tokens: take {SMALLEST_VOCAB} or more"
                )

    def check_room(self, context: int) -> None:
        """ValueError where a reply would end before its last token."""
        if self.prompt_tokens + self.new_tokens > context:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} and new_tokens={self.new_tokens} do not fit "
                f"in a context of {context}: take fewer, or with --depth a longer --sequence-len"
            )


Models: TypeAlias = dict[str, tuple[Backend, Tokenizer]]
"""By the backend's name."""


@dataclass(frozen=True)
class Sample:
    """One round: what a client that waits for a batch of replies sees."""

    first_token_s: float
    """From the requests to the first token of the last of them."""
    inter_token_s: float
    """Between two tokens of a reply, after the first."""
    tokens_per_s: float
    """Of all replies together, after the first tokens."""
    whole_s: float


def main(config: Config) -> None:
    """Measure, print a table, then one line of JSON."""
    # JAX would take nearly all of a GPU's memory at its start, and torch needs some too
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    models: Models = {name: load(config, name) for name in config.backends}
    kinds = {name: backend.devices.platform for name, (backend, _) in models.items()}
    if len(set(kinds.values())) > 1:
        places = " and ".join(f"{name} on {kind}" for name, kind in kinds.items())
        raise ValueError(
            f"{places} is no comparison: name one of --backends, or give both the same device "
            "(JAXCHAT_DEVICE=cpu for torch, uv sync --extra gpu for JAX)"
        )
    bandwidth = max(measured_bandwidth(name) for name in models)
    results: list[dict[str, Any]] = []
    for batch_size in config.batch_sizes:
        results += sweep(config, models, batch_size, bandwidth)
    together = continuous(config, models) if config.sequential else None
    document = {
        "config": asdict(config),
        "model": asdict(next(iter(models.values()))[0].config),
        "devices": {name: model[0].devices.description for name, model in models.items()},
        "bandwidth_bytes_per_s": bandwidth,
        "results": results,
        "continuous": together,
        "peak_host_bytes": peak_host_bytes(),
    }
    Console(stderr=True).print(on_screen(results, config.sequential, together))
    print(json.dumps(document), flush=True)


def load(config: Config, name: str) -> tuple[Backend, Tokenizer]:
    """A checkpoint on one device, or fresh weights."""
    if config.depth is None:
        model = load_model(
            config.source, backend=name, model_tag=config.model_tag, step=config.step, device=0
        )
        config.check_room(model.backend.config.sequence_len)
        return model.backend, model.tokenizer
    shape = GPTConfig.from_depth(
        config.depth,
        vocab_size=config.vocab_size,
        sequence_len=config.sequence_len,
        aspect_ratio=config.aspect_ratio,
    )
    backend = backend_class(name)(shape, device=0)
    backend.init(0)
    return backend, bare_tokenizer(config.vocab_size)


def bare_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of this size for a model that has none: its tokens mean nothing."""
    pairs = (bytes([a, b]) for a in range(256) for b in range(256))
    tokens = [bytes([a]) for a in range(256)]
    tokens += itertools.islice(pairs, vocab_size - SMALLEST_VOCAB)
    return Tokenizer(tokens)


def sweep(
    config: Config,
    models: Models,
    batch_size: int,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """One row a backend, measured in turns."""
    engines = {name: make_engine(config, *models[name], batch_size) for name in models}
    samples: dict[str, list[Sample]] = {name: [] for name in engines}
    for round in range(-1, config.rounds):  # round -1 warms up
        for name, engine in engines.items():
            sample = measure(config, engine, batch_size, seed=round + 1)
            speed = f"{sample.tokens_per_s:.1f} tokens/s"
            print(f"{name}, batch {batch_size}, round {round + 1}: {speed}", file=sys.stderr)
            if round >= 0:
                samples[name].append(sample)
    rows: list[dict[str, Any]] = []
    for name, own in samples.items():
        backend = models[name][0]
        inter_token_s = median(own, "inter_token_s")
        needed_bytes = step_bytes(config, backend, batch_size)
        rows.append(
            {
                "backend": name,
                "batch_size": batch_size,
                "first_token_s": median(own, "first_token_s"),
                "inter_token_s": inter_token_s,
                "tokens_per_s": median(own, "tokens_per_s"),
                "step_bytes": needed_bytes,
                "roofline_share": needed_bytes / inter_token_s / bandwidth,
                **memory_bytes(backend, batch_size, engines[name].max_length),
            }
        )
    for row in rows:
        row["speed_ratio"] = row["tokens_per_s"] / rows[-1]["tokens_per_s"]
        row["first_token_ratio"] = row["first_token_s"] / rows[-1]["first_token_s"]
    return rows


def make_engine(config: Config, backend: Backend, tokenizer: Tokenizer, slots: int) -> Engine:
    return Engine(
        backend,
        tokenizer,
        slots=slots,
        max_length=config.prompt_tokens + config.new_tokens,
        tokens_per_dispatch=config.tokens_per_dispatch,
    )


def measure(config: Config, engine: Engine, batch_size: int, *, seed: int) -> Sample:
    """Answer a batch of requests with prompts that no cache has seen."""
    requests = make_requests(config, engine, batch_size, seed)
    start = time.perf_counter()
    for request in requests:
        engine.submit(request)
    begun, first_s, tokens = set(), start, 0
    while engine.busy:
        events = engine.step()
        now = time.perf_counter()
        fresh = {event.request for event in events if event.token is not None} - begun
        if fresh:
            begun |= fresh
            first_s, tokens = now, 0  # what came before the last request's first token is prefill
        else:
            tokens += sum(event.token is not None for event in events)
    end = time.perf_counter()
    per_s = tokens / (end - first_s)
    return Sample(first_s - start, batch_size / per_s, per_s, end - start)


def make_requests(config: Config, engine: Engine, count: int, seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    vocab = engine.tokenizer.vocab_size - len(SPECIAL_NAMES)
    params = SamplingParams(
        max_tokens=config.new_tokens, temperature=config.temperature, ignore_eos=True
    )
    prompts = rng.integers(0, vocab, (count, config.prompt_tokens)).tolist()
    return [Request(prompt, params, tools=False) for prompt in prompts]


def continuous(config: Config, models: Models) -> dict[str, float]:
    """How much sooner many requests are answered together than one after the other."""
    return {name: _continuous(config, *model) for name, model in models.items()}


def _continuous(config: Config, backend: Backend, tokenizer: Tokenizer) -> float:
    together = make_engine(config, backend, tokenizer, config.sequential)
    alone = make_engine(config, backend, tokenizer, 1)
    ratios = []
    for round in range(-1, config.rounds):
        requests = make_requests(config, together, config.sequential, round + 1)
        start = time.perf_counter()
        together.complete(requests)
        middle = time.perf_counter()
        for request in requests:
            alone.complete([request])
        if round >= 0:
            ratios.append((time.perf_counter() - middle) / (middle - start))
    return statistics.median(ratios)


def step_bytes(config: Config, backend: Backend, batch_size: int) -> int:
    """Bytes that one decoding step reads at least, half-way through the replies."""
    itemsize = _itemsize(backend)
    counts = count_params(backend.config)
    weights = counts["matrices"] + counts["lm_head"]
    c = backend.config
    positions = config.prompt_tokens + config.new_tokens // 2
    seen = sum(min(positions, window + 1) for window in c.window_sizes)
    return itemsize * (weights + 2 * batch_size * seen * c.n_kv_head * c.head_dim)


def memory_bytes(backend: Backend, slots: int, length: int) -> dict[str, int]:
    """What the weights, and the keys and values of so many rows, take in the compute dtype."""
    itemsize, c = _itemsize(backend), backend.config
    entries = 2 * c.n_layer * slots * length * c.n_kv_head * c.head_dim
    return {
        "weight_bytes": itemsize * sum(count_params(c).values()),
        "cache_bytes": itemsize * entries,
    }


def _itemsize(backend: Backend) -> int:
    return 4 if "float32" in str(getattr(backend, "dtype", "float32")) else 2


def measured_bandwidth(name: str) -> float:
    """Bytes a second that a backend's device reads when it sums a large array.

    The best of several: other work can only slow it down. What is timed holds a launch and the
    host's wait for the sum too, so that a GPU needs a larger array than a CPU.
    """
    if name == "jax":
        import jax
        import jax.numpy as jnp

        stats = jax.local_devices()[0].memory_stats()  # None on a CPU
        size = probe_bytes(stats and stats["bytes_limit"] - stats["bytes_in_use"])
        total, array = jax.jit(jnp.sum), jnp.ones(size // 4, jnp.float32)
        return size / best_seconds(lambda x: total(x).block_until_ready(), array)
    import torch

    from torch_ref.runtime import pick_device

    device = pick_device(0)
    size = probe_bytes(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None)
    best_s = best_seconds(lambda x: x.sum().item(), torch.ones(size // 4, device=device))
    torch.cuda.empty_cache()  # JAX may need what PyTorch would keep
    return size / best_s


def probe_bytes(free_bytes: int | None) -> int:
    """Size of the array to read on a GPU with so much free memory; None is a CPU."""
    if free_bytes is None:
        return PROBE_BYTES
    return min(GPU_PROBE_BYTES, free_bytes // 4) // 4 * 4


def best_seconds(work: Callable[[Any], Any], array: Any) -> float:
    """Of ten, after one that warms up."""
    work(array)
    return min(seconds(work, array) for _ in range(10))


def seconds(work: Callable[[Any], Any], array: Any) -> float:
    start = time.perf_counter()
    work(array)
    return time.perf_counter() - start


def median(samples: list[Sample], name: str) -> float:
    return statistics.median(getattr(sample, name) for sample in samples)


def peak_host_bytes() -> int:
    """The most memory that this process has had resident."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def on_screen(
    rows: list[dict[str, Any]], sequential: int = 0, together: dict[str, float] | None = None
) -> Table:
    """A row a backend and batch; below them how much faster `sequential` requests are together."""
    ratios = [
        f"{name}: {sequential} requests together end {ratio:.2f} times as fast as one by one"
        for name, ratio in (together or {}).items()
    ]
    shown = Table(
        *("backend", "batch", "first token ms", "per token ms", "tokens/s", "roofline"),
        *("cache MB", "x"),
        caption="\n".join(ratios) or None,
    )
    for row in rows:
        shown.add_row(
            row["backend"],
            str(row["batch_size"]),
            f"{1000 * row['first_token_s']:.1f}",
            f"{1000 * row['inter_token_s']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['roofline_share']:.0%}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            f"{row['speed_ratio']:.2f}",
        )
    return shown


if __name__ == "__main__":
    cli.run(main, Config)
