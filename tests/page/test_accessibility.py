"""axe-core finds nothing to complain of; the keyboard and a screen reader get everywhere."""

import json

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.page.conftest import Chat, new_context
from tests.page.scripted_server import Reply, fails, holds, says

RICH = """# Title

Some **bold**, *italic*, `code`, a [link](https://x.example), and:

1. one
2. two

> quoted

```python
def f(x):  # a comment
    return "text" + str(0x1F) if x else None
```

| a | b |
|---|--:|
| 1 | 2 |
"""


@pytest.fixture(params=["light", "dark"])
def theme(request, chat):
    chat.page.emulate_media(color_scheme=request.param, reduced_motion="reduce")
    return request.param


@pytest.fixture
def violations(chat):
    """A function that lists what axe finds on the page as it is."""

    def find() -> list[str]:
        results = Axe().run(chat.page, options={"resultTypes": ["violations"]}).response
        return [
            f"{rule['id']}: {node['target']} {node['failureSummary']}"
            for rule in results["violations"]
            for node in rule["nodes"]
        ]

    return find


def test_axe_on_an_empty_page(chat, theme, violations):
    assert violations() == []


def test_axe_on_a_conversation_with_everything_in_it(chat, server, theme, violations):
    chat.page.evaluate("localStorage.setItem('jaxchat.settings', '{\"tokenView\": true}')")
    chat.reload()
    parts = [("text", RICH), ("python", "2*3"), ("python_output", "6"), ("text", " yes")]
    tokens = [(text, -0.7 * index, [(text, -0.7)]) for index, (_, text) in enumerate(parts)]
    server.play(Reply(parts, tokens=tokens), says("another"), fails(429, "busy"))
    chat.say("hello")
    chat.button("Regenerate").click()
    chat.wait_until_finished()
    chat.say("more")
    chat.button("Previous alternative").click()
    expect(chat.page.locator(".code")).to_be_visible()
    assert violations() == []
    chat.button("Next alternative").click()
    assert violations() == []  # the error
    chat.button("Previous alternative").click()
    chat.button("Token view").click()
    chat.page.locator(".tokens .token").nth(1).focus()
    assert violations() == []
    chat.messages.first.hover()
    chat.messages.first.get_by_role("button", name="Edit").click()
    assert violations() == []


def test_axe_during_a_stream(chat, server, theme, violations):
    server.play(holds(RICH, "word ", "word "))
    chat.say("hello", wait=False)
    expect(chat.answers.last).to_contain_text("word word")
    assert violations() == []
    chat.page.keyboard.press("Escape")
    chat.wait_until_finished()


def test_axe_where_the_memory_begins_and_while_the_server_starts(chat, server, theme, violations):
    chat.say("one")
    server.play(
        fails(400, "too long", code="context_length_exceeded"),
        says("fine"),
        *[fails(503, "starting", code="starting", Retry_After="9")] * 9,
    )
    chat.say("two")
    assert violations() == []
    chat.button("Retry without the first turn").click()
    chat.wait_until_finished()
    expect(chat.page.locator(".memory-start")).to_be_visible()
    chat.say("three", wait=False)
    expect(chat.answers.last).to_contain_text("being loaded")
    assert violations() == []
    chat.save_screenshot(f"memory-{theme}")
    chat.page.set_viewport_size({"width": 320, "height": 640})
    assert violations() == []
    assert chat.page.evaluate("scroller.scrollWidth - scroller.clientWidth") <= 0
    chat.save_screenshot(f"memory-{theme}-320")
    chat.button("Stop").click()
    chat.wait_until_finished()


def test_axe_on_settings_menus_notices_and_columns(chat, server, theme, violations):
    server.models = ["base", "mid", "sft", "rl"]
    chat.reload()
    chat.page.locator("#models summary").click()
    chat.page.get_by_role("switch", name="Several, side by side").check()
    chat.page.get_by_role("checkbox", name="mid").check()
    assert violations() == []
    chat.page.keyboard.press("Escape")
    chat.say("hello")
    chat.page.locator("#export-menu summary").click()
    assert violations() == []
    chat.page.keyboard.press("Escape")
    chat.box.fill("/help")
    chat.box.press("Enter")
    assert violations() == []
    chat.page.locator("#conversations li").first.hover()
    chat.page.locator("#conversations button").first.click()
    assert violations() == []
    chat.page.keyboard.press("Escape")
    chat.button("Settings").click()
    chat.page.get_by_label("Top-k").fill("-1")
    assert violations() == []


def test_axe_on_a_phone_with_the_list_open(chat, theme, violations):
    chat.page.set_viewport_size({"width": 320, "height": 640})
    chat.say("hello")
    assert violations() == []
    chat.settle()
    chat.button("Conversations").click()
    chat.settle()
    assert violations() == []


def test_each_answer_is_announced_once_and_when_it_is_complete(chat, server):
    chat.page.evaluate(
        """() => {
          window.heard = [];
          new MutationObserver(() => {
            const text = announcer.textContent;
            if (text) heard.push(text);
          }).observe(announcer, { childList: true });
        }"""
    )
    server.play(says(*["word "] * 20, hold_after=10), fails(500, "x"))
    chat.say("hello", wait=False)
    expect(chat.answers.last).to_contain_text("word " * 10)
    chat.settle()
    assert chat.page.evaluate("heard") == []
    server.go_on()
    chat.wait_for("heard.length")
    chat.say("again")
    chat.wait_for("heard.length > 1")
    chat.settle()
    heard = chat.page.evaluate("heard")
    assert heard == ["Answer: " + "word " * 20, "No answer. The server failed."]
    live = chat.page.locator("#thread [aria-live], #thread [role=status], #thread [role=log]")
    expect(live).to_have_count(0)  # nothing reads out every token


def test_everything_can_be_reached_with_the_tab_key(chat):
    chat.say("hello")
    chat.box.focus()
    names = []
    for _ in range(40):
        chat.page.keyboard.press("Tab")
        names.append(
            chat.page.evaluate(
                "document.activeElement.ariaLabel || document.activeElement.textContent.trim()"
            )
        )
    for name in ("New chat", "hello", "Rename hello", "Delete hello", "Settings", "Import",
                 "Copy", "Edit", "Regenerate", "Delete", "Export this conversation"):  # fmt: skip
        assert name in names, json.dumps(names)


def test_the_focus_returns_from_settings_menus_and_the_drawer(chat):
    chat.button("Settings").focus()
    chat.page.keyboard.press("Enter")
    chat.page.keyboard.press("Escape")
    expect(chat.button("Settings")).to_be_focused()
    chat.say("hello")
    summary = chat.page.locator("#export-menu summary")
    summary.focus()
    chat.page.keyboard.press("Enter")
    chat.button("Markdown, as shown").focus()
    chat.page.keyboard.press("Escape")
    expect(summary).to_be_focused()
    chat.page.set_viewport_size({"width": 400, "height": 700})
    chat.settle()  # the list is out of sight
    chat.button("Conversations").click()
    expect(chat.button("Close the list")).to_be_focused()
    chat.page.keyboard.press("Escape")
    expect(chat.button("Conversations")).to_be_focused()


def test_no_field_is_so_small_that_a_phone_enlarges_the_page(browser, server):
    """iOS does so, and leaves it so, where the letters have less than 16 pixels."""
    viewport = {"width": 390, "height": 800}
    context = new_context(
        browser, base_url=server.url, viewport=viewport, has_touch=True, is_mobile=True
    )
    chat = Chat.open(context, server)
    chat.say("hello")
    chat.button("Conversations").tap()
    chat.button("Rename hello").evaluate("button => button.click()")
    no_text = "[type=checkbox], [type=radio], [type=range], [hidden]"
    fields = chat.page.locator(f"textarea, select, input:not({no_text})")
    sizes = fields.evaluate_all("all => all.map((e) => parseFloat(getComputedStyle(e).fontSize))")
    assert len(sizes) >= 8 and min(sizes) >= 16
    context.close()


def test_what_is_written_from_right_to_left_begins_at_the_right(chat, server):
    direction = "element => getComputedStyle(element).direction"
    chat.box.fill("שלום")
    assert chat.box.evaluate(direction) == "rtl"
    chat.say("שלום")
    assert chat.page.locator(".bubble").evaluate(direction) == "rtl"
    chat.box.press("ArrowUp")
    assert chat.page.get_by_label("Edit your message").evaluate(direction) == "rtl"


def test_reduced_motion_is_honoured(chat, server):
    server.play(holds("word "))
    chat.page.emulate_media(reduced_motion="reduce")
    chat.say("hello", wait=False)
    expect(chat.answers.last).to_contain_text("word")
    moving = "document.getAnimations().length"
    assert chat.page.evaluate(moving) == 0
    chat.page.emulate_media(reduced_motion="no-preference")
    chat.wait_for(f"{moving} > 0")  # the cursor blinks
    chat.page.keyboard.press("Escape")
    chat.wait_until_finished()


@pytest.mark.parametrize("width", [320, 375, 761, 1920])
def test_nothing_overflows_sideways(chat, server, width):
    server.models = ["a-rather-long-name-of-a-model-d26-sft", "rl"]
    chat.page.set_viewport_size({"width": width, "height": 640})
    chat.reload()
    long = "Donaudampfschifffahrt" * 20
    server.play(says(f"{long}\n\n```\n{long}\n```\n\n| {long} | b |\n|--|--|\n| 1 | 2 |"))
    chat.say(long)
    for element in ("document.documentElement", "scroller", "document.querySelector('header')"):
        assert chat.page.evaluate(f"{element}.scrollWidth - {element}.clientWidth") <= 0, element
    chat.save_screenshot(f"width-{width}")
