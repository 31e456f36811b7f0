"""Let a larger model make up conversations that teach yours who it is.

    export OPENAI_API_KEY=...       # OPENAI_BASE_URL for any other server with the same API
    python -m scripts.gen_synthetic_data --about ada.md -m gpt-5-mini -n 1000 -o ada.jsonl
    python -m scripts.chat_sft --identity ada.jsonl

`ada.md` describes the assistant in your own words: name, maker, abilities, limits, tone. The model
plays both sides, message by message, each time with another subject, person and manner. Every
conversation is written when it is complete; the same command continues after any interruption and
asks for what is missing. A few first: `-n 5`, then read them.
"""

import fcntl
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import openai

from jaxchat import cli
from jaxchat.progress import make_console, progress_bar
from jaxchat.synthetic import Message, Unusable, converse, draw_scenario
from jaxchat.threads import stoppable

ATTEMPTS = 3
"""Scenarios tried for one conversation, when what comes is empty, cut off or there already."""

RETRIES = 6
"""Of one message: the client waits as long as a busy server asks."""

SHOWN = 5
"""Reasons for which conversations were given up, at most."""

TIMEOUT_S = 120.0

MAX_TOKENS = 2_000
"""Of one message; a model that thinks first needs room for it."""

BEGINNING = b'{"number": '
"""Of every line that we write."""


@dataclass(frozen=True)
class Config:
    """Who is described, who makes it up, and how much of it."""

    about: Path
    """A text file that describes the assistant."""
    output: Annotated[Path, cli.arg(aliases=["-o"])] = Path("identity.jsonl")
    """Where the conversations go, one a line; what is there already counts."""
    num_conversations: Annotated[int, cli.arg(aliases=["-n"])] = 1000
    """How many there will be."""
    model: Annotated[str | None, cli.arg(aliases=["-m"])] = None
    """Who writes them; the server's own if it has just one."""
    language: cli.repeatable[tuple[str, ...]] = ()
    """A language to talk in; several are drawn from. English when not set."""
    max_turns: int = 3
    """Questions in a conversation, at most."""
    temperature: float | None = None
    """Of the model; its own default when not set."""
    workers: int = 8
    """Conversations at the same time."""
    seed: int = 42
    """Another one draws other subjects and people."""

    def __post_init__(self) -> None:
        for name in ("num_conversations", "max_turns", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")


class Writer:
    """The model that writes both sides, and what it has cost."""

    def __init__(self, client: openai.OpenAI, model: str, temperature: float | None) -> None:
        self.client, self.model = client, model
        self.options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self.spent: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, messages: Sequence[Message]) -> str:
        given: Any = messages
        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=given, max_completion_tokens=MAX_TOKENS, **self.options
            )
        except openai.BadRequestError as error:
            if not self.spent:
                raise  # it is about the options: no message is answered
            raise Unusable(explain(error)) from error
        with self._lock:
            self.spent["messages"] += 1
            if answer.usage:
                self.spent["tokens read"] += answer.usage.prompt_tokens
                self.spent["tokens written"] += answer.usage.completion_tokens
        if not answer.choices:
            raise Unusable("no answer")
        choice = answer.choices[0]
        if choice.finish_reason == "length":
            raise Unusable("a message was cut off")
        return choice.message.content or ""


class Collection:
    """The file: whole lines, each with the number of its draw."""

    def __init__(self, file: IO[bytes]) -> None:
        """Reads what is there, and forgets half a line; ValueError for a file of another kind."""
        file.seek(0)
        content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            if content[: len(BEGINNING)] != BEGINNING[: len(content)]:
                raise ValueError(f"it begins with {content[:20]!r}")
            lines = [json.loads(line) for line in whole.splitlines()]
            self.numbers = {line["number"] for line in lines}
            self.texts = {json.dumps(line["messages"]) for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file.name} holds something else than this command writes ({error!r}): "
                "name another file with -o"
            ) from error
        file.truncate(len(whole))
        self._file = file

    def add(self, number: int, messages: list[Message]) -> None:
        """Keep one; Unusable when it is there already."""
        text = json.dumps(messages)
        if text in self.texts:
            raise Unusable("a conversation that is there already")
        line = json.dumps({"number": number, "messages": messages}, ensure_ascii=False)
        self._file.write(f"{line}\n".encode("utf-8", "replace"))
        self._file.flush()
        self.texts.add(text)
        self.numbers.add(number)


@contextmanager
def opened(path: Path) -> Iterator[Collection]:
    """The collection at `path`; OSError while another process writes to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{path} is being written by another process") from None
        yield Collection(file)


def main(config: Config) -> None:
    """Collect what is missing, and say what it took."""
    about = config.about.read_text(encoding="utf-8").strip()
    if not about:
        raise ValueError(f"{config.about} is empty; it should describe the assistant")
    console = make_console()
    with connected() as client, opened(config.output) as collection:
        missing = sorted(set(range(config.num_conversations)) - collection.numbers)
        if missing:
            writer = Writer(client, config.model or only_model(client), config.temperature)
            try:
                failures = collect(config, about, writer, collection, missing)
            finally:
                if spent := [f"{count:,} {what}" for what, count in writer.spent.items()]:
                    console.print(", ".join(spent))
            for reason, count in failures.most_common(SHOWN):
                console.print(f"{count:,} given up after {ATTEMPTS} attempts: {reason}")
    if not collection.numbers:
        raise ValueError(f"{config.model or 'the model'} wrote no conversation that can be used")
    console.print(
        f"{len(collection.numbers):,} conversations in {config.output}: read some, then give them "
        f"to mid_train and chat_sft as --identity {config.output}",
        soft_wrap=True,
    )


def collect(
    config: Config, about: str, writer: Writer, collection: Collection, missing: Sequence[int]
) -> Counter[str]:
    """Ask for the missing conversations; how often it was given up, by the reason.

    OSError when the server refuses or cannot be reached.
    """
    failures: Counter[str] = Counter()
    languages = config.language or ("English",)

    def attempt(number: int, trial: int) -> list[Message]:
        key = f"{config.seed}/{number}/{trial}"
        scenario = draw_scenario(key, languages=languages, max_turns=config.max_turns)
        return converse(ask, about, scenario)

    def ask(messages: Sequence[Message]) -> str:
        if stop.is_set():
            raise KeyboardInterrupt  # in a thread: the conversation is not worth its end
        return writer(messages)

    with (
        progress_bar("conversations") as on_progress,
        stoppable(ThreadPoolExecutor(config.workers)) as (pool, stop),
    ):
        running = {pool.submit(attempt, number, 0): (number, 0) for number in missing}
        try:
            for future in finished(running):
                number, trial = running.pop(future)
                try:
                    collection.add(number, future.result())
                except Unusable as error:
                    if trial + 1 < ATTEMPTS:
                        running[pool.submit(attempt, number, trial + 1)] = (number, trial + 1)
                    else:
                        failures[str(error)] += 1
                on_progress(1 - len(running) / config.num_conversations)
        except openai.OpenAIError as error:
            raise OSError(f"{explain(error)}\nThe same command continues.") from error
    return failures


def finished(running: dict[Future, Any]) -> Iterator[Future]:
    """Each future as it ends, those too that are added meanwhile."""
    while running:
        yield from wait(running, return_when=FIRST_COMPLETED).done


def connected() -> openai.OpenAI:
    """The server that the environment names; ValueError, with the remedy, when it names none."""
    url, key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
    if not key and not url:
        raise ValueError(
            "no server is named: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server with the "
            "same API, such as http://127.0.0.1:8000/v1"
        )
    return openai.OpenAI(
        api_key=key or "none", base_url=url, timeout=TIMEOUT_S, max_retries=RETRIES
    )


def only_model(client: openai.OpenAI) -> str:
    """The one model that a server has; ValueError when there are several."""
    try:
        names = [model.id for model in client.models.list()]
    except openai.OpenAIError as error:
        raise OSError(explain(error)) from error
    if len(names) != 1:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"choose one of the server's {len(names)} models with -m: {shown}")
    return names[0]


def explain(error: openai.OpenAIError) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, openai.AuthenticationError):
        return f"the server does not accept OPENAI_API_KEY: {error.message}"
    if isinstance(error, openai.APIConnectionError):
        return f"the server cannot be reached, check OPENAI_BASE_URL: {error.message}"
    return f"the server refuses: {error}"


if __name__ == "__main__":
    cli.run(main, Config)
