"""Your own conversations: a JSON lines file, and the identity that the model starts with.

A line is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}`, or just
the list. The whole file is checked when it is opened: a mistake is an error that names file and
line before anything is trained, never a surprise in the middle of a run.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxchat.conversation import Conversation, check_conversation
from jaxchat.tasks.base import Task

IDENTITY = Path(__file__).with_name("identity.jsonl")
"""Who the model is, in conversations written for this project; `--identity FILE` replaces it."""


class CustomJSON(Task):
    """The conversations of a JSON lines file; blank lines are skipped."""

    def __init__(self, path: Path | str) -> None:
        """FileNotFoundError, or ValueError with file, line and what is wrong there."""
        self.path = Path(path).expanduser()
        self.name = self.path.name
        try:
            content = self.path.read_bytes()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.path} does not exist; it should hold one conversation a line, "
                '{"messages": [{"role": "user", "content": "..."}, ...]}'
            ) from error
        lines = {n: line for n, line in enumerate(content.split(b"\n"), start=1) if line.strip()}
        self._lines = list(lines)
        self._conversations = [_parse(line, f"{self.path}:{n}") for n, line in lines.items()]
        if not self._conversations:
            raise ValueError(f"{self.path} holds no conversation")
        self._digest = hashlib.sha256(content).hexdigest()

    def _examples(self) -> int:
        return len(self._conversations)

    def _example(self, index: int) -> Conversation:
        return self._conversations[index]

    def _locate(self, example: int) -> str:
        return f"{self.path}:{self._lines[example]}"

    def _identity(self) -> str:
        return self._digest


def _parse(line: bytes, where: str) -> Conversation:
    try:
        found: Any = json.loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason})") from error
    except (ValueError, RecursionError) as error:  # the second: brackets nested by the thousand
        raise ValueError(f"{where}: not a line of JSON ({error})") from error
    conversation = {"messages": found} if isinstance(found, list) else found
    try:
        check_conversation(conversation)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not any(message["role"] == "assistant" for message in conversation["messages"]):
        raise ValueError(f"{where}: no assistant message, so nothing to learn from")
    return conversation
