"""The shapes that torch_ref declares are the shapes it has, checked at every call."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jaxtyping

jaxtyping.install_import_hook("torch_ref", "beartype.beartype")

import numpy as np
import pytest

from jaxchat.config import GPTConfig, OptimizerConfig
from jaxchat.plan import TrainingPlan
from jaxchat.sampling_params import SamplingParams
from jaxchat.engine import Engine
from jaxchat.request import Request
from jaxchat.schedule import StepSchedule
from jaxchat.tokenizer import Tokenizer
from torch_ref.gpt import norm
from torch_ref.torch_backend import TorchBackend

tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
modern = GPTConfig(
    sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32
)
for config in (modern, modern.classic()):
    for dtype in ("float32", "bfloat16"):
        backend = TorchBackend(config, dtype=dtype)
        backend.init(0)
        backend.start_training(OptimizerConfig(), TrainingPlan(64, 2, 0.1, 0.1, 128))
        ids = np.zeros((2, 2, 17), np.int32)
        backend.train_step(ids[..., :-1], ids[..., 1:], StepSchedule(1.0, 0.9, 0.1))
        backend.score(ids[0, :, :-1], ids[0, :, 1:])
        requests = [Request(tokenizer.encode(text), SamplingParams(8)) for text in ("a", "bcd")]
        Engine(backend, tokenizer, slots=2).complete(requests)
        list(backend.model.generate([1, 2], SamplingParams(2)))
with pytest.raises(Exception, match="norm"):
    norm("not a tensor")  # the hook is at work
"""


@pytest.mark.slow
def test_shapes_hold_in_training_scoring_and_decoding():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
