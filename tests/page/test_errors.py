"""Whatever goes wrong is said in words, loses nothing, and can be tried again."""

import pytest
from playwright.sync_api import expect

from tests.page.app_thread import DEADLINE_S
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
    server.play(says("the beginning ", "and more", break_after=1, hold_after=1))
    chat.say("hello", wait=False)
    expect(chat.answers.last).to_contain_text("the beginning")
    server.go_on()
    chat.wait_until_finished()
    expect(error(chat)).to_contain_text("connection broke")
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
    chat.reload()
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


TOO_LONG = fails(400, "maximum 64 tokens, requested 90", code="context_length_exceeded")


def sent(server) -> list[str]:
    return [message["content"] for message in server.requests[-1][1]["messages"]]


def test_what_was_left_out_once_is_left_out_from_then_on(chat, server):
    line = chat.page.locator(".memory-start")
    for text in ("one", "two", "three"):
        chat.say(text)
    expect(line).to_have_count(0)
    server.play(TOO_LONG)
    chat.say("four")
    chat.button("Retry without the first 2 turns").click()
    chat.wait_until_finished()
    chat.say("five")
    end = ["three", "d4-sft heard: three", "four", "d4-sft heard: four", "five"]
    assert sent(server) == end
    chat.button("Regenerate").last.click()
    chat.wait_until_finished()
    assert sent(server) == end
    chat.reload()
    expect(line).to_contain_text("The first 2 turns no longer fit.")
    following = line.locator("xpath=following-sibling::*[1]")
    expect(following).to_contain_text("three")
    chat.say("six")
    assert sent(server)[:2] == ["three", "d4-sft heard: three"]
    server.play(TOO_LONG)  # and when that is too much again, more is left out
    chat.say("seven")
    chat.button("Retry without the first 4 turns").click()
    chat.wait_until_finished()
    assert sent(server)[0] == "five"
    expect(following).to_contain_text("five")


def test_another_branch_begins_at_its_own_beginning(chat, server):
    for text in ("one", "two"):
        chat.say(text)
    server.play(TOO_LONG)
    chat.say("three")
    chat.button("Retry without the first turn").click()
    chat.wait_until_finished()
    assert sent(server) == ["two", "d4-sft heard: two", "three"]
    chat.messages.nth(4).hover()
    chat.messages.nth(4).get_by_role("button", name="Edit").click()  # as long as it was
    chat.page.get_by_role("textbox", name="Edit your message").fill("3")
    chat.page.keyboard.press("Enter")
    chat.wait_until_finished()
    assert sent(server) == ["two", "d4-sft heard: two", "3"]
    chat.messages.nth(2).hover()
    chat.messages.nth(2).get_by_role("button", name="Edit").click()
    chat.page.get_by_role("textbox", name="Edit your message").fill("2")
    chat.page.keyboard.press("Enter")
    chat.wait_until_finished()
    assert sent(server) == ["one", "d4-sft heard: one", "2"]
    expect(chat.page.locator(".memory-start")).to_have_count(0)
    chat.messages.nth(2).get_by_role("button", name="Previous alternative").click()
    expect(chat.page.locator(".memory-start")).to_have_count(1)


def test_turns_that_were_not_sent_are_not_offered_to_be_left_out(chat, server):
    server.play(fails(500, "x"), TOO_LONG)
    chat.say("unanswered")
    chat.say("a long message")
    assert sent(server) == ["a long message"]
    expect(error(chat)).to_contain_text("The message itself is too long")
    expect(chat.answers.last.get_by_role("button", name="Retry without")).to_have_count(0)


def test_a_base_model_is_sent_one_message_which_alone_can_be_too_long(chat, server):
    server.models = ["d4-base"]
    chat.reload()
    expect(chat.page.locator("#model-name")).to_have_text("d4-base")
    for text in ("one", "two"):
        chat.say(text)
    server.play(TOO_LONG)
    chat.say("three")
    expect(error(chat)).to_contain_text("The message itself is too long")
    expect(chat.answers.last.get_by_role("button", name="Retry without")).to_have_count(0)


def test_a_single_message_too_long_is_not_offered_what_cannot_help(chat, server):
    server.play(TOO_LONG)
    chat.say("hello")
    expect(error(chat)).to_contain_text("The message itself is too long for this model.")
    expect(chat.answers.last.get_by_role("button", name="Retry without")).to_have_count(0)
    chat.button("Settings").click()
    chat.page.get_by_label("Longest answer").fill("64")
    chat.button("Done").click()
    server.play(TOO_LONG)
    chat.button("Retry").click()  # the message need not be to blame now
    chat.wait_until_finished()
    expect(error(chat)).to_contain_text("the longest answer of the settings")


STARTING = fails(503, "The server is starting.", code="starting", Retry_After="1")


def wait_until_asked(chat, server, times):
    """Until the page waits for the server again, having asked it so many times."""
    chat.wait_until(lambda: len(server.requests) >= times, f"request {times}")
    chat.settle()
    assert len(server.requests) == times


def test_a_server_that_starts_is_waited_for(chat, server):
    another_hour = fails(503, "The server is starting.", code="starting", Retry_After="3600")
    server.play(STARTING, another_hour, says("awake", " at last"))
    chat.say("hello", wait=False)
    note = chat.answers.last.get_by_text("The model is being loaded and compiled.")
    expect(note).to_be_visible()
    expect(chat.page.locator("#announcer")).to_contain_text("being loaded and compiled")
    expect(chat.page.locator(".error")).to_have_count(0)
    for times, seconds in ((1, 2), (2, 3600)):  # two seconds at least
        wait_until_asked(chat, server, times)
        chat.let_pass(seconds - 0.1)
        chat.settle()
        assert len(server.requests) == times
        chat.let_pass(seconds)
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("awake at last")
    expect(note).to_have_count(0)
    assert len(server.requests) == 3
    stats = chat.answers.last.locator(".stats")
    first_ms = float(stats.inner_text().split("first after ")[1].split()[0])
    assert first_ms < 1000 * DEADLINE_S  # of the model, not of the wait


def test_waiting_for_a_server_can_be_stopped(chat, server):
    server.play(*[STARTING] * 50)
    chat.say("hello", wait=False)
    expect(chat.answers.last).to_contain_text("being loaded and compiled")
    chat.page.keyboard.press("Escape")
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("Stopped.")
    expect(chat.answers.last).not_to_contain_text("being loaded and compiled")
    chat.let_pass(60)
    chat.settle()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("model", "limit", "words"),
    [
        ("d4-sft", 5, "Ended at the longest answer that the settings allow."),
        ("d4-sft", None, "its context is full"),
        ("d4-base", None, "Ended at the longest answer that the settings allow."),
    ],
)
def test_an_answer_that_was_cut_names_the_limit_that_it_met(chat, server, model, limit, words):
    """Without one of the settings it is the context, but of a base model, which has a default."""
    server.models = [model]
    settings = f"JSON.stringify({{ maxTokens: {limit or 'null'} }})"
    chat.page.evaluate(f"localStorage.setItem('jaxchat.settings', {settings})")
    chat.reload()
    server.play(says("endless", finish="length"))
    chat.say("hello")
    expect(chat.answers.last).to_contain_text(words)
    chat.reload()
    expect(chat.answers.last).to_contain_text(words)


def test_text_stays_readable_when_markdown_cannot_be_had(chat, server):
    chat.page.route("**/page/markdown", lambda route: route.fulfill(status=503))
    server.play(says("**bold** & <b>plain</b>"))
    chat.say("hello")
    expect(chat.answers.last.locator(".body")).to_have_text("**bold** & <b>plain</b>")


def test_an_answer_grows_on_where_markdown_never_comes(chat, server):
    chat.page.route("**/page/markdown", lambda route: None)
    server.play(says("one ", "two ", "**three**", hold_after=1))
    chat.say("hello", wait=False)
    text = chat.answers.last.locator(".body")
    expect(text).to_have_text("one ")
    server.go_on()
    chat.wait_until_finished()
    expect(text).to_have_text("one ")  # it waits for the Markdown of this
    chat.let_pass(5)
    expect(text).to_have_text("one two **three**")


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
    chat.reload()
    expect(chat.page.locator("#model-name")).to_have_text("d8-sft")
    chat.button("Regenerate").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d8-sft heard: hello")
    server.play(fails(500, "x"))
    chat.say("more")
    server.models = ["d12-sft"]
    chat.reload()
    expect(chat.page.locator("#model-name")).to_have_text("d12-sft")
    chat.button("Retry").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d12-sft heard: more")


def test_a_tab_that_was_open_learns_of_other_models(chat, server):
    chat.say("hello")
    server.models = ["d8-base", "d8-sft"]
    chat.say("more")
    expect(error(chat)).to_contain_text("does not have this model any more")
    expect(chat.page.locator("#model-name")).to_have_text("d8-sft")
    chat.button("Retry with d8-sft").click()
    chat.wait_until_finished()
    expect(chat.answers.last).to_contain_text("d8-sft heard: more")
    chat.say("and more")
    expect(chat.answers.last).to_contain_text("d8-sft heard: and more")


def test_models_side_by_side_are_retried_with_those_of_their_stages(chat, server):
    server.models = ["d4-mid", "d4-sft"]
    chat.reload()
    chat.page.locator("#models summary").click()
    chat.page.get_by_role("switch", name="Several, side by side").check()
    for name in server.models:
        chat.page.get_by_role("checkbox", name=name).check()
    chat.page.keyboard.press("Escape")
    server.models = ["d8-base", "d8-mid", "d8-sft"]
    chat.say("hello")
    expect(chat.page.locator("#model-name")).to_have_text("2 models")
    for name in ("d8-mid", "d8-sft"):
        chat.button(f"Retry with {name}").click()
        chat.wait_until_finished()
    expect(chat.page.locator(".column .name")).to_have_text(["d8-mid", "d8-sft"])
    expect(chat.page.locator(".column.active .name")).to_have_text("d8-sft")


def test_an_edit_is_kept_while_there_is_no_model_to_ask(chat, server):
    chat.say("hello")
    server.models = []
    chat.reload()
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
