"""The CORE metric: how well a model does in context, above guessing, on average over tasks.

All sequences of a task are sorted into a few lengths and scored in batches of a fixed number of
tokens, so a compiled model sees a handful of shapes; the decisions are those of one example at a
time. Accuracy is centred against guessing, (a - b) / (1 - b), and averaged (arXiv 2406.11794).
GPT-2 (1.5 B) has 0.256525.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from jaxchat.backend import IGNORE, Backend
from jaxchat.core_tasks import Scored, Task, sequences
from jaxchat.progress import OnProgress, unheard
from jaxchat.tokenizer import Tokenizer

MIN_BUCKET = 64
"""Shortest padded length; buckets double from here to the model's context."""


@dataclass(frozen=True)
class TaskResult:
    """What a model reached on a task."""

    label: str
    kind: str
    examples: int
    accuracy: float
    centered: float
    """Accuracy above guessing, 1 for perfect."""

    @property
    def stderr(self) -> float:
        """Standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.examples)


def evaluate_task(
    backend: Backend,
    tokenizer: Tokenizer,
    task: Task,
    *,
    max_examples: int | None,
    batch_tokens: int,
    on_progress: OnProgress = unheard,
) -> TaskResult:
    """Accuracy on the first `max_examples` of the shuffled task (all of them when None).

    `batch_tokens` bounds the padded tokens that a device scores at a time; `on_progress` hears the
    share that is done.
    """
    count = len(task.examples) if max_examples is None else min(max_examples, len(task.examples))
    length = backend.config.sequence_len
    questions = list(sequences(task, range(count), tokenizer, length))
    flat = [sequence for question in questions for sequence in question]
    scores: dict[int, tuple[float, bool]] = {}
    rows_of = partial(batch_rows, backend.devices.count, batch_tokens)
    for indices, bucket in batches(flat, length, rows_of):
        rows = rows_of(bucket)
        scored = score_batch(backend, [flat[i] for i in indices], rows, bucket)
        scores |= zip(indices, scored, strict=True)
        on_progress(len(scores) / len(flat))
    correct, first = 0, 0
    for index, question in enumerate(questions):
        own = [scores[first + i] for i in range(len(question))]
        first += len(question)
        correct += is_correct(task, index, own)
    accuracy, baseline = correct / count, task.baseline / 100
    centered = (accuracy - baseline) / (1 - baseline)
    return TaskResult(task.label, task.kind, count, accuracy, centered)


def is_correct(task: Task, index: int, scores: Sequence[tuple[float, bool]]) -> bool:
    """The decision on one question, from (mean nats, all greedy) of each of its sequences."""
    if task.kind == "language_modeling":
        return scores[0][1]
    return int(np.argmin([nats for nats, _ in scores])) == task.examples[index]["gold"]


def batch_rows(devices: int, batch_tokens: int, bucket: int) -> int:
    """Rows of `bucket` tokens: as many for each device as `batch_tokens` hold, but at least one.

    Of any other number every device would work on all.
    """
    return devices * max(1, batch_tokens // bucket)


def batches(
    flat: Sequence[Scored], max_length: int, rows_of: Callable[[int], int]
) -> Iterator[tuple[list[int], int]]:
    """Indices of sequences that share a padded length, and that length.

    `rows_of` says how many rows of that length there may be.
    """
    buckets: dict[int, list[int]] = {}
    for index, sequence in enumerate(flat):
        buckets.setdefault(bucket_length(len(sequence.ids), max_length), []).append(index)
    for bucket in sorted(buckets):
        rows = rows_of(bucket)
        for start in range(0, len(buckets[bucket]), rows):
            yield buckets[bucket][start : start + rows], bucket


def bucket_length(length: int, max_length: int) -> int:
    """The smallest bucket that holds `length` tokens."""
    bucket = MIN_BUCKET
    while bucket < length:
        bucket *= 2
    return min(bucket, max_length)


def score_batch(
    backend: Backend, batch: Sequence[Scored], rows: int, bucket: int
) -> list[tuple[float, bool]]:
    """Mean nats of each span, and whether every token of it is the model's first choice."""
    inputs = np.zeros((rows, bucket), np.int32)
    targets = np.full((rows, bucket), IGNORE, np.int32)
    for row, (ids, start, end) in enumerate(batch):
        inputs[row, : len(ids)] = ids
        targets[row, start - 1 : end - 1] = ids[start:end]
    nll, greedy = backend.score(inputs, targets)
    scored = []
    for row, (_, start, end) in enumerate(batch):
        span = slice(start - 1, end - 1)
        hits = bool(np.all(greedy[row, span] == targets[row, span]))
        scored.append((float(nll[row, span].mean(dtype=np.float64)), hits))
    return scored


def core_metric(results: Sequence[TaskResult]) -> float:
    """The mean of the centred accuracies."""
    return sum(result.centered for result in results) / len(results)
