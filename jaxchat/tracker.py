"""Where metrics go: a JSONL file always, Weights & Biases or TensorBoard when asked.

The file is the record: one object a line, in step order. A resumed run first cuts off what was
logged after its checkpoint, so the file reads as if nothing had happened. The other sinks are
guests: one that fails is dropped with a warning and never stops a training run.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import requests

from jaxchat import runtime
from jaxchat.artifacts import atomic_write, json_numbers

METRICS = "metrics.jsonl"
"""The record of a run, in the folder of its checkpoints."""


class Sink(Protocol):
    """A place that takes scalars by step."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Append scalars to `path` and to every guest sink; on the first process only."""

    def __init__(
        self, path: Path, guests: list[Sink] | None = None, *, resume_step: int = 0
    ) -> None:
        self._guests = list(guests or [])
        if not runtime.is_first_process():
            self._file = open(os.devnull, "a")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if _precedes(row, resume_step)]
        with atomic_write(path, "w") as file:
            file.writelines(_line(int(row.pop("step")), row) for row in kept)
        self._file = open(path, "a", buffering=1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars of optimizer step `step` (steps done so far)."""
        # JSON has no NaN: null stands for what is not finite, and `read_metrics` turns it back
        self._file.write(_line(step, scalars))
        self._tell("log", step, scalars)

    def close(self) -> None:
        self._file.close()
        self._tell("close")

    def _tell(self, method: str, *args: object) -> None:
        for guest in list(self._guests):
            try:
                getattr(guest, method)(*args)
            except Exception as error:  # a guest may raise anything; training goes on
                print(f"warning: {type(guest).__name__} failed and is dropped: {error}")
                self._guests.remove(guest)


def _precedes(row: Mapping[str, float], resume_step: int) -> bool:
    """Whether a row was logged before the checkpoint of `resume_step`: its evaluation was not."""
    return row["step"] < resume_step or (row["step"] == resume_step and "train/loss" in row)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        rows.append({name: math.nan if x is None else x for name, x in row.items()})
    return rows


def _line(step: int, scalars: Mapping[str, float]) -> str:
    return json.dumps({"step": step, **json_numbers(scalars)}) + "\n"


def open_tracker(
    directory: Path,
    *,
    run: str | None,
    run_id: str,
    tensorboard: bool,
    config: Mapping,
    resume_step: int,
) -> Tracker:
    """The tracker of a run that keeps its files in `directory`.

    `run` names it at Weights & Biases; `WANDB_RUN` does when that is None. By `run_id` it is the
    same run there after every interruption.
    """
    guests = open_guests(
        wandb_run=run or os.environ.get("WANDB_RUN"),
        run_id=run_id,
        tensorboard=directory / "tensorboard" if tensorboard else None,
        config=config,
    )
    return Tracker(directory / METRICS, guests, resume_step=resume_step)


def open_guests(
    *, wandb_run: str | None, run_id: str, tensorboard: Path | None, config: Mapping
) -> list[Sink]:
    """The sinks a run asked for; one that cannot start is left out with a warning.

    `wandb_run` None or "dummy" means none, as upstream's `WANDB_RUN` does.
    """
    guests: list[Sink] = []
    if not runtime.is_first_process():
        return guests
    wanted: list[Callable[[], Sink]] = []
    if wandb_run and wandb_run != "dummy":
        wanted.append(lambda: _Wandb(wandb_run, run_id, config))
    if tensorboard is not None:
        wanted.append(lambda: _TensorBoard(tensorboard))
    for start in wanted:
        try:
            guests.append(start())
        except ModuleNotFoundError as error:
            _not_started(f"{error}; `uv sync --extra track` installs it")
        except Exception as error:  # a missing login is no reason not to train
            _not_started(error)
    return guests


def _not_started(why: object) -> None:
    print(f"warning: no metrics sink, training goes on without it: {why}")


class _Wandb:
    def __init__(self, name: str, run_id: str, config: Mapping) -> None:
        # optional: `uv sync --extra track`
        import wandb  # pyrefly: ignore[missing-import]

        mode = None
        if not (os.environ.get("WANDB_MODE") or _has_wandb_login()):
            # without a terminal to ask for a login, wandb would wait for ever or raise
            mode = "offline"
            print("wandb has no key (wandb login, or WANDB_API_KEY): see wandb sync for this run")
        project = os.environ.get("WANDB_PROJECT", "jaxchat")
        self._run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", config=dict(config), mode=mode
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


def _has_wandb_login() -> bool:
    """Whether a key is at hand: in the environment, or where `wandb login` keeps it."""
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or requests.utils.get_netrc_auth(url))


class _TensorBoard:
    def __init__(self, directory: Path) -> None:
        # optional: `uv sync --extra track`
        from tensorboardX import SummaryWriter  # pyrefly: ignore[missing-import]

        self._writer = SummaryWriter(str(directory))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
