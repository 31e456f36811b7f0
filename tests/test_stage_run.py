"""A stage that was interrupted is one stage."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from jaxchat import stage_run
from jaxchat.config import GPTConfig
from jaxchat.tokenizer import Tokenizer
from jaxchat.training_stage import LoopConfig, LoopResult
from tests.scripted import ScriptedBackend


def carried_out(directory, start):
    return stage_run.carry_out(
        SimpleNamespace(directory=directory),
        SimpleNamespace(agree=bool),
        LoopConfig(num_iterations=2, micro_batches=1, flops_per_token=1.0),
        {"step": 1, "train_seconds": 50.0, "loader": None, "run": "x", **start},
        started=time.monotonic() - 5,
        open_loader=nullcontext,
        schedule=lambda step: None,
        meta={},
        config={},
        resume="auto",
        run=None,
        tensorboard=False,
        evaluate=dict,
    )


@pytest.mark.parametrize(("start", "seconds"), [({"wall_seconds": 80.0}, 85), ({}, 55)])
def test_the_time_of_earlier_processes_counts(tmp_path, monkeypatch, start, seconds):
    """The report once gave a stage the time of its last process."""

    def run_loop(stage, loop, **_):
        return LoopResult(2, 0.0, stage.wall_seconds(), interrupted=False)

    monkeypatch.setattr(stage_run, "run_loop", run_loop)
    assert carried_out(tmp_path, start).wall_seconds == pytest.approx(seconds, abs=1)


def test_a_signal_ends_the_process_with_its_status(tmp_path, monkeypatch):
    monkeypatch.setattr(
        stage_run, "run_loop", lambda *_, **__: LoopResult(1, 0.0, 0.0, interrupted=True)
    )
    with pytest.raises(SystemExit) as stop:
        carried_out(tmp_path, {})
    assert stop.value.code == 143


def test_prompts_that_do_not_fit_are_not_asked():
    """A short context once ended a run with an error after its last step."""
    tokenizer = Tokenizer.train(["some text and some more text"], vocab_size=270)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, sequence_len=8)
    [letter] = tokenizer.encode("x")
    backend = ScriptedBackend(config, lambda held: letter)
    prompts = {"eight": [letter] * 8, "nine": [letter] * 9, "one": [letter]}
    replies = stage_run.greedy_replies(backend, tokenizer, prompts, max_tokens=3)
    assert [(name, reply.text) for name, reply in replies] == [("eight", "x"), ("one", "xxx")]
