"""Your own conversations, and who the model is."""

import json

import pytest

from jaxchat import calculator
from jaxchat.conversation import render
from jaxchat.tasks.customjson import IDENTITY, CustomJSON
from tests.tasks.examples import GOOD, TOKENIZER, calls_of, shown


def test_the_identity_is_sixty_different_conversations():
    task = CustomJSON(IDENTITY)
    questions = shown(task)
    assert len(task) >= 60
    assert len(set(questions)) == len(questions)
    text = " ".join(json.dumps(conversation) for conversation in task)
    assert text.count("jaxchat") > 20
    for conversation in task:
        assert render(TOKENIZER, conversation)[1].count(1) > 5
        for call, output in calls_of(conversation):
            assert calculator.evaluate(call) == output


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),  # where json gives up with a RecursionError
        ("hello", "not a line of JSON"),
        ('"hello"', r'must be \{"messages"'),
        ("{}", "at least one message"),
        ("[]", "at least one message"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "role must be 'user'"),
        ('{"messages": [{"role": "user", "content": ""}]}', "content is empty"),
        (GOOD.replace('"b"', '[{"type": "image", "text": "b"}]'), "unknown type 'image'"),
        (GOOD.replace('"b"', "[]"), "at least one part"),
        ('[{"role": "user", "content": "a"}]', "no assistant message"),
        ('[{"role": "user", "content": "\\ud800"}, {"role": "tool", "content": "b"}]', "'tool'"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_trained(tmp_path, line, problem):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")
    with pytest.raises(ValueError, match=rf"mine\.jsonl:3: .*{problem}"):
        CustomJSON(path)


def test_files_of_conversations_are_read_as_they_are(tmp_path):
    path = tmp_path / "mine.jsonl"
    as_list = json.dumps(json.loads(GOOD)["messages"])
    path.write_bytes(f"{GOOD}\r\n\n{as_list}".encode())
    assert list(CustomJSON(path)) == [json.loads(GOOD)] * 2
    assert CustomJSON(path)[::-1].locate(0) == f"{path}:3"
    # a line separator of Unicode inside a string is no end of line
    path.write_text(GOOD.replace('"a"', '"a\u2028b"'))
    assert shown(CustomJSON(path)) == ["a\u2028b"]
    before = CustomJSON(path).fingerprint
    path.write_text(GOOD)
    assert CustomJSON(path).fingerprint != before
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl:1: not UTF-8"):
        CustomJSON(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no conversation"):
        CustomJSON(path)
    with pytest.raises(FileNotFoundError, match="should hold one conversation a line"):
        CustomJSON(tmp_path / "none.jsonl")
