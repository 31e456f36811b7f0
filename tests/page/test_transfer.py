"""Conversations leave as files and come back as they were; other files are refused in words."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.page.scripted_server import Reply, says


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
    chat.say("more")
    text = export(chat, "JSON, with every branch").read_text()
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
    kept = ("title", "active", "role", "parts", "model", "finish", "stats", "tokens", "created")
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
    import_text(chat, name, text)
    expect(chat.page.locator("#notices")).to_contain_text(words)
    assert chat.conversation_titles() == ["here before"]
    expect(chat.messages).to_have_count(2)
