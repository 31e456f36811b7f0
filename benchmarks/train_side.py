"""One side of a comparison: a model that trains in a process of its own, on command.

`Side` starts the process and talks to it in lines of JSON; `main` is that process. A side that is
asked nothing sleeps, so several of them can take turns on one machine, each with its own peak
memory. Tokens are random: the step is measured, not the loader. Imports neither the command line's
library nor our tokenizer, so that it runs wherever the two frameworks do.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks.figures import Figure
from benchmarks.tokenizer_trial import peak_megabytes

PROBE_EDGE = {"cpu": 2048, "gpu": 8192}
"""Edge of the square matrices whose product is the ceiling of a step."""

PROBE_TRIALS = 10

SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
"""Sides hold one GPU together, so none may take all of its memory at its start."""

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""What the cpu tier of speedrun_jax.sh sets on Linux, for both frameworks alike."""


def one_device(*, gpu: bool) -> dict[str, str]:
    """Variables that give a side of either framework one device of this kind."""
    if gpu:
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        return {"CUDA_VISIBLE_DEVICES": first}
    return {"JAX_PLATFORMS": "cpu", "JAXCHAT_DEVICE": "cpu"}


@dataclass(frozen=True)
class Task:
    """What a side trains, and on what."""

    name: str
    """How tables call it."""
    backend: str
    """jax or torch."""
    depth: int
    sequence_len: int
    vocab_size: int
    rows: int
    """Rows of a micro-batch."""
    micro_batches: int = 1
    aspect_ratio: int = 64
    head_dim: int = 128
    compiled: bool = True
    """torch.compile; JAX always compiles."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those that the caller has."""

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.rows * self.micro_batches * self.sequence_len


class Side:
    """The process of one task; a context manager that ends it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_side", json.dumps(asdict(task))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **HUGE_PAGES,
                **os.environ,
                **SHARING,
                **task.environment,
                "STARTED": str(time.time()),
            },
            cwd=Path(__file__).parents[1],
            text=True,
        )
        self.platform: str = self._read()["platform"]
        """What it runs on."""
        self.start = self._read()
        """Seconds from the process's start until it was: imported, ready, and had made a
        first_step and a second_step."""
        self.seconds: list[float] = []
        """Of each step asked for so far."""
        self.cpu_seconds: list[float] = []
        """Of all threads, per step: what other work on the machine hardly moves."""

    def steps(self, count: int) -> list[float]:
        """Take steps, the first of which is not counted; returns the seconds of the others."""
        answer = self._ask("steps", count)
        self.seconds += answer["seconds"]
        self.cpu_seconds += answer["cpu_seconds"]
        return answer["seconds"]

    def figures(self) -> dict[str, Any]:
        """What the side runs on, what it needed, and how fast its framework multiplies."""
        return self._ask("figures")

    @property
    def tokens_per_s(self) -> Figure:
        return Figure(self.task.tokens / seconds for seconds in self.seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _ask(self, what: str, count: int = 1) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps([what, count]), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise OSError(
                f"{self.task.name}: the process ended with status {self._process.wait()}; "
                "what it said is above"
            )
        return json.loads(line)


def main(task: Task) -> None:
    """Train until the caller has no more to ask."""
    started = float(os.environ["STARTED"])
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print what they like

    def answer(value: Mapping[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    backend = _backend(task)
    start = {"imported": time.time() - started}
    answer({"platform": backend.devices.platform})
    step = _trainer(task, backend)
    start["ready"] = time.time() - started
    float(step())
    start["first_step"] = time.time() - started
    float(step())
    start["second_step"] = time.time() - started
    answer(start)
    for line in sys.stdin:
        what, count = json.loads(line)
        if what == "steps":
            float(step())  # after a pause: pays for memory that the system took meanwhile
            trials = _trials(step, count, backend.devices.platform)
            seconds, cpu_seconds = zip(*trials, strict=True)
            answer({"seconds": seconds, "cpu_seconds": cpu_seconds})
        else:
            answer(_figures(task, backend, loss=float(step())))


def _trials(step: Callable[[], Any], count: int, platform: str) -> list[tuple[float, float]]:
    """Seconds of each step; on a GPU the mean of all, which follow each other as in training."""
    if platform != "gpu":
        return [_measured(lambda: float(step())) for _ in range(count)]

    def together() -> None:
        for loss in [step() for _ in range(count)]:  # read when the last has been handed over
            float(loss)

    wall, cpu = _measured(together)
    return [(wall / count, cpu / count)] * count


def _backend(task: Task) -> Any:
    """The framework's side of the model, imported here so that a process holds one framework."""
    from jaxchat.config import GPTConfig

    config = GPTConfig.from_depth(
        task.depth,
        aspect_ratio=task.aspect_ratio,
        head_dim=task.head_dim,
        vocab_size=task.vocab_size,
        sequence_len=task.sequence_len,
    )
    if task.backend == "jax":
        from jaxchat.jax_backend import JaxBackend

        return JaxBackend(config)
    from torch_ref.torch_backend import TorchBackend

    return TorchBackend(config)


def _trainer(task: Task, backend: Any) -> Callable[[], Any]:
    """Fresh weights, and a function that takes one step on random tokens and returns the loss,
    which on a GPU is still on its way."""
    from jaxchat.config import OptimizerConfig, ScheduleConfig
    from jaxchat.plan import plan_training
    from jaxchat.schedule import schedule_at

    rules, schedule = OptimizerConfig(), ScheduleConfig()
    plan = plan_training(backend.config, rules, num_iterations=10**4, total_batch_size=task.tokens)
    backend.init(0)
    backend.start_training(rules, plan)
    if task.backend == "torch" and task.compiled:
        _compile()
    shape = (task.micro_batches, task.rows, task.sequence_len + 1)
    rng, number = np.random.default_rng(0), 0

    def step() -> Any:
        nonlocal number
        ids = rng.integers(0, task.vocab_size, shape, dtype=np.int32)
        metrics = backend.train_step(
            ids[..., :-1].copy(), ids[..., 1:].copy(), schedule_at(number, schedule, plan)
        )
        number += 1
        return metrics["loss"]

    return step


def _compile() -> None:
    """torch.compile what repeats: loss and gradients of a micro-batch, Muon's pure functions.

    The rest of the optimizer changes tensors in place under numbers that move every step; compiled,
    it would compile again for each of them.
    """
    import torch

    from torch_ref import optim, train_step

    train_step._summed_loss = torch.compile(train_step._summed_loss, dynamic=False)
    for name in ("equilibrate_rows", "orthogonalize", "normalize_variance"):
        setattr(optim, name, torch.compile(getattr(optim, name), dynamic=False))


def _figures(task: Task, backend: Any, *, loss: float) -> dict[str, Any]:
    from jaxchat.config import flops_per_token

    device = backend.devices
    peak_bytes = _peak_bytes(task, device.platform)
    edge = PROBE_EDGE["gpu" if device.platform == "gpu" else "cpu"]
    product = _product(task, edge, device.platform)
    product()
    seconds = min(_measured(product)[0] for _ in range(PROBE_TRIALS))
    return {
        "device": device.description,
        "peak_flops": device.peak_flops,
        "peak_bytes": peak_bytes,
        "matmul_flops": 2 * edge**3 / seconds,
        "flops_per_token": flops_per_token(backend.config, task.sequence_len),
        "loss": loss,
    }


def _product(task: Task, edge: int, platform: str) -> Callable[[], Any]:
    """A square matrix product in the dtype of training, waited for."""
    dtype = "bfloat16" if platform == "gpu" else "float32"
    if task.backend == "jax":
        import jax
        import jax.numpy as jnp

        array = jax.random.normal(jax.random.key(0), (edge, edge), jnp.dtype(dtype))
        multiply = jax.jit(jnp.matmul)
        return lambda: multiply(array, array).block_until_ready()
    import torch

    device = "cuda" if platform == "gpu" else "cpu"
    tensor = torch.randn(edge, edge, dtype=getattr(torch, dtype), device=device)
    return lambda: (tensor @ tensor)[0, 0].item()


def _peak_bytes(task: Task, platform: str) -> float:
    """Most memory held so far: the device's, or on a CPU the process's."""
    if platform != "gpu":
        return peak_megabytes() * 2**20
    if task.backend == "jax":
        import jax

        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    import torch

    return torch.cuda.max_memory_allocated()


def _measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of this process's threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
