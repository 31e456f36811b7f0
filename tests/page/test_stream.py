"""A stream of events gives the same text however the network cuts it."""

import base64

import pytest
from playwright.sync_api import expect

from tests.page.scripted_server import Reply, chat_events, holds, says

TEXT = ["Grüße, ", "世界 ", "👩‍👩‍👧 ", "line one\nline two ", "\u2028 \u0085 end"]

PARSE = """
async ([encoded, cuts]) => {
  const { readEvents } = await import("/page/sse.js");
  const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
  const results = [];
  for (const cut of cuts) {
    const pieces = [bytes.slice(0, cut), bytes.slice(cut)];
    const stream = new ReadableStream({
      pull(controller) {
        if (pieces.length) controller.enqueue(pieces.shift());
        else controller.close();
      },
    });
    const events = [];
    for await (const data of readEvents(stream)) events.push(data);
    results.push(JSON.stringify(events));
  }
  return results;
}
"""


def parse(chat, stream: bytes, cuts) -> list[str]:
    return chat.page.evaluate(PARSE, [base64.b64encode(stream).decode(), list(cuts)])


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_cut_at_every_byte_changes_nothing(chat, line_end):
    stream = b": a comment\n\n" + b"".join(chat_events(says(*TEXT)))
    stream = stream.replace(b"\n", line_end.encode())
    (whole,) = parse(chat, stream, [len(stream)])
    assert all(text.replace("\n", "\\\\n") in whole for text in TEXT), whole
    assert whole.endswith('"[DONE]"]')
    assert set(parse(chat, stream, range(len(stream) + 1))) == {whole}


READ_ANSWER = """
async ([encoded, cuts]) => {
  const { streamAnswer } = await import("/page/api.js");
  const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
  const settings = { temperature: 1, topK: 0, topP: 1, maxTokens: null, seed: 0 };
  const ask = { model: "m", messages: [], settings };
  const original = window.fetch;
  const results = [];
  for (const cut of cuts) {
    window.fetch = async () => new Response(new Blob([bytes.slice(0, cut)]).stream());
    let [text, end] = ["", "complete"];
    try {
      for await (const piece of streamAnswer(ask)) text += piece.text ?? "";
    } catch (error) {
      end = error.kind ?? String(error);
    }
    results.push([text, end]);
  }
  window.fetch = original;
  return results;
}
"""


def test_a_stream_that_ends_at_any_byte_gives_the_text_so_far_and_says_so(chat):
    stream = b"".join(chat_events(says(*TEXT)))
    encoded = base64.b64encode(stream).decode()
    cuts = list(range(len(stream) + 1))
    results = chat.page.evaluate(READ_ANSWER, [encoded, cuts])
    whole = "".join(TEXT)
    prefixes = {"".join(TEXT[:count]) for count in range(len(TEXT) + 1)}
    assert {text for text, _ in results} == prefixes
    assert results[-1] == [whole, "complete"]
    assert {end for _, end in results[:-1]} == {"broken"}


def test_lines_of_one_event_are_joined_and_other_fields_ignored(chat):
    stream = (
        b"\xef\xbb\xbfdata: 0\n\nevent: x\ndata: a\nid: 1\ndata:b\nretry: 3\n\ndata\n\ndata: cut"
    )
    (events,) = parse(chat, stream, [0])
    assert events == '["0","a\\nb"]'


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_a_cut_in_the_answer_of_the_server_changes_nothing(chat, server, share):
    length = sum(map(len, chat_events(says(*TEXT))))
    server.play(says(*TEXT, cut_at=int(length * share)))
    chat.say("hello")
    assert chat.answer_text() == "".join(TEXT)


def test_an_answer_that_comes_byte_by_byte_is_whole(chat, server):
    server.play(says(*TEXT, one_byte_at_a_time=True))
    chat.say("hello")
    assert chat.answer_text() == "".join(TEXT)


def test_special_tokens_and_control_characters_are_text(chat, server):
    text = "<|assistant_end|> \x00\x07\x1b[31m data: [DONE]\n\ndata: x"
    server.play(says(text))
    chat.say("hello")
    assert chat.answer_text() == text


def test_an_answer_grows_while_it_comes(chat, server):
    server.play(says(*["word "] * 60, hold_after=1))
    chat.say("hello", wait=False)
    answer = chat.answers.last
    for count in (1, 2, 30):
        expect(answer.locator(".body")).to_have_text(("word " * count).strip())
        expect(answer).to_have_attribute("aria-busy", "true")
        server.go_on(1 if count == 1 else 28)
    chat.button("Stop").click()
    chat.wait_until_finished()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("plain **bold", "p"),
        ("a **bold** word", "p"),
        ("a **bold**", "strong"),
        ("- one\n- two", "li"),
        ("- one\n\n- two", "p"),
        ("1. one\n   - inner", "li"),
        ("> quoted", "p"),
        ("```python\nx = 1\n", "code"),
        ("| a |\n|---|\n| b |", "td"),
    ],
)
def test_the_cursor_stands_where_the_text_ends(chat, server, text, place):
    server.play(holds(text))
    chat.say("hello", wait=False)
    tail = chat.answers.last.locator(f".prose {place}[data-tail]")
    expect(tail).to_have_count(1)
    expect(chat.answers.last.locator("[data-tail]")).to_have_count(1)
    cursor = "tail => getComputedStyle(tail, '::after').content"
    assert "▍" in tail.evaluate(cursor)
    chat.page.keyboard.press("Escape")
    chat.wait_until_finished()
    assert "▍" not in tail.evaluate(cursor)


def test_a_call_that_was_stopped_has_no_result(chat, server):
    server.play(Reply([("python", "1+"), ("python", "1")], hold_after=2))
    chat.say("hello", wait=False)
    output = chat.page.get_by_role("figure", name="Calculator").locator("output")
    expect(output).to_have_text("…")
    chat.page.keyboard.press("Escape")
    chat.wait_until_finished()
    expect(output).to_have_text("no result")


def test_a_call_of_the_calculator_is_a_card(chat, server):
    deltas = [
        ("text", "So "),
        ("python", "12*"),
        ("python", "12"),
        ("python_output", "144"),
        ("text", " it is."),
    ]
    server.play(Reply(deltas))
    chat.say("what is 12*12?")
    card = chat.page.get_by_role("figure", name="Calculator")
    expect(card.locator("code")).to_have_text("12*12")
    expect(card.locator("output")).to_have_text("144")
    chat.say("again")
    sent = server.requests[-1][1]["messages"][1]["content"]
    assert sent == [
        {"type": "text", "text": "So "},
        {"type": "python", "text": "12*12"},
        {"type": "python_output", "text": "144"},
        {"type": "text", "text": " it is."},
    ]


def test_speed_and_first_token_stand_below_an_answer(chat, server):
    chat.page.evaluate("() => { window.now = 0; performance.now = () => window.now; }")
    server.play(says(*["x"] * 20, hold_after=0))
    chat.say("hello", wait=False)
    chat.page.evaluate("now = 250")
    server.go_on(1)
    expect(chat.answers.last.locator(".body")).to_have_text("x")
    chat.page.evaluate("now = 500")
    server.go_on()
    stats = chat.answers.last.locator(".stats")
    expect(stats).to_have_text("d4-sft · 20 tokens · 40.0 tokens/s · first after 250 ms")
