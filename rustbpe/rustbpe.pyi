"""Byte-pair encoding: an exact trainer and encoder."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

UNICODE_VERSION: str
"""Of the character classes that the split patterns use; the same as tiktoken's."""

class Tokenizer:
    """A byte-level BPE vocabulary with its split pattern; untrained it holds the 256 bytes.

    Immutable but for `train_from_iterator`, and safe to share between threads.
    """

    def __init__(self) -> None: ...
    @staticmethod
    def from_ranks(pattern: str, mergeable_ranks: Sequence[tuple[bytes, int]]) -> Tokenizer:
        """Rebuild a tokenizer from what `get_pattern` and `get_mergeable_ranks` gave.

        ValueError when the ranks have gaps, the first 256 tokens are not the bytes, or a token
        occurs twice or is not the merge of two others.
        """

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        threads: int | None = None,
        progress: Callable[[str, int, int | None], object] | None = None,
    ) -> None:
        """Learn up to `vocab_size` tokens, bytes included, fewer when the texts have no more pairs.

        The largest count is merged first, of equal counts the smallest (left id, right id); the
        result depends on neither `threads` nor `buffer_size` (texts taken at a time) nor the order
        of the texts. `pattern` defaults to GPT-4's. `progress(stage, done, total)` is called now
        and then: "counting" texts, then "merging" pairs. Ctrl-C interrupts; the vocabulary then
        stays what it was. A UserWarning says when the texts are too small for `vocab_size`.

        ValueError for a vocabulary below 256, a buffer or `threads` below 1, a pattern that is
        empty, wrong or does not cover the texts; TypeError for an item that is not a str; what the
        iterator raises goes through. Texts from files: iterate over them, as
        `jaxchat.dataset` does over parquet, jsonl and txt.
        """

    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """The bytes of every token, in order of rank."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]:
        """The ids of a text, those that tiktoken gives. ValueError for text outside the pattern."""

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """The ids of a text as uint32 (T,)."""

    def batch_encode(
        self, texts: Sequence[str], *, threads: int | None = None
    ) -> list[NDArray[np.uint32]]:
        """The ids of every text as uint32 (T,), on as many threads as there are processors."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. ValueError for an unknown id, RuntimeError where it is not UTF-8."""
