"""Byte-pair encoding: an exact trainer and encoder."""

from collections.abc import Iterable, Sequence

class Tokenizer:
    """A byte-level BPE vocabulary with its split pattern; untrained it holds the 256 bytes."""

    def __init__(self) -> None: ...
    @staticmethod
    def from_ranks(pattern: str, mergeable_ranks: Sequence[tuple[bytes, int]]) -> Tokenizer:
        """Rebuild a tokenizer from what `get_pattern` and `get_mergeable_ranks` gave."""

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
    ) -> None:
        """Learn up to `vocab_size` tokens; `pattern` defaults to GPT-4's."""

    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """The bytes of every token, in order of rank."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def batch_encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
