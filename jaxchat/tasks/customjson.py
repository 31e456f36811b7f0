"""Your own conversations and questions: a JSON lines file, and who the model says it is.

A line is a conversation (or just its list of messages), or a question as GSM8K and MMLU write it:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"question": "...", "answer": "6 * 7 = <<6*7=42>>42\\n#### 42"}
    {"question": "...", "choices": ["...", "..."], "answer": 1}

Lines of ShareGPT (`conversations` of `from` and `value`) and Alpaca (`instruction`, `input`,
`output`) are read too. Calls of the calculator count where an answer has its last line `####`; the
answer to choices is a number from 0 on, or a letter. The whole file is checked when it is opened: a
mistake is an error that names file and line before anything is trained, never a surprise in the
middle of a run.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxchat.conversation import Conversation, check_conversation
from jaxchat.tasks.answers import MARK, agrees, call_parts, final_words
from jaxchat.tasks.base import LETTERS, Kind, Task, ask_choice, exchange, reference

IDENTITY = Path(__file__).with_name("identity.jsonl")
"""Who the model is, in conversations written for this project; `--identity FILE` replaces it."""

HELD_OUT = 20
"""One conversation in so many is validated on, and at least one."""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles; others are what they are."""


class CustomJSON(Task):
    """The conversations of a JSON lines file; blank lines are skipped."""

    _wanted = 'one conversation a line, {"messages": [{"role": "user", "content": "..."}, ...]}'

    def __init__(self, path: Path | str) -> None:
        """FileNotFoundError, or ValueError with file, line and what is wrong there."""
        self.path = Path(path).expanduser()
        self.name = self.path.name
        try:
            content = self.path.read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.path} does not exist; it should hold {self._wanted}"
            ) from error
        lines = {n: line for n, line in enumerate(content.split(b"\n"), start=1) if line.strip()}
        self._lines = list(lines)
        try:
            self._conversations = [_parse(line, f"{self.path}:{n}") for n, line in lines.items()]
        except ValueError as error:
            if _is_array(content):
                raise ValueError(
                    f"{self.path} is one JSON array; it should hold one conversation a line, as "
                    f"from: jq -c '.[]' {self.path} > lines.jsonl"
                ) from error
            raise
        if not self._conversations:
            raise ValueError(f"{self.path} holds no conversation")
        self._digest = hashlib.sha256(content).hexdigest()

    def split(self) -> tuple[Self, Self]:
        """What is trained on, and what is held out.

        A conversation's own text decides, so lines may be added or moved, and no conversation is on
        both sides. ValueError when all are the same one.
        """
        keys = np.array([_key(conversation) for conversation in self], np.uint64)
        held_out = keys <= max(2**64 // HELD_OUT, int(keys.min()))
        if held_out.all():
            found = f"{len(self):,} conversation{'s' * (len(self) > 1)}"
            raise ValueError(
                f"{self.path} holds {found}, {len(np.unique(keys))} distinct, and should hold more "
                "distinct ones: some are held out to validate on, and nothing is left to train on"
            )
        (train,), (val,) = np.nonzero(~held_out), np.nonzero(held_out)
        return self._reordered(train), self._reordered(val)

    def _examples(self) -> int:
        return len(self._conversations)

    def _example(self, index: int) -> Conversation:
        return self._conversations[index]

    def _locate(self, example: int) -> str:
        return f"{self.path}:{self._lines[example]}"

    def _identity(self) -> str:
        return self._digest


class CustomProblems(CustomJSON):
    """A file of questions alone, all with choices or all with a final answer."""

    _wanted = (
        'one question a line, {"question": "...", "answer": "... #### 42"} or '
        '{"question": "...", "choices": ["...", "..."], "answer": 1}'
    )

    def __init__(self, path: Path | str) -> None:
        """As CustomJSON, and ValueError for a line by which no reply can be judged."""
        super().__init__(path)
        kinds = [_judged_as(conversation) for conversation in self]
        for index, kind in enumerate(kinds):
            if kind == "conversation":
                raise ValueError(
                    f"{self.locate(index)}: nothing to judge a reply by; give the question "
                    f"choices, or its answer a last line such as {MARK} 42"
                )
            if kind != kinds[0]:
                raise ValueError(
                    f"{self.locate(index)}: is {kind} and {self.locate(0)} {kinds[0]}; put "
                    "questions with choices and others into two files"
                )
        self.kind = kinds[0]
        if self.kind == "categorical":
            self.baseline = float(np.mean([1 / len(problem["letters"]) for problem in self]))

    def evaluate(self, problem: Conversation, reply: str) -> bool:
        if self.kind == "categorical":
            return reply.strip() == reference(problem)
        return agrees(reply, reference(problem))


def _parse(line: bytes, where: str) -> Conversation:
    try:
        found: Any = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text ({error.reason}); if the file is Latin-1, "
            "convert it with iconv -f latin1 -t utf-8"
        ) from error
    except (ValueError, RecursionError) as error:  # the second: brackets nested by the thousand
        raise ValueError(f"{where}: not a line of JSON ({error})") from error
    try:
        conversation = _conversation(found)
        check_conversation(conversation)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not any(message["role"] == "assistant" for message in conversation["messages"]):
        raise ValueError(f"{where}: no assistant message, so nothing to learn from")
    return conversation


def _is_array(content: bytes) -> bool:
    """Whether a whole file is one list, of other things than messages."""
    if not content.lstrip().startswith(b"["):
        return False
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return bool(found) and not any(isinstance(each, Mapping) and "role" in each for each in found)


def _conversation(found: Any) -> Conversation:
    """What a line stands for; what is not a question is left to `check_conversation`."""
    if isinstance(found, list):
        return {"messages": found}
    if not isinstance(found, Mapping):
        return found
    if "messages" in found:
        return {"messages": found["messages"]}
    if "question" not in found:
        return _of_others(found)
    question, answer, choices = (found.get(name) for name in ("question", "answer", "choices"))
    if not isinstance(question, str):
        raise ValueError(f"question must be a string, is {question!r:.80}")
    if choices is not None:
        return _choice(question, choices, answer)
    if not isinstance(answer, str):
        raise ValueError(f"answer must be a string, is {answer!r:.80}")
    return exchange(question, call_parts(answer) if MARK in answer else answer)


def _of_others(found: Mapping[str, Any]) -> Conversation:
    if "conversations" in found:
        return {"messages": _sharegpt(found["conversations"])}
    if "instruction" in found and "output" in found:
        return _alpaca(found)
    return {"messages": None}


def _sharegpt(turns: Any) -> Any:
    """Its turns as messages; what is no turn of its kind is left to `check_conversation`."""
    if not isinstance(turns, list):
        return turns
    return [
        {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn, Mapping) and isinstance(turn.get("from"), str)
        else turn
        for turn in turns
    ]


def _alpaca(found: Mapping[str, Any]) -> Conversation:
    """The input, which may be empty or missing, stands below the instruction."""
    texts = {name: found.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} must be a string, is {text!r:.80}")
    asked = [text for text in (texts["instruction"], texts["input"]) if text]
    return exchange("\n\n".join(asked), texts["output"])


def _choice(question: str, choices: object, answer: object) -> Conversation:
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"choices must be a list of strings, are {choices!r:.80}")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        answer = letters.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise ValueError(
            f"answer must be the number of a choice, from 0 on, or its letter, is {answer!r:.80}"
        )
    return ask_choice(question, choices, answer)


def _judged_as(conversation: Conversation) -> Kind:
    if "letters" in conversation:
        return "categorical"
    answered = conversation["messages"][-1]["role"] == "assistant"
    return "generative" if answered and final_words(reference(conversation)) else "conversation"


def _key(conversation: Conversation) -> int:
    text = json.dumps(conversation, sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
