"""Log-probabilities in the two shapes of OpenAI's API.

A token is told of when all of its text is shown and not before: what a stop string swallows, were
it the end of a token or the first bytes of a character, does not leak through log-probabilities.
"""

import codecs
from collections import deque
from typing import Any

from jaxchat.backend import PromptScores
from jaxchat.request import Event
from jaxchat.tokenizer import Tokenizer


class TokenLog:
    """The tokens of one reply, held back until their text is shown."""

    def __init__(self, tokenizer: Tokenizer, *, parts: frozenset[str] | None = None) -> None:
        """`parts`: kinds of text that count; None counts all."""
        self._parts, self._first_special = parts, tokenizer.special_id("bos")
        self._text, self._shown = _Text(tokenizer), 0
        self._held: deque[tuple[int, int, Event]] = deque()

    def push(self, event: Event) -> list[tuple[int, Event]]:
        """(where its text begins, token) of every token whose text `event` has completed."""
        if self._parts is not None and event.part not in self._parts:
            return []
        if event.token is not None and event.token < self._first_special:
            self._held.append((*self._text.push(event.token), event))
        else:
            end = self._text.flush()
            if event.token is not None and self._parts is None:
                self._held.append((end, end, event))
        self._shown += len(event.text)
        shown = []
        while self._held and self._held[0][1] <= self._shown:
            start, _, told = self._held.popleft()
            shown.append((start, told))
        if event.stop_id is not None and self._parts is None:
            shown.append((self._text.length, event))
        return shown


class _Text:
    """The text that tokens add up to, and where in it each of them stands."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.length = 0
        """Characters that are whole."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> tuple[int, int]:
        """Where the text of the next token begins and ends.

        A token that shares a character with others begins or ends where that does.
        """
        raw = self._tokenizer.decode_bytes([token])
        if raw[0] & 0xC0 != 0x80:  # it begins a character, whatever became of the last one
            self.flush()
        start = self.length
        self.length += len(self._utf8.decode(raw))
        unfinished = bool(self._utf8.getstate()[0])
        return start, self.length + unfinished

    def flush(self) -> int:
        """End an unfinished character; returns where the text ends."""
        self.length += len(self._utf8.decode(b"", final=True))
        return self.length


def chat_entry(tokenizer: Tokenizer, event: Event) -> dict[str, Any]:
    """One token of `choices[].logprobs.content`."""
    assert event.token is not None and event.logprob is not None
    entry = _chat_token(tokenizer, event.token, event.logprob)
    return {**entry, "top_logprobs": [_chat_token(tokenizer, *pair) for pair in event.top]}


class CompletionLog:
    """The four parallel lists of `choices[].logprobs`."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer, self._top = tokenizer, top
        self.lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }

    def add_prompt(self, ids: list[int], scores: PromptScores) -> None:
        """Every token of an echoed prompt; the first has nothing before it, hence null."""
        text = _Text(self._tokenizer)
        first_special = self._tokenizer.special_id("bos")
        for i, token in enumerate(ids):
            best = zip(scores.top_ids[i].tolist(), scores.top_logprobs[i].tolist(), strict=True)
            known = i > 0
            offset = text.push(token)[0] if token < first_special else text.length
            self._add(token, float(scores.logprobs[i]) if known else None, tuple(best), offset)

    def add(self, event: Event, offset: int) -> None:
        """A token of the reply, or the one that ended it."""
        token = event.stop_id if event.token is None else event.token
        assert token is not None
        self._add(token, event.logprob, event.top, offset)

    def _add(
        self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...], offset: int
    ) -> None:
        best: dict[str, float] = {}
        for other, value in top[: self._top]:
            best.setdefault(label(self._tokenizer, other), value)
        if self._top and logprob is not None:  # clients compare the two to the last bit
            best[label(self._tokenizer, token)] = logprob
        self.lists["tokens"].append(label(self._tokenizer, token))
        self.lists["token_logprobs"].append(logprob)
        self.lists["top_logprobs"].append(best if logprob is not None else None)
        self.lists["text_offset"].append(offset)


def label(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; `bytes:\\xe4\\xbd` where it is a piece of a character."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.decode_bytes([token])
    text = raw.decode(errors="replace")
    return {"token": text, "logprob": logprob, "bytes": list(raw)}
