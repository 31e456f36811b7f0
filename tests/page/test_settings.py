"""Settings, slash commands and keys change what is asked of the server, and survive a reload."""

import pytest
from playwright.sync_api import expect

from tests.page.conftest import Chat
from tests.page.scripted_server import holds


def open_settings(chat):
    chat.button("Settings").click()
    return chat.page.get_by_role("dialog", name="Settings")


def test_every_setting_reaches_the_server_and_outlives_a_reload(chat, server):
    dialog = open_settings(chat)
    dialog.get_by_label("System prompt").fill("Be brief.")
    dialog.get_by_label("Temperature", exact=True).fill("0.25")
    dialog.get_by_label("Top-k").fill("7")
    dialog.get_by_label("Top-p", exact=True).fill("0.9")
    dialog.get_by_label("Longest answer").fill("33")
    dialog.get_by_label("Seed").fill("123")
    chat.button("Done").click()
    for _ in range(2):
        chat.say("hello")
        body = server.requests[-1][1]
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        wanted = {"temperature": 0.25, "top_k": 7, "top_p": 0.9, "max_tokens": 33, "seed": 123}
        assert {name: body[name] for name in wanted} == wanted
        assert "logprobs" not in body
        chat.reload()
        chat.button("New chat").click()


def test_two_tabs_do_not_undo_each_others_settings(chat, context, server):
    other = Chat.open(context, server)
    open_settings(chat).get_by_label("System prompt").fill("Be brief.")
    chat.button("Done").click()
    other.wait_for("document.getElementById('setting-system').value === 'Be brief.'")
    open_settings(other).get_by_label("Seed").fill("7")
    other.button("Done").click()
    chat.wait_for("document.getElementById('setting-seed').value === '7'")
    for one in (chat, other):
        one.reload()
        one.button("New chat").click()
        one.say("hello")
        body = server.requests[-1][1]
        assert (body["messages"][0]["content"], body["seed"]) == ("Be brief.", 7)


def test_what_one_tab_writes_asks_nothing_of_another_and_changes_no_choice(chat, context, server):
    server.models = ["d4-base", "d4-sft"]
    chat.reload()
    other = Chat.open(context, server)
    for one, name in ((other, "d4-sft"), (chat, "d4-base")):  # the last choice is the stored one
        one.page.locator("#models summary").click()
        one.page.get_by_label(name).check()
        one.page.keyboard.press("Escape")
    asked = len(other.requested)
    chat.box.fill("a draft")
    open_settings(chat).get_by_label("System prompt").fill("Be brief.")
    chat.button("Done").click()
    other.wait_for("document.getElementById('setting-system').value === 'Be brief.'")
    chat.wait_for("localStorage.getItem('jaxchat.draft.new') !== null")
    other.wait_for("localStorage.getItem('jaxchat.draft.new') !== null")
    other.settle()
    assert [url for url in other.requested[asked:] if url.endswith("/v1/models")] == []
    other.page.evaluate("dispatchEvent(new Event('online'))")  # what does ask for the models again
    expect(other.page.get_by_label("d4-sft")).to_be_checked()
    other.say("hello")
    assert server.requests[-1][1]["model"] == "d4-sft"


@pytest.mark.parametrize("kept", ["{}", '"x"', "5", "true", "[3]", "{"])
def test_what_is_damaged_in_the_browsers_storage_is_no_obstacle(chat, server, kept):
    names = ("models", "settings", "draft.new")
    for name in names:
        chat.page.evaluate(
            "([name, kept]) => localStorage.setItem(`jaxchat.${name}`, kept)", [name, kept]
        )
    chat.reload()
    chat.say("hello")
    assert chat.answer_text() == "d4-sft heard: hello"


def test_reset_brings_the_first_values_back(chat, server):
    dialog = open_settings(chat)
    dialog.get_by_label("Temperature", exact=True).fill("0")
    dialog.get_by_label("Longest answer").fill("5")
    chat.button("Reset").click()
    expect(dialog.get_by_label("Temperature", exact=True)).to_have_value("0.6")
    chat.button("Done").click()
    chat.say("hello")
    body = server.requests[-1][1]
    assert body["temperature"] == 0.6 and "max_tokens" not in body


def test_the_page_begins_with_what_the_server_takes_and_keeps_what_the_reader_sets(chat, server):
    server.defaults = {"temperature": 0, "top_k": 5000}
    chat.reload()
    dialog = open_settings(chat)
    temperature = dialog.get_by_label("Temperature", exact=True)
    expect(temperature).to_have_value("0")
    expect(dialog.get_by_label("Top-k")).to_have_value("5000")
    dialog.get_by_label("Theme").select_option("Dark")
    chat.button("Done").click()
    expect(dialog).to_be_hidden()
    chat.say("one")
    body = server.requests[-1][1]
    assert (body["temperature"], body["top_k"]) == (0, 5000)
    server.defaults = {"temperature": 0.7, "top_k": 1}  # what was not set is not stored
    chat.reload()
    open_settings(chat)
    expect(temperature).to_have_value("0.7")
    temperature.fill("0.9")
    chat.button("Done").click()
    chat.reload()
    chat.say("two")
    body = server.requests[-1][1]
    assert (body["temperature"], body["top_k"]) == (0.9, 1)
    stored = chat.page.evaluate("JSON.parse(localStorage.getItem('jaxchat.settings'))")
    assert stored == {"theme": "dark", "temperature": 0.9}


def test_a_server_that_does_not_tell_its_defaults_takes_them(chat, server):
    server.defaults = {}
    chat.reload()
    chat.say("hello")
    assert server.requests[-1][1].keys().isdisjoint({"temperature", "top_k"})
    chat.box.fill("/temperature")
    chat.box.press("Enter")
    expect(chat.page.locator("#notices")).to_contain_text("Temperature is what the server takes.")


def test_without_a_seed_every_request_has_its_own(chat, server):
    chat.say("one")
    chat.say("two")
    first, second = (body["seed"] for _, body in server.requests)
    assert first != second


@pytest.mark.parametrize(
    ("label", "value", "reason"),
    [
        ("Temperature", "3", "from 0 to 2"),
        ("Temperature", "", "from 0 to 2"),
        ("Top-k", "1.5", "whole number"),
        ("Top-p", "0", "from 0.01 to 1"),
        ("Longest answer", "0", "from 1"),
        ("Seed", "-1", "from 0"),
    ],
)
def test_a_value_out_of_range_is_named_and_not_taken(chat, label, value, reason):
    dialog = open_settings(chat)
    field = dialog.get_by_label(label, exact=True)
    before = field.input_value()
    field.fill(value)
    expect(dialog.get_by_role("alert").filter(has_text=reason)).to_be_visible()
    field.blur()
    expect(field).to_have_value(before)
    chat.page.keyboard.press("Escape")


def test_the_theme_is_chosen_and_there_before_the_first_paint(chat):
    dialog = open_settings(chat)
    dialog.get_by_label("Theme").select_option("Dark")
    chat.page.reload(wait_until="commit")
    chat.wait_for("Boolean(document.body)")
    assert chat.page.evaluate("document.documentElement.dataset.theme") == "dark"
    background = "getComputedStyle(document.body).backgroundColor"
    expect(chat.page.locator("h1")).to_be_visible()
    assert chat.page.evaluate(background) == "rgb(27, 28, 31)"


def test_the_theme_follows_the_system_unless_chosen(chat):
    background = "getComputedStyle(document.body).backgroundColor"
    chat.page.emulate_media(color_scheme="dark")
    dark = chat.page.evaluate(background)
    chat.page.emulate_media(color_scheme="light")
    assert (dark, chat.page.evaluate(background)) == ("rgb(27, 28, 31)", "rgb(255, 255, 255)")


def test_slash_commands_set_show_and_explain(chat, server):
    notices = chat.page.locator("#notices")
    for line, answer in [
        ("/temperature 0.3", "Temperature is now 0.3."),
        ("/temperature", "Temperature is 0.3."),
        ("/topk 9", "Top-k is now 9."),
        ("/topk many", "Top-k is a whole number from 0 to 1000; got many."),
        ("/temperature 9", "from 0 to 2; got 9."),
        ("/help", "Commands and keys"),
    ]:
        chat.box.fill(line)
        chat.box.press("Enter")
        expect(notices).to_contain_text(answer)
        expect(chat.button("Send")).to_be_disabled()
    row = notices.locator("dt", has_text="Shift+Enter").first
    expect(row.locator("xpath=following-sibling::dd[1]")).to_have_text("new line")
    assert server.requests == []
    chat.say("hello")
    assert server.requests[-1][1]["temperature"] == 0.3 and server.requests[-1][1]["top_k"] == 9
    chat.box.fill("/clear")
    chat.box.press("Enter")
    expect(chat.messages).to_have_count(0)
    assert chat.conversation_titles() == ["hello"]


@pytest.mark.parametrize(
    "text",
    [
        "/usr/bin/env is what?",
        "/etc holds what?",
        "/etc/passwd",
        "/temperature of the sun?",
        "/clear the table",
        "/help\nme",
        "/",
    ],
)
def test_what_is_no_command_is_a_message(chat, server, text):
    chat.say(text)
    assert server.requests[-1][1]["messages"][-1]["content"] == text


def test_a_word_that_is_no_command_is_told_and_kept(chat, server):
    chat.box.fill("/nonsense")
    chat.box.press("Enter")
    expect(chat.page.locator("#notices")).to_contain_text("There is no command /nonsense.")
    expect(chat.box).to_have_value("/nonsense")
    expect(chat.box).to_be_focused()
    chat.box.press_sequentially(" is a word")
    chat.box.press("Enter")
    chat.wait_until_finished()
    assert server.requests[-1][1]["messages"][-1]["content"] == "/nonsense is a word"


def test_the_keys_of_the_message_box(chat, server):
    chat.box.fill("one")
    chat.box.press("Shift+Enter")
    chat.box.press_sequentially("two")
    assert server.requests == []
    chat.box.press("Enter")
    chat.wait_until_finished()
    assert server.requests[-1][1]["messages"][-1]["content"] == "one\ntwo"
    chat.box.press("ArrowUp")
    editor = chat.page.get_by_role("textbox", name="Edit your message")
    expect(editor).to_be_focused()
    expect(editor).to_have_value("one\ntwo")
    chat.page.keyboard.press("Escape")
    server.play(holds("word "))
    chat.say("stop me", wait=False)
    expect(chat.answers.last).to_contain_text("word")
    chat.page.keyboard.press("Escape")
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("Stopped.")
    chat.page.keyboard.press("Control+Shift+O")
    expect(chat.messages).to_have_count(0)
    expect(chat.box).to_be_focused()
    chat.page.keyboard.press("Control+k")
    expect(chat.page.get_by_role("searchbox")).to_be_focused()


def test_enter_that_ends_a_word_of_an_input_method_sends_nothing(chat, server):
    chat.box.fill("にほん")
    chat.page.evaluate(
        "prompt => document.getElementById('prompt').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))",
        None,
    )
    chat.settle()
    assert server.requests == [] and chat.box.input_value() == "にほん"


@pytest.mark.parametrize("box", ["message", "title", "edit"])
def test_enter_of_an_input_method_whose_word_has_ended_already_does_nothing(chat, server, box):
    """As Safari tells it: no longer composing, but with the code of an input method."""
    chat.say("hello")
    if box == "edit":
        chat.box.press("ArrowUp")
        field = chat.page.get_by_label("Edit your message")
    elif box == "title":
        chat.page.locator("#conversations li").hover()
        chat.button("Rename hello").click()
        field = chat.page.get_by_label("Title", exact=True)
    else:
        field = chat.box
    field.fill("にほん")
    script = "(e, options) => e.dispatchEvent(new KeyboardEvent('keydown', options))"
    for name in ("Enter", "Escape"):
        field.evaluate(script, {"key": name, "keyCode": 229, "bubbles": True})
    chat.settle()
    expect(field).to_have_value("にほん")
    assert len(server.requests) == 1 and chat.conversation_titles() in (["hello"], [])


def test_an_api_key_is_tried_once_when_it_is_complete(chat):
    field = open_settings(chat).get_by_label("API key")
    before = len(chat.requested)
    field.press_sequentially("sk-secret")
    chat.settle()
    assert [url for url in chat.requested[before:] if not url.endswith("/health")] == []
    with chat.page.expect_request("**/v1/models") as request:
        chat.page.keyboard.press("Escape")  # which closes the dialog
    assert request.value.headers["authorization"] == "Bearer sk-secret"


def test_what_was_said_of_another_key_is_no_answer_to_the_new_one(chat):
    held = []

    def answer(route):
        if route.request.headers.get("authorization") == "Bearer old":
            held.append(route)
        else:
            route.continue_()

    chat.page.route("**/v1/models", answer)
    field = open_settings(chat).get_by_label("API key")
    with chat.page.expect_request("**/v1/models"):
        field.fill("old")
        field.blur()
    field.fill("new")
    field.blur()
    with chat.page.expect_response("**/v1/models") as response:
        chat.wait_until(lambda: held, "the first key is tried")
        with chat.page.expect_request("**/v1/models") as request:
            held[0].fulfill(status=401, json={"error": {"message": "no such key", "code": None}})
    assert response.value.status == 401
    assert request.value.headers["authorization"] == "Bearer new"
    request.value.response().finished()
    chat.settle()
    assert "no such key" not in chat.page.locator("#notices").inner_text()


def test_a_key_that_no_header_can_carry_is_said_to_be_at_fault(chat, server):
    field = open_settings(chat).get_by_label("API key")
    field.fill("sk-\u200bsecret")
    chat.button("Done").click()
    notices = chat.page.locator("#notices")
    expect(notices).to_contain_text("The API key has a character that cannot be sent")
    chat.say("hello")
    expect(chat.answers.last).to_contain_text("wants an API key")
    expect(chat.answers.last).not_to_contain_text("cannot be reached")
    assert server.requests == []


def test_an_api_key_is_sent_and_forgotten_with_the_tab(chat, context, server):
    dialog = open_settings(chat)
    dialog.get_by_label("API key").fill("sk-secret")
    chat.button("Done").click()
    with chat.page.expect_request("**/v1/chat/completions") as request:
        chat.say("hello")
    assert request.value.headers["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in chat.page.evaluate("JSON.stringify(localStorage)")


def test_escape_closes_what_is_open_before_it_stops_the_answer(chat, server):
    chat.page.set_viewport_size({"width": 400, "height": 700})
    server.play(holds("word "))
    chat.say("hello", wait=False)
    expect(chat.answers.last).to_contain_text("word")
    chat.button("Conversations").click()
    chat.page.keyboard.press("Escape")
    expect(chat.button("Conversations")).to_be_focused()
    chat.page.locator("#models summary").click()
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#models fieldset")).to_be_hidden()
    expect(chat.button("Stop")).to_be_visible()
    chat.page.keyboard.press("Escape")
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("Stopped.")
