"""What is asked about the installed libraries, word problems and spelling."""

import hashlib
import inspect
import json
import pkgutil
import re
from collections import Counter
from decimal import Decimal

import pytest

from jaxchat import calculator
from jaxchat.conversation import check_conversation
from jaxchat.tasks import documentation, words
from jaxchat.tasks.answers import final_answer
from jaxchat.tasks.arithmetic import KINDS, Arithmetic
from jaxchat.tasks.base import reference
from jaxchat.tasks.documentation import DocumentationChoice, DocumentationQA
from jaxchat.tasks.spellingbee import SimpleSpelling, SpellingBee
from tests.tasks.examples import calls_of, shown


def test_documentation_is_parsed_as_a_person_reads_it(library):
    known = {
        entry.name: entry
        for split in documentation.SPLITS
        for entry in documentation.entries(split)
    }
    entry = known["networkx.algorithms.bipartite.basic.color"]
    assert entry.summary == "Returns a two-coloring of the graph."
    assert (entry.kind, entry.library, entry.parameters) == ("function", "networkx", ("G",))
    google = [entry for entry in known.values() if entry.library == "optax" and entry.parameters]
    assert {"learning_rate", "decay"} <= {name for entry in google for name in entry.parameters}
    with pytest.raises(ValueError, match="documentation split 'test': choose one of train, val"):
        documentation.entries("test")


def test_documentation_knows_what_kind_of_thing_it_describes(library):
    """Against the imported things themselves."""
    checked = Counter()
    for entry in documentation.entries("train"):
        if entry.library != "networkx" or ".tests" in entry.name or "drawing" in entry.name:
            continue
        found = pkgutil.resolve_name(entry.name.split(".")[0])
        try:
            for part in entry.name.split(".")[1:]:
                owner, found = found, getattr(found, part)
        except AttributeError:  # defined inside a function
            continue
        checked[entry.kind] += 1
        match entry.kind:
            case "module":
                assert inspect.ismodule(found) or not isinstance(found, type)  # shadowed by a name
            case "class":
                assert isinstance(found, type)
            case "method":
                assert isinstance(owner, type)
            case "function":
                assert callable(found) and not isinstance(found, type)
    assert checked["function"] > 100 and checked["class"] > 3 and checked["method"] > 10


def test_documentation_is_not_shared_between_splits(library):
    train, val = (documentation.entries(split) for split in documentation.SPLITS)
    assert len(train) > 500 and len(val) > 20
    assert not {e.name for e in train} & {e.name for e in val}


@pytest.mark.parametrize("split", documentation.SPLITS)
def test_documentation_questions_have_one_right_answer(library, split):
    task = DocumentationChoice(split)
    golds = Counter()
    for problem in task[::3]:
        check_conversation(problem)
        question = problem["messages"][0]["content"]
        choices = re.findall(r"^- (.*)=([A-D])$", question, re.MULTILINE)
        assert [letter for _, letter in choices] == list("ABCD")
        assert len({text for text, _ in choices}) == 4
        golds[reference(problem)] += 1
        wrong = [text for text, letter in choices if letter != reference(problem)]
        named = re.search(r"parameter of ([\w.]+)\?", question)
        if named:
            entry = next(e for e in documentation.entries(split) if e.name == named[1])
            assert not set(wrong) & set(entry.parameters)
    total = sum(golds.values())
    assert all(abs(golds[letter] / total - 0.25) < 0.12 for letter in "ABCD")


def test_documentation_conversations_state_what_is_documented(library):
    task = DocumentationQA("train")
    followed = 0
    for conversation, entry in zip(task, documentation.entries("train"), strict=True):
        check_conversation(conversation)
        said = " ".join(m["content"] for m in conversation["messages"])
        assert entry.name in said
        followed += len(conversation["messages"]) > 2
        for listed in re.findall(r"Its parameters are ([^.]*)\.", said):
            assert re.split(r", | and ", listed) == list(entry.parameters)
    assert 0.3 < followed / len(task) < 0.9


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_word_problems_are_solved_by_their_own_trace(split, kind):
    task = Arithmetic(split, 300, kinds=None if kind is None else [kind])
    for problem in task:
        check_conversation(problem)
        assert task.evaluate(problem, reference(problem))
        steps = list(calls_of(problem))
        assert 1 <= len(steps) <= 2
        for call, output in steps:
            assert calculator.evaluate(call) == output
        # the operands of the first step are in the question, those of the second too or just found
        seen = problem["messages"][0]["content"]
        for call, output in steps:
            assert all(number in seen for number in re.findall(r"\d+", call))
            seen += " " + output
        assert final_answer(reference(problem)) == Decimal(steps[-1][1])


def test_word_problems_of_the_splits_are_different():
    train, test = (set(shown(Arithmetic(split, 2000))) for split in ("train", "test"))
    assert not train & test
    assert len(train) > 1800


def test_word_problems_stay_what_they_are():
    """Golden: whoever changes the task changes this, and knows that scores no longer compare."""
    text = json.dumps([Arithmetic("test", 30)[i] for i in range(30)], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:8] == GOLDEN_ARITHMETIC


GOLDEN_ARITHMETIC = "e1049d74"


@pytest.mark.parametrize(
    "options", [{"split": "val"}, {"size": 0}, {"kinds": ["calculus"]}, {"kinds": []}]
)
def test_impossible_word_problems_are_named(options):
    with pytest.raises(ValueError, match="Arithmetic: split"):
        Arithmetic(**({"split": "train", "size": 5} | options))


def test_words_come_from_the_list_or_from_the_documentation(library, monkeypatch):
    train, test = words.words("train"), words.words("test")
    assert {"graph", "node", "edges"} <= {*train, *test}
    assert all(re.fullmatch(r"[a-z]{3,16}", word) for word in (*train, *test))
    assert not set(train) & set(test)
    assert 0.03 < len(test) / len(train) < 0.12
    before = SpellingBee("train", 10).fingerprint
    path = words.words_path()
    path.parent.mkdir(parents=True)
    path.write_text("aardvark\r\nzebra\r\nox\r\n" + "w" * 40)
    try:
        assert {*words.words("train"), *words.words("test")} == {"aardvark", "zebra"}
        with pytest.raises(ValueError, match="words split 'val'"):
            words.words("val")
    finally:
        path.unlink()
    assert SpellingBee("train", 10).fingerprint == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_letters_are_counted_aloud_and_by_the_calculator(library, split):
    task = SpellingBee(split, 400)
    absent = 0
    for problem in task:
        check_conversation(problem)
        ((call, output),) = calls_of(problem)
        word, letter = re.fullmatch(r'"([a-z]+)"\.count\("([a-z])"\)', call).groups()
        assert output == str(word.count(letter)) == calculator.evaluate(call)
        said = reference(problem)
        spelled = re.search(r"is spelled (.*)\. That makes", said)[1].split(", ")
        assert "".join(part[0] for part in spelled) == word
        assert [part for part in spelled if " " in part] == [
            f"{letter} {i + 1}" for i in range(word.count(letter))
        ]
        assert word in problem["messages"][0]["content"]
        assert task.evaluate(problem, said)
        assert not task.evaluate(problem, f"#### {word.count(letter) + 1}")
        absent += letter not in word
    assert 0 < absent < 0.2 * len(task)


def test_words_are_spelled(library):
    task = SimpleSpelling("test", 50)
    for problem in task:
        word, letters = reference(problem).split(": ")
        assert letters.split(", ") == list(word)
        assert task.evaluate(problem, reference(problem) + "\n")
        assert not task.evaluate(problem, word)
        assert not task.evaluate(problem, f"Let me see. {reference(problem)}")
    with pytest.raises(ValueError, match="SimpleSpelling: size=0 must be at least 1"):
        SimpleSpelling("test", 0)
