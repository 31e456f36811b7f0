"""Conversations leave as files and come back as they were; other files are refused in words."""

import json
import random
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.page.scripted_server import Reply, fails, says


def export(chat, choice: str) -> Path:
    chat.page.locator("#export-menu summary").click()
    with chat.page.expect_download() as download:
        chat.button(choice).click()
    return Path(download.value.path())


def import_text(chat, name: str, text: str) -> None:
    file = {"name": name, "mimeType": "application/octet-stream", "buffer": text.encode()}
    chat.page.set_input_files("#import-file", file)


def test_json_keeps_every_branch(chat, server):
    deltas = [("text", "So "), ("python", "2*3"), ("python_output", "6")]
    tokens = [("So ", -0.1, [("So ", -0.1), ("Well", -2.5)]), ("2", -0.5, []), ("6", None, [])]
    server.play(says("one"), Reply(deltas, tokens=tokens))
    chat.say("hello")
    chat.button("Regenerate").click()
    chat.wait_until_finished()
    server.play(fails(400, "too long", code="context_length_exceeded"))
    chat.say("more")
    chat.button("Retry without the first turn").click()
    chat.wait_until_finished()
    text = export(chat, "JSON, with every branch").read_text()
    assert '"leftOut": 1' in text
    before = json.loads(text)["conversations"]
    import_text(chat, "x.json", text)
    expect(chat.page.locator("#conversations .conversation")).to_have_count(2)
    expect(chat.answers.first).to_contain_text("2/2")
    after = json.loads(export(chat, "JSON, with every branch").read_text())["conversations"]
    assert [shape(one) for one in after] == [shape(one) for one in before]
    assert after[0]["id"] != before[0]["id"]


def shape(conversation, at=None):
    """A conversation without ids: what it says, nested as it branches."""
    node = conversation if at is None else conversation["messages"][at]
    kept = ("title", "active", "role", "parts", "model", "finish", "stats", "tokens", "created",
            "leftOut")  # fmt: skip
    values = {name: node[name] for name in kept if name in node}
    return {**values, "children": [shape(conversation, child) for child in node["children"]]}


def test_markdown_reads_back_what_it_shows(chat, server):
    awkward = "# not a title\n\n## You\n\n\\## Answer\n\n```python\nx = 1\n# c\n```\n\nend"
    deltas = [("text", awkward), ("python", "2*3"), ("python_output", "6"), ("text", "done")]
    server.play(Reply(deltas))
    chat.say("## You\nand\n## Answer")
    text = export(chat, "Markdown, as shown").read_text()
    assert text.startswith("# ## You and ## Answer\n\n## You\n\n\\## You\nand\n\\## Answer\n\n")
    import_text(chat, "x.md", text)
    expect(chat.page.locator("#conversations .conversation")).to_have_count(2)
    expect(chat.messages).to_have_count(2)
    assert export(chat, "Markdown, as shown").read_text() == text


ROUND_TRIP = """
async (answers) => {
  const { add, newConversation, newMessage, path } = await import("/page/conversation.js");
  const { fromMarkdown, toMarkdown } = await import("/page/transfer.js");
  const conversation = newConversation();
  let parent = null;
  for (const [question, parts] of answers) {
    parent = add(conversation, parent, newMessage("user", question)).id;
    parent = add(conversation, parent, { ...newMessage("assistant", ""), parts }).id;
  }
  const text = toMarkdown(conversation);
  return [text, path(fromMarkdown(text)).map((message) => message.parts)];
}
"""

FENCES = ("```python", "```python_output", "```jaxchat-python", "````jaxchat-python_output",
          "```", "````", "\\```jaxchat-python", "## You", "## Answer", "# x", "\\# x")  # fmt: skip
PIECES = (*FENCES, "", " ", "x = 1", "6\r", "a\u2028## You", "```jaxchat", "~~~", "`code`")


def read_back(chat, answers):
    """Markdown of a conversation of questions and answers, and the parts that it reads back as."""
    told = [[question, [{"type": t, "text": x} for t, x in parts]] for question, parts in answers]
    text, parts = chat.page.evaluate(ROUND_TRIP, told)
    return text, [[(part["type"], part["text"]) for part in message] for message in parts]


def messages_of(answers):
    return [message for question, parts in answers for message in ([("text", question)], parts)]


def test_code_in_an_answer_stays_code(chat):
    code = "Run this:\n\n```python\nx = 1\n```\n\n```python_output\n1\n```\n"
    answers = [("```python\n2\n```", [("text", code), ("python", "2*3"), ("python_output", "6")])]
    text, parts = read_back(chat, answers)
    assert parts == messages_of(answers)
    assert "\n```jaxchat-python\n2*3\n```\n" in text


def test_markdown_reads_back_whatever_was_said(chat):
    rng = random.Random(5)
    for _ in range(40):
        answers = []
        for _ in range(10):
            question = "\n".join(rng.choices(PIECES, k=rng.randint(1, 4))) or "x"
            parts = []
            for _ in range(rng.randint(0, 4)):
                kinds = ["text", "python", "python_output"]
                if parts and parts[-1][0] == "text":  # neighbours of text are one part
                    kinds.remove("text")
                kind = rng.choice(kinds)
                text = "\n".join(rng.choices(PIECES, k=rng.randint(1, 4)))
                parts += [(kind, text or "y")]
            answers.append((question, parts))
        text, parts = read_back(chat, answers)
        assert parts == messages_of(answers), text


OLD_FILE = """# Old

## You

What is 2*3?

## Answer

So

```python
x = 2
\\# a comment
```

or

```python
2*3
```

```python_output
6
```
it is.

```python
alone
```
"""


def test_markdown_of_before_reads_calls_only_where_an_output_follows(chat):
    import_text(chat, "old.md", OLD_FILE)
    expect(chat.messages).to_have_count(2)
    card = chat.page.get_by_role("figure", name="Calculator")
    expect(card).to_have_count(1)
    expect(card.locator("code")).to_have_text("2*3")
    expect(card.locator("output")).to_have_text("6")
    expect(chat.page.locator(".code pre")).to_have_text(["x = 2\n# a comment\n", "alone\n"])
    expect(chat.answers.last).to_contain_text("it is.")


def test_markdown_with_the_line_ends_of_windows_is_read(chat):
    import_text(chat, "x.md", OLD_FILE.replace("\n", "\r\n"))
    expect(chat.page.get_by_role("figure", name="Calculator").locator("code")).to_have_text("2*3")


def test_all_conversations_leave_in_one_file_and_come_back(chat):
    for text in ("one", "two"):
        chat.button("New chat").click()
        chat.say(text)
    with chat.page.expect_download() as download:
        chat.button("Export all").click()
    text = Path(download.value.path()).read_text()
    import_text(chat, "all.json", text)
    links = chat.page.locator("#conversations .conversation")
    expect(links).to_have_count(4)
    assert sorted(links.all_inner_texts()) == ["one", "one", "two", "two"]


COUNT_DRAWINGS = """
() => {
  window.drawings = 0;
  const list = document.getElementById("conversations");
  new MutationObserver(() => (window.drawings += 1)).observe(list, { childList: true });
}
"""


def test_the_list_is_not_drawn_anew_for_each_of_many_conversations(chat):
    """Each drawing takes as long as the list is: 500 conversations took half a minute."""
    count = 60
    messages = {"0": {"role": "user", "parts": [{"type": "text", "text": "x"}], "children": []}}
    documents = [
        {"title": f"chat {index}", "children": ["0"], "messages": messages, "active": 0}
        for index in range(count)
    ]
    chat.page.evaluate(COUNT_DRAWINGS)
    file = {"format": "jaxchat-conversations", "version": 1, "conversations": documents}
    import_text(chat, "x.json", json.dumps(file))
    expect(chat.page.locator("#conversations .conversation")).to_have_count(count)
    expect(chat.messages).to_have_count(1)
    assert chat.page.evaluate("drawings") <= 3  # all are stored, the first is opened


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.json", "", "cannot be read"),
        ("x.json", "{}", "not a file of the format"),
        ("x.json", "null", "not a file of the format"),
        ("x.md", "# title\n\nno turns", "“## You”"),
        ("x.json", [], "holds no conversation"),
        ("x.json", [1], "no messages"),
        ("x.json", [{"messages": {}, "children": ["a"]}], "not a tree"),
        ("x.json", [{"messages": {"a": {"role": "user", "children": ["a"]}}, "children": ["a"]}],
         "not a tree"),
        ("x.json", [{"messages": {"a": {"role": "system"}}, "children": ["a"]}], "no known role"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_ours_is_refused_and_changes_nothing(chat, name, text, words):
    if isinstance(text, list):
        text = json.dumps({"format": "jaxchat-conversations", "conversations": text})
    chat.say("here before")
    titles = chat.page.locator("#conversations .conversation")
    expect(titles).to_have_text(["here before"])
    import_text(chat, name, text)
    expect(chat.page.locator("#notices")).to_contain_text(words)
    chat.settle()
    assert chat.conversation_titles() == ["here before"]
    expect(chat.messages).to_have_count(2)
