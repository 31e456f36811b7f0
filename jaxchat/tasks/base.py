"""What a task is: a list of conversations, and a judge of replies to them.

The one idea: a task is a sequence. `task[i]` is a conversation (conversation.py's format) whose
last assistant message is the reference answer, `task[:1000]` is a task, `task.shuffled(0)` is a
task, a mixture of tasks is a task; so training reads and evaluation judges one kind of object.
Nothing is random but by a stated seed, and `fingerprint` names content and order, so that a run
refuses to continue on other data. Left out: tokens (conversation.py), models (task_eval.py).
"""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self, TypeAlias, overload

import numpy as np

from jaxchat.conversation import Conversation

Kind: TypeAlias = Literal["conversation", "categorical", "generative"]
"""To learn from only; answered with one of a few letters; answered with free text."""

LETTERS = "ABCDEFGHIJ"
"""Names of choices."""


class Task(ABC):
    """Conversations by index. Subclasses give `_examples`, `_example`, `_identity`, maybe a judge.

    A conversation of a categorical task also has the key "letters": the answers to choose from.
    """

    name: str
    """As tables and messages call it."""
    kind: Kind = "conversation"
    baseline: float = 0.0
    """Accuracy of guessing, 0 to 1."""
    max_tokens: int = 256
    """Room that a generated answer needs."""

    @abstractmethod
    def _examples(self) -> int:
        """How many there are before any slicing."""

    @abstractmethod
    def _example(self, index: int) -> Conversation:
        """One of them; the same for the same index, always."""

    @abstractmethod
    def _identity(self) -> str:
        """Names the content: what this returns is equal only for equal examples."""

    def evaluate(self, problem: Conversation, reply: str) -> bool:
        """Whether `reply` (its text, without tool calls) answers `problem` correctly."""
        raise TypeError(f"{self.name} is for training only: it has no judge of replies")

    def reward(self, problem: Conversation, reply: str) -> float:
        """What reinforcement learning pays for a reply: 1 for a correct one, unless overridden."""
        return float(self.evaluate(problem, reply))

    def unavailable(self) -> str | None:
        """Why replies cannot be judged on this machine, or None when they can."""
        return None

    # --- a sequence ----------------------------------------------------------------------------

    @property
    def _order(self) -> Sequence[int] | np.ndarray:
        """Which examples, in which order."""
        return self.__dict__.setdefault("_chosen", range(self._examples()))

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Conversation | Self:
        if isinstance(index, slice):
            return self._reordered(self._order[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} examples, there is no number {index}")
        return self._example(int(self._order[index]))

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))

    def shuffled(self, seed: int) -> Self:
        """The same examples in an order that depends on `seed` and their number only."""
        order = np.asarray(self._order)
        return self._reordered(order[np.random.default_rng(seed).permutation(len(order))])

    def locate(self, index: int) -> str:
        """Where the conversation of this index comes from, for messages: `GSM8K[17]`."""
        return self._locate(int(self._order[index]))

    def _locate(self, example: int) -> str:
        return f"{self.name}[{example}]"

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name content and order."""
        order = self._order
        shown = repr(order).encode() if isinstance(order, range) else np.asarray(order).tobytes()
        return hashlib.sha256(self._identity().encode() + b"\0" + shown).hexdigest()[:16]

    def _reordered(self, order: Sequence[int] | np.ndarray) -> Self:
        twin = copy.copy(self)
        twin.__dict__["_chosen"] = order
        return twin


class TaskSequence(Task):
    """Tasks one after the other: a curriculum."""

    def __init__(self, tasks: Sequence[Task], *, name: str = "sequence") -> None:
        if not tasks:
            raise ValueError(f"{name} needs at least one task")
        self.name, self.tasks = name, tuple(tasks)
        self._starts = np.cumsum([0, *map(len, self.tasks)])

    def _examples(self) -> int:
        return int(self._starts[-1])

    def _example(self, index: int) -> Conversation:
        task, within = self._part(index)
        return task[within]

    def _identity(self) -> str:
        return "sequence " + " ".join(task.fingerprint for task in self.tasks)

    def _locate(self, example: int) -> str:
        task, index = self._part(example)
        return task.locate(index)

    def _part(self, example: int) -> tuple[Task, int]:
        """The task that an example belongs to, and its index there."""
        number = int(np.searchsorted(self._starts, example, side="right")) - 1
        return self.tasks[number], example - int(self._starts[number])


class TaskMixture(TaskSequence):
    """Tasks shuffled into each other. A task that is given twice counts twice."""

    def __init__(self, tasks: Sequence[Task], *, seed: int = 42, name: str = "mixture") -> None:
        super().__init__(tasks, name=name)
        self.__dict__["_chosen"] = np.random.default_rng(seed).permutation(self._examples())


def exchange(question: str, answer: str | Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """A conversation of one question and its answer, text or parts."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def ask_choice(question: str, choices: Sequence[str], gold: int) -> Conversation:
    """A multiple-choice question as a conversation.

    Each letter stands behind its choice: a small model finds the letter by looking at what came
    before it, instead of having to read ahead (as upstream found). No space before the letter, so
    that it is the token that the answer begins with.
    """
    letters = LETTERS[: len(choices)]
    if not 2 <= len(choices) <= len(LETTERS) or not 0 <= gold < len(choices):
        raise ValueError(
            f"a question needs 2 to {len(LETTERS)} choices and an answer among them; this one has "
            f"{len(choices)} and answer number {gold}: {question!r:.80}"
        )
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, letters, strict=True)]
    asked = "\n".join([question, *lines, "", "Which one is right? Say its letter only."])
    return exchange(asked, letters[gold]) | {"letters": tuple(letters)}


def reference(problem: Conversation) -> str:
    """The text of the reference answer, tool calls left out."""
    content = problem["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


class MultipleChoice(Task):
    """A task whose answers are letters."""

    kind: Kind = "categorical"
    baseline = 0.25

    def evaluate(self, problem: Conversation, reply: str) -> bool:
        if reply not in problem["letters"]:
            raise ValueError(f"reply {reply!r} is none of the letters {problem['letters']}")
        return reply == reference(problem)
