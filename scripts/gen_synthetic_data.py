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
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import openai
from openai.types import Model
from openai.types.chat import ChatCompletion

from jaxchat import cli
from jaxchat.progress import make_console, progress_bar
from jaxchat.synthetic import Message, Unusable, converse, draw_scenario
from jaxchat.threads import AbandonedPool, stoppable

AnswerT = TypeVar("AnswerT")
"""What a request gives."""

ATTEMPTS = 3
"""Scenarios tried for one conversation, when what comes is empty, cut off or there already."""

RETRIES = 6
"""Of one message, while the server is busy, broken or away."""

TIMEOUT_S = 120.0

TIMEOUT_RETRIES = 2
"""Fewer: a server that hangs would be noticed only after a quarter of an hour."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
"""Between retries, doubled each time, as the client does it; a server may ask for more."""

PATIENCE_S = 600.0
"""The longest wait that a server may ask for; a spent daily quota asks for hours."""

FATAL = (401, 404, 429, 503)
"""Statuses that are not about one message: key, address or model, quota, a server that is down."""

REFUSALS = 20
"""Refused attempts with no conversation in between, after which it is not about messages either."""

SHOWN = 5
"""Reasons for which conversations were given up, at most."""

SHOWN_LETTERS = 500
"""Of what a server says when it refuses."""

MAX_TOKENS = 2_000
"""Of one message; a model that thinks first needs room for it."""

LIMITS = ("max_completion_tokens", "max_tokens")
"""Names of that option: OpenAI's models that think refuse the older one, Mistral's API the new."""

BEGINNING = b'{"number": '
"""Of every line that we write."""

CONTINUES = "The same command continues."


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


class Refused(Unusable):
    """The server does not answer this message."""


class Writer:
    """The model that writes both sides, and what it has cost."""

    def __init__(self, client: openai.OpenAI, model: str, temperature: float | None) -> None:
        self.client, self.model = client, model
        self.options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        self.limit = LIMITS[0]
        self.spent: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, messages: Sequence[Message], stop: threading.Event) -> str:
        """The next message; KeyboardInterrupt once `stop` is set and it is not there yet."""
        try:
            return self._read(patiently(lambda: self._answer(messages), stop))
        except openai.APIStatusError as error:
            if error.status_code in FATAL:
                raise
            raise Refused(explain(error)) from error
        except json.JSONDecodeError as error:  # of an empty body, say
            return self._read(error)

    def _read(self, answer: Any) -> str:
        """What an answer says, which the client hands over whatever its form."""
        if not self.spent and not isinstance(answer, ChatCompletion):
            raise OSError(foreign(answer))
        try:
            choice, usage = answer.choices[0], answer.usage
            text, cut_off = text_of(choice.message.content), choice.finish_reason == "length"
        except (AttributeError, TypeError, LookupError):
            raise Refused(f"no answer: {answer!r}"[:SHOWN_LETTERS]) from None
        with self._lock:
            self.spent["messages"] += 1
            if usage:
                self.spent["tokens read"] += usage.prompt_tokens or 0
                self.spent["tokens written"] += usage.completion_tokens or 0
        if cut_off:
            raise Unusable("a message was cut off")
        return text

    def _answer(self, messages: Sequence[Message]) -> ChatCompletion:
        """One request, with the limit's older name for servers that do not know the new one."""
        limit = self.limit
        try:
            return self._request(messages, limit)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if limit == self.limit:  # no other thread has found out meanwhile
                if self.spent or limit == LIMITS[1] or limit not in error.response.text:
                    raise
                self.limit = LIMITS[1]
        return self._request(messages, self.limit)

    def _request(self, messages: Sequence[Message], limit: str) -> ChatCompletion:
        given: Any = messages
        options: dict[str, Any] = {**self.options, limit: MAX_TOKENS}
        return self.client.chat.completions.create(model=self.model, messages=given, **options)


def text_of(content: str | list[dict[str, Any]] | None) -> str:
    """What was said: some servers give it in parts, of which thoughts are no text."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part.get("type") == "text")
    return content or ""


class Collection:
    """The file: whole lines, each with the number of its draw."""

    def __init__(self, file: IO[bytes]) -> None:
        """Reads what is there, and forgets half a line; ValueError for a file of another kind.

        People read it, so an editor may have added empty lines, or taken the last newline away.
        """
        file.seek(0)
        content = file.read()
        whole, begun = whole_lines(content), content.lstrip()
        try:
            if begun[: len(BEGINNING)] != BEGINNING[: len(begun)]:
                raise ValueError(f"it begins with {begun[:20]!r}")
            lines = [json.loads(line) for line in whole.splitlines() if line.strip()]
            self.numbers = {line["number"] for line in lines}
            self.texts = {json.dumps(line["messages"]) for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file.name} holds something else than this command writes ({error!r}): "
                "name another file with -o"
            ) from error
        file.truncate(min(len(whole), len(content)))
        file.write(whole[len(content) :])
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


def whole_lines(content: bytes) -> bytes:
    """Without the half line that an interruption leaves; no beginning of a line of ours parses."""
    end = content.rfind(b"\n") + 1
    try:
        json.loads(content[end:])
    except ValueError:
        return content[:end]
    return content + b"\n"


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
                said = cli.printable(reason)  # some of it by the server
                console.print(f"{count:,} given up after {ATTEMPTS} attempts: {said}")
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

    OSError when the server refuses or cannot be reached. One refused message costs its attempt; a
    few before any answer, or many with no conversation in between, are about something else.
    """
    failures: Counter[str] = Counter()
    refusals = 0
    languages = config.language or ("English",)

    def attempt(number: int, trial: int) -> list[Message]:
        key = f"{config.seed}/{number}/{trial}"
        scenario = draw_scenario(key, languages=languages, max_turns=config.max_turns)
        return converse(ask, about, scenario)

    def ask(messages: Sequence[Message]) -> str:
        if stop.is_set():
            raise KeyboardInterrupt  # in a thread: the conversation is not worth its end
        return writer(messages, stop)

    with (
        progress_bar("conversations") as on_progress,
        stoppable(AbandonedPool(config.workers)) as (pool, stop),
    ):
        running = {pool.submit(attempt, number, 0): (number, 0) for number in missing}
        try:
            for future in finished(running):
                number, trial = running.pop(future)
                try:
                    collection.add(number, future.result())
                    refusals = 0
                except Unusable as error:
                    refusals += isinstance(error, Refused)
                    if refusals >= (REFUSALS if writer.spent else ATTEMPTS):
                        raise OSError(f"{error}\n{CONTINUES}") from error
                    if trial + 1 < ATTEMPTS:
                        running[pool.submit(attempt, number, trial + 1)] = (number, trial + 1)
                    else:
                        failures[str(error)] += 1
                on_progress(1 - len(running) / config.num_conversations)
        except openai.OpenAIError as error:
            raise OSError(f"{explain(error)}\n{CONTINUES}") from error
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
    return openai.OpenAI(api_key=key or "none", base_url=url, timeout=TIMEOUT_S, max_retries=0)


def only_model(client: openai.OpenAI) -> str:
    """The one model that a server has; ValueError when there are several."""
    try:
        models = patiently(lambda: client.models.list().data, threading.Event())
    except openai.OpenAIError as error:
        raise OSError(explain(error)) from error
    except AttributeError as error:  # the client takes whatever came for a page of models
        raise OSError(foreign("no list of models")) from error
    if not isinstance(models, list) or not all(isinstance(model, Model) for model in models):
        raise OSError(foreign(models))
    names = [model.id for model in models]
    if len(names) != 1:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise ValueError(f"choose one of the server's {len(names)} models with -m: {shown}")
    return names[0]


def patiently(request: Callable[[], AnswerT], stop: threading.Event) -> AnswerT:
    """The answer to a request that is repeated while that may help.

    In place of the client's own retries, which sleep through an interrupt, and give up where a
    server asks for a long wait. KeyboardInterrupt when `stop` is set meanwhile.
    """
    retries = 0
    while True:
        try:
            return request()
        except (openai.APIConnectionError, openai.APIStatusError) as error:
            pause_s = pause_before_retry(error, retries)
            if pause_s is None:
                raise
        if stop.wait(pause_s):
            raise KeyboardInterrupt  # in a thread: nobody waits for the answer any more
        retries += 1


def pause_before_retry(error: openai.APIError, retries: int) -> float | None:
    """How long to wait after so many retries; None when another one would not help."""
    few = isinstance(error, openai.APITimeoutError)
    if retries >= (min(RETRIES, TIMEOUT_RETRIES) if few else RETRIES):
        return None
    pause_s = min(FIRST_PAUSE_S * 2**retries, LONGEST_PAUSE_S) * random.uniform(0.75, 1)
    if isinstance(error, openai.APIStatusError):
        if not passing(error):
            return None
        asked_s = retry_after_s(error.response.headers)
        pause_s = max(pause_s, asked_s) if asked_s else pause_s
    return pause_s if pause_s <= PATIENCE_S else None


def passing(error: openai.APIStatusError) -> bool:
    """Whether the server may answer later, by its own word or by the status."""
    said = error.response.headers.get("x-should-retry")
    if said in ("true", "false"):
        return said == "true"
    return error.status_code in (408, 409, 429) or error.status_code >= 500


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long a server asks to wait: milliseconds, seconds or a date (RFC 9110, 10.2.3)."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(KeyError, ValueError):
            return float(headers[name]) * unit_s
    with suppress(KeyError, ValueError, TypeError):
        return (parsedate_to_datetime(headers["retry-after"]) - datetime.now(UTC)).total_seconds()
    return None


def explain(error: openai.OpenAIError) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, openai.APITimeoutError):
        return f"the server did not answer within {TIMEOUT_S:g} s"
    if isinstance(error, openai.APIConnectionError):
        return f"the server cannot be reached, check OPENAI_BASE_URL: {error.message}"
    if not isinstance(error, openai.APIStatusError):
        return f"the server refuses: {error}"
    # the client's own message leaves out what it does not know the form of
    said = " ".join(error.response.text.split())[:SHOWN_LETTERS] or error.message
    wait_s = retry_after_s(error.response.headers)
    asks = f" (it asks to wait for {wait_s:,.0f} s)" if wait_s else ""
    if isinstance(error, openai.AuthenticationError):
        return f"the server does not accept OPENAI_API_KEY: {said}"
    return f"the server refuses: status {error.status_code}{asks}: {said}"


def foreign(answer: object) -> str:
    """For a web page, or whatever else came in place of an answer."""
    return (
        "the server answers, but not as OpenAI's API does: does OPENAI_BASE_URL end in /v1? It "
        f"gave {answer!r:.{SHOWN_LETTERS}}"
    )


if __name__ == "__main__":
    cli.run(main, Config)
