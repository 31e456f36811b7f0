"""Nothing that somebody wrote runs: not in messages, titles, answers, files, or addresses."""

import json

import pytest
from playwright.sync_api import expect

from tests.page.corpus import XSS
from tests.page.scripted_server import Reply, fails, says

WHOLE = "\n\n".join(XSS)


@pytest.fixture(autouse=True)
def harmless(chat):
    yield
    chat.settle()
    assert chat.page.evaluate("window.hacked") is None
    markup = chat.page.locator("#thread, #conversations, header, #notices")
    for selector in ("script", "iframe", "img", "object", "base", "style", "link", "form"):
        expect(markup.locator(selector)).to_have_count(0)
    assert chat.address.startswith(chat.server.url)


def test_in_what_the_reader_writes(chat):
    chat.say(WHOLE)
    expect(chat.messages.first.locator(".bubble")).to_have_text(WHOLE.replace("\t", " "))


def test_in_what_the_model_writes(chat, server):
    server.play(*(says(text) for text in XSS), says(WHOLE))
    chat.say("begin")
    for text in XSS:
        assert chat.answer_text() == text
        chat.say("next")
    assert chat.answer_text() == WHOLE


def test_in_an_answer_that_streams_in_pieces(chat, server):
    server.play(says(*(WHOLE[i : i + 40] for i in range(0, len(WHOLE), 40)), pause_s=0.02))
    chat.say("begin")
    assert chat.answer_text() == WHOLE


def test_in_links(chat, server):
    server.play(says("[a link](https://x.example)\n\n" + WHOLE))
    chat.say("begin")
    links = chat.page.locator("#thread a")
    expect(links.first).to_have_text("a link")
    protocols = links.evaluate_all("links => links.map(a => a.protocol)")
    assert set(protocols) <= {"http:", "https:", "mailto:"}


def test_in_calls_of_the_tool_token_views_and_errors(chat, server):
    deltas = [("python", WHOLE), ("python_output", WHOLE), ("text", "x")]
    tokens = [(text, -0.1, [(text, -0.1)]) for text in XSS[:3]]
    server.play(Reply(deltas, tokens=tokens), fails(400, WHOLE, code=WHOLE))
    chat.page.evaluate("localStorage.setItem('jaxchat.settings', '{\"tokenView\": true}')")
    chat.reload()
    chat.say("begin")
    chat.button("Token view").click()
    chat.page.locator(".tokens .token").first.hover()
    expect(chat.page.get_by_role("tooltip")).to_be_visible()
    chat.say("more")


def test_in_titles_and_searches(chat):
    for text in XSS[:6]:
        chat.button("New chat").click()
        chat.say(text)
    chat.page.get_by_role("searchbox").fill(XSS[1])
    chat.page.locator("#conversations li").first.hover()
    chat.page.locator("#conversations button").first.click()
    chat.page.get_by_role("textbox", name="Title").fill(XSS[0])
    chat.page.keyboard.press("Enter")


def test_in_names_of_models(chat, server):
    server.models = [XSS[0], XSS[1]]
    chat.reload()
    chat.page.locator("#models summary").click()
    expect(chat.page.locator("#model-choices label")).to_have_text([XSS[1], XSS[0]])


def test_in_imported_files(chat):
    message = {"role": "assistant", "parts": [{"type": "text", "text": WHOLE}], "children": []}
    messages = {
        "__proto__x": {**message, "role": "user", "children": ["b"], "active": "0"},
        "b": {**message, "model": XSS[0], "error": {"message": XSS[0]}, "status": "failed"},
    }
    conversation = {"title": XSS[1], "children": ["__proto__x"], "messages": messages}
    file = {"format": "jaxchat-conversations", "version": 1, "conversations": [conversation]}
    chat.page.set_input_files(
        "#import-file",
        {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps(file).encode()},
    )
    expect(chat.messages).to_have_count(2)
    expect(chat.page.locator("h1")).to_have_text(XSS[1])
    markdown = f"# {XSS[0]}\n\n## You\n\n{WHOLE}\n\n## Answer\n\n{WHOLE}\n"
    chat.page.set_input_files(
        "#import-file",
        {"name": "x.md", "mimeType": "text/markdown", "buffer": markdown.encode()},
    )
    expect(chat.page.locator("h1")).to_have_text(XSS[0])


@pytest.mark.parametrize("address", ["#<img src=x onerror=window.hacked=1>", "#__proto__", "#%"])
def test_in_addresses(chat, address):
    chat.go_to("/" + address)
    chat.reload()
    expect(chat.page.locator("h1")).to_have_text("New chat")


def test_text_cannot_become_markup_outside_the_one_policy(chat):
    blocked = chat.page.evaluate(
        """() => {
          try { document.body.innerHTML = "<b>x</b>"; return false; }
          catch (error) { return error instanceof TypeError; }
        }"""
    )
    assert blocked
    chat.problems.clear()  # the browser reports what it blocked
