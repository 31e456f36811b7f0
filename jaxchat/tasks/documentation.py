"""Questions about the embedded documentation: a chat task for machines without a network.

The documents of the embedded corpus say what several thousand functions, classes and modules are.
From them come conversations ("What does X do?", with follow-ups about parameters, library and kind)
and multiple-choice questions of five kinds with four choices each, so guessing gets 25%. Questions
of the validation split are about modules that no training document and no training question has.
Left out: anything a docstring does not state; what cannot be parsed is not asked about.
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from jaxchat.conversation import Conversation
from jaxchat.embedded_corpus import ensure_embedded_corpus
from jaxchat.tasks.base import MultipleChoice, Task, ask_choice

SPLITS = ("train", "val")
KINDS = ("function", "method", "class", "module")
CHOICES = 4

MAX_LISTED = 8
"""More parameters than that are not asked for."""

_SENTENCE = re.compile(r"[A-Z][^:`*<>]{20,160}?[a-z)]\.(?=\s|$)")
_PARAMETERS = re.compile(r"^(?:Parameters\n[-=]{4,}|Args:|Arguments:)\n+", re.MULTILINE)
_SECTION = re.compile(r"^(?:[A-Z][\w ]+\n[-=]{3,}|[A-Z][\w ]+:|\S.*\.)$", re.MULTILINE)
"""What ends the section of parameters: another section, or prose."""
_NAMES = re.compile(r"(\*{0,2}[A-Za-z_]\w*(?:, *\*{0,2}[A-Za-z_]\w*)*) *(?:\([^)]*\) *)?:")


class Entry(NamedTuple):
    """What the documentation states about one thing."""

    name: str
    """Dotted, as in `scipy.linalg.cholesky`."""
    summary: str
    """The first sentence of its docstring."""
    kind: str
    library: str
    parameters: tuple[str, ...]

    @property
    def short(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]


def entries(split: str) -> tuple[Entry, ...]:
    """Everything of a split that has a kind and a summary of one sentence; each summary once."""
    if split not in SPLITS:
        raise ValueError(f"documentation split {split!r}: choose one of {', '.join(SPLITS)}")
    return _entries(ensure_embedded_corpus(), split)


class DocumentationQA(Task):
    """Conversations of one to three questions about one thing; nothing to judge."""

    def __init__(self, split: str) -> None:
        self.name = "Documentation QA"
        self._entries, self._split = entries(split), split

    def _examples(self) -> int:
        return len(self._entries)

    def _example(self, index: int) -> Conversation:
        entry = self._entries[index]
        rng = random.Random(f"qa {entry.name}")
        turns = [rng.choice((_what_is, _which_is))(entry, rng)]
        asked = rng.sample(_FOLLOW_UPS, k=rng.choice((0, 1, 1, 2)))
        turns += [turn for follow_up in asked if (turn := follow_up(entry, rng)) is not None]
        return {
            "messages": [
                {"role": role, "content": content}
                for turn in turns
                for role, content in zip(("user", "assistant"), turn, strict=True)
            ]
        }

    def _identity(self) -> str:
        return f"documentation qa {self._split} {_corpus_digest()}"


class DocumentationChoice(MultipleChoice):
    """Four choices: which name, which summary, which library, which kind, which parameter."""

    name = "Documentation"

    def __init__(self, split: str) -> None:
        self._entries, self._split = entries(split), split
        parameters = {name for entry in self._entries for name in entry.parameters}
        libraries = {entry.library for entry in self._entries}
        self._questions = [
            (number, question)
            for number, entry in enumerate(self._entries)
            for question, ask in enumerate(_QUESTIONS)
            if len(self._entries) >= CHOICES
            and (ask is not _which_library or len(libraries) >= CHOICES)
            and (ask is not _which_parameter or _has_foreign(entry, parameters))
        ]

    def _examples(self) -> int:
        return len(self._questions)

    def _example(self, index: int) -> Conversation:
        number, question = self._questions[index]
        entry = self._entries[number]
        rng = random.Random(f"choice {question} {entry.name}")
        asked, right, wrong = _QUESTIONS[question](entry, self._entries, rng)
        gold = rng.randrange(CHOICES)
        return ask_choice(asked, [*wrong[:gold], right, *wrong[gold:]], gold)

    def _identity(self) -> str:
        return f"documentation choice {self._split} {_corpus_digest()}"


@lru_cache(maxsize=4)
def _entries(directory: Path, split: str) -> tuple[Entry, ...]:
    columns = ["text", "name", "distribution", "kind"]
    rows = pq.read_table(directory / f"{split}.parquet", columns=columns).to_pylist()
    found: dict[str, Entry] = {}
    for row in rows:
        _, _, doc = row["text"].partition("\n\n")
        sentence = _SENTENCE.match(" ".join(doc.split("\n\n")[0].split()))
        if sentence is None or row["kind"] not in KINDS:
            continue
        library = "the standard library" if row["distribution"] == "python" else row["distribution"]
        found.setdefault(
            sentence[0],
            Entry(row["name"], sentence[0], row["kind"], library, _parameters_of(doc)),
        )
    return tuple(sorted(found.values()))


def _parameters_of(doc: str) -> tuple[str, ...]:
    """Names in the section of parameters, in numpy's or Google's style."""
    start = _PARAMETERS.search(doc)
    section = _SECTION.split(doc[start.end() :], maxsplit=1)[0] if start else ""
    lines = [line for line in section.splitlines() if line.strip()]
    if not lines or "%(" in section:  # a template, filled in when its module is imported
        return ()
    indent = len(lines[0]) - len(lines[0].lstrip())
    found: list[str] = []
    for line in lines:
        match = _NAMES.match(line, indent)
        if match and not line[:indent].strip():
            found += (name.strip(" *") for name in match[1].split(","))
    return tuple(dict.fromkeys(found))


def _corpus_digest() -> str:
    return json.loads((ensure_embedded_corpus() / "manifest.json").read_text())["sha256"]


# --- conversations --------------------------------------------------------------------------------


def _what_is(entry: Entry, rng: random.Random) -> tuple[str, str]:
    verb = "do" if entry.kind in ("function", "method") else "provide"
    asked = rng.choice(
        (
            f"What does {entry.name} {verb}?",
            f"What is {entry.name}?",
            f"Explain {entry.name} in one sentence.",
            f"Tell me about {entry.name}.",
            f"what is {entry.name} for?",
            f"I came across {entry.name}. What is it?",
        )
    )
    return asked, entry.summary


def _which_is(entry: Entry, rng: random.Random) -> tuple[str, str]:
    asked = rng.choice(
        (
            f'Which {entry.kind} is described like this? "{entry.summary}"',
            f'I am looking for a {entry.kind} of {entry.library}. "{entry.summary}"',
            f'The manual says: "{entry.summary}" What is it about?',
        )
    )
    return asked, f"That is {entry.name}."


def _parameters(entry: Entry, rng: random.Random) -> tuple[str, str] | None:
    if not 1 <= len(entry.parameters) <= MAX_LISTED:
        return None
    asked = rng.choice(
        ("Which parameters does it take?", "What are its parameters?", "What can I pass to it?")
    )
    *most, last = entry.parameters
    if not most:
        return asked, f"It has one parameter, {last}."
    return asked, f"Its parameters are {', '.join(most)} and {last}."


def _library(entry: Entry, rng: random.Random) -> tuple[str, str] | None:
    asked = rng.choice(("Which library is it from?", "Where does it come from?", "Whose is it?"))
    return asked, f"It is part of {entry.library}."


def _kind(entry: Entry, rng: random.Random) -> tuple[str, str] | None:
    others = [kind for kind in KINDS if kind != entry.kind]
    first, second = rng.sample([entry.kind, rng.choice(others)], k=2)
    asked = rng.choice((f"Is it a {first} or a {second}?", "What kind of thing is it?"))
    return asked, f"It is a {entry.kind}."


_FOLLOW_UPS = (_parameters, _library, _kind)

# --- multiple choice ------------------------------------------------------------------------------

_Question = Callable[[Entry, Sequence[Entry], random.Random], tuple[str, str, list[str]]]
"""Question, right answer and three wrong ones."""


def _which_name(entry: Entry, all_: Sequence[Entry], rng: random.Random) -> tuple:
    asked = f'What does the manual describe with these words? "{entry.summary}"'
    return asked, entry.name, _others(entry.name, lambda: rng.choice(all_).name)


def _which_summary(entry: Entry, all_: Sequence[Entry], rng: random.Random) -> tuple:
    asked = f"What does the manual say about {entry.name}?"
    return asked, entry.summary, _others(entry.summary, lambda: rng.choice(all_).summary)


def _which_library(entry: Entry, all_: Sequence[Entry], rng: random.Random) -> tuple:
    asked = f'Which library has {entry.short}? "{entry.summary}"'
    return asked, entry.library, _others(entry.library, lambda: rng.choice(all_).library)


def _which_kind(entry: Entry, all_: Sequence[Entry], rng: random.Random) -> tuple:
    asked = f"What kind of thing is {entry.name}?"
    return asked, entry.kind, _others(entry.kind, lambda: rng.choice(KINDS))


def _which_parameter(entry: Entry, all_: Sequence[Entry], rng: random.Random) -> tuple:
    right = rng.choice(entry.parameters)

    def foreign() -> str:
        """A parameter of something else that this does not have."""
        while True:
            name = rng.choice(rng.choice(all_).parameters or ("",))
            if name and name not in entry.parameters:
                return name

    asked = f'Which one is a parameter of {entry.name}? "{entry.summary}"'
    return asked, right, _others(right, foreign)


def _has_foreign(entry: Entry, parameters: set[str]) -> bool:
    """Whether it has parameters, and there are enough that it does not have."""
    return bool(entry.parameters) and len(parameters - {*entry.parameters}) >= CHOICES - 1


def _others(right: str, draw: Callable[[], str]) -> list[str]:
    """Three different wrong answers."""
    found: list[str] = []
    while len(found) < CHOICES - 1:
        other = draw()
        if other != right and other not in found:
            found.append(other)
    return found


_QUESTIONS: tuple[_Question, ...] = (
    _which_name,
    _which_summary,
    _which_library,
    _which_kind,
    _which_parameter,
)
