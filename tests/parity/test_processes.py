"""Two processes under gloo train, score, save and write what one process does."""

import atexit
import json
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.multiprocessing

from jaxchat.config import GPTConfig, OptimizerConfig, ScheduleConfig
from jaxchat.engine import Engine
from jaxchat.plan import TrainingPlan
from jaxchat.request import Request
from jaxchat.sampling_params import SamplingParams
from jaxchat.schedule import schedule_at
from jaxchat.tokenizer import Tokenizer
from torch_ref.torch_backend import TorchBackend

CONFIG = GPTConfig(sequence_len=256, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
"""Three layers: no stack of matrices divides by two, so the padding of shares is exercised."""

PLAN = TrainingPlan(
    total_batch_size=1024, num_iterations=20, lr_scale=0.05, weight_decay=0.2, target_tokens=20480
)

STEPS = 5


def batch(step):
    rng = np.random.default_rng(step)
    ids = rng.integers(0, 300, (2, 4, 65), dtype=np.int32)
    targets = ids[..., 1:].copy()
    targets[:, 0, :40] = -1  # the first process's rows count fewer targets
    return ids[..., :-1], targets


def noisy_backend(config):
    backend = TorchBackend(config, dtype="float32")
    backend.init(0)
    rng = np.random.default_rng(0)
    noisy = {
        name: x + 0.1 * rng.standard_normal(x.shape, np.float32)
        for name, x in backend.get_params().items()
    }
    backend.set_params(noisy)
    return backend


def train(folder, steps, *, resume_from=None, save_as=None):
    """Losses and gradient norms of a run that may continue a checkpoint and leave one."""
    backend = noisy_backend(CONFIG)
    backend.start_training(OptimizerConfig(), PLAN)
    if resume_from:
        backend.load(folder / resume_from)
    curve = []
    for step in steps:
        schedule = schedule_at(step, ScheduleConfig(warmup_steps=4), PLAN)
        metrics = backend.train_step(*batch(step), schedule)
        curve.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    if save_as:
        backend.save(folder / save_as)
    return curve, backend


def write():
    """Replies of an engine, and how many rows of its cache this process holds.

    Three slots: of two rows each, one is idle. A prompt is read by one process and its five samples
    are continued by both; one request alone asks for alternatives.
    """
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)])
    backend = noisy_backend(replace(CONFIG, vocab_size=tokenizer.vocab_size))
    free = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    requests = [
        Request([tokenizer.bos_id, *b"five"], free, n=5),
        Request([tokenizer.bos_id], replace(free, temperature=0.0, top_logprobs=2)),
        Request([tokenizer.bos_id, *b"long" * 30], replace(free, repetition_penalty=1.5), n=2),
    ]
    engine = Engine(backend, tokenizer, slots=3)
    replies = engine.complete(requests)
    return [[r.ids, r.logprobs, r.tops] for r in replies], len(engine._cache.lengths)


def one_of_two(rank, port, folder):
    """The body of a process: train, score, save; the first one writes down what it saw."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "JAXCHAT_DEVICE": "cpu",
    }
    atexit.register(write_down_the_end, folder / f"ended{rank}.json")
    curve, backend = train(folder, range(STEPS), save_as="two")
    even, odd = (backend.score(*(x[0, :rows] for x in batch(9))) for rows in (4, 3))
    resumed, _ = train(folder, range(STEPS, STEPS + 2), resume_from="two")
    (folder / f"written{rank}.json").write_text(json.dumps(write()))
    if rank == 0:
        np.savez(folder / "scores.npz", even=even.nll, odd=odd.nll)
        seen = {"curve": curve, "resumed": resumed, "count": backend.devices.count}
        seen["state"] = held_state(backend)
        (folder / "seen.json").write_text(json.dumps(seen))


def write_down_the_end(path):
    """What is left of the company when all else has ended."""
    path.write_text(json.dumps({"together": torch.distributed.is_initialized()}))


def held_state(backend):
    """Numbers of optimizer state that this process holds, by kind."""
    muon, *adam = backend._optimizer.rules
    stacks = [*muon.momentum.values(), *muon.second_moment.values()]
    tables = [x for rule in adam for moments in (rule.mu, rule.nu) for x in moments.values()]
    return {
        name: sum(x.numel() for x in held) for name, held in (("muon", stacks), ("adam", tables))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind, and the checkpoint of one."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, folder), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """The same run without company."""
    return train(folder, range(STEPS), save_as="one")


def test_two_processes_are_one(folder, one_process, parity):
    curve, alone = one_process
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["count"] == 2
    losses, norms = np.abs(np.array(seen["curve"]) - curve).T
    parity("two torch processes: loss and gradient norm", losses.max(), "loss")
    parity("two torch processes: loss and gradient norm", norms.max(), "gradient norm")
    scores = np.load(folder / "scores.npz")
    for name, rows in (("even", 4), ("odd", 3)):
        expected = alone.score(*(x[0, :rows] for x in batch(9)))
        difference = np.abs(scores[name] - expected.nll).max()
        parity("two torch processes: nats per token", difference, name)


def test_each_holds_its_share_of_the_optimizer_state(folder, one_process):
    """Half of Adam's tables; of three layers' matrices, two, where a stack is filled up to four."""
    whole = held_state(one_process[1])
    share = json.loads((folder / "seen.json").read_text())["state"]
    assert share["adam"] == pytest.approx(whole["adam"] / 2, rel=1e-3)  # scalars are on both
    assert whole["muon"] / 2 <= share["muon"] <= whole["muon"] * 2 / 3


def test_each_writes_its_share_of_the_replies(folder, parity):
    """All are told all of them, and they are those of one process."""
    first, second = (json.loads((folder / f"written{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    (replies, rows), (expected, whole) = first, json.loads(json.dumps(write()))
    assert (rows, whole) == (2, 3)
    for (ids, logprobs, tops), (ids_alone, logprobs_alone, tops_alone) in zip(
        replies, expected, strict=True
    ):
        assert ids == ids_alone
        difference = np.abs(np.array(logprobs) - logprobs_alone).max()
        parity("two torch processes: log-probabilities of replies", difference)
        assert [[id for id, _ in top] for top in tops] == [
            [id for id, _ in top] for top in tops_alone
        ]


def test_their_checkpoint_is_whole(folder, one_process, parity):
    """One process loads what two saved: same tensors, and it continues as they did."""
    for file in ("params.pt", "optimizer.pt"):
        one, two = (torch.load(folder / name / file, weights_only=True) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name, x in one.items():
            assert two[name].shape == x.shape, name
            size = max(float(x.float().norm()), 1e-12)
            difference = float((two[name] - x).float().norm()) / size
            parity("two torch processes: checkpoint, relative", difference, name)
    continued, _ = train(folder, range(STEPS, STEPS + 2), resume_from="two")
    seen = json.loads((folder / "seen.json").read_text())
    difference = np.abs(np.array(seen["resumed"]) - continued).max()
    parity("two torch processes: loss and gradient norm", difference, "resumed")


def test_they_part_before_their_interpreters_end(folder):
    """Or threads of gloo's would abort some of them, and a finished run would have failed."""
    ends = [json.loads((folder / f"ended{rank}.json").read_text()) for rank in (0, 1)]
    assert ends == [{"together": False}] * 2
