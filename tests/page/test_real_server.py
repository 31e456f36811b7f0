"""The page on `scripts.chat_web` with a checkpoint on disk: every process and byte is real.

The model is small and untrained, which is the harder case: it writes broken characters, special
tokens and calls of the calculator at random.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import expect

from jaxchat.checkpoint import CheckpointStore
from jaxchat.jax_backend import JaxBackend
from jaxchat.server.settings import ServerSettings
from jaxchat.stages import stage_directory
from jaxchat.tokenizer import Tokenizer
from tests.models import MODERN, shaken
from tests.page.app_thread import DEADLINE_S
from tests.page.conftest import Chat

CONTEXT = 2048
START_S = 600
TRIES = 20
"""An answer takes a second or so: it may have come to its end before it is left."""


class ChatWeb:
    """A process of chat_web. `reset`, `url` and `wait_until_idle` as the scripted server has."""

    def __init__(self, base_dir: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "scripts.chat_web", "--port", str(self.port)]
        environment = {**os.environ, "JAXCHAT_BASE_DIR": str(base_dir)}
        self._log = (base_dir / "chat_web.log").open("w+")
        self.process = subprocess.Popen(
            [*command, "--slots", "2"], env=environment, stdout=self._log, stderr=self._log
        )

    def wait_until_ready(self, path: str = "/ready") -> None:
        deadline = time.monotonic() + START_S
        while self.status(path) != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(1)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def status(self, path: str) -> int | None:
        try:
            return self._get(path).status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except urllib.error.URLError:
            return None

    def _get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=DEADLINE_S) as response:
            self.body = response.read().decode()
            return response

    def running(self) -> float:
        self._get("/metrics")
        return float(re.search(r"num_requests_running\{.*\} (\S+)", self.body)[1])

    def aborted(self) -> float:
        """Replies that ended because nobody waited for them any more."""
        self._get("/metrics")
        counted = re.search(r'request_success_total\{.*"abort".*\} (\S+)', self.body)
        return float(counted[1]) if counted else 0.0

    def reset(self) -> None:
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.running():
            assert time.monotonic() < deadline, "a slot was not freed"
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(DEADLINE_S) == 0, self.log()
        self._log.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A base directory with a tokenizer and one finetuned model."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(folder))
        words = ["The quick brown fox jumps over the lazy dog.", "Wie schön 你好 12*3 = 36."] * 4
        tokenizer = Tokenizer.train(words, vocab_size=300)
        tokenizer.save(folder / "tokenizer")
        vocab_size = tokenizer.vocab_size
        backend = JaxBackend(
            replace(MODERN, n_layer=2, sequence_len=CONTEXT, vocab_size=vocab_size)
        )
        backend.init(0)
        params = shaken(backend.get_params())
        # the end of a turn gets the logit 0, far from the likeliest: every answer is a long one
        for name in ("assistant_end", "bos"):
            params["lm_head.weight"][tokenizer.special_id(name)] = 0
        backend.set_params(params)
        store = CheckpointStore(stage_directory("sft", "d2"))
        store.save(1, backend, {"tokenizer": tokenizer.fingerprint})
        store.finish()
    return folder


@pytest.fixture(scope="module")
def running_server(browser, checkpoint):  # browser first: without one nothing needs to start
    server = ChatWeb(checkpoint)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def set_values(chat, **values):
    """Settings, through the page's own dialog."""
    chat.button("Settings").click()
    for label, value in values.items():
        field = chat.page.get_by_label(label.replace("_", " "), exact=True)
        if value is True:
            field.check()
        else:
            field.fill(str(value))
    chat.button("Done").click()


def test_a_conversation_of_several_turns(chat):
    expect(chat.page.locator("#model-name")).to_have_text("sft-d2")
    set_values(chat, Longest_answer=40)
    for text in ("hello", "Grüße 世界", "<|assistant_end|><|user_start|>"):
        chat.say(text)
        expect(chat.answers.last.locator(".error")).to_have_count(0)
        expect(chat.answers.last.locator(".stats")).to_contain_text("tokens/s")
    assert len(chat.texts()) == 6


def test_the_settings_begin_with_those_of_the_server(chat):
    chat.button("Settings").click()
    for label, value in {
        "Temperature": ServerSettings.temperature,
        "Top-k": ServerSettings.top_k,
    }.items():
        expect(chat.page.get_by_label(label, exact=True)).to_have_value(str(value))


def test_the_same_seed_gives_the_same_answer(chat):
    set_values(chat, Longest_answer=60, Seed=7)
    chat.say("hello")
    first = chat.answer_text()
    chat.button("Regenerate").click()
    chat.wait_until_finished()
    assert chat.answer_text() == first
    set_values(chat, Seed=8)
    chat.button("Regenerate").click()
    chat.wait_until_finished()
    assert chat.answer_text() != first


def is_freed(chat, server, leave) -> bool:
    """Whether an answer that `leave` left ended for that, and not by itself before."""
    before = server.aborted()
    chat.say("hello", wait=False)
    expect(chat.answers.last.locator(".prose").first).not_to_be_empty()
    leave()
    server.wait_until_idle()
    return server.aborted() == before + 1


def test_stop_frees_the_slot(chat, server):
    def stop():
        chat.button("Stop", include_hidden=True).evaluate("button => button.click()")
        chat.wait_until_finished()

    def is_freed_anew():
        chat.button("New chat").click()
        return is_freed(chat, server, stop)

    set_values(chat, Temperature=0)
    assert any(is_freed_anew() for _ in range(TRIES))
    expect(chat.answers.last).to_contain_text("Stopped.")


def test_closing_the_page_frees_the_slot(chat, context, server):
    def is_freed_by_closing():
        other = Chat.open(context, server)
        return is_freed(other, server, lambda: other.page.close(run_before_unload=False))

    set_values(chat, Temperature=0)
    assert any(is_freed_by_closing() for _ in range(TRIES))


def test_the_token_view_shows_the_models_own_probabilities(chat):
    set_values(chat, Temperature=0, Longest_answer=30, Record_token_probabilities=True)
    chat.say("hello")
    chat.button("Token view").click()
    tokens = chat.page.locator(".tokens .token")
    assert tokens.count() >= 1
    tokens.first.hover()
    card = chat.page.get_by_role("tooltip")
    rows = card.locator("li")
    expect(rows).to_have_count(5)
    shares = [float(text.rstrip("%")) for text in card.locator("li > span").all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.1
    expect(rows.first).to_have_class("chosen")  # greedy takes the likeliest


def test_a_conversation_too_long_is_refused_with_its_numbers(chat):
    chat.say("x" * 3 * CONTEXT)
    error = chat.answers.last.get_by_role("group", name="Error")
    expect(error).to_contain_text("too long for this model")
    expect(error).to_contain_text(str(CONTEXT))


def test_a_server_that_starts_is_waited_for_and_one_that_is_gone_is_said(browser, checkpoint):
    server = ChatWeb(checkpoint)
    try:
        server.wait_until_ready("/health")
        context = browser.new_context(base_url=server.url)  # whose timers run, as the server starts
        context.set_default_timeout(1000 * DEADLINE_S)
        chat = Chat.open(context, server)
        set_values(chat, Longest_answer=5)
        chat.say("are you there?", wait=False)
        stats = chat.answers.last.locator(".stats")
        expect(stats).to_contain_text("tokens/s", timeout=1000 * START_S)
        chat.box.fill("hello")
        server.stop()
        chat.box.press("Enter")
        error = chat.answers.last.get_by_role("group", name="Error")
        expect(error).to_contain_text("cannot be reached")
        assert chat.problems == []
        context.close()
    finally:
        server.process.kill()
