"""Both backends on real text through the whole pipeline: training, bits per byte, CORE, tool use.

The text is the embedded corpus, with fewer libraries than installed so that it is read in a second.
"""

from dataclasses import replace

import numpy as np
import pytest

from jaxchat import core_eval, embedded_corpus
from jaxchat.config import OptimizerConfig, ScheduleConfig
from jaxchat.conversation import render, render_for_completion
from jaxchat.core_eval import evaluate_task
from jaxchat.core_tasks import make_task
from jaxchat.dataloader import PackedLoader
from jaxchat.dataset import open_corpus
from jaxchat.embedded_tasks import embedded_tasks
from jaxchat.engine import Engine
from jaxchat.jax_backend import JaxBackend
from jaxchat.loss_eval import bits_per_byte
from jaxchat.plan import plan_training
from jaxchat.request import Request
from jaxchat.sampling_params import SamplingParams
from jaxchat.schedule import StepSchedule, schedule_at
from jaxchat.tokenizer import Tokenizer
from tests.parity.twins import CONFIGS, max_abs, perturbed_weights
from torch_ref.torch_backend import TorchBackend

ROWS, STEPS = 2, 100

LENGTH = 192
"""Tokens of a row: longer than the short window, short enough for a hundred steps."""

EXAMPLES = 12
"""Of each task."""

SCHEDULE = ScheduleConfig(warmup_steps=10, momentum_warmup_steps=50)

CONVERSATION = {
    "messages": [
        {"role": "user", "content": "What is 12 * 34?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Let me compute it. "},
                {"type": "python", "text": "12 * 34"},
                {"type": "python_output", "text": "408"},
                {"type": "text", "text": "It is 408."},
            ],
        },
    ]
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(tmp_path_factory.mktemp("corpus")))
        patch.setattr(embedded_corpus, "DISTRIBUTIONS", ("networkx",))
        empty = str(tmp_path_factory.mktemp("stdlib"))
        patch.setattr(embedded_corpus.sysconfig, "get_path", lambda _: empty)
        return open_corpus("embedded")


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer.train(corpus.iter_texts("train"), vocab_size=1024)


@pytest.fixture(scope="module", params=["modern", "classic"])
def config(request, tokenizer):
    return replace(CONFIGS[request.param], vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def backends(config):
    """JAX on one device and torch, with the same weights."""
    ours = JaxBackend(config, dtype="float32", device=0)
    return ours, TorchBackend(config, dtype="float32")


@pytest.fixture
def same_weights(backends, config):
    for backend in backends:
        backend.set_params(perturbed_weights(config))
    return backends


def batches(corpus, tokenizer, split, count):
    with PackedLoader(
        corpus, tokenizer, split=split, rows_per_batch=ROWS, sequence_len=LENGTH
    ) as loader:
        return [next(loader) for _ in range(count)]


def test_training_follows_one_curve(same_weights, corpus, tokenizer, config, parity):
    """From perturbed weights: at the very start the output projections are zero, the residual
    scalars have a true gradient of zero, and Adam makes full steps of its rounding errors."""
    optimizer = OptimizerConfig()
    plan = plan_training(config, optimizer, num_iterations=STEPS, total_batch_size=ROWS * LENGTH)
    plan = replace(plan, weight_decay=optimizer.weight_decay)  # as twins.PLAN
    curves = []
    for backend in same_weights:
        backend.start_training(optimizer, plan)
        losses = []
        for step, batch in enumerate(batches(corpus, tokenizer, "train", STEPS)):
            moving = schedule_at(step, SCHEDULE, plan)
            metrics = backend.train_step(batch.inputs[None], batch.targets[None], moving)
            losses.append(float(metrics["loss"]))
        curves.append(losses)
    ours, theirs = np.array(curves)
    assert ours[-5:].mean() < ours[0] - 0.5
    parity(f"{STEPS} training steps on the embedded corpus: loss", max_abs(theirs, ours))


def test_bits_per_byte(same_weights, corpus, tokenizer, parity):
    """To the fourth digit behind the point, and two more."""
    held_out = batches(corpus, tokenizer, "val", 4)
    ours, theirs = (bits_per_byte(b, held_out, tokenizer.token_bytes) for b in same_weights)
    parity("bits per byte", abs(ours - theirs))


def test_core_decisions(same_weights, corpus, tokenizer, parity, monkeypatch):
    """All three kinds, one with demonstrations: every single decision is the same."""
    decisions = []
    judge = core_eval.is_correct

    def listen(task, index, scores):
        best = int(np.argmin([nats for nats, _ in scores]))
        decisions.append((task.label, index, best, scores[0][1]))
        return judge(task, index, scores)

    monkeypatch.setattr(core_eval, "is_correct", listen)
    tasks = [*embedded_tasks(corpus), likely_words(corpus)]
    made = []
    for backend in same_weights:
        decisions.clear()
        options = {"max_examples": EXAMPLES, "batch_tokens": 2048}
        results = [evaluate_task(backend, tokenizer, task, **options) for task in tasks]
        made.append(([result.accuracy for result in results], list(decisions)))
    (our_accuracies, ours), (their_accuracies, theirs) = made
    assert len({best for _, _, best, _ in ours}) > 1
    assert len(ours) == EXAMPLES * len(tasks)
    differing = sum(a != b for a, b in zip(ours, theirs, strict=True))
    parity(f"CORE: decisions that differ, of {len(ours)}", differing)
    assert our_accuracies == their_accuracies


def likely_words(corpus):
    """Choices of one word each, so that nothing but the model's scores tells them apart."""
    words = sorted({word for text in corpus.iter_texts("val") for word in text.split()})[::40]
    examples = [
        {"query": "The graph is", "choices": words[i : i + 4], "gold": i % 4}
        for i in range(0, 4 * 30, 4)
    ]
    return make_task(
        label="likely_words",
        kind="multiple_choice",
        num_fewshot=3,
        delimiter=" ",
        baseline=25.0,
        examples=examples,
    )


def test_engines_with_tool_use(same_weights, tokenizer, config, parity):
    """A model that has learned one conversation by heart calls the calculator, and goes on for 200
    tokens, beside another request."""
    ours, theirs = same_weights
    learn_by_heart(theirs, tokenizer, config)
    ours.set_params(theirs.get_params())
    prompt = render_for_completion(tokenizer, CONVERSATION)
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    other = Request(tokenizer.encode("Returns the graph"), replace(params, temperature=1.0, seed=3))
    asked = Request(prompt, params)
    (reply, beside), (their_reply, their_beside) = (
        Engine(backend, tokenizer, slots=2).complete([asked, other]) for backend in same_weights
    )
    assert [part["type"] for part in reply.parts][:4] == ["text", "python", "python_output", "text"]
    assert reply.parts[:3] == CONVERSATION["messages"][1]["content"][:3]
    assert reply.parts[3]["text"].startswith("It is 408.")
    assert len(reply.ids) == 200 and not all(reply.sampled)
    assert their_reply.parts == reply.parts
    differing = sum(a != b for a, b in zip(reply.ids, their_reply.ids, strict=True))
    parity("Engines, greedy with tool use: tokens that differ, of 200", differing)
    differing = sum(a != b for a, b in zip(beside.ids, their_beside.ids, strict=True))
    parity(f"Engines, sampled: tokens that differ, of {len(beside.ids)}", differing)


def learn_by_heart(backend, tokenizer, config):
    """Train on one conversation until the model says it by itself."""
    ids, mask = render(tokenizer, CONVERSATION)
    inputs, targets = np.array(ids[:-1], np.int32), np.array(ids[1:], np.int32)
    targets[np.array(mask[1:]) == 0] = -1
    plan = plan_training(config, OptimizerConfig(), num_iterations=60, total_batch_size=2**15)
    backend.start_training(OptimizerConfig(), plan)
    for _ in range(plan.num_iterations):
        moving = StepSchedule(lr_multiplier=1.0, momentum=0.9, weight_decay=0.0)
        metrics = backend.train_step(inputs[None, None], targets[None, None], moving)
    assert float(metrics["loss"]) < 0.05
