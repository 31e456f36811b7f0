"""A real browser on the scripted server: one browser for all tests, a fresh profile for each.

The browser is `$JAXCHAT_CHROMIUM`, or chromium as found on PATH.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect, sync_playwright

from tests.page.scripted_server import ScriptedServer

CHROMIUM = "JAXCHAT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

expect.set_options(timeout=10_000)


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


@pytest.fixture
def context(browser, server):
    context = browser.new_context(
        base_url=server.url, viewport={"width": 1200, "height": 800}, accept_downloads=True
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
        page.goto(path)
        # not wait_for_function: it polls with eval(), which the page's policy may forbid
        page.wait_for_selector("#thread > *", state="attached")
        return chat

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
        self.page.wait_for_selector(".done")
        return self.page.evaluate("navigator.clipboard.readText()")

    def wait_for(self, expression: str) -> None:
        """Until a JavaScript expression is true; asked from here, where no policy forbids it."""
        deadline = time.monotonic() + 10
        while not self.page.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} did not become true"
            self.page.wait_for_timeout(20)

    def conversation_titles(self) -> list[str]:
        return self.page.locator("#conversations .conversation").all_inner_texts()

    def save_screenshot(self, name: str) -> None:
        """Into `$JAXCHAT_SCREENSHOTS`, where that is set."""
        folder = os.environ.get("JAXCHAT_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=Path(folder) / f"{name}.png")
