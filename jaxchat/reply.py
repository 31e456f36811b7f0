"""One reply as it grows: tokens in, text for people and tool calls for the engine out.

A reply is a sequence of parts (`text`, `python`, `python_output`, as in conversation.py), separated
by special tokens that have no text of their own. Two things wait before they are shown: bytes that
may be the first half of a character, and text that may be the beginning of a stop string; so
neither broken characters nor any piece of a stop string ever leaves. Left out: where tokens come
from and when a reply must end for want of room (engine.py).
"""

from collections.abc import Sequence

from jaxchat.calculator import evaluate
from jaxchat.tokenizer import StreamDecoder, Tokenizer


class StopFilter:
    """Passes text through, up to the first stop string that is complete, which it swallows."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.matched = False
        self._held = ""

    def push(self, text: str) -> str:
        """What may be shown now. After a match nothing is."""
        if self.matched:
            return ""
        text = self._held + text
        found = [(start + len(s), start) for s in self.stops if (start := text.find(s)) >= 0]
        if found:  # the first to be complete, however the text was cut; then the longest
            self.matched, self._held = True, ""
            return text[: min(found)[1]]
        shown = len(text) - self._undecided(text)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, when no more text follows."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0


class Reply:
    """The state of one reply between two tokens."""

    def __init__(self, tokenizer: Tokenizer, *, stops: Sequence[str], tools: bool) -> None:
        self.part = "text"
        """The kind of text that the next token adds."""
        self._tokenizer, self._tools = tokenizer, tools
        self._first_special = tokenizer.special_id("bos")
        self._parts = {
            tokenizer.special_id("python_start"): "python",
            tokenizer.special_id("python_end"): "text",
            tokenizer.special_id("output_start"): "python_output",
            tokenizer.special_id("output_end"): "text",
        }
        self._python_end = tokenizer.special_id("python_end")
        self._decoder = StreamDecoder(tokenizer)
        self._filter = StopFilter(stops)
        self._expression: list[int] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the reply."""
        return self._filter.matched

    def push(self, token: int) -> tuple[str, str]:
        """The part that a token's text belongs to and the text that may be shown now."""
        part = self.part
        if token < self._first_special:
            if part == "python":
                self._expression.append(token)
            return part, self._visible(self._decoder.push(token))
        text = self.flush()
        self.part = self._parts.get(token, part)
        if self.part == "python":
            self._expression = []
        return part, text

    def flush(self) -> str:
        """The text that still waits, when the part or the reply ends."""
        return self._visible(self._decoder.flush()) + self._filter.flush()

    def forced_after(self, token: int) -> list[int]:
        """The tokens that the tool writes after `token`: its output after a call, else none.

        A call that the calculator refuses gets no output, as upstream: the model goes on alone.
        """
        if token != self._python_end:
            return []
        expression = self._tokenizer.decode(self._expression)
        result = evaluate(expression) if self._tools else None
        self._expression = []
        if result is None:
            return []
        start, end = (self._tokenizer.special_id(f"output_{side}") for side in ("start", "end"))
        return [start, *self._tokenizer.encode(result), end]

    def _visible(self, text: str) -> str:
        """Stop strings end text only: a calculation may contain anything."""
        return self._filter.push(text) if self.part == "text" else text
