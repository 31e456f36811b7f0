"""CORE: golden prompts, and batched decisions against one example at a time."""

import json
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxchat import cli, core_tasks
from jaxchat.backend import DeviceInfo
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import GPTConfig
from jaxchat.core_eval import batch_rows, batches, bucket_length, core_metric, evaluate_task
from jaxchat.core_tasks import (
    Scored,
    Task,
    demonstrations,
    load_bundle,
    make_task,
    prompts,
    sequences,
)
from jaxchat.dataset import Corpus
from jaxchat.embedded_tasks import embedded_tasks
from jaxchat.jax_backend import JaxBackend
from jaxchat.params import split
from jaxchat.report import Report, Subject, subject_of
from jaxchat.stages import stage_directory
from jaxchat.tokenizer import Tokenizer
from scripts import base_eval
from tests.models import make_perturbed

DATA = Path(os.environ.get("JAXCHAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
BUNDLE = DATA / "eval_bundle"
needs_bundle = pytest.mark.skipif(
    not BUNDLE.is_dir(), reason="no evaluation bundle: name a folder in JAXCHAT_TEST_DATA"
)

CHOICE = {"query": "The sky is", "choices": ["blue.", "green."], "gold": 0}
SCHEMA = {"context_options": ["Ann saw Bo and Ann", "Ann saw Bo and Bo"], "continuation": "ran."}
LANGUAGE = {"context": " One, two, ", "continuation": "three"}


ONE_DEVICE = DeviceInfo("cpu", 1, "none", None)


def task_of(kind, examples, *, shots=0, delimiter=" ", baseline=25.0):
    return Task("t", kind, shots, delimiter, baseline, tuple(examples))


def sequences_of(task, index, tokenizer, max_length):
    """Those of one question."""
    (spans,) = sequences(task, [index], tokenizer, max_length)
    return spans


@pytest.fixture(scope="module")
def tokenizer():
    text = "The sky is blue. Ann saw Bo and Bo ran. One, two, three, four and the rest. "
    return Tokenizer.train(iter([text * 20]), vocab_size=320)


@pytest.fixture(scope="module")
def backend(tokenizer):
    config = GPTConfig(
        sequence_len=256,
        vocab_size=tokenizer.vocab_size,
        n_layer=2,
        n_head=2,
        n_kv_head=2,
        n_embd=32,
    )
    backend = JaxBackend(config)
    _, params = split(make_perturbed(config, scale=0.3))
    backend.set_params({name: np.asarray(value) for name, value in params.items()})
    return backend


def test_golden_prompts_of_every_kind():
    shot = {"query": "Grass is", "choices": ["red.", "green."], "gold": 1}
    choice = task_of("multiple_choice", [CHOICE, shot], shots=1, delimiter="\nA: ")
    assert prompts(choice, 0) == [
        "Grass is\nA: green.\n\nThe sky is\nA: blue.",
        "Grass is\nA: green.\n\nThe sky is\nA: green.",
    ]
    other = {"context_options": ["Red", "Blue"], "continuation": "is a colour.", "gold": 1}
    assert prompts(task_of("schema", [SCHEMA, other], shots=1), 0) == [
        "Blue is a colour.\n\nAnn saw Bo and Ann ran.",
        "Blue is a colour.\n\nAnn saw Bo and Bo ran.",
    ]
    again = {"context": " Five, ", "continuation": "six"}
    assert prompts(task_of("language_modeling", [LANGUAGE, again], shots=1), 0) == [
        "Five, six\n\nOne, two,",
        "Five, six\n\nOne, two, three",
    ]
    assert prompts(task_of("schema", [SCHEMA]), 0) == [
        "Ann saw Bo and Ann ran.",
        "Ann saw Bo and Bo ran.",
    ]
    assert prompts(task_of("language_modeling", [LANGUAGE]), 0) == [
        "One, two,",
        "One, two, three",
    ]


def test_spans_cover_exactly_what_differs(tokenizer):
    def scored(kind, example):
        spans = sequences_of(task_of(kind, [example]), 0, tokenizer, 256)
        assert all(span.ids[0] == tokenizer.bos_id for span in spans)
        return [tokenizer.decode(span.ids[span.start : span.end]) for span in spans]

    assert scored("multiple_choice", CHOICE) == [" blue.", " green."]
    assert scored("schema", SCHEMA) == [" ran.", " ran."]
    assert scored("language_modeling", LANGUAGE) == [" three"]


def test_a_choice_that_begins_all_others_is_scored_too(tokenizer):
    """Its span would be empty, and the mean of nothing wins every comparison."""
    example = {**CHOICE, "choices": ["blue", "blue and"], "gold": 1}
    first, second = sequences_of(task_of("multiple_choice", [example]), 0, tokenizer, 256)
    assert second.ids[: len(first.ids)].tolist() == first.ids.tolist()
    assert (first.start, first.end) == (len(first.ids) - 1, len(first.ids))
    assert (second.start, second.end) == (first.start, len(second.ids))


def test_long_prompts_lose_their_beginning_not_their_span(tokenizer):
    long = {**LANGUAGE, "context": "One, two, three, " * 100}
    (span,) = sequences_of(task_of("language_modeling", [long]), 0, tokenizer, 64)
    assert len(span.ids) == 64
    assert tokenizer.decode(span.ids[span.start : span.end]) == " three"


def test_demonstrations_never_show_the_question_and_outlive_a_limit():
    """Upstream draws them from the limited sample, and fails when that is too small (issue 550)."""
    examples = [{**LANGUAGE, "continuation": str(i)} for i in range(30)]
    task = make_task(
        label="t",
        kind="language_modeling",
        num_fewshot=10,
        delimiter=" ",
        baseline=0.0,
        examples=examples,
    )
    for index in range(30):
        shots = demonstrations(task, index)
        assert len(shots) == 10
        assert task.examples[index] not in shots
    assert demonstrations(task, 3) == demonstrations(task, 3)


def test_examples_and_demonstrations_are_drawn_as_in_nanochat():
    """Other seeds (1337, and 1234 + the example's number) are another metric."""
    examples = [{**LANGUAGE, "continuation": str(i)} for i in range(12)]
    facts = {"kind": "language_modeling", "num_fewshot": 4, "delimiter": " ", "baseline": 0.0}
    task = make_task(label="t", examples=examples, **facts)
    order = list(range(12))
    random.Random(1337).shuffle(order)
    assert [int(e["continuation"]) for e in task.examples] == order
    others = [order[i] for i in range(12) if i != 5]
    drawn = random.Random(1234 + 5).sample(others, 4)
    assert [int(e["continuation"]) for e in demonstrations(task, 5)] == drawn


@pytest.mark.parametrize("count", [2, 11, 22, 23, 24, 85, 86, 87, 300])
def test_a_draw_is_that_of_a_list_of_all_others(count):
    """The definition, on both sides of the sizes where `sample` changes its algorithm."""
    task = task_of("language_modeling", range(count), shots=min(10, count - 1))
    for index in range(count):
        others = [i for i in range(count) if i != index]
        drawn = random.Random(1234 + index).sample(others, task.num_fewshot)
        assert demonstrations(task, index) == drawn


def test_a_draw_does_not_look_at_all_other_examples():
    """A list of them, for every question, was 82 of 171 s before CORE had its first batch."""
    task = task_of("language_modeling", range(100_000), shots=10)
    tracemalloc.start()
    demonstrations(task, 50_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000, "bytes; a list of a hundred thousand has 800,000"


def test_questions_encoded_together_have_the_ids_of_each_alone(tokenizer, monkeypatch):
    """In groups of 256, as arrays: lists of ints took 2 GB for one task of CORE."""
    examples = [{**LANGUAGE, "continuation": "three " * i} for i in range(1, 8)]
    examples[3] = {"context": "Äh, \ud800", "continuation": "two"}  # a lone surrogate
    monkeypatch.setattr(core_tasks, "ENCODED_QUESTIONS", 3)
    task = task_of("language_modeling", examples, shots=2)
    asked = [6, 0, 1, 2, 3, 4, 5]
    found = list(sequences(task, asked, tokenizer, 256))
    assert len(found) == len(asked)
    for index, (span,) in zip(asked, found, strict=True):
        assert span.ids.dtype == np.uint32
        whole = prompts(task, index)[1]
        assert span.ids.tolist() == [tokenizer.bos_id, *tokenizer.encode(whole)]


def test_too_few_examples_for_the_demonstrations_are_refused():
    with pytest.raises(ValueError, match="t has 1 examples, its 1 demonstrations"):
        task_of("schema", [SCHEMA], shots=1)


def test_every_sequence_is_in_one_batch_that_holds_it():
    rng = np.random.default_rng(0)
    flat = [Scored([0] * int(n), 1, int(n)) for n in rng.integers(2, 257, 200)]
    seen = []
    for indices, bucket in batches(flat, 256, lambda bucket: 1024 // bucket):
        assert len(indices) <= 1024 // bucket
        assert all(len(flat[i].ids) <= bucket for i in indices)
        seen += indices
    assert sorted(seen) == list(range(200))
    assert [bucket_length(n, 200) for n in (1, 64, 65, 129, 200)] == [64, 64, 128, 200, 200]


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_devices_have_equal_shares_of_a_batch(devices):
    """Of 32 rows, three devices had all 32 each."""
    assert batch_rows(devices, 16384, 512) == 32 * devices
    assert batch_rows(devices, 1000, 2048) == devices


def decide_alone(backend, tokenizer, task, index):
    """The definition, one sequence at a time and unpadded."""
    spans = sequences_of(task, index, tokenizer, backend.config.sequence_len)
    results = []
    for ids, start, end in spans:
        row = np.array([ids], np.int32)
        nll, greedy = backend.score(row[:, :-1], row[:, 1:])
        results.append((nll[0, start - 1 : end - 1].mean(), greedy[0, start - 1 : end - 1]))
    if task.kind == "language_modeling":
        return results[0][1].tolist() == spans[0].ids[spans[0].start : spans[0].end].tolist()
    nats = [mean for mean, _ in results]
    return int(np.argmin(nats)) == task.examples[index]["gold"]


@needs_bundle
def test_batches_decide_as_single_examples_on_all_22_tasks(backend, tokenizer):
    tasks = load_bundle(BUNDLE)
    assert len(tasks) == 22
    before = backend._score._cache_size()
    batched = [
        evaluate_task(backend, tokenizer, task, max_examples=2, batch_tokens=2048) for task in tasks
    ]
    assert backend._score._cache_size() - before <= 3  # 64, 128 and 256 tokens
    for task, result in zip(tasks, batched, strict=True):
        alone = [decide_alone(backend, tokenizer, task, i) for i in range(2)]
        assert result.accuracy == np.mean(alone), task.label


@needs_bundle
def test_centering_reproduces_the_published_gpt2_table():
    """Our formula and baselines turn its accuracies into its centred ones, and 0.1139."""
    import csv

    baselines = {task.label: task.baseline / 100 for task in load_bundle(BUNDLE)}
    with open(BUNDLE / "openai-community-gpt2.csv", newline="") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file)][1:]
    centered = []
    for label, accuracy, published in rows[:22]:
        value = (float(accuracy) - baselines[label]) / (1 - baselines[label])
        assert value == pytest.approx(float(published), abs=2e-6)
        centered.append(value)
    assert np.mean(centered) == pytest.approx(0.1139, abs=1e-4)


def test_a_model_that_knows_the_answers_gets_them_all(tokenizer):
    """Language modelling is right exactly when every token is the model's first choice."""

    class Knowing:
        config = GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size)
        devices = ONE_DEVICE

        def score(self, inputs, targets):
            nll = np.where(targets < 0, 0, 1).astype(np.float32)
            return nll, np.where(targets < 0, 0, targets)

    task = task_of("language_modeling", [LANGUAGE] * 5)
    result = evaluate_task(Knowing(), tokenizer, task, max_examples=None, batch_tokens=128)
    assert (result.accuracy, result.examples) == (1.0, 5)
    assert core_metric([result]) == result.centered == 1.0


def test_accuracy_is_centred_on_guessing_and_the_metric_is_the_mean_of_that(tokenizer):
    """Of two questions alike but for the right answer, every model gets one."""

    class Any:
        config = GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size)
        devices = ONE_DEVICE

        def score(self, inputs, targets):
            return targets.astype(np.float32), targets

    task = task_of("multiple_choice", [CHOICE, {**CHOICE, "gold": 1}])
    result = evaluate_task(Any(), tokenizer, task, max_examples=None, batch_tokens=128)
    assert (result.accuracy, result.centered) == (0.5, pytest.approx((0.5 - 0.25) / 0.75))
    worse = replace(result, accuracy=0.1, centered=-0.2)
    assert core_metric([result, worse]) == pytest.approx((1 / 3 - 0.2) / 2)


def test_a_choice_counts_by_the_mean_of_its_tokens_however_many_they_are(tokenizer):
    """Of their sum, the shortest choice would win. There are no more examples than there are."""

    class AllAlike:
        config = GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size)
        devices = ONE_DEVICE

        def score(self, inputs, targets):
            likelier = np.arange(len(inputs))[:, None] == 1  # by a little: the long choice
            return np.where(likelier, 0.9, 1.0) * np.ones(inputs.shape), targets

    long = {
        **CHOICE,
        "choices": ["no", "a much longer answer than any other", "yes", "so"],
        "gold": 1,
    }
    result = evaluate_task(
        AllAlike(), tokenizer, task_of("multiple_choice", [long]), max_examples=9, batch_tokens=256
    )
    assert (result.examples, result.accuracy) == (1, 1.0)


def test_only_the_mean_of_all_examples_is_called_core():
    def label(words, *, is_core):
        return base_eval.metric_label(cli.parse(base_eval.Config, words), is_core=is_core)

    assert label([], is_core=True) == "CORE"
    assert label(["--max-per-task", "500"], is_core=True) == "CORE of 500 a task"
    assert label([], is_core=False) == "embedded tasks, not CORE"


def test_a_bundle_that_is_none_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_download --all"):
        load_bundle(tmp_path)


ENTRY = "{label: t, dataset_uri: t.jsonl, num_fewshot: [0], icl_task_type: language_modeling}"


def write_bundle(folder, *, listed=f"icl_tasks:\n- {ENTRY}\n", baselines="t,0", rows=(LANGUAGE,)):
    """A bundle of one task; `rows` are examples, or lines as they are."""
    (folder / "core.yaml").write_text(listed)
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{baselines}\n")
    (folder / "eval_data").mkdir()
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "eval_data" / "t.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_a_bundle_of_ones_own_is_read(tmp_path):
    write_bundle(tmp_path)
    assert load_bundle(tmp_path) == [task_of("language_modeling", [LANGUAGE], baseline=0.0)]


CHOOSING = f"icl_tasks:\n- {ENTRY.replace('language_modeling', 'multiple_choice')}\n"


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({"rows": (LANGUAGE, "{oops")}, r"t\.jsonl:2: "),
        ({"rows": (LANGUAGE, "7")}, r"t\.jsonl:2: a language_modeling example must have context"),
        ({"rows": ({"context": "x"},)}, r"t\.jsonl:1: .* must have context, continuation"),
        ({"listed": CHOOSING, "rows": ({**CHOICE, "gold": 2},)}, r"t\.jsonl:1: gold=2 must be"),
        ({"listed": CHOOSING, "rows": ({**CHOICE, "gold": "A"},)}, r"t\.jsonl:1: gold='A' must be"),
        ({"listed": CHOOSING, "rows": ({**CHOICE, "choices": 7},)}, r"t\.jsonl:1: gold=0 must be"),
        ({"baselines": "other,0"}, r"eval_meta_data\.csv has no row for task 't' of .*core\.yaml"),
        ({"baselines": "t,0\nu,half"}, r"eval_meta_data\.csv:3: .* a name and a number"),
        ({"baselines": "t"}, r"eval_meta_data\.csv:2: .* a name and a number"),
        ({"listed": "icl_tasks:\n- {label: [t}\n"}, r"core\.yaml:2: "),
        ({"listed": "icl_tasks: \x07"}, r"core\.yaml: .* special characters are not allowed"),
        ({"listed": "tasks: []"}, r"core\.yaml has no list of tasks under icl_tasks"),
        ({"listed": ""}, r"core\.yaml has no list of tasks under icl_tasks"),
        ({"listed": "icl_tasks: 3"}, r"core\.yaml has no list of tasks under icl_tasks"),
        (
            {"listed": "icl_tasks: [{label: t}]"},
            r"core\.yaml: entry 1 of icl_tasks.* must have label",
        ),
        ({"listed": "icl_tasks: [t]"}, r"core\.yaml: entry 1 of icl_tasks"),
        (
            {"listed": f"icl_tasks: [{ENTRY.replace('[0]', '10')}]"},
            r"core\.yaml: entry 1 of icl_tasks.* a list of a number",
        ),
        ({"listed": f"icl_tasks: [{ENTRY.replace('language_', '')}]"}, "task t: kind 'modeling'"),
    ],
)
def test_what_is_wrong_with_a_bundle_is_named(tmp_path, faulty, message):
    """A task without a baseline, a list without tasks and broken YAML once ended in a traceback."""
    write_bundle(tmp_path, **faulty)
    with pytest.raises(ValueError, match=message):
        load_bundle(tmp_path)


def test_the_report_says_which_model_has_been_judged(backend, tokenizer, base_dir, tmp_path):
    """A CORE without a model was on the card of whatever was exported next."""
    tokenizer.save(base_dir / "tokenizer")
    store = CheckpointStore(stage_directory("base", "mini"))
    store.save(7, backend, {"tokenizer": tokenizer.fingerprint, "run": "f00d"})
    store.finish()
    write_bundle(tmp_path)
    base_eval.main(cli.parse(base_eval.Config, ["--bundle", str(tmp_path), "-g", "mini"]))
    (section,) = Report(base_dir).sections()
    assert section.figures.keys() == {"CORE"}
    assert subject_of(section) == Subject("base", "mini", "f00d", 7)


def test_an_estimate_does_not_take_the_place_of_core(
    backend, tokenizer, base_dir, tmp_path, capsys
):
    """A quick look took the point from the miniseries' plot, which measures nothing twice."""
    tokenizer.save(base_dir / "tokenizer")
    store = CheckpointStore(stage_directory("base", "mini"))
    store.save(7, backend, {"tokenizer": tokenizer.fingerprint})
    store.finish()
    write_bundle(tmp_path)
    figures = []
    for words in (["--max-per-task", "1"], [], ["--max-per-task", "1"]):
        base_eval.main(cli.parse(base_eval.Config, ["--bundle", str(tmp_path), *words]))
        (section,) = Report(base_dir).sections()
        figures.append(list(section.figures))
    assert figures == [["CORE of 1 a task"], ["CORE"], ["CORE"]]
    assert "Not in the report" in capsys.readouterr().out
    rows = (store.path(7) / "base_eval.csv").read_text().splitlines()
    assert rows[-1].startswith("CORE,")


class Documentation(Corpus):
    """Held-out summaries of a hundred functions."""

    def groups(self, split):
        return [(0, 0, 100)]

    def read_group(self, split, shard, group):
        return [
            f"lib.module.function_{i}\n\nReturn the number {i} as a value of its own kind.\n\nMore."
            for i in range(100)
        ]


def test_embedded_tasks_have_all_kinds_one_right_answer_and_honest_baselines(backend, tokenizer):
    tasks = embedded_tasks(Documentation("docs", "f"))
    assert [task.kind for task in tasks] == ["multiple_choice", "schema", "language_modeling"]
    assert [task.baseline for task in tasks] == [25, 50, 0]
    for example in tasks[0].examples:
        number = example["query"].rpartition("_")[2]
        matching = [f"number {number} as" in choice for choice in example["choices"]]
        assert matching.index(True) == example["gold"]
        assert sum(matching) == 1
    golds = [example["gold"] for example in tasks[0].examples]
    assert min(np.bincount(golds, minlength=4)) > 10
    assert tasks[2].examples[0]["continuation"] == "kind"
    for task in tasks:
        result = evaluate_task(backend, tokenizer, task, max_examples=4, batch_tokens=2048)
        assert result.accuracy == np.mean(
            [decide_alone(backend, tokenizer, task, i) for i in range(4)]
        )
