"""What the stages learn from and are judged by."""

import json
import random
from collections import Counter

import pytest

from jaxchat.conversation import check_conversation
from jaxchat.tasks import mixtures
from jaxchat.tasks.base import TaskSequence, reference
from jaxchat.tasks.customjson import IDENTITY, CustomJSON
from jaxchat.tasks.hub import HUB_SETS
from tests.tasks.examples import GOOD, arc_row, shown, write_split


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


def own(tmp_path, count=100):
    path = tmp_path / "own.jsonl"
    lines = [GOOD.replace('"a"', f'"own {i}"') for i in range(count)]
    path.write_text("\n".join([*lines, GOOD.replace('"a"', f'"{"long " * 50}"')]))
    return path


@pytest.mark.parametrize("mixture", [mixtures.mid_mixture, mixtures.sft_mixture])
def test_conversations_of_ones_own_stand_alone_or_beside_others(library, tmp_path, mixture):
    path = own(tmp_path)
    alone = shown(mixture(str(path)))
    held_out = shown(mixtures.validation_mixture(str(path)))
    assert sorted({*alone, *held_out}) == sorted(shown(CustomJSON(path)))
    assert not {*alone} & {*held_out}
    beside = mixture("offline", str(path))
    assert len(beside) == len(mixture("offline")) + len(alone)
    assert {*alone} < {*shown(beside)}
    assert "Who are you?" in shown(beside)
    val = shown(mixtures.validation_mixture("offline", str(path)))
    assert len(val) == len(mixtures.validation_mixture("offline")) + len(held_out)
    assert {*held_out} < {*val}
    named = tmp_path / "me.jsonl"
    named.write_text(GOOD.replace('"a"', '"who?"'))
    assert sorted(shown(mixture(str(path), identity=named))) == sorted([*alone, "who?"])
    assert mixtures.title(["offline", str(path)]) == "offline tasks, own.jsonl"


def test_a_file_that_has_changed_is_read_anew(library, tmp_path):
    path = str(own(tmp_path))
    before = mixtures.sft_mixture(path)
    own(tmp_path, 150)
    after = mixtures.sft_mixture(path)
    assert len(after) > len(before)
    assert after.fingerprint != before.fingerprint


def test_runs_on_ones_own_ask_what_is_held_out(library, tmp_path):
    path = str(own(tmp_path, 300))
    asked = mixtures.sample_questions(path)
    assert len({*asked}) == 4
    assert all(len(question) <= mixtures.SHORT for question in asked)
    assert {*asked} <= {*shown(mixtures.validation_mixture(path))}
    assert mixtures.sample_questions("hub", path) == [*mixtures.QUESTIONS["hub"], *asked]


def test_questions_of_ones_own_are_learned_and_judged(library, tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(f'{{"question": "{i}?", "answer": "#### {i}"}}' for i in range(99)))
    train, judged = mixtures.rl_tasks(str(path))
    assert len(train) + len(judged) == 99
    assert len(judged) < 20
    assert train.reward(train[0], reference(train[0])) == 1
    assert not {*shown(train)} & {*shown(judged)}
    (name,) = mixtures.eval_names(str(path))
    assert len(mixtures.eval_task(name)) == 99
    with pytest.raises(ValueError, match=r"own\.jsonl:1: nothing to judge"):
        mixtures.rl_tasks(str(own(tmp_path)))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        mixtures.eval_task("none.jsonl")


def test_a_task_is_no_file_of_its_name(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Arithmetic").write_text(GOOD)
    assert len(mixtures.eval_task("Arithmetic")) == mixtures.ARITHMETIC_EVAL


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
    with pytest.raises(ValueError, match="data 'net': choose one of hub, offline, or a jsonl file"):
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
