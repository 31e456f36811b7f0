"""Talk to a model in the terminal.

    python -m scripts.chat_cli                           # the finetuned model, turn by turn
    python -m scripts.chat_cli -i base -p "Returns the"  # a base model continues the text, once

Replies stream as they are written. Ctrl-C stops a reply and keeps the conversation, Ctrl-D leaves;
/help lists what else can be said. The conversation so far is not read again at every turn: the
engine continues from what its cache holds.
"""

import contextlib
import re
import signal
from dataclasses import dataclass, replace
from types import FrameType
from typing import Annotated, Any

from jaxchat import cli
from jaxchat.backend import DEFAULT_BACKEND, BackendName
from jaxchat.conversation import check_conversation, render_for_completion
from jaxchat.engine import Engine
from jaxchat.request import LEAD, Completion, Request
from jaxchat.sampling_params import (
    CHAT_TEMPERATURE,
    CHAT_TOP_K,
    TEXT_TEMPERATURE,
    SamplingParams,
)
from jaxchat.stages import StageName, load_model
from jaxchat.tokenizer import Tokenizer

with contextlib.suppress(ImportError):  # not on Windows; importing it gives `input` line editing
    import readline  # noqa: F401

HELP = """\
/temperature 0.6   how freely to choose: 0 always takes the most likely token
/topk 50           how many tokens to choose from: 0 for all
/seed 1            another number, other replies
/clear             forget the conversation
/help              this list
/quit              leave
Ctrl-C stops a reply, Ctrl-D leaves."""

COMMANDS = re.findall("^/[a-z]+", HELP, re.MULTILINE)


@dataclass(frozen=True)
class Config:
    """Which model, and how it chooses its words."""

    prompt: Annotated[str | None, cli.arg(aliases=["-p"])] = None
    """Answer this once and exit; talk turn by turn when not set."""
    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "sft"
    """Stage of the model. A base model continues text, the others converse."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Model of that stage, such as d12; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Checkpoint of that model; the newest when not set."""
    temperature: Annotated[float | None, cli.arg(aliases=["-t"])] = None
    """How freely to choose; 0 takes the likeliest token. 0.6 when not set, 0.8 for a base model."""
    top_k: Annotated[int, cli.arg(aliases=["-k"])] = CHAT_TOP_K
    """How many tokens to choose from: 0 for all."""
    max_tokens: int = SamplingParams.max_tokens
    """Longest reply, in tokens."""
    seed: int = 0
    """The same seed, model and words give the same reply."""
    backend: BackendName = DEFAULT_BACKEND
    """Framework that runs the model."""

    def __post_init__(self) -> None:
        self.sampling()

    def sampling(self) -> SamplingParams:
        """ValueError, naming it, for a value out of range."""
        default = TEXT_TEMPERATURE if self.source == "base" else CHAT_TEMPERATURE
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=default if self.temperature is None else self.temperature,
            top_k=self.top_k,
            seed=self.seed,
        )


def main(config: Config) -> None:
    """Load the model, then answer once or converse."""
    model = load_model(
        config.source, backend=config.backend, model_tag=config.model_tag, step=config.step
    )
    session = Session(
        Engine(model.backend, model.tokenizer, slots=1),
        config.sampling(),
        chat=config.source != "base",
    )
    with session.ctrl_c:
        if config.prompt is not None:
            session.say(config.prompt)
            return
        step = model.meta["step"]
        print(f"{config.source} model {model.tag}, step {step}. /help lists commands.", flush=True)
        converse(session)


def converse(session: "Session") -> None:
    """Read lines and answer them until the input ends."""
    while True:
        try:
            line = session.ctrl_c.read("\n> ")
        except EOFError:
            print()
            return
        try:
            if line is None:
                print("\n(Ctrl-D leaves)", end="")
            elif line == "/quit":
                return
            elif is_command(line):
                print(session.command(line))
            elif line:
                session.say(line)
        except ValueError as error:
            print(f"error: {error}")


def is_command(line: str) -> bool:
    """Whether a line is meant for this program: it begins with a command, or is a word like one."""
    return line.split(" ")[0] in COMMANDS or re.fullmatch("/[a-z]+", line) is not None


class CtrlC:
    """What Ctrl-C does in a conversation: it ends the reading of a line, or else it is noted.

    So it never raises in the middle of a step of the engine, nor where another was just handled.
    """

    def __init__(self) -> None:
        self.pressed = False
        """Since the last line was asked for."""
        self._reading = False

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._press)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def read(self, prompt: str) -> str | None:
        """A line, or None where Ctrl-C ended it."""
        self.pressed = False
        try:
            try:  # two: an interrupt may come as late as in `finally`
                self._reading = True
                return input(prompt).strip()
            finally:
                self._reading = False
        except (KeyboardInterrupt, SystemError):  # the latter is CPython's, of two at once
            return None

    def _press(self, _signal: int, _frame: FrameType | None) -> None:
        if self._reading:
            self._reading = False
            raise KeyboardInterrupt
        self.pressed = True


class Session:
    """A conversation (or, with a base model, one text after another) on one engine."""

    def __init__(self, engine: Engine, params: SamplingParams, *, chat: bool) -> None:
        self.engine, self.params, self.chat = engine, params, chat
        self.messages: list[dict[str, Any]] = []
        self.ctrl_c = CtrlC()

    def say(self, text: str) -> None:
        """Print the reply to `text` as it comes and remember both."""
        if not self.chat:
            print(text, end="", flush=True)
            self._stream([self._tokenizer.bos_id, *self._tokenizer.encode(text)])
            return
        messages = [*self.messages, {"role": "user", "content": text}]
        messages, ids = self._fit(messages)
        self.messages = remember(messages, self._stream(ids))

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; returns what to print."""
        name, _, value = line.partition(" ")
        match name:
            case "/temperature":
                self.params = replace(self.params, temperature=_number(float, name, value))
                return f"temperature {self.params.temperature}"
            case "/topk":
                self.params = replace(self.params, top_k=_number(int, name, value))
                return f"top-k {self.params.top_k}"
            case "/seed":
                self.params = replace(self.params, seed=_number(int, name, value))
                return f"seed {self.params.seed}"
            case "/clear":
                self.messages = []
                return "The conversation is forgotten."
            case "/help":
                return HELP
        return f"There is no {name}.\n{HELP}"

    @property
    def _tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def _fit(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """The latest turns that leave room for a reply, and their ids."""
        room = self.engine.max_length - min(self.params.max_tokens, self.engine.max_length // 4)
        ids = render_for_completion(self._tokenizer, {"messages": messages})
        while len(ids) > room and len(messages) > 2:
            messages = messages[2:]
            ids = render_for_completion(self._tokenizer, {"messages": messages})
        return messages, ids

    def _stream(self, ids: list[int]) -> Completion:
        """Print a reply as it comes; Ctrl-C ends it between two dispatches."""
        reply, part = Completion(0, 0), "text"
        stream = self.engine.generate(Request(ids, self.params, tools=self.chat))
        for event in stream:
            if event.text and event.part != part:
                print(LEAD[event.part], end="")
                part = event.part
            print(cli.printable(event.text), end="", flush=True)
            reply.add(event)
            if self.ctrl_c.pressed:
                print(" (stopped)", end="")
                break
        stream.close()
        print(flush=True)
        return reply


def remember(messages: list[dict[str, Any]], reply: Completion) -> list[dict[str, Any]]:
    """The conversation with a reply: with its tool calls, or where they are malformed its text.

    A reply without any text is forgotten along with its question: it cannot be rendered.
    """
    for content in (reply.parts, reply.text):
        whole = [*messages, {"role": "assistant", "content": content}]
        with contextlib.suppress(ValueError):
            check_conversation({"messages": whole})
            return whole
    return messages[:-1]


def _number(kind: type, name: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        example = f"{name} {kind(1)}"
        raise ValueError(f"{name} wants a number, as in {example}; got {value!r}") from None


if __name__ == "__main__":
    cli.run(main, Config)
