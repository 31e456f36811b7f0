"""Rollouts as batches, pass@k against its formula, and the reward of a real run."""

import itertools
from math import comb

import numpy as np
import pytest

from jaxchat.backend import IGNORE, backend_class
from jaxchat.config import GPTConfig, OptimizerConfig, ScheduleConfig, TrainingPlan
from jaxchat.conversation import render_for_completion
from jaxchat.policy_gradient import RolloutConfig, RolloutLoader, pass_at_k, rollout_batch
from jaxchat.request import Completion
from jaxchat.schedule import schedule_at
from jaxchat.tasks.base import Task
from jaxchat.tokenizer import Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
END = TOKENIZER.special_id("assistant_end")


class SayA(Task):
    """Right is a reply that begins with an `a`: a few dozen steps teach it."""

    name, kind = "say a", "generative"

    def _examples(self):
        return 8

    def _example(self, index):
        question = {"role": "user", "content": f"{index}?"}
        return {"messages": [question, {"role": "assistant", "content": "a"}]}

    def _identity(self):
        return "say a"

    def evaluate(self, problem, reply):
        return reply.startswith("a")


def reply(ids, logprobs, stop_id=None):
    return Completion(
        0, 0, ids=ids, logprobs=logprobs, stop_id=stop_id, finish_reason="stop" if stop_id else ""
    )


def test_rows_hold_prompt_and_reply_and_learn_what_the_model_chose():
    """The second token was written by the tool; the end of the turn was chosen."""
    groups = [[reply([7, 8, 9], [-1.0, None, -1.0], stop_id=5), reply([6], [-1.0])]]
    batch = rollout_batch([[1, 2]], groups, np.array([[1.0, 0.0]]), max_length=128)
    assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (2, 128)
    assert batch.inputs[0, :5].tolist() == [1, 2, 7, 8, 9]
    assert batch.targets[0, :6].tolist() == [IGNORE, 7, IGNORE, 9, 5, IGNORE]
    assert batch.inputs[1, :2].tolist() == [1, 2]
    assert batch.targets[1, :3].tolist() == [IGNORE, 6, IGNORE]
    assert set(batch.weights[0]) == {0.5}
    assert set(batch.weights[1]) == {-0.5}
    assert batch.figures["train/reward"] == 0.5
    assert batch.figures["train/mixed_groups_share"] == 1.0


def test_a_group_that_agrees_teaches_nothing():
    groups = [[reply([7], [-1.0]), reply([8], [-1.0])]]
    batch = rollout_batch([[1]], groups, np.array([[1.0, 1.0]]), max_length=64)
    assert not batch.weights.any()
    assert batch.figures["train/mixed_groups_share"] == 0.0


def small_backend(name):
    config = GPTConfig.from_depth(
        1, aspect_ratio=32, head_dim=32, vocab_size=TOKENIZER.vocab_size, sequence_len=64
    )
    backend = backend_class(name)(config, dtype="float32")
    backend.init(0)
    return backend


CONFIG = RolloutConfig(questions=4, samples=8, max_tokens=4, top_k=0, slots=8)


def test_a_loader_continues_where_another_stood():
    """The same weights, seed and step give the same rollouts; the next pass has another order."""
    backend = small_backend("jax")
    first = RolloutLoader(SayA(), backend, TOKENIZER, CONFIG, seed=3)
    batches = [next(first) for _ in range(3)]
    later = RolloutLoader(SayA(), backend, TOKENIZER, CONFIG, seed=3, state={"step": 2})
    np.testing.assert_array_equal(next(later).inputs, batches[2].inputs)
    assert (first.state(), first.epoch) == ({"step": 3}, 1)
    asked = [tuple(sorted({tuple(row[:6]) for row in b.inputs.tolist()})) for b in batches]
    assert len(set(asked[0]) | set(asked[1])) == len(SayA())


def test_samples_of_a_question_differ_from_their_first_token():
    batch = next(RolloutLoader(SayA(), small_backend("jax"), TOKENIZER, CONFIG, seed=0))
    prompt = len(render_for_completion(TOKENIZER, SayA()[0]))
    firsts = batch.inputs[:, prompt].reshape(CONFIG.questions, CONFIG.samples)
    assert all(len(set(group.tolist())) > 2 for group in firsts)


def test_too_few_questions_are_named():
    with pytest.raises(ValueError, match=r"8 questions, a step takes 9: lower --questions"):
        RolloutLoader(SayA(), None, TOKENIZER, RolloutConfig(questions=9), seed=0)
    with pytest.raises(ValueError, match="samples=1 at least 2"):
        RolloutConfig(samples=1)


def test_pass_at_k_is_the_chance_over_all_subsets():
    """Against an average over every choice of k of the n replies."""
    backend = small_backend("jax")
    config = RolloutConfig(questions=1, samples=5, max_tokens=2, top_k=3, slots=5)
    found = pass_at_k(SayA(), backend, TOKENIZER, config, questions=4, ks=(1, 2, 5, 9), seed=1)
    assert set(found) == {"pass@1", "pass@2", "pass@5"}
    assert 0 <= found["pass@1"] <= found["pass@2"] <= found["pass@5"] <= 1
    for n, c, k in itertools.product((5,), range(6), (1, 2, 5)):
        replies = [True] * c + [False] * (n - c)
        chances = [any(chosen) for chosen in itertools.combinations(replies, k)]
        assert 1 - comb(n - c, k) / comb(n, k) == pytest.approx(np.mean(chances))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_the_reward_rises(name):
    """From guessing among 265 tokens to saying what pays, on either backend."""
    backend = small_backend(name)
    plan = TrainingPlan(2**15, 40, 1.0, 0.0, 0)
    backend.start_training(OptimizerConfig().scaled(0.25), plan)
    config = RolloutConfig(questions=8, samples=32, max_tokens=2, top_k=0, slots=32)
    loader = RolloutLoader(SayA(), backend, TOKENIZER, config, seed=0)
    schedule = ScheduleConfig(warmup_steps=0, warmdown_ratio=1.0, final_lr_frac=0.0)
    rewards = []
    for step in range(plan.num_iterations):
        batch = next(loader)
        rewards.append(batch.figures["train/reward"])
        arrays = (batch.inputs[None], batch.targets[None])
        backend.train_step(*arrays, schedule_at(step, schedule, plan), batch.weights[None])
    assert np.mean(rewards[:3]) < 0.1
    assert np.mean(rewards[-5:]) > 0.7
