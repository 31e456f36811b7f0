"""Word problems with calculator traces, made on the spot: GSM8K's format without a network.

Each example is drawn from templates by its index: plain expressions, one-step stories, two-step
stories. The answer calls the calculator and ends in `#### number`, so learning, judging, rewards
and pass@k are those of GSM8K. The hash of a question decides its split: the splits share none.
"""

import hashlib
import random
from collections.abc import Callable, Sequence

from jaxchat.conversation import Conversation
from jaxchat.tasks.answers import MARK, call, same_answer
from jaxchat.tasks.base import Kind, Task, exchange, reference

SPLITS = ("train", "test")
TEST_SHARE = 16
"""One question in so many is tested on."""

NAMES = ("Ada", "Ben", "Chloe", "Dev", "Emil", "Fatima", "Grace", "Hugo", "Iris", "Jonas", "Kim")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "tickets")
BOXES = ("bags", "baskets", "boxes", "crates", "drawers", "shelves")

_Problem = tuple[str, list[tuple[str, str]]]
"""A question, and steps: what is said before a calculation, and the calculation."""


class Arithmetic(Task):
    """`size` problems of a split, of the given `kinds` in equal parts."""

    name = "Arithmetic"
    kind: Kind = "generative"
    max_tokens = 128

    def __init__(self, split: str, size: int, *, kinds: Sequence[str] | None = None) -> None:
        """`kinds` are of `KINDS`; all of them when None."""
        chosen = tuple(KINDS if kinds is None else kinds)
        unknown = [kind for kind in chosen if kind not in KINDS]
        if split not in SPLITS or unknown or not chosen or size < 1:
            raise ValueError(
                f"Arithmetic: split {split!r} must be one of {', '.join(SPLITS)}, kinds {chosen} "
                f"some of {', '.join(KINDS)}, size={size} at least 1"
            )
        self._split, self._size, self._kinds = split, size, chosen

    def evaluate(self, problem: Conversation, reply: str) -> bool:
        return same_answer(reply, reference(problem))

    def _examples(self) -> int:
        return self._size

    def _example(self, index: int) -> Conversation:
        kind = self._kinds[index % len(self._kinds)]
        attempt = 0
        while True:
            rng = random.Random(f"{self._split} {kind} {index} {attempt}")
            question, steps = rng.choice(KINDS[kind])(rng)
            held_out = hashlib.sha256(question.encode()).digest()[0] % TEST_SHARE == 0
            if held_out == (self._split == "test"):
                return _conversation(question, steps)
            attempt += 1

    def _identity(self) -> str:
        # the templates are this file: what they make of a few indices stands for it
        sample = "".join(self._example(i)["messages"][0]["content"] for i in range(32))
        return f"arithmetic {self._split} {self._size} {self._kinds} {sample}"


def _conversation(question: str, steps: Sequence[tuple[str, str]]) -> Conversation:
    parts: list[dict[str, str]] = []
    said_before = ""
    for said, expression in steps:
        called = call(expression)
        result = called[-1]["text"].removesuffix(".0")
        parts += [{"type": "text", "text": said_before + said}, *called]
        said_before = f"{result}\n"
    parts.append({"type": "text", "text": f"{said_before}{MARK} {said_before.strip()}"})
    return exchange(question, parts)


def _expression(rng: random.Random) -> _Problem:
    a, b = rng.randint(2, 999), rng.randint(2, 99)
    sign, word = rng.choice((("+", "plus"), ("-", "minus"), ("*", "times")))
    if sign == "-" and a < b:
        a, b = b, a
    asked = rng.choice(
        (
            f"What is {a} {sign} {b}?",
            f"{a}{sign}{b}",
            f"Calculate {a} {sign} {b}.",
            f"What is {a} {word} {b}?",
            f"How much is {a} {word} {b}?",
        )
    )
    return asked, [(f"{a} {sign} {b} = ", f"{a}{sign}{b}")]


def _gains(rng: random.Random) -> _Problem:
    name, thing, a, b = rng.choice(NAMES), rng.choice(THINGS), *_pair(rng)
    asked = f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?"
    return asked, [(f"{name} now has {a} + {b} = ", f"{a}+{b}")]


def _loses(rng: random.Random) -> _Problem:
    name, thing, (b, a) = rng.choice(NAMES), rng.choice(THINGS), sorted(_pair(rng))
    asked = f"{name} had {a} {thing} and gave away {b}. How many {thing} are left?"
    return asked, [(f"There are {a} - {b} = ", f"{a}-{b}")]


def _packs(rng: random.Random) -> _Problem:
    box, thing, a, b = rng.choice(BOXES), rng.choice(THINGS), *_pair(rng)
    asked = f"There are {a} {box} with {b} {thing} each. How many {thing} is that?"
    return asked, [(f"That is {a} * {b} = ", f"{a}*{b}")]


def _shares(rng: random.Random) -> _Problem:
    thing, each, people = rng.choice(THINGS), rng.randint(2, 99), rng.randint(2, 12)
    total = each * people
    asked = f"{people} children share {total} {thing} equally. How many does each one get?"
    return asked, [(f"Each one gets {total} / {people} = ", f"{total}/{people}")]


def _pays(rng: random.Random) -> _Problem:
    name, thing, (a, b) = rng.choice(NAMES), rng.choice(THINGS), _pair(rng)
    paid = a * b + rng.randint(1, 50)
    asked = (
        f"{name} buys {a} {thing} at {b} dollars each and pays with {paid} dollars. "
        "How many dollars come back?"
    )
    return asked, [
        (f"The {thing} cost {a} * {b} = ", f"{a}*{b}"),
        (f"{name} gets back {paid} - {a * b} = ", f"{paid}-{a * b}"),
    ]


def _collects(rng: random.Random) -> _Problem:
    name, thing, box, (a, b) = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES), _pair(rng)
    extra = rng.randint(2, 99)
    asked = (
        f"{name} fills {a} {box} with {b} {thing} each and keeps {extra} {thing} on the table. "
        f"How many {thing} are there in all?"
    )
    return asked, [
        (f"The {box} hold {a} * {b} = ", f"{a}*{b}"),
        (f"In all there are {a * b} + {extra} = ", f"{a * b}+{extra}"),
    ]


def _earns(rng: random.Random) -> _Problem:
    name, (hours, rate), days = rng.choice(NAMES), _pair(rng, most=12), rng.randint(2, 9)
    asked = (
        f"{name} works {hours} hours a day for {rate} dollars an hour. "
        f"How many dollars does {name} earn in {days} days?"
    )
    return asked, [
        (f"A day earns {hours} * {rate} = ", f"{hours}*{rate}"),
        (f"{days} days earn {days} * {hours * rate} = ", f"{days}*{hours * rate}"),
    ]


def _pair(rng: random.Random, *, most: int = 60) -> tuple[int, int]:
    """Two different numbers."""
    a, b = rng.sample(range(2, most), k=2)
    return a, b


KINDS: dict[str, tuple[Callable[[random.Random], _Problem], ...]] = {
    "expression": (_expression,),
    "one step": (_gains, _loses, _packs, _shares),
    "two steps": (_pays, _collects, _earns),
}
"""Templates by kind."""
