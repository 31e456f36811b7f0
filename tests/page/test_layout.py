"""Where things are: the list put away, wide tables on a phone, the foot of the page, paper."""

import re

from playwright.sync_api import expect

from tests.page.scripted_server import fails, says

COLUMNS = "| one | two | three | four | five | six |\n|--|--|--|--|--|--|\n"
TABLE = COLUMNS + "| and so on and so forth " * 6 + "|"


def test_the_list_can_be_put_away_and_stays_so(chat):
    listed = chat.page.get_by_role("navigation", name="Conversations")
    chat.button("Close the list").click()
    expect(listed).to_be_hidden()
    expect(chat.button("Conversations")).to_be_focused()
    chat.say("hello")
    chat.page.add_init_script(
        "document.addEventListener('DOMContentLoaded', () => {"
        " window.first = document.getElementById('sidebar').checkVisibility() })"
    )
    chat.reload()
    expect(listed).to_be_hidden()
    assert chat.page.evaluate("window.first") is False  # nor was it there for a moment
    chat.button("Start a new chat").click()
    expect(chat.page.locator("h1")).to_have_text("New chat")
    chat.page.keyboard.press("Control+k")
    expect(chat.page.get_by_role("searchbox")).to_be_focused()
    chat.button("Close the list").click()
    chat.button("Conversations").click()
    expect(chat.button("Close the list")).to_be_focused()
    expect(chat.button("Start a new chat")).to_be_hidden()
    chat.reload()
    expect(listed).to_be_visible()


def test_a_phone_has_its_drawer_whatever_was_chosen_on_a_large_screen(chat):
    chat.say("hello")
    chat.button("Close the list").click()
    chat.page.set_viewport_size({"width": 390, "height": 800})
    chat.settle()
    chat.button("Start a new chat").click()
    expect(chat.messages).to_have_count(0)
    chat.button("Conversations").click()
    chat.page.get_by_role("link", name="hello").click()
    expect(chat.messages).to_have_count(2)
    expect(chat.page.get_by_role("navigation", name="Conversations")).to_be_hidden()


def test_a_wide_table_scrolls_on_a_phone_instead_of_showing_a_word_a_line(chat, server):
    chat.page.set_viewport_size({"width": 390, "height": 800})
    server.play(says(TABLE))
    chat.say("a table")
    cells = chat.page.locator("td")
    expect(cells).to_have_count(6)
    assert min(cell.bounding_box()["width"] for cell in cells.all()) >= 88
    box = chat.page.get_by_role("region", name="Table")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")


def test_what_fades_out_above_the_message_box_can_be_clicked(chat, server):
    server.play(says("word " * 2000))
    chat.say("hello")
    above = "getComputedStyle(document.querySelector('.dock'), '::before')"
    assert "gradient" in chat.page.evaluate(f"{above}.backgroundImage")
    x, y = chat.page.locator("#composer").evaluate(
        "e => [e.getBoundingClientRect().left + 9, e.getBoundingClientRect().top - 9]"
    )
    under = "([x, y]) => document.elementFromPoint(x, y).closest('#scroller') !== null"
    assert chat.page.evaluate(under, [x, y])


def test_all_of_a_conversation_is_printed_in_ink_on_white(chat, server):
    chat.page.emulate_media(color_scheme="dark")
    chat.button("Close the list").click()
    for _ in range(3):
        server.play(says("word " * 1000 + "\n\n```\ncode\n```"))
        chat.say("hello")
    expect(chat.page.locator(".code pre")).to_have_count(3)
    pages = re.findall(rb"/Type\s*/Page\b", chat.page.pdf(format="A4"))
    assert len(pages) >= 4
    chat.page.emulate_media(media="print", color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert chat.page.evaluate(paper) == "rgb(255, 255, 255)"
    expect(chat.page.get_by_role("button")).to_have_count(0)
    expect(chat.box).to_be_hidden()
    expect(chat.page.locator("h1")).to_be_visible()


def test_a_choice_of_models_looks_like_one(chat, server):
    sign = "getComputedStyle(document.querySelector('#models summary'), '::after').content"
    assert "▾" not in chat.page.evaluate(sign)
    server.models = ["d4-sft", "d4-rl"]
    chat.reload()
    expect(chat.page.locator("#model-name")).to_have_text("d4-sft")
    assert "▾" in chat.page.evaluate(sign)


def test_a_base_model_is_given_the_beginning_of_a_text(chat, server):
    expect(chat.box).to_have_attribute("placeholder", "Ask anything")
    server.models = ["d4-base"]
    chat.reload()
    expect(chat.box).to_have_attribute("placeholder", "The beginning of a text")


def test_who_is_refused_for_a_key_is_led_to_its_field(chat, server):
    server.play(fails(401, "The key is missing.", code="invalid_api_key"))
    chat.say("hello")
    chat.button("Open the settings").click()
    expect(chat.page.get_by_label("API key", exact=True)).to_be_focused()
    chat.page.keyboard.type("secret")
    chat.page.keyboard.press("Enter")
    expect(chat.page.get_by_role("dialog")).to_be_hidden()
    chat.button("Retry").click()
    expect(chat.answers.last).to_contain_text("heard: hello")
