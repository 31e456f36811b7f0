"""Conversations as tokens: messages in, (ids, supervision mask) out.

A conversation is `{"messages": [{"role", "content"}, ...]}`: an optional system message (merged
into the first user message), then user and assistant in turn. Assistant content is a string or a
list of parts `{"type", "text"}` with the types `text`, `python` and `python_output`. The one idea:
the structure is written with special tokens that only this module emits, and every piece of
content is encoded as ordinary text, so no user can forge a turn. The mask is 1 on exactly what the
model must learn to produce: assistant text, calls of the tool, and the end of its turn.

    <|bos|> <|user_start|>2+2?<|user_end|>
    <|assistant_start|> <|python_start|>2+2<|python_end|> <|output_start|>4<|output_end|> It is 4. <|assistant_end|>
    (mask 1:            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^                                 ^^^^^^^^^^^^^^^^^^^^^^^^^^)

Left out: packing rows (the loader's work) and reading files (the tasks').
"""  # noqa: E501 (the example is one rendered line)

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from jaxchat.tokenizer import Tokenizer

Conversation: TypeAlias = Mapping[str, Any]
"""`{"messages": [...]}` as parsed from JSON; other keys are ignored. See `check_conversation`."""

PART_TYPES = ("text", "python", "python_output")
"""What the content of an assistant message can be made of."""

SYSTEM_SEPARATOR = "\n\n"
"""Between the system message and the first user message that it is merged into."""

_DIM, _GREEN, _BOLD, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[1m", "\x1b[0m"


def render(
    tokenizer: Tokenizer, conversation: Conversation, *, max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their supervision mask (1 = learn to predict this token).

    Both lists have the same length, cut to the first `max_tokens` where that is given.
    Raises ValueError, naming the message, for what `check_conversation` refuses.
    """
    check_conversation(conversation)
    rendered = _rendered(tokenizer, conversation["messages"])
    return rendered.ids[:max_tokens], rendered.mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """The prompt after which the model writes the next assistant message.

    A trailing assistant message is dropped (what an evaluation asks the model to reproduce). One
    before it may be empty: a model that ended its turn at once reads that again.
    Raises ValueError as `render` does, and when there is no user message left to answer.
    """
    check_conversation(conversation, empty_replies=True)
    messages = list(conversation["messages"])
    if messages[-1]["role"] == "assistant":
        messages.pop()
    ids = _rendered(tokenizer, messages).ids
    return [*ids, tokenizer.special_id("assistant_start")]


def first_question(conversation: Conversation) -> str:
    """The first user message of a checked conversation, the system message in front of it."""
    return _merge_system(conversation["messages"])[0]["content"]


def crop_prompt(ids: Sequence[int], most: int) -> list[int]:
    """A prompt in at most `most` tokens: bos, and of the rest the end, where the question is."""
    return list(ids) if len(ids) <= most else [ids[0], *ids[len(ids) - most + 1 :]]


def check_conversation(conversation: Conversation, *, empty_replies: bool = False) -> None:
    """Raise ValueError, naming the message (counted from 0) and what is wrong with it.

    Wrong are: anything that is not the format of this module's docstring, roles out of turn, a
    system message that is not the first or has no user message after it, empty content (only a
    tool may have no output), and tool output without the call before it. A conversation may end
    with a user message: then its last turn is merely not supervised. With `empty_replies` an
    assistant message that another follows may be without text.
    """
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not _is_list(messages) or not messages:
        raise ValueError('a conversation must be {"messages": [...]} with at least one message')
    starts_with_system = isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
    if starts_with_system and len(messages) == 1:
        raise ValueError("message 0: a system message needs a user message after it, found none")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f'message {index}: must be {{"role", "content"}}, is {type(message).__name__}'
            )
        _check_role(index, message.get("role"), starts_with_system)
        is_past_reply = message["role"] == "assistant" and index < len(messages) - 1
        may_be_empty = empty_replies and is_past_reply
        _check_content(index, message["role"], message.get("content"), may_be_empty)


def visualize(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> str:
    """Tokens for a terminal, separated by `|`: supervised ones green, others dim, specials bold.

    Control characters and halves of UTF-8 characters are shown escaped, so that a conversation
    cannot drive the terminal. Raises ValueError when the two lists differ in length.
    """
    if len(ids) != len(mask):
        raise ValueError(f"ids and mask differ in length: {len(ids)} and {len(mask)}")
    first_special = tokenizer.vocab_size - len(tokenizer.special_names)
    shown = []
    for token, learn in zip(ids, mask, strict=True):
        style = (_GREEN if learn else _DIM) + (_BOLD if token >= first_special else "")
        text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
        shown.append(f"{style}{_printable(text)}{_RESET}")
    return "|".join(shown)


class _Rendered:
    """The two lists while they grow."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.mask: list[int] = []

    def special(self, name: str, *, learn: bool) -> None:
        self._extend([self.tokenizer.special_id(name)], learn)

    def text(self, text: str, *, learn: bool) -> None:
        self._extend(self.tokenizer.encode(text), learn)

    def span(self, name: str, text: str, *, learn: bool) -> None:
        """`text` between its start and end tokens, all masked alike."""
        self.special(f"{name}_start", learn=learn)
        self.text(text, learn=learn)
        self.special(f"{name}_end", learn=learn)

    def assistant(self, content: str | Sequence[Mapping[str, str]]) -> None:
        self.special("assistant_start", learn=False)
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            match part["type"]:
                case "text":
                    self.text(part["text"], learn=True)
                case "python":
                    self.span("python", part["text"], learn=True)
                case "python_output":  # the tool writes this, not the model
                    self.span("output", part["text"], learn=False)
        self.special("assistant_end", learn=True)

    def _extend(self, ids: Sequence[int], learn: bool) -> None:
        self.ids.extend(ids)
        self.mask.extend([int(learn)] * len(ids))


def _rendered(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> _Rendered:
    """Checked messages."""
    rendered = _Rendered(tokenizer)
    rendered.special("bos", learn=False)
    for message in _merge_system(messages):
        if message["role"] == "user":
            rendered.span("user", message["content"], learn=False)
        else:
            rendered.assistant(message["content"])
    return rendered


def _merge_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if messages[0]["role"] != "system":
        return list(messages)
    system, user, *rest = messages
    merged = system["content"] + SYSTEM_SEPARATOR + user["content"]
    return [{"role": "user", "content": merged}, *rest]


def _check_role(index: int, role: object, starts_with_system: bool) -> None:
    """Turns alternate, user first; one system message may come before them."""
    if role not in ("system", "user", "assistant"):
        raise ValueError(
            f"message {index}: unknown role {role!r}, must be 'system', 'user' or 'assistant'"
        )
    turn = index - starts_with_system
    expected = "system" if turn < 0 else ("user", "assistant")[turn % 2]
    if role != expected:
        remedy = "; a system message can only be the first" if role == "system" else ""
        raise ValueError(
            f"message {index}: role must be {expected!r} (user and assistant take turns, "
            f"user first), is {role!r}{remedy}"
        )


def _check_content(index: int, role: str, content: object, may_be_empty: bool) -> None:
    if isinstance(content, str):
        if not content.strip() and not may_be_empty:
            raise ValueError(f"message {index} ({role}): content is empty")
        return
    if role != "assistant":
        raise ValueError(
            f"message {index} ({role}): content must be a string, is {type(content).__name__}"
        )
    if not _is_list(content) or not content:
        raise ValueError(
            f"message {index} (assistant): content must be a string or a list of parts with at "
            f"least one part, is {content!r:.80}"
        )
    before = None
    for number, part in enumerate(content):
        where = f"message {index} (assistant), part {number}"
        before = _check_part(where, part, before, may_be_empty)


def _check_part(where: str, part: object, before: str | None, may_be_empty: bool) -> str:
    """The part's type, once it is known to be fine after a part of type `before`."""
    if not isinstance(part, Mapping):
        raise ValueError(f'{where}: must be {{"type", "text"}}, is {type(part).__name__}')
    kind, text = part.get("type"), part.get("text")
    if kind not in PART_TYPES:
        raise ValueError(f"{where}: unknown type {kind!r}, must be one of {', '.join(PART_TYPES)}")
    if not isinstance(text, str):
        raise ValueError(f"{where} ({kind}): text must be a string, is {type(text).__name__}")
    if not text and kind != "python_output" and not (kind == "text" and may_be_empty):
        raise ValueError(f"{where} ({kind}): text is empty")
    if kind == "python_output" and before != "python":
        raise ValueError(f"{where}: python_output must follow a python part, follows {before!r}")
    return kind


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
