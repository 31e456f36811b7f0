"""English words for the spelling tasks, split into those to learn from and those to judge on.

The list of github.com/dwyl/english-words where `data_download --all` has put it, else the words of
the embedded documentation. A word's hash decides its split, whatever the list.
"""

import hashlib
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pyarrow.parquet as pq

from jaxchat.artifacts import base_dir
from jaxchat.embedded_corpus import ensure_embedded_corpus

WORDS_URL = (
    "https://raw.githubusercontent.com/dwyl/english-words/"
    "20f5cc9b3f0ccc8ce45d814c532b7c2031bba31c/words_alpha.txt"
)
"""370 K words, of a pinned commit."""

SPLITS = ("train", "test")
TEST_SHARE = 16
"""One word in so many is tested on."""

SHORTEST, LONGEST = 3, 16
"""Letters of a word."""

MIN_COUNT = 3
"""How often a word of the documentation occurs at least: fewer are often misspelt."""


def words_path() -> Path:
    """Where the downloaded list is kept."""
    return base_dir() / "data" / "tasks" / "words" / "words_alpha.txt"


def words(split: str) -> tuple[str, ...]:
    """The words of a split in alphabetical order."""
    if split not in SPLITS:
        raise ValueError(f"words split {split!r}: choose one of {', '.join(SPLITS)}")
    path = words_path()
    known = _listed(path) if path.exists() else _of_documentation(ensure_embedded_corpus())
    return _split(known, split)


@lru_cache(maxsize=4)
def _split(known: tuple[str, ...], split: str) -> tuple[str, ...]:
    held_out = split == "test"
    return tuple(word for word in known if _is_test(word) == held_out)


@lru_cache(maxsize=2)
def _listed(path: Path) -> tuple[str, ...]:
    found = path.read_text(encoding="ascii").split()
    return tuple(sorted(word for word in set(found) if SHORTEST <= len(word) <= LONGEST))


@lru_cache(maxsize=2)
def _of_documentation(directory: Path) -> tuple[str, ...]:
    """Lower-case words between spaces, as prose has them; identifiers rarely stand so."""
    counts: Counter[str] = Counter()
    prose = re.compile(rf"(?<= )[a-z]{{{SHORTEST},{LONGEST}}}(?=[ ,.])")
    for text in pq.read_table(directory / "train.parquet", columns=["text"])["text"].to_pylist():
        counts.update(prose.findall(text))
    return tuple(sorted(word for word, count in counts.items() if count >= MIN_COUNT))


def _is_test(word: str) -> bool:
    return hashlib.sha256(word.encode()).digest()[0] % TEST_SHARE == 0
