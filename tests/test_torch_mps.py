"""What a Mac's GPU is asked to do, it can do: the whole backend on a pretended one.

tests/virtual_mps.py says what is checked at every operation, and what only the device can tell.
"""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from jaxchat import sampling
from jaxchat.backend import DecodeBatch
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import GPTConfig, OptimizerConfig, ScheduleConfig
from jaxchat.dataloader import Batch
from jaxchat.plan import TrainingPlan
from jaxchat.sampling_params import SamplingParams
from jaxchat.schedule import schedule_at
from jaxchat.tracker import METRICS, Tracker, read_metrics
from jaxchat.train_loop import run_loop
from jaxchat.training_stage import LoopConfig, Stage
from tests.virtual_mps import kernels, virtual_mps
from torch_ref.torch_backend import TorchBackend

MODERN = GPTConfig(sequence_len=256, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)

PLAN = TrainingPlan(
    total_batch_size=512, num_iterations=20, lr_scale=0.05, weight_decay=0.2, target_tokens=10240
)

PARAMS = (
    SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, top_logprobs=3),
    SamplingParams(
        temperature=0.0,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        logit_bias=((3, 2.0),),
    ),
    None,
)
"""Between them every filter and penalty; the third row is left alone."""


def use(backend, folder):
    """Everything that the pipeline asks of a backend; returns what it answered."""
    ids = np.random.default_rng(0).integers(0, 300, (1, 2, 141), dtype=np.int32)
    inputs, targets = ids[..., :-1], ids[..., 1:].copy()
    targets[0, 0, :50] = -1
    backend.init(0)
    backend.start_training(OptimizerConfig(), PLAN)
    answers = []
    metrics = backend.train_step(inputs, targets, schedule_at(0, ScheduleConfig(), PLAN))
    answers += [float(metrics["loss"]), float(metrics["grad_norm"])]
    backend.save(folder)
    backend.load(folder)
    backend.set_optimizer_state(backend.get_optimizer_state())
    backend.set_params(backend.get_params())
    answers.append(backend.score(inputs[0], targets[0]).nll)
    answers.append(backend.logits(inputs[0], np.array([3, 135], np.int32)))
    answers.append(backend.score_prompt(ids[0, 0, :100]).logprobs[1:])
    assert backend.agree(True)
    cache, lengths = backend.new_cache(3, 256), np.array([3, 135, 100], np.int32)
    for row in range(2):
        cache, logits = backend.prefill(cache, row, ids[0, 0, : lengths[row]], 0)
        answers.append(logits)
    cache = backend.copy_row(cache, 1, 2, 100)
    batch = DecodeBatch(
        tokens=np.array([1, 2, 3], np.int32),
        lengths=lengths,
        budgets=np.array([4, 3, 0], np.int32),
        uniforms=np.stack([sampling.uniforms(0, row, 1, 4) for row in range(3)]),
        prompt_lengths=lengths,
        params=PARAMS,
        stop_ids=frozenset({7}),
    )
    result = backend.decode(cache, batch)
    return [*answers, result.logprobs[1, :3]]


@pytest.mark.parametrize("preset", ["modern", "classic"])
def test_the_whole_backend_keeps_to_what_mps_can_do(preset, tmp_path, monkeypatch):
    """In float16, its default there, and with the answers of float16 on the CPU."""
    config = MODERN if preset == "modern" else replace(MODERN, n_kv_head=4).classic()
    expected = use(TorchBackend(config, dtype="float16"), tmp_path / "cpu")
    with virtual_mps(monkeypatch) as rules:
        backend = TorchBackend(config)
        assert (backend.device.type, backend.dtype) == ("mps", torch.float16)
        assert backend.devices.platform == "mps"
        answers = use(backend, tmp_path / "mps")
    assert len(rules.seen) > 50
    for mine, theirs in zip(answers, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=0.02)


class Loader:
    """Batches of random ids."""

    passes, position = 0.0, None

    def __next__(self):
        ids = np.random.default_rng(0).integers(0, 300, (4, 65), dtype=np.int32)
        return Batch(ids[:, :-1], ids[:, 1:].copy())

    def state(self, position=None):
        return {}


def test_the_loop_reads_the_figures_of_a_step(tmp_path, monkeypatch):
    with virtual_mps(monkeypatch), closing(Tracker(tmp_path / METRICS)) as tracker:
        backend = TorchBackend(replace(MODERN, n_layer=1))
        backend.init(0)
        backend.start_training(OptimizerConfig(), PLAN)
        stage = Stage(
            backend=backend,
            loader=Loader(),
            schedule=lambda step: schedule_at(step, ScheduleConfig(), PLAN),
            store=CheckpointStore(tmp_path),
            tracker=tracker,
            meta={},
            evaluate=lambda _: {"val/bpb": 1.0},
        )
        run_loop(stage, LoopConfig(num_iterations=3, micro_batches=2, flops_per_token=1.0))
    losses = [row["train/loss"] for row in read_metrics(tmp_path / METRICS) if "train/loss" in row]
    assert len(losses) == 3
    assert 0 < losses[-1] < losses[0] < 7


def test_evaluation_needs_the_memory_of_8192_tokens_however_many_there_are(monkeypatch):
    """So that a Mac of 8 GB which could train the model can also evaluate it."""
    ids = np.random.default_rng(0).integers(0, 300, (64, 256), dtype=np.int32)
    largest = []
    for rows in (32, 64):  # 8,192 tokens, and twice as many
        with virtual_mps(monkeypatch) as rules:
            backend = TorchBackend(replace(MODERN, n_layer=1))
            backend.init(0)
            scores = backend.score(ids[:rows], ids[:rows])
            backend.logits(ids[:rows], np.zeros(rows, np.int32))
        assert scores.nll.shape == (rows, 256)
        largest.append(rules.largest_bytes)
    assert largest[0] == largest[1]


def test_several_processes_on_the_one_gpu_of_a_mac_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with virtual_mps(monkeypatch), pytest.raises(ValueError, match="run without torchrun"):
        TorchBackend(MODERN)


def test_a_pytorch_that_attends_wrongly_on_a_mac_is_refused(monkeypatch):
    with virtual_mps(monkeypatch):
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.13.1"))
        with pytest.raises(ValueError, match=r"install 2\.14 or later, or set JAXCHAT_DEVICE=cpu"):
            TorchBackend(MODERN)
        monkeypatch.setenv("JAXCHAT_DEVICE", "cpu")
        TorchBackend(MODERN)


def test_what_mps_cannot_do_is_noticed(monkeypatch):
    """The pretended device refuses what the real one would refuse or hand to the CPU."""
    with virtual_mps(monkeypatch):
        there = torch.ones(3, 3).to("mps")
        assert there.device.type == "mps"
        assert (there + there).sum().item() == 18
        with pytest.raises(AssertionError, match="float64"):
            there.double()
        with pytest.raises(AssertionError, match="float64"):
            torch.zeros(2, dtype=torch.float64, device="mps")
        with pytest.raises(AssertionError, match="mixes in CPU tensors"):
            there + torch.tensor(1.0)
        assert "MPS" not in kernels("linalg_eig")
        with pytest.raises(AssertionError, match="linalg_eig has no MPS kernel"):
            torch.linalg.eig(there)
