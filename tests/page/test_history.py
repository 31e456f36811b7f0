"""What other tabs did, what is brought back, where the back button leads."""

import re

from playwright.sync_api import expect

from tests.page.conftest import Chat
from tests.page.scripted_server import fails, holds, says
from tests.page.test_chat import texts_equal


def test_an_open_conversation_goes_on_from_what_another_tab_added(chat, context, server):
    chat.say("one")
    other = Chat.open(context, server, path=f"/{chat.address.rsplit('/', 1)[1]}")
    texts_equal(other, "one", "d4-sft heard: one")
    chat.say("two")
    texts_equal(other, "one", "d4-sft heard: one", "two", "d4-sft heard: two")
    other.say("three")  # and neither overwrites the other
    texts = ["one", "d4-sft heard: one", "two", "d4-sft heard: two", "three", "d4-sft heard: three"]
    texts_equal(chat, *texts)
    chat.reload()
    texts_equal(chat, *texts)


def test_two_tabs_that_write_at_the_same_time_keep_what_either_wrote(chat, context, server):
    chat.say("one")
    other = Chat.open(context, server, path=f"/{chat.address.rsplit('/', 1)[1]}")
    texts_equal(other, "one", "d4-sft heard: one")
    server.play(says(*["slow "] * 20, hold_after=2))
    chat.say("two", wait=False)
    expect(chat.answers.last).to_contain_text("slow slow")
    other.say("three")  # another branch, as that tab has not heard of the first yet
    server.go_on()
    chat.wait_until_finished()
    for tab in (chat, other):
        tab.reload()
        expect(tab.messages).to_have_count(4)
        question = tab.messages.nth(2).locator(".bubble")
        expect(question).to_have_text(re.compile("two|three"))
        other_one = {"two": "three", "three": "two"}[question.text_content()]
        tab.messages.nth(2).hover()
        step = tab.button("Previous alternative").or_(tab.button("Next alternative"))
        step.and_(tab.page.locator(":enabled")).first.click()
        expect(question).to_have_text(other_one)
        assert "…" not in tab.texts()[3]


def test_a_conversation_that_another_tab_deletes_stays_deleted(chat, context, server):
    chat.say("one")
    other = Chat.open(context, server, path=f"/{chat.address.rsplit('/', 1)[1]}")
    server.play(holds("slow ", "slow "))
    chat.say("two", wait=False)
    expect(chat.answers.last).to_contain_text("slow slow")
    other.page.get_by_role("link", name="one", exact=True).hover()
    other.page.get_by_role("button", name="Delete one").click()
    expect(chat.page.locator("h1")).to_have_text("New chat")
    chat.after_timers(1000)  # longer than between two saves
    chat.settle()
    for tab in (chat, other):
        expect(tab.page.get_by_role("link", name="one", exact=True)).to_have_count(0)
        tab.reload()
        expect(tab.page.get_by_role("link", name="one", exact=True)).to_have_count(0)


def test_a_deleted_conversation_can_be_brought_back_and_written_to_elsewhere(chat, context, server):
    chat.say("one")
    other = Chat.open(context, server, path=f"/{chat.address.rsplit('/', 1)[1]}")
    other.page.get_by_role("link", name="one", exact=True).hover()
    other.page.get_by_role("button", name="Delete one").click()
    expect(chat.page.locator("h1")).to_have_text("New chat")
    other.button("Undo").click()
    chat.page.get_by_role("link", name="one", exact=True).click()
    texts_equal(chat, "one", "d4-sft heard: one")
    chat.say("two")
    chat.reload()
    texts_equal(chat, "one", "d4-sft heard: one", "two", "d4-sft heard: two")


def test_a_message_that_another_tab_deletes_is_gone_and_comes_back_with_undo(chat, context, server):
    chat.say("one")
    chat.say("two")
    other = Chat.open(context, server, path=f"/{chat.address.rsplit('/', 1)[1]}")
    texts_equal(other, "one", "d4-sft heard: one", "two", "d4-sft heard: two")
    other.messages.nth(2).hover()
    other.messages.nth(2).get_by_role("button", name="Delete").click()
    texts_equal(chat, "one", "d4-sft heard: one")
    chat.say("three")
    other.button("Undo").click()
    texts_equal(other, "one", "d4-sft heard: one", "two", "d4-sft heard: two")
    for tab in (chat, other):
        tab.reload()
        tab.messages.nth(2).hover()
        expect(tab.page.locator(".versions").first).to_contain_text("/2")


def test_a_retry_in_the_middle_keeps_what_followed(chat, server):
    server.play(fails(500, "x"))
    chat.say("one")
    chat.say("two")
    chat.button("Retry").click()
    chat.wait_until_finished()
    texts_equal(chat, "one", "d4-sft heard: one")
    chat.button("Previous alternative").click()
    texts_equal(chat, "one", "", "two", "d4-sft heard: two")
    chat.reload()
    texts_equal(chat, "one", "", "two", "d4-sft heard: two")


def test_an_edit_is_kept_when_editing_is_asked_for_again(chat):
    chat.say("first")
    chat.box.press("ArrowUp")
    editor = chat.page.get_by_label("Edit your message")
    editor.fill("a better question")
    chat.box.focus()
    chat.box.press("ArrowUp")
    expect(editor).to_have_value("a better question")
    expect(editor).to_be_focused()


def test_keys_of_an_input_method_end_no_edit_and_no_answer(chat, server):
    def press_escape(composing):
        options = {"key": "Escape", "isComposing": composing, "bubbles": True}
        script = "(e, options) => e.dispatchEvent(new KeyboardEvent('keydown', options))"
        editor.evaluate(script, options)

    chat.say("first")
    chat.box.press("ArrowUp")
    editor = chat.page.get_by_label("Edit your message")
    press_escape(True)
    expect(editor).to_be_visible()
    press_escape(False)
    expect(editor).to_be_hidden()


def test_the_skip_link_leads_to_the_box_and_leaves_the_conversation_open(chat):
    chat.say("one")
    url = chat.address
    chat.page.locator(".skip").focus()
    chat.page.keyboard.press("Enter")
    expect(chat.box).to_be_focused()
    assert chat.address == url
    texts_equal(chat, "one", "d4-sft heard: one")


def test_undo_works_after_other_conversations_were_open(chat):
    chat.say("a")
    chat.say("b")
    chat.messages.nth(2).hover()
    chat.messages.nth(2).get_by_role("button", name="Delete").click()
    chat.button("New chat").click()
    chat.page.get_by_role("link", name="a", exact=True).click()
    texts_equal(chat, "a", "d4-sft heard: a")
    chat.button("Undo").click()
    texts_equal(chat, "a", "d4-sft heard: a", "b", "d4-sft heard: b")
    chat.reload()
    texts_equal(chat, "a", "d4-sft heard: a", "b", "d4-sft heard: b")


def test_undo_of_what_hung_on_a_deleted_message_changes_nothing(chat):
    chat.say("a")
    chat.say("b")
    for index in (2, 0):
        chat.messages.nth(index).hover()
        chat.messages.nth(index).get_by_role("button", name="Delete").click()
        chat.page.evaluate("document.querySelector('.notice').dataset.text += ' '")  # keep both
    chat.button("Undo").first.click()
    expect(chat.messages).to_have_count(0)
    chat.button("Undo").click()
    texts_equal(chat, "a", "d4-sft heard: a")


def test_an_address_without_a_conversation_does_not_catch_the_back_button(chat, server):
    chat.say("one")
    first = chat.address
    chat.page.goto(f"{server.url}/#gone")
    expect(chat.page.locator("h1")).to_have_text("New chat")
    assert "#" not in chat.address
    chat.page.go_back()
    expect(chat.page.locator("h1")).to_have_text("one")
    assert chat.address == first


def test_messages_can_be_copied_where_the_browser_offers_no_clipboard(context, server):
    """As at an address in a local network, which has no https."""
    context.add_init_script(
        "Object.defineProperty(navigator, 'clipboard', { get: () => undefined });"
        "delete Crypto.prototype.randomUUID;"
    )
    chat = Chat.open(context, server)
    server.play(says("to be *copied*"))
    chat.say("hello")
    chat.button("Copy").last.click()
    expect(chat.page.locator(".done")).to_be_visible()
    expect(chat.page.locator("#announcer")).to_have_text("Copied.")
    chat.box.focus()
    chat.page.keyboard.press("Control+v")
    expect(chat.box).to_have_value("to be *copied*")
    assert chat.problems == []
