"""A real browser on the scripted server: one browser for all tests, a fresh profile for each.

No test looks at the clock, so that all pass on a machine that is busy with other things. They wait
for what must happen; the server holds its replies until they go on; what the page does only after
seconds waits for `Chat.let_pass`. That nothing happens is seen after `Chat.settle`.

The browser is `$JAXCHAT_CHROMIUM`, or chromium as found on PATH.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.page.app_thread import DEADLINE_S
from tests.page.scripted_server import ScriptedServer

CHROMIUM = "JAXCHAT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

expect.set_options(timeout=1000 * DEADLINE_S)

LONG_TIMERS = """
(() => {
  const { setTimeout } = window;
  const now = performance.now.bind(performance);
  let [waiting, skipped] = [[], 0];
  performance.now = () => now() + skipped;
  const wait = (ms, run) => waiting.push({ ms, run });
  window.setTimeout = (run, ms = 0, ...values) =>
    ms < 2000 ? setTimeout(run, ms, ...values) : void wait(ms, () => run(...values));
  AbortSignal.timeout = (ms) => {
    const controller = new AbortController();
    wait(ms, () => controller.abort(new DOMException("as scripted", "TimeoutError")));
    return controller.signal;
  };
  window.letPass = (passed) => {
    skipped += passed;
    const due = waiting.filter(({ ms }) => ms <= passed);
    waiting = waiting.filter(({ ms }) => ms > passed);
    for (const { run } of due) run();
  };
})();
"""
"""Timers of two seconds and more end when the test says so: notices go away, the patience with a
server is over, one that starts is asked again. None may do so while a test still looks."""

OPENED = "() => import(document.querySelector('script[type=module]').src)"
"""The page's module has run to its end: the conversation is open, the models were asked for."""

SETTLED = """
async () => {
  const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
  await frame();
  for (const moving of document.getAnimations()) {
    const { endTime } = moving.effect.getComputedTiming();
    if (endTime < Infinity) moving.finish();  // the cursor blinks on
  }
  await frame();
  await (await fetch("health")).text();
}
"""


def find_chromium() -> str | None:
    """The browser that the tests drive."""
    return os.environ.get(CHROMIUM) or next(filter(None, map(shutil.which, NAMES)), None)


def pytest_collection_modifyitems(items):
    """A page takes a second or two to open: `make test` leaves these to `make page`."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="package")  # until then playwright's event loop runs in this thread
def browser():
    path = find_chromium()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH and ${CHROMIUM} is not set")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def running_server():
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.reset()
    yield running_server
    running_server.wait_until_idle()


def new_context(browser: Browser, **options) -> BrowserContext:
    """A profile in which a test has all the time that it takes."""
    context = browser.new_context(**options)
    context.set_default_timeout(1000 * DEADLINE_S)
    context.add_init_script(LONG_TIMERS)
    return context


@pytest.fixture
def context(browser, server):
    context = new_context(
        browser,
        base_url=server.url,
        viewport={"width": 1200, "height": 800},
        accept_downloads=True,
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def chat(context, server):
    """The page, opened; at the end nothing may have failed, run or left the origin."""
    chat = Chat.open(context, server)
    yield chat
    assert chat.problems == []
    assert [url for url in chat.requested if not url.startswith((server.url, "blob:"))] == []


@dataclass
class Chat:
    """The page as a reader uses it."""

    page: Page
    server: ScriptedServer
    problems: list[str]
    requested: list[str]

    @staticmethod
    def open(context: BrowserContext, server: ScriptedServer, *, path: str = "/") -> "Chat":
        page = context.new_page()
        chat = Chat(page, server, [], [])
        page.on("pageerror", lambda error: chat.problems.append(f"exception: {error}"))
        page.on("console", chat._console)
        page.on("dialog", lambda dialog: (chat.problems.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: chat.requested.append(request.url))
        chat.go_to(path)
        return chat

    def go_to(self, path: str) -> None:
        self.page.goto(path)
        self._run(OPENED)

    def reload(self) -> None:
        self.page.reload()
        self._run(OPENED)

    def _run(self, script: str) -> None:
        """Until an asynchronous function of JavaScript has ended: `evaluate` has no deadline."""
        ended = f"({script})().then(() => (window.ended = true))"
        self.page.evaluate(f"() => {{ window.ended = false; {ended}; }}")
        self.wait_for("window.ended")

    def _console(self, message) -> None:
        # the browser itself reports every failed request; the tests look at what the page says
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    @property
    def box(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message", exact=True)

    @property
    def messages(self) -> Locator:
        return self.page.locator(".message")

    @property
    def answers(self) -> Locator:
        return self.page.locator(".message.assistant")

    def button(self, name: str, **options) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True, **options)

    def say(self, text: str, *, wait: bool = True) -> None:
        """Send a message; by default wait until the answer is complete."""
        self.box.fill(text)
        self.box.press("Enter")
        if wait:
            expect(self.box).to_have_value("")  # it is sent once the models are known
            self.wait_until_finished()

    def wait_until_finished(self) -> None:
        expect(self.page.locator(".message.streaming")).to_have_count(0)
        expect(self.button("Send")).to_be_visible()

    def texts(self) -> list[str]:
        """What the messages say, without what stands around them."""
        return [text.strip() for text in self.page.locator(".message .body").all_inner_texts()]

    def answer_text(self) -> str:
        """The last answer as it was written, Markdown and all: what its copy button copies."""
        self.answers.last.hover()
        self.answers.last.get_by_role("button", name="Copy", exact=True).click()
        expect(self.answers.last.locator(".actions .done")).to_have_count(1)  # it is copied now
        return self.page.evaluate("navigator.clipboard.readText()")

    @property
    def address(self) -> str:
        """As the page itself has it: `page.url` is told of changes a little later."""
        return self.page.evaluate("location.href")

    def settle(self) -> None:
        """Until what was begun has come to pass: frames, requests on their way; transitions end."""
        self._run(SETTLED)

    def let_pass(self, seconds: float) -> None:
        """Let the page's long timers end, as far as they are not longer than this."""
        self.page.evaluate("seconds => letPass(1000 * seconds)", seconds)

    def after_timers(self, ms: int) -> None:
        """Until the page's timers of less than so many ms have ended, as they do in turn."""
        self._run(f"() => new Promise((resolve) => setTimeout(resolve, {ms}))")

    def wait_for(self, expression: str) -> None:
        """Until a JavaScript expression is true; asked from here, where no policy forbids it."""
        self.wait_until(lambda: self.page.evaluate(expression), expression)

    def wait_until(self, condition: Callable[[], object], name: str) -> None:
        """Until it holds, while the page goes on."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {name}"
            self.page.wait_for_timeout(20)

    def conversation_titles(self) -> list[str]:
        return self.page.locator("#conversations .conversation").all_inner_texts()

    def save_screenshot(self, name: str) -> None:
        """Into `$JAXCHAT_SCREENSHOTS`, where that is set."""
        folder = os.environ.get("JAXCHAT_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png")
