"""Letters of words: SimpleSpelling writes them out, SpellingBee counts one of them.

A model sees tokens, not letters; that `strawberry` has three r it must learn. It does so by
spelling first, counting as it goes, and then asking the calculator, so it sees both agree.
Words are generated from a list by index, so a task can be as long as it is asked to be.
"""

import hashlib
import random

from jaxchat.conversation import Conversation
from jaxchat.tasks.answers import MARK, call, same_answer
from jaxchat.tasks.base import Kind, Task, exchange, reference
from jaxchat.tasks.words import words

ASK_COUNT = (
    "How many {letter} are in {word}?",
    "How many times does {letter} occur in {word}?",
    "Count the letter {letter} in the word {word}.",
    "how often is there a {letter} in {word}",
    "What is the number of {letter} in {word}?",
    "Tell me how many {letter}'s {word} has.",
    "In {word}, how many {letter} do you see?",
    "{word}: how many {letter}?",
    "Does {word} have any {letter}, and how many?",
    "I need to know how many times {letter} is in {word}.",
)

ASK_SPELLING = (
    "Spell {word}.",
    "How is {word} spelled?",
    "Spell the word {word}, letter by letter.",
    "which letters does {word} have?",
    "Write out the letters of {word}.",
)

QUOTES = ("", "'", '"')

FOREIGN_LETTER_SHARE = 0.1
"""Of the questions ask about any letter, which the word may not have at all."""


class _Words(Task):
    """A task about one word an example."""

    kind: Kind = "generative"

    def __init__(self, split: str, size: int) -> None:
        if size < 1:
            raise ValueError(f"{self.name}: size={size} must be at least 1")
        self._words, self._split, self._size = words(split), split, size

    def _examples(self) -> int:
        return self._size

    def _draw(self, index: int) -> tuple[str, random.Random]:
        rng = random.Random(f"{self.name} {self._split} {index}")
        return rng.choice(self._words), rng

    def _identity(self) -> str:
        digest = hashlib.sha256(" ".join(self._words).encode()).hexdigest()
        return f"{self.name} {self._split} {self._size} {digest}"


class SpellingBee(_Words):
    """`size` questions of how often a letter is in a word; splits share no word."""

    name = "SpellingBee"

    def evaluate(self, problem: Conversation, reply: str) -> bool:
        return same_answer(reply, reference(problem))

    def _example(self, index: int) -> Conversation:
        word, rng = self._draw(index)
        foreign = rng.random() < FOREIGN_LETTER_SHARE
        letter = rng.choice("abcdefghijklmnopqrstuvwxyz" if foreign else word)
        quote = rng.choice(QUOTES)
        shown = {"word": f"{quote}{word}{quote}", "letter": f"{quote}{letter}{quote}"}
        count = word.count(letter)
        expression = f'"{word}".count("{letter}")'
        parts = [
            {"type": "text", "text": _count_aloud(word, letter)},
            *call(expression),
            {"type": "text", "text": f"\n{MARK} {count}"},
        ]
        return exchange(rng.choice(ASK_COUNT).format(**shown), parts)


class SimpleSpelling(_Words):
    """`size` words to spell; splits share no word."""

    name = "SimpleSpelling"
    max_tokens = 64

    def evaluate(self, problem: Conversation, reply: str) -> bool:
        return reply.strip() == reference(problem)

    def _example(self, index: int) -> Conversation:
        word, rng = self._draw(index)
        quote = rng.choice(QUOTES)
        asked = rng.choice(ASK_SPELLING).format(word=f"{quote}{word}{quote}")
        return exchange(asked, f"{word}: {', '.join(word)}")


def _count_aloud(word: str, letter: str) -> str:
    """`b, a 1, n, a 2, n, a 3`: every letter, with a running count of the one asked for."""
    spoken, count = [], 0
    for each in word:
        count += each == letter
        spoken.append(f"{each} {count}" if each == letter else each)
    return f"{word} is spelled {', '.join(spoken)}. That makes {count}. The calculator says: "
