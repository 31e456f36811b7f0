"""Your own conversations, and who the model is."""

import json
from pathlib import Path

import pytest

from jaxchat import calculator
from jaxchat.conversation import render
from jaxchat.tasks.base import exchange
from jaxchat.tasks.customjson import HELD_OUT, IDENTITY, CustomJSON, CustomProblems
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.mmlu import MMLU
from tests.real_data import DATA, needs_data
from tests.tasks.examples import GOOD, TOKENIZER, calls_of, shown, write_split

ROOT = Path(__file__).parents[2]
CHOICE = '{"question": "Who?", "choices": ["I", "you", "we"], "answer": 1}'
SUM = '{"question": "6 times 7?", "answer": "6*7 = <<6*7=42>>42\\n#### 42"}'


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
        ('{"question": 1, "answer": "b"}', "question must be a string, is 1"),
        ('{"question": "a"}', "answer must be a string, is None"),
        ('{"question": "", "answer": "b"}', "content is empty"),
        (CHOICE.replace("1}", "3}"), "2 to 10 choices and an answer among them"),
        (CHOICE.replace("1}", "-1}"), "2 to 10 choices and an answer among them"),
        (CHOICE.replace("1}", "true}"), "answer must be the number of a choice.*is True"),
        (CHOICE.replace("1}", '"D"}'), "answer must be the number of a choice.*is 'D'"),
        (CHOICE.replace("1}", '""}'), "answer must be the number of a choice.*is ''"),
        (CHOICE.replace('["I", "you", "we"]', '"Iyouwe"'), "choices must be a list of strings"),
        (CHOICE.replace('"we"', "2"), "choices must be a list of strings"),
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
    with pytest.raises(ValueError, match=r"mine\.jsonl:1: not UTF-8 .*iconv -f latin1 -t utf-8"):
        CustomJSON(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no conversation"):
        CustomJSON(path)
    with pytest.raises(FileNotFoundError, match="should hold one conversation a line"):
        CustomJSON(tmp_path / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="should hold one question a line") as raised:
        CustomProblems(tmp_path / "none.jsonl")
    for line in str(raised.value).partition("a line, ")[2].split(" or "):
        assert CustomProblems(written(tmp_path, line)).kind


def written(tmp_path, *lines, name="mine.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(lines))
    return path


def numbered(count):
    return [GOOD.replace('"a"', f'"a{i}"') for i in range(count)]


def test_a_line_may_be_a_question(tmp_path):
    plain = '{"question": "C++?", "answer": "std::cout << a=b >> c; <<a=b>>", "id": 7}'
    both = GOOD.replace("{", '{"question": "a note", ', 1)
    sums, choice, letter, text, messages = CustomJSON(
        written(tmp_path, SUM, CHOICE, CHOICE.replace("1}", '"B"}'), plain, both)
    )
    assert messages == json.loads(GOOD)
    assert list(calls_of(sums)) == [("6*7", "42")]
    assert choice == letter
    assert choice["letters"] == ("A", "B", "C")
    assert choice["messages"][1]["content"] == "B"
    assert set(text) == {"messages"}
    assert text["messages"][1]["content"] == json.loads(plain)["answer"]


def test_lines_of_sharegpt_and_alpaca_are_read(tmp_path):
    turns = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    sharegpt = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    lines = (sharegpt, alpaca, alpaca | {"input": ""})
    first, second, third = CustomJSON(written(tmp_path, *map(json.dumps, lines)))
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [message["role"] for message in first["messages"]] == roles
    assert [message["content"] for message in first["messages"]] == ["s", *"abcd"]
    assert second == exchange("Add.\n\n1 and 2", "3")
    assert third == exchange("Add.", "3")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"conversations": "hello"}', r'must be \{"messages"'),
        ('{"conversations": ["hello"]}', "message 0: must be"),
        ('{"conversations": [{"from": "tool", "value": "a"}]}', "unknown role 'tool'"),
        ('{"conversations": [{"from": "human"}]}', "content must be a string, is NoneType"),
        ('{"instruction": 1, "output": "b"}', "instruction must be a string, is 1"),
        ('{"instruction": "a", "output": ""}', "content is empty"),
    ],
)
def test_a_bad_line_of_theirs_is_named(tmp_path, line, problem):
    with pytest.raises(ValueError, match=rf"mine\.jsonl:1: .*{problem}"):
        CustomJSON(written(tmp_path, line))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("each", [GOOD, SUM, json.dumps(json.loads(GOOD)["messages"])])
def test_an_array_of_conversations_is_told_from_lines_of_messages(tmp_path, indent, each):
    path = written(tmp_path, json.dumps([json.loads(each)] * 3, indent=indent), name="all.json")
    with pytest.raises(ValueError, match=r"all\.json is one JSON array; .*jq -c '\.\[\]'"):
        CustomJSON(path)
    for line, problem in (
        ('[{"role": "user", "content": "a"}]', "no assistant message"),
        ('[{"role": "user", "content": "a"}, {"content": "b"}]', "unknown role None"),
        ("[]", "at least one message"),
    ):
        with pytest.raises(ValueError, match=rf"mine\.jsonl:1: .*{problem}"):
            CustomJSON(written(tmp_path, line))


def test_the_lines_that_the_readme_shows_are_read(tmp_path):
    lines = (ROOT / "README.md").read_text().splitlines()
    shown = [line for line in lines if line.startswith('    {"')]
    assert len(shown) == 4
    assert [len(each["messages"]) for each in CustomJSON(written(tmp_path, *shown))] == [2] * 4
    assert CustomProblems(written(tmp_path, shown[1])).kind == "generative"
    assert CustomProblems(written(tmp_path, shown[2])).kind == "categorical"


@needs_data
def test_the_hubs_questions_read_the_same_from_a_file(tmp_path, monkeypatch):
    """Their own tasks read the same rows from parquet files."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path))
    for name, task in (("gsm8k", GSM8K), ("mmlu", MMLU)):
        path = DATA / name / "test.jsonl"
        lines = path.read_text().splitlines()[:300]
        write_split(name, "test", [json.loads(line) for line in lines])
        assert list(task("test")) == list(CustomProblems(path))[:300]


def test_what_is_held_out_depends_on_the_text_alone(tmp_path):
    train, val = CustomJSON(written(tmp_path, *numbered(2000))).split()
    assert len(train) + len(val) == 2000
    assert len(val) == pytest.approx(2000 / HELD_OUT, rel=0.3)
    more = [CHOICE, *reversed(numbered(2000)), *numbered(1000)]
    wider, later = CustomJSON(written(tmp_path, *more)).split()
    assert {*shown(val)} <= {*shown(later)}
    assert not {*shown(wider)} & {*shown(later)}
    assert len(wider) + len(later) == len(more)


def test_of_few_conversations_one_is_held_out(tmp_path):
    train, val = CustomJSON(written(tmp_path, *numbered(2))).split()
    assert (len(train), len(val)) == (1, 1)
    with pytest.raises(ValueError, match=r"2 conversations, 1 distinct.*nothing is left to train"):
        CustomJSON(written(tmp_path, GOOD, GOOD)).split()
    with pytest.raises(ValueError, match="1 conversation, 1 distinct"):
        CustomJSON(written(tmp_path, GOOD)).split()


def test_a_file_of_problems_is_judged_by_what_it_asks(tmp_path):
    words = '{"question": "Capital?", "answer": "It is Paris.\\n#### Paris"}'
    sums = CustomProblems(written(tmp_path, SUM, words))
    assert (sums.kind, sums.baseline) == ("generative", 0.0)
    assert sums.evaluate(sums[0], "so #### 42.0")
    assert not sums.evaluate(sums[0], "so #### 43")
    assert sums.evaluate(sums[1], "#### PARIS")
    choices = CustomProblems(written(tmp_path, CHOICE, CHOICE.replace('"I", ', "")))
    assert choices.kind == "categorical"
    assert choices.baseline == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert choices.reward(choices[0], " B\n") == 1
    assert choices.reward(choices[0], "A") == 0


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ((SUM, GOOD), r"mine\.jsonl:2: nothing to judge a reply by"),
        ((CHOICE, "", SUM), r"mine\.jsonl:3: is generative and .*mine\.jsonl:1 categorical"),
        (
            ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '
             '"b"}, {"role": "user", "content": "#### 1"}]}',),
            r"mine\.jsonl:1: nothing to judge",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_named(tmp_path, lines, problem):
    with pytest.raises(ValueError, match=problem):
        CustomProblems(written(tmp_path, *lines))
