"""Chat evaluation: batched letters against one prompt at a time, generation against a script."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from jaxchat import task_report
from jaxchat.backend import backend_class
from jaxchat.conversation import render, render_for_completion
from jaxchat.engine import Engine
from jaxchat.jax_backend import JaxBackend
from jaxchat.params import split
from jaxchat.report import KeyValues, Section, Table
from jaxchat.request import Request
from jaxchat.sampling_params import SamplingParams
from jaxchat.task_eval import SAMPLE_SEED, ChatResult, Drawing, evaluate_chat, wilson
from jaxchat.tasks.arithmetic import Arithmetic
from jaxchat.tasks.base import MultipleChoice, Task, ask_choice
from jaxchat.tasks.humaneval import HumanEval
from jaxchat.tokenizer import Tokenizer
from tests.models import MODERN, make_perturbed
from tests.scripted import ScriptedBackend

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
CONFIG = replace(MODERN, n_layer=2, vocab_size=TOKENIZER.vocab_size)


class Choices(MultipleChoice):
    """Questions of different lengths, with two to five choices."""

    name = "choices"

    def _examples(self):
        return 12

    def _example(self, index):
        return ask_choice("x" * (index * 17 % 140), list("abcde"[: 2 + index % 4]), index % 2)

    def _identity(self):
        return "choices"


class OneLine(MultipleChoice):
    """A question that is longer than the model's context."""

    name = "long"

    def _examples(self):
        return 3

    def _example(self, index):
        return ask_choice("y" * 1000, ["no", "yes"], 1)

    def _identity(self):
        return "long"


@pytest.fixture(scope="module", params=["jax", "torch"])
def backend(request):
    backend = backend_class(request.param)(CONFIG, dtype="float32")
    _, params = split(make_perturbed(CONFIG, scale=0.3))
    backend.set_params({name: np.asarray(value) for name, value in params.items()})
    return backend


def evaluate(backend, task, **changes):
    options = {"max_problems": None, "batch_tokens": 1024, "slots": 4}
    return evaluate_chat(backend, TOKENIZER, task, **(options | changes))


def test_logits_are_those_of_a_prefill(backend):
    """The batch is padded and its rows end at different places; a prompt alone is the oracle."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, n).astype(np.int32) for n in (1, 5, 37, 64)]
    inputs = np.zeros((4, 64), np.int32)
    for row, prompt in enumerate(prompts):
        inputs[row, : len(prompt)] = prompt
    positions = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
    logits = backend.logits(inputs, positions)
    assert logits.shape == (4, CONFIG.vocab_size)
    assert logits.dtype == np.float32
    for row, prompt in enumerate(prompts):
        _, alone = backend.prefill(backend.new_cache(1, 256), 0, prompt, 0)
        np.testing.assert_allclose(logits[row], alone, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("batch_tokens", [1, 512, 4096])
def test_batched_letters_are_those_of_one_prompt_at_a_time(backend, batch_tokens):
    task = Choices()
    correct = 0
    for problem in task:
        ids = np.array(render_for_completion(TOKENIZER, problem), np.int32)
        _, logits = backend.prefill(backend.new_cache(1, 256), 0, ids[-256:], 0)
        scores = [logits[ord(letter)] for letter in problem["letters"]]
        gold = problem["letters"].index(problem["messages"][1]["content"])
        correct += int(np.argmax(scores)) == gold
    shares = []
    result = evaluate(backend, task, batch_tokens=batch_tokens, on_progress=shares.append)
    assert (result.problems, result.correct) == (12, correct)
    assert 0 < shares[0] < shares[-1] == 1.0 and shares == sorted(shares)
    assert 0 < correct < 12
    assert (result.ended, result.called, result.skipped) == (None, None, None)


def test_letters_compile_a_handful_of_shapes():
    backend = JaxBackend(CONFIG, dtype="float32")
    backend.init(0)
    before = backend._logits._cache_size()  # of this function, whoever called it
    for _ in range(2):
        evaluate(backend, Choices(), batch_tokens=768)
    assert backend._logits._cache_size() - before <= 3  # 64, 128, 256 tokens


def test_a_prompt_longer_than_the_context_keeps_its_bos_and_its_end(backend, monkeypatch):
    asked, logits = [], backend.logits
    monkeypatch.setattr(
        backend, "logits", lambda ids, at: asked.extend(ids.tolist()) or logits(ids, at)
    )
    result = evaluate(backend, OneLine())
    assert (result.problems, result.cropped) == (3, 3)
    whole = render_for_completion(TOKENIZER, OneLine()[0])
    assert asked[:3] == [[whole[0], *whole[-CONFIG.sequence_len + 1 :]]] * 3


def test_a_limit_takes_a_fair_and_fixed_sample(backend):
    shares = []
    first, second = (
        evaluate(backend, Choices(), max_problems=5, on_progress=shares.append) for _ in range(2)
    )
    assert first == second
    assert first.problems == 5
    assert shares[-1] == 1.0


# --- generation -----------------------------------------------------------------------------------


def parrot(task, *, wrong=()):
    """A model that knows the answers by heart and calls the tool where they do."""
    replies = {}
    for number, problem in enumerate(task):
        prompt = tuple(render_for_completion(TOKENIZER, problem))
        ids, _ = render(TOKENIZER, problem)
        answer = ids[len(prompt) :]
        replies[prompt] = answer[-1:] if number in wrong else answer

    def next_token(held):
        for prompt, answer in replies.items():
            if tuple(held[: len(prompt)]) == prompt:
                said = len(held) - len(prompt)
                return answer[said] if said < len(answer) else 0
        raise AssertionError("a prompt that no problem has")

    config = replace(CONFIG, sequence_len=512)
    return ScriptedBackend(config, next_token)


def test_replies_are_generated_together_and_judged_by_the_task():
    task = Arithmetic("test", 12, kinds=["expression"])
    order = list(task.shuffled(1337))
    backend = parrot(order, wrong={2, 5, 7})
    shares = []
    result = evaluate(backend, task, on_progress=shares.append)
    assert (result.name, result.kind) == ("Arithmetic", "generative")
    assert (result.problems, result.correct, result.ended) == (12, 9, 12)
    assert result.called == 9  # the wrong ones say nothing at all
    assert max(backend.dispatches) == 4
    assert shares == sorted(shares) and shares[-1] == 1.0


class Guess(Task):
    """Right is one word, which the test chooses."""

    name, kind, max_tokens, word = "guess", "generative", 1, ""

    def _examples(self):
        return 8

    def _example(self, index):
        question = {"role": "user", "content": f"Which word, {index}?"}
        return {"messages": [question, {"role": "assistant", "content": "one"}]}

    def _identity(self):
        return ""

    def evaluate(self, conversation, reply):
        return reply == self.word


@pytest.mark.parametrize("samples", [2, 5])
def test_a_problem_is_solved_if_one_of_its_samples_is_right(backend, samples):
    """Against replies that are written a problem at a time."""
    drawing, task = Drawing(samples, temperature=30.0, top_k=0), Guess()
    engine, said = Engine(backend, TOKENIZER, slots=1), []
    for number, problem in enumerate(task.shuffled(SAMPLE_SEED)):
        ids = render_for_completion(TOKENIZER, problem)
        request = Request(ids, drawing.params(seed=number, room=1), n=samples)
        said.append([reply.text for reply in engine.complete([request])])
    words = sorted({word for replies in said for word in replies})
    solved = {word: sum(word in replies for replies in said) for word in words}
    assert len(set(solved.values())) > 1
    for task.word, correct in solved.items():
        result = evaluate(backend, task, drawing=drawing)
        assert (result.problems, result.correct, result.samples) == (8, correct, samples)


def test_a_reply_is_as_long_as_is_asked_for_and_shares_are_of_all_replies(monkeypatch):
    task, said = Guess(), []
    monkeypatch.setattr(task, "evaluate", lambda _, reply: said.append(reply))
    backend = ScriptedBackend(replace(CONFIG, sequence_len=512), lambda held: ord("x"))
    result = evaluate(backend, task, drawing=Drawing(3, temperature=1.0, max_tokens=7))
    assert said == ["x" * 7] * (8 * 3)
    (row,) = task_report.result_table([replace(result, ended=6)]).rows
    assert row[task_report.COLUMNS.index("ended")] == 6 / 24


@pytest.mark.parametrize(("problems", "samples", "rows"), [(12, 1, 8), (3, 1, 3), (3, 2, 6)])
def test_every_device_writes_its_own_replies_but_no_more_than_there_are(problems, samples, rows):
    made = []

    class Made(ScriptedBackend):
        devices = ScriptedBackend.devices._replace(count=2)

        def new_cache(self, rows, max_length):
            made.append(rows)
            return super().new_cache(rows, max_length)

    backend = Made(replace(CONFIG, sequence_len=512), lambda held: ord("x"))
    evaluate(backend, Arithmetic("test", problems), drawing=Drawing(samples, temperature=1.0))
    assert made == [rows] == [max(backend.dispatches)]


def test_replies_are_drawn_as_asked():
    params = Drawing(2, temperature=0.5, top_k=3).params(seed=5, room=7)
    assert params == SamplingParams(7, temperature=0.5, top_k=3, seed=5)


def test_several_greedy_replies_are_refused():
    with pytest.raises(ValueError, match="4 samples at top_k 1 are one reply 4 times: set --top-k"):
        Drawing(4, temperature=1.0, top_k=1)
    with pytest.raises(ValueError, match="4 samples at temperature 0 are one reply 4 times"):
        Drawing(samples=4)
    with pytest.raises(ValueError, match="temperature=-1"):
        Drawing(temperature=-1)


@pytest.mark.parametrize("task", [Choices(), Arithmetic("test", 5), HumanEval(sandbox="none")])
def test_a_result_names_the_problems_of_its_task(task):
    """All of them, whatever part was asked: a quick look is at the same problems."""
    backend = ScriptedBackend(replace(CONFIG, sequence_len=512), lambda held: ord("x"))
    backend.logits = lambda inputs, positions: np.zeros((len(inputs), CONFIG.vocab_size))
    for limit in (2, None):
        assert evaluate(backend, task, max_problems=limit).data == task.fingerprint


def test_a_reply_that_does_not_end_is_counted():
    task = Arithmetic("test", 5)
    backend = ScriptedBackend(replace(CONFIG, sequence_len=512), lambda held: ord("x"))
    result = evaluate(backend, task)
    assert (result.correct, result.ended, result.called) == (0, 0, 0)


def test_a_task_without_a_sandbox_is_skipped_and_says_so(backend):
    result = evaluate(backend, HumanEval(sandbox="none"))
    assert result.skipped == "no sandbox: no sandbox was asked for"
    assert math.isnan(result.accuracy)


def test_what_cannot_be_judged_is_refused(backend):
    class Talk(Task):
        name = "talk"

        def _examples(self):
            return 1

        def _example(self, index):
            return {}

        def _identity(self):
            return ""

    with pytest.raises(ValueError, match="talk is for training only"):
        evaluate(backend, Talk())


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "problems"), [(0, 10), (10, 10), (5, 10), (1, 1000), (300, 1000)]
)
def test_intervals_are_wilsons(correct, problems):
    """Against scipy."""
    expected = binomtest(correct, problems).proportion_ci(0.95, method="wilson")
    assert wilson(correct, problems) == pytest.approx((expected.low, expected.high), abs=1e-7)


@given(st.integers(0, 500), st.integers(1, 500))
def test_an_interval_holds_its_share(correct, problems):
    correct = min(correct, problems)
    low, high = wilson(correct, problems)
    assert 0 <= low <= correct / problems <= high <= 1
    assert low < high


def test_intervals_of_nothing_are_nothing():
    assert all(math.isnan(bound) for bound in wilson(0, 0))


# --- the report -----------------------------------------------------------------------------------


def section(source, results, facts):
    parts = [task_report.result_table(results), KeyValues(facts)]
    return Section(task_report.section_name(source), "t", parts, "now")


FACTS = {"step": 10, "max_problems": None}
MID = section(
    "mid",
    [
        ChatResult("Documentation", "categorical", 0.25, 1000, 260),
        ChatResult("HumanEval", "generative", 0.0, skipped="no sandbox: none"),
    ],
    FACTS,
)


def test_stages_stand_side_by_side():
    sft = section(
        "sft",
        [
            ChatResult("Documentation", "categorical", 0.25, 1000, 400),
            ChatResult("Arithmetic", "generative", 0.0, 100, 50, ended=90, called=80),
        ],
        FACTS,
    )
    table = task_report.side_by_side([sft, MID])
    assert table.columns == ["task", "mid", "sft"]
    assert table.rows == [
        ["Documentation", "26.0 [23.4, 28.8] of 1000", "40.0 [37.0, 43.1] of 1000 *"],
        ["HumanEval", "skipped: no sandbox: none", None],
        ["Arithmetic", None, "50.0 [40.4, 59.6] of 100 *"],
    ]

    assert task_report.manners([sft, MID]).rows == [
        ["Arithmetic: ended", None, "90%"],
        ["Arithmetic: called", None, "80%"],
    ]


def test_a_terminal_gets_fewer_columns():
    result = ChatResult("Arithmetic", "generative", 0.0, 100, 50, ended=90, called=80, cropped=3)
    assert task_report.compact(task_report.result_table([result])).rows == [
        ["Arithmetic", "50.0 [40.4, 59.6] of 100 *", "0%", "90%", "80%", "3 prompts cropped"]
    ]
    one = task_report.result_table([replace(result, cropped=1)])
    assert task_report.compact(one).rows[0][-1] == "1 prompt cropped"


def test_a_second_run_replaces_its_own_rows_only():
    fresh = task_report.result_table([ChatResult("GSM8K", "generative", 0.0, 10, 3)])
    trained = Section("mid_train", "of the same model", [KeyValues(FACTS)], "now")
    merged = task_report.with_earlier_rows(fresh, FACTS, [trained, MID], "mid")
    assert [row[0] for row in merged.rows] == ["Documentation", "HumanEval", "GSM8K"]
    again = task_report.result_table([ChatResult("Documentation", "categorical", 0.25, 1000, 3)])
    merged = task_report.with_earlier_rows(again, FACTS, [MID], "mid")
    assert [row[0] for row in merged.rows] == ["HumanEval", "Documentation"]
    assert merged.rows[1] == again.rows[0]
    assert task_report.outweighed(again, merged) == []


def test_a_quick_look_takes_no_larger_samples_place():
    """A thousand problems gave way to ten."""
    quick = task_report.result_table([ChatResult("Documentation", "categorical", 0.25, 10, 3)], 10)
    merged = task_report.with_earlier_rows(quick, FACTS, [MID], "mid")
    assert [(row[0], row[2]) for row in merged.rows] == [("Documentation", 1000), ("HumanEval", 0)]
    assert task_report.outweighed(quick, merged) == [
        "Documentation: 30.0 [10.8, 60.3] of 10 now; the result of 1000 problems stays"
    ]
    other = task_report.with_earlier_rows(quick, FACTS | {"step": 20}, [MID], "mid")
    assert other.rows == quick.rows
    assert task_report.outweighed(quick, other) == []


def test_a_file_that_was_mended_replaces_what_it_was():
    """Of 500 problems, half of them wrong, the result stayed in place of that of 300."""
    old = ChatResult("test.jsonl", "generative", 0.0, 500, 50, data="wrong")
    table = task_report.result_table([replace(old, problems=300, correct=270, data="mended")])
    merged = task_report.with_earlier_rows(table, FACTS, [section("mid", [old], FACTS)], "mid")
    assert merged.rows == table.rows
    assert task_report.outweighed(table, merged) == []
    few = task_report.result_table([replace(old, problems=10, correct=9)])
    merged = task_report.with_earlier_rows(few, FACTS, [section("mid", [old], FACTS)], "mid")
    assert merged.rows == task_report.result_table([old]).rows
    assert "data" not in task_report.compact(merged).columns


def test_a_row_that_does_not_say_its_problems_gives_way_and_stays_beside_others():
    """Sections were written before they did."""
    table = task_report.result_table([ChatResult("GSM8K", "generative", 0.0, 500, 50)])
    at = list(table.columns).index("data")
    rows = [[*row[:at], *row[at + 1 :]] for row in table.rows]
    older = Table([*table.columns[:at], *table.columns[at + 1 :]], rows)
    before = Section(task_report.section_name("mid"), "t", [older, KeyValues(FACTS)], "then")
    again = task_report.result_table([ChatResult("GSM8K", "generative", 0.0, 10, 9, data="now")])
    assert task_report.with_earlier_rows(again, FACTS, [before], "mid").rows == again.rows
    other = task_report.result_table([ChatResult("MMLU", "categorical", 0.25, 10, 9, data="m")])
    merged = task_report.with_earlier_rows(other, FACTS, [before], "mid")
    assert merged.rows == [table.rows[0], other.rows[0]]


def test_files_of_one_name_have_rows_of_their_own():
    one = ChatResult("test.jsonl", "generative", 0.0, 500, 50, data="a")
    two = task_report.result_table([replace(one, problems=9, correct=4), replace(one, data="b")])
    merged = task_report.with_earlier_rows(two, FACTS, [section("mid", [one], FACTS)], "mid")
    assert merged.rows == [task_report.result_table([one]).rows[0], two.rows[1]]


@pytest.mark.parametrize("changed", [{"step": 20}, {"max_problems": 5}])
def test_another_model_or_limit_starts_over(changed):
    fresh = task_report.result_table([ChatResult("GSM8K", "generative", 0.0, 10, 3)])
    merged = task_report.with_earlier_rows(fresh, FACTS | changed, [MID], "mid")
    assert isinstance(merged, Table) and len(merged.rows) == 1


def test_some_problems_are_drawn_from_all_of_them():
    """The first ones of a set are often of one subject, or the easy ones."""
    asked = []

    class Asked(Choices):
        def evaluate(self, problem, reply):
            asked.append(problem["messages"][0]["content"])
            return True

    small = JaxBackend(CONFIG, dtype="float32")
    small.init(0)
    evaluate(small, Asked(), max_problems=4)
    contents = [problem["messages"][0]["content"] for problem in Choices()]
    drawn = [problem["messages"][0]["content"] for problem in Choices().shuffled(1337)[:4]]
    assert sorted(asked) == sorted(drawn)
    assert sorted(asked) != sorted(contents[:4])


def test_a_long_question_leaves_its_reply_the_room_that_it_needs():
    """And the reply is the likeliest one: temperature 0."""

    class Long(Task):
        name, kind, max_tokens = "long", "generative", 16

        def _examples(self):
            return 2

        def _example(self, index):
            turns = zip(("user", "assistant"), ("pq"[index] * 1000, "x"), strict=True)
            return {"messages": [{"role": role, "content": text} for role, text in turns]}

        def _identity(self):
            return "long"

        def evaluate(self, problem, reply):
            return reply == "x" * 16

    class Greedy(ScriptedBackend):
        def decode(self, cache, batch):
            assert {row.temperature for row in batch.params if row is not None} == {0.0}
            return super().decode(cache, batch)

    backend = Greedy(replace(CONFIG, sequence_len=64), lambda held: ord("x"))
    result = evaluate(backend, Long())
    assert (result.problems, result.correct, result.cropped) == (2, 2, 2)
    assert {count for _, _, count in backend.prefills} == {64 - 16}
