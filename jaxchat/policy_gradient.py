"""Reinforcement learning: rollouts of the present weights as weighted training batches.

REINFORCE with the mean of the group as its baseline (GRPO, arXiv 2402.03300, without its KL term,
ratio clipping and division by the deviation; token-level mean as in DAPO, arXiv 2503.14476): each
question is answered several times, a reply's advantage is its reward minus the mean of its group,
and the loss is that advantage times the nats of every token the model chose. Rollouts are made by
the weights that the next step changes, so no ratio is needed. The one idea: this is a loader. The
training loop, its checkpoints and its resume are those of every other stage.

What the model did not choose (prompts, tool output) is not learned from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, Self

import numpy as np

from jaxchat.backend import IGNORE, Backend
from jaxchat.conversation import Conversation, crop_prompt, render_for_completion
from jaxchat.dataloader import Batch
from jaxchat.engine import Engine
from jaxchat.progress import OnProgress, unheard
from jaxchat.request import Completion, Request
from jaxchat.sampling_params import SamplingParams, check_varied
from jaxchat.tasks.base import Task
from jaxchat.tokenizer import Tokenizer

LENGTH_MULTIPLE = 128
"""Rollouts are padded to a multiple of this: a handful of lengths, each compiled once."""


@dataclass(frozen=True)
class RolloutConfig:
    """How questions become rollouts."""

    questions: int = 16
    """Questions of one optimizer step."""
    samples: int = 16
    """Replies to each question: the group whose mean is the baseline."""
    max_tokens: int = 256
    """Longest reply, in tokens."""
    temperature: float = 1.0
    top_k: int = 50
    slots: int = 64
    """Replies that a device writes at the same time."""

    def __post_init__(self) -> None:
        if self.questions < 1 or self.samples < 2 or self.slots < 1:
            raise ValueError(
                f"questions={self.questions} and slots={self.slots} must be at least 1, and "
                f"samples={self.samples} at least 2: one reply is no better than its own mean"
            )
        self.params(seed=0)  # ValueError for how no reply can be written
        check_varied(self.samples, temperature=self.temperature, top_k=self.top_k)

    @property
    def rows(self) -> int:
        """Rollouts of one optimizer step."""
        return self.questions * self.samples

    def params(self, seed: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, seed=seed
        )


class RolloutLoader:
    """An endless iterator of batches, each written by the backend's weights of that moment.

    Of several processes each is told all rollouts, which their devices write together, and hands
    out its share of the rows.
    """

    def __init__(
        self,
        task: Task,
        backend: Backend,
        tokenizer: Tokenizer,
        config: RolloutConfig,
        *,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`state` continues where another loader's `state()` was taken."""
        if len(task) < config.questions:
            raise ValueError(
                f"the task has {len(task)} questions, a step takes {config.questions}: "
                "lower --questions"
            )
        self._task, self._backend, self._tokenizer = task, backend, tokenizer
        self._config, self._seed = config, seed
        self._share = slice(process_index, None, process_count)
        self._step = 0 if state is None else state["step"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing reads ahead: rollouts need the weights of their own step."""

    @property
    def passes(self) -> float:
        """How often the questions have been handed out."""
        return self._step / self._steps_per_epoch

    @property
    def position(self) -> int:
        """Batches handed out so far."""
        return self._step

    def state(self, position: int | None = None) -> dict[str, Any]:
        return {"step": self._step if position is None else position}

    def __next__(self) -> Batch:
        config = self._config
        questions = [self._task[i] for i in self._chosen()]
        first = self._step * config.questions
        engine = make_engine(self._backend, self._tokenizer, config, config.rows)
        prompts = prompts_of(engine, questions, config)
        replies = sample_groups(
            engine,
            prompts,
            config,
            samples=config.samples,
            seeds=[(self._seed << 32) + first + i for i in range(len(questions))],
        )
        rewards = np.array(
            [
                [self._task.reward(question, reply.text) for reply in group]
                for question, group in zip(questions, replies, strict=True)
            ],
            np.float32,
        )
        self._step += 1
        batch = rollout_batch(prompts, replies, rewards, max_length=engine.max_length)
        assert batch.weights is not None
        inputs, targets, weights = (
            rows[self._share] for rows in (batch.inputs, batch.targets, batch.weights)
        )
        return Batch(inputs, targets, weights, batch.figures)

    @property
    def _steps_per_epoch(self) -> int:
        return len(self._task) // self._config.questions

    def _chosen(self) -> list[int]:
        """The questions of this step: each once in a pass, in an order that the seed decides."""
        epoch, step = divmod(self._step, self._steps_per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._task))
        count = self._config.questions
        return [int(i) for i in order[step * count : (step + 1) * count]]


def make_engine(
    backend: Backend, tokenizer: Tokenizer, config: RolloutConfig, replies: int
) -> Engine:
    """With `slots` rows for each device, and no more than there are replies to write."""
    return Engine(backend, tokenizer, slots=min(config.slots * backend.devices.count, replies))


def prompts_of(
    engine: Engine, questions: Sequence[Conversation], config: RolloutConfig
) -> list[list[int]]:
    """The questions as prompts that leave room for a reply, at most half of the context.

    A longer one is cropped, as chat_eval crops it: no question ends a run.
    """
    most = engine.max_length - min(config.max_tokens, engine.max_length // 2)
    return [crop_prompt(render_for_completion(engine.tokenizer, q), most) for q in questions]


def sample_groups(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    config: RolloutConfig,
    *,
    samples: int,
    seeds: Sequence[int],
    on_progress: OnProgress = unheard,
) -> list[list[Completion]]:
    """`samples` replies to each prompt, all of them in one queue of the engine."""
    requests = [
        Request(ids, config.params(seed), n=samples)
        for ids, seed in zip(prompts, seeds, strict=True)
    ]
    replies = engine.complete(requests, on_progress)
    return [replies[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def rollout_batch(
    prompts: Sequence[Sequence[int]],
    replies: Sequence[Sequence[Completion]],
    rewards: np.ndarray,
    *,
    max_length: int,
) -> Batch:
    """Rollouts as rows: `rewards` is (Q, S) float32, the batch (Q x S, T).

    Targets are what the model chose, its end of turn included; weights are the advantages.
    """
    mixed = np.ptp(rewards, axis=1, keepdims=True) > 0
    # the mean of three times 0.7 is another float32: of equal rewards a difference would be left
    advantages = np.where(mixed, rewards - rewards.mean(axis=1, keepdims=True), 0)
    rows = [
        (prompt, reply) for prompt, group in zip(prompts, replies, strict=True) for reply in group
    ]
    chosen = [_chosen_ids(reply) for _, reply in rows]
    longest = max(len(p) + len(c) for (p, _), c in zip(rows, chosen, strict=True))
    length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, max_length)
    inputs = np.zeros((len(rows), length), np.int32)
    targets = np.full((len(rows), length), IGNORE, np.int32)
    for row, ((prompt, _), reply) in enumerate(zip(rows, chosen, strict=True)):
        ids = [*prompt, *(id for id, _ in reply)]
        learned = [IGNORE] * len(prompt) + [id if by_model else IGNORE for id, by_model in reply]
        inputs[row, : len(ids) - 1] = ids[:-1][:length]
        targets[row, : len(ids) - 1] = learned[1:][:length]
    weights = np.repeat(advantages.reshape(-1, 1), length, axis=1).astype(np.float32)
    figures = {
        "train/reward": float(rewards.mean()),
        "train/reply_tokens": float(np.mean([len(reply) for reply in chosen])),
        "train/finished_share": float(np.mean([r.finish_reason == "stop" for _, r in rows])),
        "train/mixed_groups_share": float(np.mean(mixed)),
    }
    return Batch(inputs, targets, weights, figures)


def _chosen_ids(reply: Completion) -> list[tuple[int, bool]]:
    """Every id of a reply, and whether the model chose it."""
    ids = list(zip(reply.ids, reply.sampled, strict=True))
    return ids if reply.stop_id is None else [*ids, (reply.stop_id, True)]


def pass_at_k(
    task: Task,
    backend: Backend,
    tokenizer: Tokenizer,
    config: RolloutConfig,
    *,
    questions: int,
    samples: int,
    ks: Sequence[int],
    on_progress: OnProgress = unheard,
) -> dict[str, float]:
    """The chance that one of k replies is right, over the first `questions` of a task.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of arXiv 2107.03374, from n = `samples` replies
    of which c are right; they are written as `config` says.
    """
    asked = [task[i] for i in range(min(questions, len(task)))]
    engine = make_engine(backend, tokenizer, config, len(asked) * samples)
    replies = sample_groups(
        engine,
        prompts_of(engine, asked, config),
        config,
        samples=samples,
        seeds=range(len(asked)),
        on_progress=on_progress,
    )
    right = [
        sum(task.evaluate(question, reply.text) for reply in group)
        for question, group in zip(asked, replies, strict=True)
    ]
    return {
        f"pass@{k}": float(np.mean([1 - comb(samples - c, k) / comb(samples, k) for c in right]))
        for k in ks
        if k <= samples
    }
