"""Real data sets in the hub's own layout."""

import itertools

import pytest

from jaxchat import calculator
from jaxchat.conversation import check_conversation, render
from jaxchat.tasks.arc import ARC
from jaxchat.tasks.base import reference
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.hub import HUB_SETS, missing_sets
from jaxchat.tasks.mmlu import MMLU
from jaxchat.tasks.smoltalk import SmolTalk
from tests.real_data import needs_data
from tests.tasks.examples import TOKENIZER, arc_row, read_lines, shown, write_split


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
