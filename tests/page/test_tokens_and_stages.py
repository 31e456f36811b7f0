"""The token view, and several models that answer one question side by side."""

import math

from playwright.sync_api import expect

from tests.page.conftest import Chat, new_context
from tests.page.scripted_server import Reply, fails, says

TOKENS = [
    ("Hello", math.log(0.9), [("Hello", math.log(0.9)), ("Hi", math.log(0.05))]),
    (" odd", math.log(0.02), [(" nice", math.log(0.6)), ("\n", math.log(0.1))]),
    (" world", math.log(0.5), [(" world", math.log(0.5))]),
]


def record_tokens(chat):
    chat.button("Settings").click()
    chat.page.get_by_label("Record token probabilities").check()
    chat.button("Done").click()


def test_hovering_shows_the_alternatives_and_their_probabilities(chat, server):
    record_tokens(chat)
    server.play(Reply([("text", text) for text, _, _ in TOKENS], tokens=TOKENS))
    chat.say("hello")
    body = server.requests[-1][1]
    assert body["logprobs"] is True and body["top_logprobs"] == 5
    chat.button("Token view").click()
    tokens = chat.page.locator(".tokens .token")
    expect(tokens).to_have_text(["Hello", " odd", " world"])
    card = chat.page.get_by_role("tooltip")
    tokens.nth(0).hover()
    expect(card.locator("li")).to_have_text(["Hello90.0%", "Hi5.00%"])
    expect(card.locator(".chosen")).to_have_text("Hello90.0%")
    tokens.nth(1).hover()  # chosen, though not among the likeliest
    expect(card.locator("li")).to_have_text(["␣nice60.0%", "⏎10.0%", "␣odd2.00%"])
    chat.page.mouse.move(5, 5)
    expect(card).to_be_hidden()
    chat.button("Token view").click()
    expect(chat.answers.last.locator(".prose")).to_have_text("Hello odd world")


def test_likely_tokens_have_another_colour_than_unlikely_ones(chat, server):
    record_tokens(chat)
    server.play(Reply([("text", text) for text, _, _ in TOKENS], tokens=TOKENS))
    chat.say("hello")
    chat.button("Token view").click()
    colours = chat.page.locator(".tokens .token").evaluate_all(
        "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"
    )
    assert len(set(colours)) == 3


def test_the_arrow_keys_go_from_token_to_token(chat, server):
    record_tokens(chat)
    server.play(Reply([("text", text) for text, _, _ in TOKENS], tokens=TOKENS))
    chat.say("hello")
    chat.button("Token view").click()
    tokens = chat.page.locator(".tokens .token")
    tokens.nth(0).focus()
    chat.page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    expect(chat.page.get_by_role("tooltip")).to_contain_text("␣odd")
    expect(tokens.nth(1)).to_have_attribute("aria-label", "␣odd, 2.00%")


def test_a_single_model_answers_without_a_choice(chat, server):
    chat.page.locator("#models summary").click()
    expect(chat.page.get_by_role("radio")).to_have_count(1)
    expect(chat.page.get_by_role("switch", name="Several")).to_be_hidden()


def choose_stages(chat, server, *models: str):
    server.models = list(models)
    chat.reload()
    chat.page.locator("#models summary").click()


def test_stages_are_listed_in_the_order_of_training(chat, server):
    choose_stages(chat, server, "rl", "other", "base", "sft", "mid")
    labels = chat.page.locator("#model-choices label")
    expect(labels).to_have_text(["base", "mid", "sft", "rl", "other"])
    expect(chat.page.get_by_role("radio", name="sft")).to_be_checked()
    chat.page.get_by_role("radio", name="mid").check()
    chat.page.keyboard.press("Escape")
    chat.say("hello")
    assert server.requests[-1][1]["model"] == "mid"
    chat.reload()
    expect(chat.page.locator("#model-name")).to_have_text("mid")


def test_all_stages_answer_one_question_side_by_side(chat, server):
    choose_stages(chat, server, "base", "mid", "sft", "rl")
    chat.page.get_by_role("switch", name="Several, side by side").check()
    for name in ("base", "mid", "sft", "rl"):
        chat.page.get_by_role("checkbox", name=name, exact=True).check()
    chat.page.keyboard.press("Escape")
    chat.say("hello")
    columns = chat.page.locator(".column")
    expect(columns).to_have_count(4)
    expect(columns.locator(".name")).to_have_text(["base", "mid", "sft", "rl"])
    paths = {body["model"]: path for path, body in server.requests}
    assert paths.pop("base") == "/v1/completions"
    assert set(paths.values()) == {"/v1/chat/completions"}
    base = next(body for path, body in server.requests if path == "/v1/completions")
    assert base["prompt"] == "hello" and "messages" not in base
    assert base["max_tokens"] == 128  # it never ends by itself, and the API's default is 16
    expect(chat.page.locator("#model-name")).to_have_text("4 models")
    expect(columns.nth(0)).to_contain_text("… and so on, says base")
    boxes = [column.bounding_box() for column in columns.all()]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]


def compare(chat, server, *models: str):
    """Let all of these models answer side by side."""
    choose_stages(chat, server, *models)
    chat.page.get_by_role("switch", name="Several, side by side").check()
    for name in models:
        chat.page.get_by_role("checkbox", name=name, exact=True).check()
    chat.page.keyboard.press("Escape")


def sent_to(server, model: str) -> list[str]:
    """The contents of the last messages that a model was sent."""
    body = next(body for _, body in reversed(server.requests) if body["model"] == model)
    return [message["content"] for message in body["messages"]]


def column(chat, model: str, row: int = -1):
    """A model's answer in one of the rows of columns."""
    columns = chat.page.locator(".columns").nth(row).locator(".column")
    return columns.filter(has=chat.page.locator(".name", has_text=model))


def test_the_conversation_goes_on_from_the_chosen_answer(chat, server):
    compare(chat, server, "mid", "sft")
    chat.say("hello")
    chat.button("Go on from this one").click()
    expect(chat.page.locator(".column.active .name")).to_have_text("mid")
    chat.page.locator("#models summary").click()
    chat.page.get_by_role("switch", name="Several, side by side").uncheck()
    chat.page.get_by_role("radio", name="sft").check()
    chat.page.keyboard.press("Escape")
    chat.say("more")
    assert sent_to(server, "sft") == ["hello", "mid heard: hello", "more"]
    chat.reload()
    expect(chat.page.locator(".column.active .name")).to_have_text("mid")
    expect(chat.messages).to_have_count(5)


def test_models_side_by_side_are_sent_each_its_own_answers(chat, server):
    compare(chat, server, "base", "mid", "sft")
    for text in ("one", "two"):
        chat.say(text)
    column(chat, "mid").get_by_role("button", name="Go on from this one").click()
    chat.say("three")
    for model in ("mid", "sft"):
        first, second = f"{model} heard: one", f"{model} heard: two"
        assert sent_to(server, model) == ["one", first, "two", second, "three"]
    base = next(body for path, body in reversed(server.requests) if path == "/v1/completions")
    assert base["prompt"] == "three"


def test_a_model_without_an_answer_of_its_own_is_sent_the_shown_one(chat, server):
    compare(chat, server, "mid", "sft")
    server.play(fails(500, "broken"), says("fine"))  # mid, then sft
    chat.say("one")
    chat.say("two")
    assert sent_to(server, "mid") == sent_to(server, "sft") == ["one", "fine", "two"]


def test_the_most_finished_model_is_gone_on_from_unless_the_reader_chooses(chat, server):
    compare(chat, server, "rl", "other", "base", "mid")
    for text in ("one", "two"):
        chat.say(text)
    expect(chat.page.locator(".column.active .name")).to_have_text(["rl", "rl"])
    column(chat, "mid", 0).get_by_role("button", name="Go on from this one").click()
    expect(chat.page.locator(".column.active .name")).to_have_text("mid")  # a branch of its own


def test_a_retry_of_one_model_keeps_what_is_gone_on_from(chat, server):
    compare(chat, server, "mid", "sft")
    server.play(fails(500, "broken"), says("fine"))
    chat.say("one")
    chat.button("Retry").click()
    chat.wait_until_finished()
    expect(chat.page.locator(".error")).to_have_count(0)
    expect(chat.page.locator(".column.active .name")).to_have_text("sft")


def test_one_of_several_can_fail_and_be_tried_again(chat, server):
    choose_stages(chat, server, "mid", "sft")
    chat.page.get_by_role("switch", name="Several, side by side").check()
    for name in ("mid", "sft"):
        chat.page.get_by_role("checkbox", name=name, exact=True).check()
    chat.page.keyboard.press("Escape")
    server.play(fails(500, "broken"), says("fine"))
    chat.say("hello")
    expect(chat.page.locator(".column")).to_have_count(2)
    chat.button("Retry").click()
    chat.wait_until_finished()
    expect(chat.page.locator(".column")).to_have_count(2)
    expect(chat.page.locator(".error")).to_have_count(0)
    chat.answers.first.get_by_role("button", name="Regenerate").click()
    chat.wait_until_finished()
    expect(chat.page.locator(".column")).to_have_count(2)
    expect(chat.answers.first).to_contain_text("2/2")


def test_the_names_stay_in_sight_while_long_columns_are_read(chat, server):
    choose_stages(chat, server, "mid", "sft")
    chat.page.get_by_role("switch", name="Several, side by side").check()
    for name in ("mid", "sft"):
        chat.page.get_by_role("checkbox", name=name, exact=True).check()
    chat.page.keyboard.press("Escape")
    server.play(says("line\n\n" * 60), says("line\n\n" * 60))
    chat.say("hello")
    expect(chat.page.locator(".prose p")).to_have_count(120)
    assert chat.page.evaluate("scroller.scrollTop") > 500
    for name in chat.page.locator(".column .name").all():
        expect(name).to_be_in_viewport()


def test_a_line_end_has_a_sign_that_can_be_pointed_at(chat, server):
    record_tokens(chat)
    tokens = [("a", -0.1, []), ("\n\n", -0.5, [("\n\n", -0.5)]), ("b", -0.1, [])]
    server.play(Reply([("text", text) for text, _, _ in tokens], tokens=tokens))
    chat.say("hello")
    chat.button("Token view").click()
    end = chat.page.locator(".tokens .token").nth(1)
    box = end.evaluate("span => span.getClientRects()[0].toJSON()")  # of its first line
    chat.page.mouse.move(box["left"] + 5, box["top"] + box["height"] / 2)
    expect(chat.page.get_by_role("tooltip").locator("code")).to_have_text("⏎⏎")
    expect(end).to_have_text("\n\n", use_inner_text=False)  # the sign is no text


def test_the_card_of_a_token_can_be_dismissed_and_opened_by_touch(browser, server):
    viewport = {"width": 360, "height": 640}
    context = new_context(
        browser, base_url=server.url, viewport=viewport, has_touch=True, is_mobile=True
    )
    context.add_init_script("localStorage.setItem('jaxchat.settings', '{\"tokenView\": true}')")
    chat = Chat.open(context, server)
    server.play(Reply([("text", text) for text, _, _ in TOKENS], tokens=TOKENS))
    chat.say("hello")
    chat.button("Token view").tap()
    card = chat.page.get_by_role("tooltip")
    chat.page.locator(".tokens .token").nth(1).tap()
    expect(card).to_contain_text("␣odd")
    chat.page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    assert chat.problems == []
    context.close()
