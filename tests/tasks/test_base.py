"""A task is a sequence; mixtures and multiple choice."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.tasks.base import TaskMixture, TaskSequence, ask_choice
from tests.tasks.examples import Numbers, shown


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
