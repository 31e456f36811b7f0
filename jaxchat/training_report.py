"""What a training stage tells the report: settings, curves and samples, from its metrics rows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxchat.report import Curve, KeyValues, Part, Samples

Rows = Sequence[Mapping[str, float]]


def training_parts(
    rows: Rows,
    settings: Mapping[str, Any],
    derived: Mapping[str, Any],
    samples: Sequence[tuple[str, str]],
    train_seconds: float,
) -> tuple[list[Part], dict[str, float]]:
    """The parts of a training section, and its figures for the summary.

    `rows` are those of `tracker.read_metrics`; validation must have run at least once.
    """
    loss_steps, losses = series(rows, "train/loss")
    skipped = set(series(rows, "train/skipped")[0])
    last = [x for step, x in zip(loss_steps, losses, strict=True) if step not in skipped][-50:]
    bpb_steps, bpbs = series(rows, "val/bpb")
    speed_steps, speeds = series(rows, "train/tokens_per_second")
    figures = {
        "val bpb": bpbs[-1],
        "train loss": sum(last) / len(last) if last else math.nan,
        "train tokens/s": sorted(speeds)[len(speeds) // 2],
    }
    first = bpbs[0]
    outcome = figures | {
        "val bpb before training": first,
        "val bpb fell by %": 100 * (1 - bpbs[-1] / first),
        "lowest val bpb": min(bpbs),
        "training seconds": train_seconds,
    }
    shown = {name: f"{value:.4f}" for name, value in outcome.items()}
    parts: list[Part] = [
        KeyValues(shown | {"steps skipped": str(len(skipped))}, "Outcome"),
        Curve("Training loss", "step", "loss (nats per token)", {"train": (loss_steps, losses)}),
        Curve("Validation", "step", "bits per byte", {"val": (bpb_steps, bpbs)}),
        Curve("Speed", "step", "tokens per second", {"train": (speed_steps, speeds)}),
        Samples(samples, "Greedy continuations after the last step"),
        KeyValues({name: str(value) for name, value in derived.items()}, "What followed"),
        KeyValues({name: str(value) for name, value in settings.items()}, "Options"),
    ]
    return parts, figures


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """The steps and values of one metric."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]
