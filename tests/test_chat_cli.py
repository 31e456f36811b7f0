"""The terminal chat: what is printed, what is remembered, what Ctrl-C and mistakes do."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxchat.config import GPTConfig
from jaxchat.conversation import render_for_completion
from jaxchat.engine import Engine
from jaxchat.sampling_params import SamplingParams
from scripts import chat_cli
from tests.scripted import ScriptedBackend
from tests.test_engine import script, special, tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=100)


def session(*replies, chat=True, sequence_len=512, on_token=lambda held: None):
    """A session whose model gives these replies, one per turn."""
    texts = [list(reply) for reply in replies]

    def next_token(held):
        on_token(held)
        start = special("assistant_start")
        turns = held.count(start) if chat else 1
        begun = len(held) - (max(i for i, id in enumerate(held) if id == start) + 1 if chat else 3)
        reply = texts[(turns - 1) % len(texts)]
        return reply[begun] if begun < len(reply) else special("assistant_end")

    config = GPTConfig(sequence_len=sequence_len, vocab_size=tokenizer().vocab_size)
    engine = Engine(ScriptedBackend(config, next_token), tokenizer(), slots=1)
    return chat_cli.Session(engine, GREEDY, chat=chat)


def typed(monkeypatch, *lines):
    """Type these lines; an exception is raised instead of a line; then Ctrl-D."""
    waiting = iter([*lines, EOFError()])

    def read(_prompt):
        line = next(waiting)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)


def test_a_base_model_continues_the_text_that_it_echoes(capsys):
    base = session(script(" lazy dog"), chat=False)
    base.say("The")
    assert capsys.readouterr().out.startswith("The")
    assert base.messages == []


def test_turns_are_remembered_and_only_the_new_words_are_read(monkeypatch, capsys):
    typed(monkeypatch, "hello", "", "and now?")
    chat = session(script("I am here"), script("still here"))
    chat_cli.converse(chat)
    assert "I am here" in capsys.readouterr().out
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    starts = [start for _, start, _ in chat.engine.backend.prefills]
    first = render_for_completion(tokenizer(), {"messages": chat.messages[:1]})
    assert starts == [0, len(first) + len(script("I am here"))]


def test_a_reply_shows_text_and_drives_no_terminal(capsys):
    """It could write to the clipboard, set the title or hide what stands above it."""
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    chat = session(script(f"\x1b]52;c;ZXZpbA==\x07\x9b2J\rone\ttwo\n{family} e\u0301"))
    chat.say("hello")
    shown = f"\ufffd]52;c;ZXZpbA==\ufffd\ufffd2J\ufffdone\ttwo\n{family} e\u0301"
    assert shown in capsys.readouterr().out
    assert "\x1b" in chat.messages[-1]["content"][0]["text"]


def test_a_tool_call_and_its_output_are_shown_and_remembered(capsys):
    call = script("<python_start>", "6*7", "<python_end>")
    output = script("<output_start>", "42", "<output_end>")
    chat = session([*call, *output, *script("It is 42.")])
    chat.say("6 times 7?")
    assert ">>> 6*7\n42\nIt is 42." in capsys.readouterr().out
    kinds = [part["type"] for part in chat.messages[-1]["content"]]
    assert kinds == ["python", "python_output", "text"]


def test_ctrl_c_stops_the_reply_and_keeps_the_conversation(monkeypatch, capsys):
    def press_once(held):
        if len(held) == 40:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    typed(monkeypatch, "talk", KeyboardInterrupt(), "/clear")
    chat = session([65] * 90, on_token=press_once)
    with chat.ctrl_c:
        chat.say("talk")
    assert "(stopped)" in capsys.readouterr().out
    (part,) = chat.messages[-1]["content"]
    assert 0 < len(part["text"]) < 90
    assert not chat.engine.busy
    with chat.ctrl_c:
        chat_cli.converse(chat)
    assert signal.getsignal(signal.SIGINT) is before
    assert chat.messages == []
    assert "Ctrl-D leaves" in capsys.readouterr().out


IN_A_TERMINAL = """
import fcntl, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from scripts import chat_cli
from tests.test_chat_cli import session

chat = session([65] * 90, on_token=lambda held: time.sleep(0.03))
with chat.ctrl_c:
    chat_cli.converse(chat)
print(len(chat.messages), "messages")
"""


def test_no_burst_of_ctrl_c_ends_the_conversation():
    """A second one could hit the handling of the first, or the moment between reply and prompt."""
    terminal, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL],
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    os.close(theirs)
    try:
        read_until(terminal, "> ")
        for _ in range(3):
            os.write(terminal, b"talk\n")
            read_until(terminal, "A")
            for _ in range(400):  # the last ones come after the reply
                os.write(terminal, b"\x03")
                time.sleep(0.002)
            read_until(terminal, None)
        os.write(terminal, b"\x04")
        assert "6 messages" in read_until(terminal, "messages")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        os.close(terminal)


def read_until(terminal, text):
    """What the terminal shows up to this text; None waits for silence."""
    shown = ""
    while text is None or text not in shown:
        if not select.select([terminal], [], [], 0.5 if text is None else 60)[0]:
            assert text is None, shown
            break
        try:
            shown += os.read(terminal, 65536).decode()
        except OSError:  # its program has ended
            raise AssertionError(shown) from None
    return shown


def test_commands_change_the_next_reply_and_mistakes_are_explained(monkeypatch, capsys):
    mistakes = "/topk many", "/topk 99999999999", "/temperature -1", "/nothing"
    typed(monkeypatch, "/temperature 1.5", "/topk 7", "/seed 3", *mistakes)
    chat = session(script("ok"))
    chat_cli.converse(chat)
    assert (chat.params.temperature, chat.params.top_k, chat.params.seed) == (1.5, 7, 3)
    out = capsys.readouterr().out
    assert "error: /topk wants a number, as in /topk 1; got 'many'" in out
    assert "out of range: top_k=99999999999" in out
    assert "temperature=-1.0" in out
    assert "There is no /nothing." in out


def test_two_interrupts_at_once_are_one(monkeypatch, capsys):
    """The second finds the first one's exception on its way, and CPython makes a SystemError."""
    typed(monkeypatch, SystemError("_press returned a result with an exception set"), "/quit")
    chat_cli.converse(session(script("ok")))
    assert "Ctrl-D leaves" in capsys.readouterr().out


def test_who_quits_is_asked_nothing_more(monkeypatch, capsys):
    typed(monkeypatch, "/quit", AssertionError("asked"))
    chat_cli.converse(session(script("ok")))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        *(("/help", True), ("/topk", True), ("/topk 50", True), ("/temperature hot today", True)),
        *(("/nothing", True), ("/etc holds what?", False), ("/etc/hosts", False), ("/", False)),
    ],
)
def test_a_slash_alone_makes_no_command(line, expected):
    assert chat_cli.is_command(line) == expected


def test_old_turns_are_dropped_where_the_context_ends(capsys):
    chat = session(script("a reply"), sequence_len=64)
    for _ in range(6):
        chat.say("some words")
    assert 2 < len(chat.messages) < 12
    assert len(render_for_completion(tokenizer(), {"messages": chat.messages[:-1]})) <= 48


@pytest.mark.parametrize(
    "reply", [script("<output_start>", "7", "<output_end>"), script("<python_start>"), []]
)
def test_a_reply_that_cannot_be_rendered_does_not_end_the_conversation(reply, capsys):
    chat = session(reply, script("fine"))
    chat.say("one")
    chat.say("two")
    assert chat.messages == [] or chat.messages[-1]["role"] == "assistant"


def test_values_out_of_range_are_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match=r"temperature=-1"):
        chat_cli.Config(temperature=-1)
