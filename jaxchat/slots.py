"""The engine's bookkeeping: prompts, the samples drawn from them, and the slots they sit in."""

from dataclasses import dataclass, field

import numpy as np

from jaxchat.reply import Reply
from jaxchat.request import Request

WORTH_COPYING = 32
"""Tokens of a prompt that another row holds, from which on they are copied and not read."""


@dataclass
class Prompt:
    """The prompt of a request, shared by its samples."""

    ids: list[int]
    logits: np.ndarray | None = None
    """What follows it, once a sample has read it."""


@dataclass(eq=False)
class Sample:
    """One reply on its way."""

    number: int
    row: int
    request: Request
    prompt: Prompt
    reply: Reply
    generated: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt and the reply so far: the position of the next one."""
        return len(self.prompt.ids) + self.generated


@dataclass(eq=False)
class Slot:
    """A row of the cache and the sample that sits in it."""

    index: int
    held: list[int] = field(default_factory=list)
    """The ids in the row, also after its sample has ended."""
    pending: list[int] = field(default_factory=list)
    """The sample's ids that are not in the row yet."""
    sample: Sample | None = None
    started: bool = False
    """Whether the sample's prompt has been read."""
    used: int = 0
    """When the slot was last taken, in admissions."""

    @property
    def unread(self) -> bool:
        """Whether the row lacks more of the sample's ids than the one that decoding reads."""
        return self.sample is not None and (len(self.pending) > 1 or not self.started)

    @property
    def ready(self) -> bool:
        """Whether the sample's next token can be decoded."""
        return self.sample is not None and not self.unread

    def start(self, sample: Sample) -> None:
        """Take a sample in, keeping what the row holds of its prompt.

        The last id is read again, unless it is known what follows it.
        """
        ids = sample.prompt.ids
        kept = common_prefix(self.held, ids)
        if sample.prompt.logits is None:
            kept = min(kept, len(ids) - 1)
        self.held, self.pending = ids[:kept], ids[kept:]
        self.sample, self.started = sample, False

    def worth(self, ids: list[int]) -> int:
        """Tokens of a prompt that the row holds, where it goes on or goes back; 0 otherwise.

        Conversations begin alike, with an instruction of any length. That is no reason to lose the
        rest of one: another row can get a copy of the beginning. A prompt that is a beginning asks
        for its reply anew, and may replace one as long as itself.
        """
        shared = common_prefix(self.held, ids)
        lost = len(self.held) - shared
        goes_back = shared == len(ids)
        bearable = max(shared, WORTH_COPYING) if goes_back else min(shared, WORTH_COPYING)
        return shared if lost <= bearable else 0


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists share from the start: found by halves, as lists compare fast."""
    same, differs = 0, min(len(a), len(b))
    if a[:differs] == b[:differs]:
        return differs
    while differs - same > 1:
        middle = (same + differs) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            differs = middle
    return same
