"""Scaling laws: what a sweep of finished runs says about the best size for a budget of compute.

The second approach of Chinchilla (Hoffmann et al., arXiv 2203.15556): runs of equal FLOPs lie on a
valley over model size; a parabola in log N gives its bottom, and the bottoms of several budgets a
power law. N counts block matrices and lm_head, as `--target-param-data-ratio` does. Reads what
every pretraining run leaves behind, the newest checkpoint's meta.json and metrics.jsonl. Left out:
drawing, which dev/scaling_analysis.ipynb does.
"""

import csv
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxchat.artifacts import base_dir
from jaxchat.checkpoint import META, CheckpointStore
from jaxchat.config import GPTConfig, count_params, flops_per_token, scaling_params
from jaxchat.stages import STAGE_FOLDERS
from jaxchat.tracker import METRICS, read_metrics

CORE_CSV = "base_eval.csv"
"""What `scripts.base_eval` leaves in the folder of the checkpoint it has judged."""

CORE = "CORE"
"""Label of its last row where that is the mean of all examples, and no estimate."""

NEAR = 4.0
"""How far from the best size, as a factor, the runs may lie that its parabola goes through."""


@dataclass(frozen=True)
class Run:
    """A pretraining run that has reached its horizon."""

    tag: str
    depth: int
    width: int
    params: int
    """All of them, embeddings included."""
    scaling_params: int
    """N: block matrices and lm_head."""
    tokens: int
    """D: tokens the run has seen."""
    flops: float
    """C: training FLOPs, attention included."""
    target_flops: float | None
    """The budget it was given, if it was given one."""
    val_bpb: float
    """Bits per byte of the validation split after the last step."""
    train_seconds: float
    """Time in training steps; evaluations and checkpoints left out."""
    core: float | None
    """CORE, where it has been measured on all examples."""
    directory: Path
    """The folder of its checkpoints and metrics."""

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.scaling_params


def read_runs(pattern: str = "*") -> list[Run]:
    """The finished pretraining runs whose tag matches a wildcard, by depth, width and FLOPs.

    Runs that are under way are left out, and with a warning those that cannot be read.
    """
    runs = []
    for folder in (base_dir() / STAGE_FOLDERS["base"]).glob(pattern):
        try:
            run = read_run(folder)
        except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
            why = f"{error} is missing" if isinstance(error, KeyError) else error
            print(f"warning: leaving out {folder}, which cannot be read: {why}", file=sys.stderr)
            continue
        if run is not None:
            runs.append(run)
    return sorted(runs, key=lambda run: (run.depth, run.width, run.flops, run.tag))


def read_run(directory: Path) -> Run | None:
    """The run of one folder; None where it has not reached its horizon, or was made elsewhere."""
    store = CheckpointStore(directory)
    steps = store.steps()
    if not steps:
        return None
    meta = json.loads((store.path(steps[-1]) / META).read_text())
    if "plan" not in meta:  # imported
        return None
    model, plan = GPTConfig(**meta["model"]), meta["plan"]
    last = [
        row["val/bpb"]
        for row in read_metrics(directory / METRICS)
        if "val/bpb" in row and row["step"] == plan["num_iterations"]
    ]
    if not last or steps[-1] != plan["num_iterations"]:
        return None
    return Run(
        tag=directory.name,
        depth=model.n_layer,
        width=model.n_embd,
        params=sum(count_params(model).values()),
        scaling_params=scaling_params(model),
        tokens=plan["target_tokens"],
        flops=float(plan["target_tokens"]) * flops_per_token(model),
        target_flops=meta["config"]["target_flops"],
        val_bpb=last[-1],
        train_seconds=meta["train_seconds"],
        core=_read_core(store.path(steps[-1]) / CORE_CSV),
        directory=directory,
    )


def _read_core(path: Path) -> float | None:
    if not path.is_file():
        return None
    with open(path, newline="") as file:
        *_, last = csv.reader(file)
    return float(last[2]) if last[0] == CORE else None


class Curve(NamedTuple):
    """A metric of a run against what had been spent when it was measured."""

    flops: list[float]
    seconds: list[float]
    """Time in training steps."""
    values: list[float]


def curve(run: Run, metric: str) -> Curve:
    """A metric over a run's life, from its metrics.jsonl: "train/loss", "val/bpb" and the like.

    Without the steps that were skipped, whose loss may be no number.
    """
    found, tokens, seconds = Curve([], [], []), 0.0, 0.0
    for row in read_metrics(run.directory / METRICS):
        if "train/batch_tokens" in row:
            tokens += row["train/batch_tokens"]
            seconds += row["train/batch_tokens"] / row["train/tokens_per_second"]
        if metric in row and "train/skipped" not in row:
            found.flops.append(tokens * run.flops / run.tokens)
            found.seconds.append(seconds)
            found.values.append(row[metric])
    return found


def by_budget(runs: Iterable[Run]) -> dict[float, list[Run]]:
    """Runs of equal `--target-flops`, the smallest model first; runs without one are left out."""
    budgets: dict[float, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.scaling_params):
        if run.target_flops is not None:
            budgets.setdefault(run.target_flops, []).append(run)
    return dict(sorted(budgets.items()))


@dataclass(frozen=True)
class Valley:
    """The parabola through the runs of one budget, and its bottom."""

    flops: float
    """The budget."""
    params: float
    """N at the bottom."""
    tokens: float
    """D at the bottom."""
    bpb: float
    """Bits per byte there."""
    coefficients: tuple[float, float, float]
    """Of bits per byte in ln N, the highest power first."""
    sizes: tuple[int, int]
    """The smallest and the largest N that it was fitted to."""

    def at(self, params: np.ndarray) -> np.ndarray:
        """The parabola's bits per byte at these sizes."""
        return np.polyval(self.coefficients, np.log(params))


def fit_valley(runs: Sequence[Run]) -> Valley:
    """The best size of one budget. ValueError unless it lies between sizes that have been run.

    The parabola goes through the runs within `NEAR` of the best one: a valley is one near its
    bottom only. D at the bottom is interpolated, since attention makes C only nearly 6 N D.
    """
    best = min(runs, key=lambda run: run.val_bpb)
    low, high = best.scaling_params / NEAR, best.scaling_params * NEAR
    near = sorted(
        (run for run in runs if low <= run.scaling_params <= high),
        key=lambda run: run.scaling_params,
    )
    sizes = np.log([run.scaling_params for run in near])
    if best.target_flops is None or len(set(sizes)) < 3:
        raise ValueError(
            f"{len(set(sizes))} model sizes within a factor of {NEAR} of the best: a parabola "
            "takes three"
        )
    fit = np.polyfit(sizes, [run.val_bpb for run in near], 2)
    bottom = -fit[1] / (2 * fit[0])
    if fit[0] <= 0 or not sizes[0] <= bottom <= sizes[-1]:
        side = "smaller" if near[0].val_bpb < near[-1].val_bpb else "larger"
        raise ValueError(
            f"the runs of {best.target_flops:.3g} FLOPs do not bracket the best size: add {side}"
        )
    return Valley(
        flops=best.target_flops,
        params=float(np.exp(bottom)),
        tokens=float(np.exp(np.interp(bottom, sizes, np.log([run.tokens for run in near])))),
        bpb=float(np.polyval(fit, bottom)),
        coefficients=(float(fit[0]), float(fit[1]), float(fit[2])),
        sizes=(near[0].scaling_params, near[-1].scaling_params),
    )


@dataclass(frozen=True)
class PowerLaw:
    """y = scale * x ** exponent."""

    scale: float
    exponent: float

    def at(self, x: np.ndarray) -> np.ndarray:
        return self.scale * x**self.exponent


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Least squares in the logarithms. ValueError with fewer than two different x."""
    if len(set(x)) < 2:
        raise ValueError(f"{len(set(x))} budgets: a power law takes two or more")
    exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


@dataclass(frozen=True)
class ScalingLaw:
    """N and D of the best models as powers of the budget: N ~ C^a, D ~ C^b."""

    valleys: tuple[Valley, ...]
    params: PowerLaw
    tokens: PowerLaw


def fit_scaling_law(budgets: Mapping[float, Sequence[Run]]) -> ScalingLaw:
    """Both powers from the valleys of `by_budget`. ValueError where one cannot be fitted."""
    valleys = tuple(fit_valley(runs) for runs in budgets.values())
    flops = [valley.flops for valley in valleys]
    return ScalingLaw(
        valleys,
        params=fit_power_law(flops, [valley.params for valley in valleys]),
        tokens=fit_power_law(flops, [valley.tokens for valley in valleys]),
    )


def leave_one_size_out(budgets: Mapping[float, Sequence[Run]]) -> list[ScalingLaw]:
    """The law without the runs of each model size in turn: how far it hangs on single runs.

    A size without which no law can be fitted is left out.
    """
    laws = []
    for size in sorted({run.scaling_params for runs in budgets.values() for run in runs}):
        rest = {c: [r for r in runs if r.scaling_params != size] for c, runs in budgets.items()}
        try:
            laws.append(fit_scaling_law(rest))
        except ValueError:
            continue
    return laws
