"""Rollouts as batches, pass@k against its formula, and the reward of a real run."""

import itertools

import numpy as np
import pytest

from jaxchat.backend import IGNORE, backend_class
from jaxchat.chat_loader import ChatLoader
from jaxchat.config import GPTConfig, OptimizerConfig, ScheduleConfig
from jaxchat.conversation import render_for_completion
from jaxchat.engine import Engine
from jaxchat.plan import TrainingPlan
from jaxchat.policy_gradient import (
    RolloutConfig,
    RolloutLoader,
    pass_at_k,
    prompts_of,
    rollout_batch,
    sample_groups,
)
from jaxchat.request import Completion
from jaxchat.sampling_params import SamplingParams
from jaxchat.schedule import schedule_at
from jaxchat.tasks.arithmetic import Arithmetic
from jaxchat.tasks.base import Task
from jaxchat.tokenizer import Tokenizer
from tests.scripted import ScriptedBackend

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
END = TOKENIZER.special_id("assistant_end")
CONTEXT = GPTConfig.from_depth(
    1, aspect_ratio=32, head_dim=32, vocab_size=TOKENIZER.vocab_size, sequence_len=64
)


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
    assert batch.figures["train/finished_share"] == 0.5
    assert batch.figures["train/reply_tokens"] == (4 + 1) / 2


def test_an_advantage_is_the_reward_minus_the_mean_of_its_own_group():
    """Not of all groups, and not divided by a deviation."""
    groups = [[reply([7], [-1.0]) for _ in range(4)] for _ in range(2)]
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    batch = rollout_batch([[1], [2]], groups, rewards, max_length=64)
    expected = [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]
    assert batch.weights[:, 0].tolist() == expected


def test_replies_are_sampled_as_the_options_say():
    config = RolloutConfig(max_tokens=9, temperature=0.7, top_k=5)
    sampled = config.params(seed=3)
    assert sampled == SamplingParams(max_tokens=9, temperature=0.7, top_k=5, seed=3)


def test_a_group_that_agrees_teaches_nothing():
    groups = [[reply([7], [-1.0]), reply([8], [-1.0])]]
    batch = rollout_batch([[1]], groups, np.array([[1.0, 1.0]]), max_length=64)
    assert not batch.weights.any()
    assert batch.figures["train/mixed_groups_share"] == 0.0


@pytest.mark.parametrize("reward", [0.1, 0.7, 1.1])
@pytest.mark.parametrize("samples", [3, 5, 6, 7, 11, 24])
def test_of_equal_rewards_that_float32_cannot_hold_nothing_is_left(reward, samples):
    """Their mean was another number, and Muon made a whole step of the 6e-8 between them."""
    groups = [[reply([7], [-1.0])] * samples] * 2
    mixed = [reward, *[0.0] * (samples - 1)]
    rewards = np.array([[reward] * samples, mixed], np.float32)
    batch = rollout_batch([[1], [2]], groups, rewards, max_length=64)
    assert not batch.weights[:samples].any()
    assert batch.weights[samples:].all()
    assert batch.figures["train/mixed_groups_share"] == 0.5


def small_backend(name):
    backend = backend_class(name)(CONTEXT, dtype="float32")
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
    assert (first.state(), first.passes) == ({"step": 3}, 1.5)
    assert first.state(first.position - 1) == {"step": 2}
    asked = [questions_of(batch) for batch in batches]
    assert sorted(asked[0] + asked[1]) == list(range(len(SayA())))
    second = asked[2] + questions_of(next(first))
    assert sorted(second) == sorted(asked[0] + asked[1])
    assert second != asked[0] + asked[1]


def questions_of(batch):
    """Their numbers, in the order in which they were asked."""
    digits = ["".join(chr(i) for i in row[:8] if ord("0") <= i <= ord("9"))[:1] for row in batch[0]]
    return [int(digit) for digit in digits[:: CONFIG.samples]]


def test_a_question_that_comes_again_is_answered_anew():
    """With the seed of its place alone, every step would write the same replies."""

    class Same(SayA):
        def _example(self, index):
            return super()._example(0)

    loader = RolloutLoader(Same(), small_backend("jax"), TOKENIZER, CONFIG, seed=3)
    first, second = next(loader), next(loader)
    assert not np.array_equal(first.inputs, second.inputs)


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
    with pytest.raises(ValueError, match="out of range: top_k=-1"):
        RolloutConfig(top_k=-1)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ({"temperature": 0.0}, "4 samples at temperature 0 are one reply 4 times: set --temper"),
        ({"top_k": 1}, "4 samples at top_k 1 are one reply 4 times: set --top-k 50"),
    ],
)
def test_a_group_of_one_reply_is_refused(drawn, message):
    """Every group agrees: hours taught nothing."""
    with pytest.raises(ValueError, match=message):
        RolloutConfig(samples=4, **drawn)


def test_pass_at_k_is_the_chance_over_all_subsets():
    """Against an average over every choice of k of the n replies."""

    class OneInThree(SayA):
        def evaluate(self, problem, reply):
            return sum(reply.encode()) % 3 == 0

    backend, task = small_backend("jax"), OneInThree()
    config = RolloutConfig(questions=1, samples=2, max_tokens=2, top_k=0, slots=5)
    found = pass_at_k(task, backend, TOKENIZER, config, questions=4, samples=5, ks=(1, 2, 5, 9))
    assert set(found) == {"pass@1", "pass@2", "pass@5"}
    engine = Engine(backend, TOKENIZER, slots=5)
    asked = [task[i] for i in range(4)]
    groups = sample_groups(
        engine,
        prompts_of(engine, asked, config),
        config,
        samples=5,
        seeds=range(4),
    )
    right = [[task.evaluate(task[0], reply.text) for reply in group] for group in groups]
    assert 2 < sum(map(sum, right)) < 18
    for k in (1, 2, 5):
        chances = [np.mean([any(c) for c in itertools.combinations(row, k)]) for row in right]
        assert found[f"pass@{k}"] == pytest.approx(np.mean(chances))
    options = {"questions": 4, "samples": 1, "ks": (1, 2)}
    found = pass_at_k(task, backend, TOKENIZER, config, **options)
    assert found == {"pass@1": np.mean([row[0] for row in right])}  # a group of 1 was refused


def test_questions_and_samples_share_the_slots():
    """A reply that ends makes room for the next question's: fewer dispatches, never more rows."""

    def next_token(held):
        text = bytes(id for id in held if id < 256)
        question, said = text.split(b"?")
        return ord("x") if len(said) < 7 * int(question) + 2 else END

    def dispatches_of(groups):
        backend = ScriptedBackend(CONTEXT, next_token)
        for questions in groups:
            engine = Engine(backend, TOKENIZER, slots=5, tokens_per_dispatch=4)
            prompts = prompts_of(engine, questions, config)
            replies = sample_groups(
                engine, prompts, config, samples=config.samples, seeds=range(len(questions))
            )
            for question, group in zip(questions, replies, strict=True):
                number = int(question["messages"][0]["content"][0])
                assert [reply.text for reply in group] == ["x" * (7 * number + 2)] * config.samples
        assert len(backend.prefills) == len(SayA())  # the samples of a question share it
        return backend.dispatches

    config = RolloutConfig(questions=8, samples=4, max_tokens=60, top_k=0, slots=5)
    questions = list(SayA())
    together, apart = dispatches_of([questions]), dispatches_of([[q] for q in questions])
    assert max(together) == 5  # of at least two questions
    assert max(apart) == 4
    assert len(together) < 0.9 * len(apart)


def test_a_question_longer_than_the_context_is_cropped():
    """It must not end a run that has trained for hours: its end is asked, half is left to reply."""

    class Long(SayA):
        def _example(self, index):
            question = {"role": "user", "content": "q" * (500 * index + 1) + "?"}
            return {"messages": [question, {"role": "assistant", "content": "a"}]}

    batch = next(RolloutLoader(Long(), small_backend("jax"), TOKENIZER, CONFIG, seed=0))
    assert batch.inputs.shape == (32, 64)
    prompts = {tuple(row[:60]) for row in batch.inputs.tolist() if 0 not in row[:60]}
    assert prompts
    for prompt in prompts:  # bos, the end of the text, and the two tokens that end the turn
        assert prompt[0] == TOKENIZER.bos_id
        assert prompt[-3] == ord("?")
        assert set(prompt[1:-3]) == {ord("q")}


def test_processes_hand_out_shares_of_one_batch():
    backend = small_backend("jax")
    whole = next(RolloutLoader(SayA(), backend, TOKENIZER, CONFIG, seed=3))
    for index in range(2):
        share = {"process_index": index, "process_count": 2}
        part = next(RolloutLoader(SayA(), backend, TOKENIZER, CONFIG, seed=3, **share))
        for name in ("inputs", "targets", "weights"):
            np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[index::2])
        assert part.figures == whole.figures


class Sums(Arithmetic):
    """One more than 1 to 5: few enough that the model can find out by trying."""

    def __init__(self):
        super().__init__("train", 5)

    def _example(self, index):
        return exchange(f"{index + 1}+1=", f"#### {index + 2}")

    def _identity(self):
        return "sums"


class Guesses(Sums):
    """The form of an answer without its content: every sum is any number from 2 to 6."""

    def _examples(self):
        return 25

    def _example(self, index):
        question = super()._example(index % 5)["messages"][0]["content"]
        return exchange(question, f"#### {2 + index // 5}")


def exchange(question, answer):
    turns = zip(("user", "assistant"), (question, answer), strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "torch"])
def test_the_reward_of_sums_rises(name):
    """First the form is taught, with random numbers in it; what is right only the reward says."""
    backend = small_backend(name)
    form = TrainingPlan(2**12, 60, 0.5, 0.0, 0)
    backend.start_training(OptimizerConfig(), form)
    with ChatLoader(Guesses(), TOKENIZER, rows_per_batch=16, sequence_len=64) as loader:
        for step in range(form.num_iterations):
            batch = next(loader)
            backend.train_step(batch.inputs[None], batch.targets[None], at(step, form))
    plan = TrainingPlan(2**12, 120, 0.5, 0.0, 0)  # faster, one sum of the five may be given up
    backend.start_training(OptimizerConfig().scaled(0.3), plan)
    config = RolloutConfig(questions=5, samples=16, max_tokens=8, top_k=0, slots=40)
    loader = RolloutLoader(Sums(), backend, TOKENIZER, config, seed=0)
    rewards = []
    for step in range(plan.num_iterations):
        batch = next(loader)
        rewards.append(batch.figures["train/reward"])
        arrays = (batch.inputs[None], batch.targets[None])
        backend.train_step(*arrays, at(step, plan), batch.weights[None])
    assert 0.05 < np.mean(rewards[:3]) < 0.35  # a guess among five is right one time in five
    assert np.mean(rewards[-5:]) > 0.8


def at(step, plan):
    flat_then_down = ScheduleConfig(warmup_steps=0, warmdown_ratio=0.5, final_lr_frac=0.0)
    return schedule_at(step, flat_then_down, plan)
