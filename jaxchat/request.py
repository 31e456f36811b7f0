"""What goes into the engine and what comes out of it: requests, events, completions.

A reply arrives as a stream of events, one per token and one for its end; a `Completion` is the sum
of its events. Plain data: no backend, no tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxchat.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt and what to make of it."""

    ids: Sequence[int]
    """The prompt."""
    params: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    """Samples of the same prompt, with the rows `row`, ..., `row + n - 1`."""
    row: int = 0
    """Together with the seed and a token's position, the key of its random number."""
    tools: bool = True
    """Whether calls of the calculator are answered."""


LEAD = {"python": "\n>>> ", "python_output": "\n", "text": "\n"}
"""What a terminal shows where a reply changes from one kind of part to another."""

Alternatives = tuple[tuple[int, float], ...]
"""(token, log-probability) of the likeliest tokens, best first."""


class Event(NamedTuple):
    """A token of a reply, or its end (the last event, the only one with a `finish_reason`)."""

    request: int
    """The number that `submit` gave."""
    row: int
    """Which sample of the request, counted from its `row`."""
    part: str
    """What the text is: `text`, `python` (a tool call) or `python_output`."""
    text: str
    """What can be shown now; a token's text may come with a later event."""
    token: int | None = None
    """The token; None at the end."""
    logprob: float | None = None
    """Log-probability without temperature and filters, of `token` or `stop_id`; None if forced."""
    forced: bool = False
    """Whether the tool wrote this token, not the model."""
    finish_reason: str | None = None
    """`stop`, `length`, `cancelled`, or `error` where the backend failed."""
    stop_id: int | None = None
    """The token that ended the reply, where one did; it is not part of the reply."""
    top: Alternatives = ()
    """What else could have stood here, where the request asked for `top_logprobs`."""


@dataclass
class Completion:
    """A whole reply."""

    request: int
    row: int
    ids: list[int] = field(default_factory=list)
    """Every token after the prompt, without the one that ended it."""
    logprobs: list[float | None] = field(default_factory=list)
    """One per id; None where the tool wrote it."""
    parts: list[dict[str, str]] = field(default_factory=list)
    """The reply as conversation.py's assistant content."""
    finish_reason: str = ""
    stop_id: int | None = None
    stop_logprob: float | None = None
    tops: list[Alternatives] = field(default_factory=list)
    """The alternatives to each id."""

    @property
    def text(self) -> str:
        """The reply without tool calls and their output."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    @property
    def transcript(self) -> str:
        """The whole reply as a terminal shows it, calls and their output on lines of their own; an
        ellipsis ends one that was cut off."""
        shown, before = "", "text"
        for part in self.parts:
            shown += (LEAD[part["type"]] if part["type"] != before else "") + part["text"]
            before = part["type"]
        return shown + ("…" if self.finish_reason == "length" else "")

    @property
    def sampled(self) -> list[bool]:
        """For each id, whether the model chose it."""
        return [logprob is not None for logprob in self.logprobs]

    def add(self, event: Event) -> None:
        """Take in the next event of this reply."""
        if event.text:
            if not self.parts or self.parts[-1]["type"] != event.part:
                self.parts.append({"type": event.part, "text": ""})
            self.parts[-1]["text"] += event.text
        if event.token is not None:
            self.ids.append(event.token)
            self.logprobs.append(event.logprob)
            self.tops.append(event.top)
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            self.stop_id, self.stop_logprob = event.stop_id, event.logprob
