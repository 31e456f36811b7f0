"""How well a chat model answers: letters by their logits, free text by generating it.

A categorical problem is one forward: the choice whose letter has the largest logit where the answer
begins is the answer, so a model is judged on what it knows and not on whether it keeps to the
format. Prompts of similar length share a batch, so a compiled model sees a handful of shapes.
Generative problems go through the Engine all at once, with the calculator, and the task judges the
text: one greedy reply each, or whether any of several is right. Left out: which tasks
(tasks/mixtures.py), tables (task_report.py).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxchat.backend import Backend
from jaxchat.conversation import Conversation, crop_prompt, render_for_completion
from jaxchat.core_eval import batch_rows, bucket_length
from jaxchat.engine import Engine
from jaxchat.progress import OnProgress, unheard
from jaxchat.request import Request
from jaxchat.sampling_params import CHAT_TOP_K, SamplingParams, check_varied
from jaxchat.tasks.base import Task
from jaxchat.tokenizer import Tokenizer

SAMPLE_SEED = 1337
"""Order in which a task's problems are taken, so that a limit takes a fair sample."""

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95% interval."""


@dataclass(frozen=True)
class Drawing:
    """How replies are drawn: as they stand here where models are compared."""

    samples: int = 1
    """Replies to each problem, which is solved if one of them is right (pass@n)."""
    temperature: float = 0.0
    top_k: int = CHAT_TOP_K
    max_tokens: int | None = None
    """Longest reply; what the task gives it when None."""

    def __post_init__(self) -> None:
        check_varied(self.samples, temperature=self.temperature, top_k=self.top_k)
        self.params(seed=0, room=self.max_tokens or 1)  # ValueError for what none can be drawn by

    def params(self, *, seed: int, room: int) -> SamplingParams:
        return SamplingParams(room, temperature=self.temperature, top_k=self.top_k, seed=seed)


GREEDY = Drawing()
"""One reply of the likeliest tokens."""


@dataclass(frozen=True)
class ChatResult:
    """What a model reached on a task."""

    name: str
    kind: str
    baseline: float
    """Accuracy of guessing."""
    problems: int = 0
    correct: int = 0
    cropped: int = 0
    """Prompts too long for the model: the beginning of their text was left out."""
    ended: int | None = None
    """Replies that ended by themselves, within the room they had; generated ones only."""
    called: int | None = None
    """Replies that called the calculator and got an answer; generated ones only."""
    samples: int = 1
    """Replies to a problem."""
    skipped: str | None = None
    """Why the task was not run."""
    data: str | None = None
    """The task's fingerprint: which problems there are, whatever part of them was asked."""

    @property
    def accuracy(self) -> float:
        return self.correct / self.problems if self.problems else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.correct, self.problems)

    @property
    def centered(self) -> float:
        """Accuracy above guessing, 1 for perfect."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)


def wilson(correct: int, problems: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927): sound for few problems and near 0 and 1."""
    if not problems:
        return math.nan, math.nan
    share, z2 = correct / problems, Z_95**2
    middle = (share + z2 / (2 * problems)) / (1 + z2 / problems)
    spread = share * (1 - share) / problems + z2 / (4 * problems**2)
    half = Z_95 / (1 + z2 / problems) * math.sqrt(spread)
    low = 0.0 if correct == 0 else middle - half
    return low, 1.0 if correct == problems else middle + half


def evaluate_chat(
    backend: Backend,
    tokenizer: Tokenizer,
    task: Task,
    *,
    max_problems: int | None,
    batch_tokens: int,
    slots: int,
    drawing: Drawing = GREEDY,
    on_progress: OnProgress = unheard,
) -> ChatResult:
    """A task on `max_problems` of its problems, drawn fairly (all of them when None).

    `batch_tokens` bounds the padded tokens that a device reads, and `slots` the replies that it
    writes, at a time; `on_progress` hears the share that is done. ValueError for a task with
    nothing to judge.
    """
    if task.kind == "conversation":
        raise ValueError(f"{task.name} is for training only: it has no judge of replies")
    reason = task.unavailable()
    if reason is not None:
        facts = (task.name, task.kind, task.baseline)
        return ChatResult(*facts, skipped=reason, data=task.fingerprint)
    problems = list(task.shuffled(SAMPLE_SEED)[:max_problems])
    if task.kind == "categorical":
        return _choose(backend, tokenizer, task, problems, batch_tokens, on_progress)
    return _generate(backend, tokenizer, task, problems, slots, drawing, on_progress)


# --- letters --------------------------------------------------------------------------------------


def _choose(
    backend: Backend,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Conversation],
    batch_tokens: int,
    on_progress: OnProgress,
) -> ChatResult:
    context = backend.config.sequence_len
    prompts, cropped = _prompts(tokenizer, problems, context)
    # of similar length together
    order = sorted(range(len(prompts)), key=lambda i: bucket_length(len(prompts[i]), context))
    correct, done = 0, 0
    while done < len(order):
        bucket = bucket_length(len(prompts[order[done]]), context)
        rows = batch_rows(backend.devices.count, batch_tokens, bucket)
        batch = [
            i
            for i in order[done : done + rows]
            if bucket_length(len(prompts[i]), context) == bucket
        ]
        logits = _last_logits(backend, [prompts[i] for i in batch], rows, bucket)
        for i, row in zip(batch, logits, strict=True):
            letters = problems[i]["letters"]
            ids = [_letter_id(tokenizer, letter) for letter in letters]
            correct += task.evaluate(problems[i], letters[int(np.argmax(row[ids]))])
        done += len(batch)
        on_progress(done / len(order))
    return ChatResult(
        task.name,
        task.kind,
        task.baseline,
        len(problems),
        correct,
        cropped,
        data=task.fingerprint,
    )


def _last_logits(
    backend: Backend, prompts: Sequence[Sequence[int]], rows: int, bucket: int
) -> np.ndarray:
    """(len(prompts), V): the logits after each prompt, all padded to one shape."""
    inputs, positions = np.zeros((rows, bucket), np.int32), np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        inputs[row, : len(prompt)] = prompt
        positions[row] = len(prompt) - 1
    return backend.logits(inputs, positions)[: len(prompts)]


def _letter_id(tokenizer: Tokenizer, letter: str) -> int:
    (id,) = tokenizer.encode(letter)  # a byte is a token of every byte-level vocabulary
    return id


# --- text -----------------------------------------------------------------------------------------


def _generate(
    backend: Backend,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Conversation],
    slots: int,
    drawing: Drawing,
    on_progress: OnProgress,
) -> ChatResult:
    samples = drawing.samples
    rows = max(1, min(slots * backend.devices.count, len(problems) * samples))
    engine = Engine(backend, tokenizer, slots=rows)
    room = min(drawing.max_tokens or task.max_tokens, engine.max_length // 2)
    prompts, cropped = _prompts(tokenizer, problems, engine.max_length - room)
    requests = [
        Request(ids, drawing.params(seed=number, room=room), n=samples)
        for number, ids in enumerate(prompts)
    ]
    replies = engine.complete(requests, on_progress)
    right = [
        task.evaluate(problems[number // samples], reply.text)
        for number, reply in enumerate(replies)
    ]
    return ChatResult(
        task.name,
        task.kind,
        task.baseline,
        len(problems),
        sum(any(right[at : at + samples]) for at in range(0, len(right), samples)),
        cropped,
        ended=sum(reply.finish_reason == "stop" for reply in replies),
        called=sum(
            any(part["type"] == "python_output" for part in reply.parts) for reply in replies
        ),
        samples=samples,
        data=task.fingerprint,
    )


def _prompts(
    tokenizer: Tokenizer, problems: Sequence[Conversation], most: int
) -> tuple[list[list[int]], int]:
    """Every prompt in at most `most` tokens, and how many had to be cropped for that."""
    prompts = [render_for_completion(tokenizer, problem) for problem in problems]
    return [crop_prompt(ids, most) for ids in prompts], sum(len(ids) > most for ids in prompts)
