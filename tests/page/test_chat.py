"""Asking, stopping, regenerating, editing, deleting; the list; what a reload keeps."""

import re
import urllib.request

from playwright.sync_api import expect

from tests.page.conftest import Chat
from tests.page.scripted_server import holds, says


def texts_equal(chat, *texts: str) -> None:
    expect(chat.page.locator(".message .body")).to_have_text(list(texts))


def test_a_question_is_answered(chat, server):
    chat.say("hello\nthere")
    texts_equal(chat, "hello\nthere", "d4-sft heard: hello there")
    path, body = server.requests[-1]
    assert path == "/v1/chat/completions" and body["model"] == "d4-sft"
    assert body["messages"] == [{"role": "user", "content": "hello\nthere"}]


def test_the_whole_conversation_is_sent(chat, server):
    chat.say("one")
    chat.say("two")
    assert [message["content"] for message in server.requests[-1][1]["messages"]] == [
        "one",
        "d4-sft heard: one",
        "two",
    ]


def test_stop_keeps_what_came_and_frees_the_slot(chat, server):
    server.play(holds("word ", "word "))
    chat.say("hello", wait=False)
    expect(chat.answers.last).to_contain_text("word word")
    assert running(server) == 1
    chat.button("Stop").click()
    chat.wait_until_finished()
    server.wait_until_idle()
    assert running(server) == 0
    expect(chat.answers.last).to_contain_text("Stopped.")
    assert chat.answers.last.inner_text().count("word") == 2
    chat.say("and on")
    assert server.requests[-1][1]["messages"][1]["content"].startswith("word word")


def running(server) -> int:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        return int(re.search(r"num_requests_running\S* (\d+)", response.read().decode())[1])


def test_an_answer_goes_on_while_another_conversation_is_open(chat, server):
    server.play(says(*["word "] * 40, hold_after=2))
    chat.say("first", wait=False)
    expect(chat.answers.last).to_contain_text("word")
    chat.button("New chat").click()
    server.go_on(20)
    chat.say("second")
    texts_equal(chat, "second", "d4-sft heard: second")
    server.go_on()
    chat.page.get_by_role("link", name="first").click()
    chat.wait_until_finished()
    texts_equal(chat, "first", ("word " * 40).strip())


def test_regenerating_adds_an_alternative_and_keeps_the_others(chat, server):
    server.play(says("one"), says("two"), says("three"))
    chat.say("hello")
    for _ in range(2):
        chat.button("Regenerate").click()
        chat.wait_until_finished()
    answer = chat.answers.last
    expect(answer).to_contain_text("3/3")
    texts_equal(chat, "hello", "three")
    chat.button("Previous alternative").click()
    expect(answer).to_contain_text("2/3")
    texts_equal(chat, "hello", "two")
    expect(chat.button("Previous alternative")).to_be_focused()
    chat.button("Previous alternative").click()
    texts_equal(chat, "hello", "one")
    expect(chat.button("Previous alternative")).to_be_disabled()


def test_editing_a_question_makes_a_branch_with_its_own_future(chat):
    chat.say("a")
    chat.say("b")
    first = chat.messages.first
    first.hover()
    first.get_by_role("button", name="Edit").click()
    chat.page.get_by_role("textbox", name="Edit your message").fill("A")
    chat.page.keyboard.press("Enter")
    chat.wait_until_finished()
    texts_equal(chat, "A", "d4-sft heard: A")
    chat.say("C")
    chat.button("Previous alternative").click()
    texts_equal(chat, "a", "d4-sft heard: a", "b", "d4-sft heard: b")
    chat.button("Next alternative").click()
    texts_equal(chat, "A", "d4-sft heard: A", "C", "d4-sft heard: C")


def test_branches_keep_their_order_and_choice_across_a_reload(chat, server):
    server.play(says("one"), says("two"), says("three"))
    chat.say("hello")
    for _ in range(2):
        chat.button("Regenerate").click()
        chat.wait_until_finished()
    chat.button("Previous alternative").click()
    expect(chat.answers.last).to_contain_text("2/3")
    chat.reload()
    expect(chat.answers.last).to_contain_text("2/3")
    chat.button("Previous alternative").click()
    texts_equal(chat, "hello", "one")
    chat.button("Next alternative").click()
    texts_equal(chat, "hello", "two")
    chat.button("Next alternative").click()
    texts_equal(chat, "hello", "three")


def test_an_edit_can_be_given_up(chat):
    chat.say("hello")
    chat.messages.first.hover()
    chat.button("Edit").click()
    chat.page.get_by_role("textbox", name="Edit your message").fill("other")
    chat.page.keyboard.press("Escape")
    texts_equal(chat, "hello", "d4-sft heard: hello")
    expect(chat.button("Edit")).to_be_focused()


def test_deleting_a_message_takes_what_followed_and_can_be_undone(chat):
    chat.say("a")
    chat.say("b")
    chat.messages.nth(2).hover()
    chat.messages.nth(2).get_by_role("button", name="Delete").click()
    texts_equal(chat, "a", "d4-sft heard: a")
    chat.button("Undo").click()
    texts_equal(chat, "a", "d4-sft heard: a", "b", "d4-sft heard: b")


def test_copying_code_copies_the_code_alone(chat, server):
    server.play(says("Look:\n\n```python\ndef f():\n    return 1\n```\n"))
    chat.say("code")
    chat.button("Copy the python code").click()
    expect(chat.page.locator(".code .done")).to_have_count(1)
    copied = chat.page.evaluate("navigator.clipboard.readText()")
    assert copied == "def f():\n    return 1\n"


def test_conversations_are_listed_searched_renamed_and_deleted(chat):
    for text in ("apples", "bread and butter", "cheese"):
        chat.button("New chat").click()
        chat.say(text)
    links = chat.page.locator("#conversations .conversation")
    expect(links).to_have_text(["cheese", "bread and butter", "apples"])
    search = chat.page.get_by_role("searchbox")
    search.fill("BUTTER heard")  # both words, in any message
    expect(links).to_have_text(["bread and butter"])
    search.fill("nothing of the kind")
    expect(chat.page.locator("#conversations")).to_have_text("Nothing found.")
    search.fill("")
    chat.page.get_by_role("link", name="apples").hover()
    chat.button("Rename apples").click()
    chat.page.get_by_role("textbox", name="Title").fill("Fruit")
    chat.page.keyboard.press("Enter")
    expect(links).to_have_text(["cheese", "bread and butter", "Fruit"])
    chat.page.get_by_role("link", name="cheese").hover()
    chat.button("Delete cheese").click()
    expect(links).to_have_text(["bread and butter", "Fruit"])
    chat.reload()
    expect(links).to_have_text(["bread and butter", "Fruit"])


def test_a_deleted_conversation_can_be_brought_back(chat):
    chat.say("keep me")
    chat.page.get_by_role("link", name="keep me").hover()
    chat.button("Delete keep me").click()
    expect(chat.page.locator("#conversations")).to_have_text("No conversations yet.")
    chat.button("Undo").click()
    chat.page.get_by_role("link", name="keep me").click()
    texts_equal(chat, "keep me", "d4-sft heard: keep me")


def test_deleting_a_conversation_that_streams_stops_it_for_good(chat, server):
    server.play(holds("word "))
    chat.say("endless", wait=False)
    expect(chat.answers.last).to_contain_text("word")
    chat.page.get_by_role("link", name="endless").hover()
    chat.button("Delete endless").click()
    server.wait_until_idle()
    chat.reload()
    expect(chat.page.locator("#conversations")).to_have_text("No conversations yet.")


def test_the_address_names_the_conversation(chat):
    chat.say("one")
    first = chat.address
    chat.button("New chat").click()
    assert "#" not in chat.address
    chat.say("two")
    chat.page.go_back()
    chat.page.go_back()
    expect(chat.page.locator("h1")).to_have_text("one")
    assert chat.address == first


NO_SAVES = """
() => {
  const { setTimeout } = window;
  const save = 700;  // SAVE_MS of session.js
  window.setTimeout = (run, ms, ...values) => ms === save ? 0 : setTimeout(run, ms, ...values);
}
"""


def test_a_reload_in_the_middle_of_an_answer_keeps_what_was_there(chat, server):
    chat.page.evaluate(NO_SAVES)  # but the one that a page makes which closes
    server.play(holds(*["word "] * 60))
    chat.say("hello", wait=False)
    expect(chat.answers.last).to_contain_text("word " * 60)
    chat.reload()
    expect(chat.answers.last).to_contain_text("Stopped.")
    assert chat.answers.last.inner_text().count("word") == 60
    server.wait_until_idle()
    chat.button("Regenerate").click()
    chat.wait_until_finished()
    texts_equal(chat, "hello", "d4-sft heard: hello")


def test_a_draft_is_kept_for_each_conversation(chat):
    chat.say("one")
    chat.box.fill("half a thought")
    chat.button("New chat").click()
    expect(chat.box).to_have_value("")
    chat.box.fill("another")
    chat.page.get_by_role("link", name="one").click()
    expect(chat.box).to_have_value("half a thought")
    chat.reload()
    expect(chat.box).to_have_value("half a thought")
    chat.button("New chat").click()
    expect(chat.box).to_have_value("another")


def test_another_tab_sees_what_this_one_keeps(chat, context, server):
    other = Chat.open(context, server)
    chat.say("from here")
    expect(other.page.get_by_role("link", name="from here")).to_be_visible()


def test_the_view_follows_only_a_reader_who_is_at_the_end(chat, server):
    def show(count):
        """Let so many more lines come, and the page draw them."""
        shown = lines.count()
        server.go_on(count)
        expect(lines).to_have_count(shown + count)
        chat.settle()

    server.play(says("filler\n\n" * 60), says(*["a line\n\n"] * 100, hold_after=0))
    chat.say("long")
    chat.say("more", wait=False)
    lines = chat.answers.last.locator("p", has_text="a line")
    for _ in range(2):
        show(20)
        assert distance_from_end(chat) < 40
    chat.page.mouse.move(600, 300)
    chat.page.evaluate(SCROLL_ENDS)
    end = chat.page.evaluate("scroller.scrollTop")
    chat.page.mouse.wheel(0, -900)
    chat.wait_for(f"scrollEnds > 0 && scroller.scrollTop < {end - 890}")
    position, before = chat.page.evaluate("scroller.scrollTop"), distance_from_end(chat)
    assert before > 800
    show(30)
    assert chat.page.evaluate("scroller.scrollTop") == position
    assert distance_from_end(chat) > before + 500
    chat.button("Go to the latest message").click()
    chat.settle()
    assert distance_from_end(chat) < 40
    show(20)
    assert distance_from_end(chat) < 40
    chat.button("Stop").click()
    chat.wait_until_finished()


SCROLL_ENDS = """
() => {
  window.scrollEnds = 0;
  scroller.addEventListener("scrollend", () => (window.scrollEnds += 1));
}
"""


def distance_from_end(chat) -> float:
    return chat.page.evaluate("scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight")


BEFORE_ALL_SCRIPTS = """
new MutationObserver((_, observer) => {
  const box = document.getElementById("prompt");
  if (!box) return;
  box.value = "in a hurry";
  observer.disconnect();
}).observe(document, { childList: true, subtree: true });
"""


def test_what_is_written_before_the_page_has_come_to_life_stays(chat, context):
    """The draft of before took its place."""
    chat.box.fill("a draft")
    chat.reload()
    expect(chat.box).to_have_value("a draft")
    context.add_init_script(BEFORE_ALL_SCRIPTS)
    chat.reload()
    expect(chat.box).to_have_value("in a hurry")
    expect(chat.page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
