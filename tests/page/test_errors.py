"""Whatever goes wrong is said in words, loses nothing, and can be tried again."""

import pytest
from playwright.sync_api import expect

from tests.page.conftest import Chat
from tests.page.scripted_server import fails, says


def error(chat):
    return chat.answers.last.get_by_role("group", name="Error")


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (fails(429, "too many", Retry_After="7"), ["too much to do", "wait 7 s", "too many"]),
        (fails(503, "draining", Retry_After="5"), ["too much to do", "wait 5 s"]),
        (fails(500, "The server failed; see its log."), ["The server failed.", "see its log"]),
        (fails(401, "no key"), ["API key", "no key"]),
        (fails(400, "messages.0: wrong"), ["refused the request", "messages.0: wrong"]),
        (fails(404, "no model x"), ["refused the request", "no model x"]),
        (says("a", "b", break_after=1), ["connection broke"]),
        (says("a", "b", break_after=2), ["connection broke"]),
        (says("a", "b", error_after=1), ["The server failed.", "the engine failed"]),
    ],
    ids=["429", "503", "500", "401", "400", "404", "cut", "no end", "error inside"],
)
def test_a_failure_is_named_and_the_retry_answers(chat, server, reply, words):
    server.play(reply)
    chat.say("hello")
    for word in words:
        expect(error(chat)).to_contain_text(word)
    chat.button("Retry").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d4-sft heard: hello")
    expect(error(chat)).to_have_count(0)
    assert [body["messages"] for _, body in server.requests] == 2 * [
        [{"role": "user", "content": "hello"}]
    ]


def test_what_came_before_the_break_stays_as_an_alternative(chat, server):
    server.play(says("the beginning ", "and more", break_after=1, pause_s=0.3))
    chat.say("hello")
    expect(chat.answers.last).to_contain_text("the beginning")
    chat.button("Retry").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("2/2")
    chat.button("Previous alternative").click()
    expect(chat.answers.last).to_contain_text("the beginning")


def test_an_empty_failure_leaves_no_alternative_behind(chat, server):
    server.play(fails(500, "x"), fails(500, "x"))
    chat.say("hello")
    chat.button("Retry").click()
    chat.wait_until_finished()
    chat.button("Retry").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d4-sft heard: hello")
    expect(chat.answers.last.locator(".versions")).to_have_count(0)


def test_a_server_that_is_down_is_said_and_comes_back(chat, server):
    chat.say("one")
    chat.page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    chat.say("two")
    expect(error(chat)).to_contain_text("cannot be reached")
    chat.page.unroute("**/v1/chat/completions")
    chat.page.reload()
    expect(error(chat)).to_contain_text("cannot be reached")
    chat.button("Retry").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d4-sft heard: two")


def test_a_conversation_too_long_can_go_on_without_its_beginning(chat, server):
    for text in ("one", "two", "three"):
        chat.say(text)
    server.play(fails(400, "maximum 64 tokens, requested 90", code="context_length_exceeded"))
    chat.say("four")
    expect(error(chat)).to_contain_text("too long for this model")
    expect(error(chat)).to_contain_text("maximum 64 tokens, requested 90")
    chat.button("Retry without the first 2 turns").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d4-sft heard: four")
    sent = [message["content"] for message in server.requests[-1][1]["messages"]]
    assert sent == ["three", "d4-sft heard: three", "four"]
    expect(chat.messages).to_have_count(8)  # the page still shows it all


def test_a_single_message_too_long_is_not_offered_what_cannot_help(chat, server):
    server.play(fails(400, "too long", code="context_length_exceeded"))
    chat.say("hello")
    expect(error(chat)).to_contain_text("too long")
    expect(chat.answers.last.get_by_role("button", name="Retry without")).to_have_count(0)


def test_an_answer_cut_by_its_limit_says_so(chat, server):
    server.play(says("endless", finish="length"))
    chat.say("hello")
    expect(chat.answers.last).to_contain_text("Ended at the longest answer")


def test_text_stays_readable_when_markdown_cannot_be_had(chat, server):
    chat.page.route("**/page/markdown", lambda route: route.fulfill(status=503))
    server.play(says("**bold** & <b>plain</b>"))
    chat.say("hello")
    expect(chat.answers.last.locator(".body")).to_have_text("**bold** & <b>plain</b>")


def test_a_page_without_models_says_so_and_keeps_the_message(context, server):
    server.models = []
    chat = Chat.open(context, server)
    chat.box.fill("hello")
    chat.box.press("Enter")
    expect(chat.page.locator("#notices")).to_contain_text("has no model to ask")
    expect(chat.box).to_have_value("hello")
    server.models = ["d4-sft"]  # no reload is needed
    chat.box.press("Enter")
    expect(chat.answers.last).to_contain_text("d4-sft heard: hello")
    assert chat.problems == []


def test_a_failed_answer_offers_only_what_helps(chat, server):
    server.play(fails(500, "x"))
    chat.say("hello")
    expect(error(chat)).to_be_visible()
    names = chat.answers.last.get_by_role("button").evaluate_all(
        "buttons => buttons.map((b) => b.ariaLabel ?? b.textContent)"
    )
    assert names == ["Retry", "Delete"]


def test_an_answer_without_a_word_is_said_to_be_one(chat, server):
    server.play(says())
    chat.say("hello")
    expect(chat.answers.last).to_contain_text("ended its answer before the first word")
    expect(chat.answers.last.locator(".stats")).to_have_count(0)
    chat.button("Regenerate").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d4-sft heard: hello")


def test_a_model_that_is_gone_is_replaced_by_the_chosen_one(chat, server):
    chat.say("hello")
    server.models = ["d8-sft"]
    chat.page.reload()
    expect(chat.page.locator("#model-name")).to_have_text("d8-sft")
    chat.button("Regenerate").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d8-sft heard: hello")
    server.play(fails(500, "x"))
    chat.say("more")
    server.models = ["d12-sft"]
    chat.page.reload()
    expect(chat.page.locator("#model-name")).to_have_text("d12-sft")
    chat.button("Retry").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d12-sft heard: more")


def test_an_edit_is_kept_while_there_is_no_model_to_ask(chat, server):
    chat.say("hello")
    server.models = []
    chat.page.reload()
    chat.messages.first.hover()
    chat.button("Edit").click()
    editor = chat.page.get_by_role("textbox", name="Edit your message")
    editor.fill("other")
    editor.press("Enter")
    expect(chat.page.locator("#notices")).to_contain_text("has no model to ask")
    expect(editor).to_have_value("other")
    server.models = ["d4-sft"]
    editor.press("Enter")
    expect(chat.answers.last).to_contain_text("d4-sft heard: other")
