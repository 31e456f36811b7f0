"""A thousand messages stay smooth; a full storage is said and loses nothing that is on screen."""

import json

import pytest
from playwright.sync_api import expect

from tests.page.conftest import Chat
from tests.page.scripted_server import says

COUNT = 1000

TRIES = 5
"""What else the machine does can only make a task longer: the best of some tries is the page's."""


def longest_task_ms(chat, act) -> float:
    """Of the tasks that the page runs during `act`, in time of its own thread.

    By the clock a task of a busy machine takes as long as whatever is run in between.
    """
    chat.page.context.browser.start_tracing(page=chat.page, categories=["toplevel"])
    try:
        act()
    finally:
        trace = json.loads(chat.page.context.browser.stop_tracing())["traceEvents"]
    threads = [event for event in trace if event["name"] == "thread_name"]
    main = {
        (event["pid"], event["tid"])
        for event in threads
        if event["args"]["name"] == "CrRendererMain"
    }
    tasks = [event for event in trace if (event["pid"], event["tid"]) in main and "tdur" in event]
    assert len(tasks) > 10
    return max(event["tdur"] for event in tasks) / 1000


def is_smooth(chat, act, limit_ms: float) -> bool:
    return any(longest_task_ms(chat, act) < limit_ms for _ in range(TRIES))


@pytest.fixture
def long_chat(chat):
    """A conversation of a thousand messages, imported."""
    messages = {}
    for index in range(COUNT):
        role = "assistant" if index % 2 else "user"
        text = f"Message **{index}**\n\n- one\n- two\n\n```python\nx = {index}\n```\n" * 2
        messages[str(index)] = {
            "role": role,
            "parts": [{"type": "text", "text": text}],
            "children": [str(index + 1)] if index + 1 < COUNT else [],
        }
    document = {"title": "Long", "children": ["0"], "messages": messages, "active": 0}
    file = {"format": "jaxchat-conversations", "version": 1, "conversations": [document]}
    buffer = json.dumps(file).encode()
    chat.page.set_input_files(
        "#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": buffer}
    )
    expect(chat.messages).to_have_count(COUNT)
    return chat


def test_a_thousand_messages_open_at_the_end_and_scroll(long_chat):
    page = long_chat.page
    page.reload()
    expect(long_chat.messages).to_have_count(COUNT)
    expect(long_chat.messages.last.locator(".code").last).to_be_in_viewport()
    page.mouse.move(600, 300)

    def scroll():
        page.evaluate("scroller.scrollTop = scroller.scrollHeight")
        for _ in range(20):
            page.mouse.wheel(0, -1500)
            long_chat.settle()
        page.evaluate("scroller.scrollTop = 0")
        expect(long_chat.messages.nth(1).locator(".code").first).to_be_visible()

    assert is_smooth(long_chat, scroll, 500)
    # only what was near the screen asked for its Markdown: far fewer than 500 answers
    rendered = page.locator(".prose:not(.plain)").count()
    assert rendered < COUNT / 4, rendered


def test_writing_and_answers_stay_smooth_below_a_thousand_messages(long_chat, server):
    def ask():
        long_chat.box.press_sequentially("a question in a long conversation")
        server.play(says(*["word "] * 60, pause_s=0.02))
        long_chat.box.press("Enter")
        expect(long_chat.box).to_have_value("")
        long_chat.wait_until_finished()
        expect(long_chat.answers.last).to_contain_text("word " * 60)

    long_chat.settle()
    # once, when the question and the answer are added
    assert is_smooth(long_chat, ask, 1000)


def test_a_full_storage_is_said_and_the_conversation_goes_on(chat, context, server):
    session = context.new_cdp_session(chat.page)
    session.send("Storage.overrideQuotaForOrigin", {"origin": server.url, "quotaSize": 1})
    chat.say("begins")
    expect(chat.page.locator("#notices")).to_contain_text("storage is full")
    chat.say("goes on")
    chat.button("New chat").click()
    chat.page.get_by_role("link", name="begins").click()
    expect(chat.messages).to_have_count(4)  # kept in memory
    chat.page.locator("#export-menu summary").click()
    with chat.page.expect_download() as download:
        chat.button("JSON, with every branch").click()
    with open(download.value.path()) as file:
        assert len(json.load(file)["conversations"][0]["messages"]) == 4
    session.send("Storage.overrideQuotaForOrigin", {"origin": server.url})
    chat.say("there is room again")
    chat.reload()
    expect(chat.messages).to_have_count(6)


def test_the_browser_is_asked_once_to_keep_what_is_stored(chat):
    count = "navigator.storage.persist = async () => (window.asked += 1)"
    chat.page.evaluate(f"() => {{ window.asked = 0; {count}; }}")
    chat.say("hello")
    chat.wait_for("window.asked")
    chat.say("again")
    chat.settle()
    assert chat.page.evaluate("window.asked") == 1


def test_a_browser_that_offers_no_storage_still_chats(context, server):
    context.add_init_script(
        """
        for (const name of ["localStorage", "sessionStorage", "indexedDB"]) {
          const get = () => { throw new DOMException("no", "SecurityError"); };
          Object.defineProperty(window, name, { get });
        }
        """
    )
    chat = Chat.open(context, server)
    expect(chat.page.locator("#notices")).to_contain_text("storage is full or closed")
    chat.say("hello")
    expect(chat.answers.last).to_contain_text("d4-sft heard: hello")
    expect(chat.page.locator("#conversations .conversation")).to_have_text(["hello"])
    assert chat.problems == []
