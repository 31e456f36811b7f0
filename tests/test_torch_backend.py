"""The PyTorch backend, alone: causality, cache, sampling, training, checkpoints."""

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode

from jaxchat import sampling
from jaxchat.backend import Backend, DecodeBatch, backend_class
from jaxchat.config import GPTConfig, OptimizerConfig, ScheduleConfig, count_params
from jaxchat.plan import TrainingPlan
from jaxchat.sampling_params import SamplingParams
from jaxchat.schedule import schedule_at
from jaxchat.spikes import Limits
from tests.models import assert_same_arrays
from torch_ref import (
    attention,
    device_sampling,
    loss,
    torch_backend,
    train_step,
    weights,
)
from torch_ref.torch_backend import TorchBackend

MODERN = GPTConfig(
    sequence_len=256,
    vocab_size=300,
    n_layer=4,
    n_head=4,
    n_kv_head=2,
    n_embd=64,
    window_pattern="SSSL",
)
"""Grouped queries, and a short window (128) below the sequence length."""

PRESETS = {"modern": MODERN, "classic": replace(MODERN, n_kv_head=4).classic()}

PLAN = TrainingPlan(
    total_batch_size=512, num_iterations=20, lr_scale=0.05, weight_decay=0.2, target_tokens=10240
)


@pytest.fixture(params=PRESETS)
def config(request):
    return PRESETS[request.param]


def make_backend(config, *, seed=0, dtype="float32"):
    """A backend whose zero-initialised weights are not zero."""
    backend = TorchBackend(config, dtype=dtype)
    backend.init(seed)
    rng = np.random.default_rng(seed)
    noisy = {
        name: x + 0.1 * rng.standard_normal(x.shape, np.float32)
        for name, x in backend.get_params().items()
    }
    backend.set_params(noisy)
    return backend


def random_batch(seed=0, *, micro_batches=2, rows=2, length=64):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 300, (micro_batches, rows, length + 1), dtype=np.int32)
    targets = ids[..., 1:].copy()
    targets[0, 0, : length // 3] = -1
    return ids[..., :-1], targets


def train(backend, steps, *, first=0, **shape):
    """Losses of some steps on random batches."""
    schedule = ScheduleConfig(warmup_steps=4)
    return [
        float(backend.train_step(*random_batch(i, **shape), schedule_at(i, schedule, PLAN))["loss"])
        for i in range(first, first + steps)
    ]


# --- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 130])
def test_no_gradient_flows_from_the_future(config, position):
    """Zero for every later position, non-zero for the position itself and for the first one."""
    model = make_backend(config).model
    logits = model(torch.arange(140)[None])
    logits[0, position].square().sum().backward()
    for name, param in model.named_parameters():
        if name == "wte.weight" or name.startswith("value_embeds"):
            reach = param.grad.abs().sum(dim=1)[:140]
            assert (reach[position + 1 :] == 0).all(), name
            assert reach[position] > 0, name
            assert reach[0] > 0, name


def test_parameters_number_what_the_formula_says(config):
    params = make_backend(config).get_params()
    assert sum(x.size for x in params.values()) == sum(count_params(config).values())
    assert {x.dtype for x in params.values()} == {np.dtype(np.float32)}


def test_initialisation_has_the_stated_statistics():
    config = replace(MODERN, n_embd=256, vocab_size=2048)
    backend = TorchBackend(config)
    backend.init(0)
    params, bound = backend.get_params(), (3 / 256) ** 0.5
    assert np.std(params["wte.weight"]) == pytest.approx(0.8, rel=0.02)
    assert np.std(params["lm_head.weight"]) == pytest.approx(0.001, rel=0.02)
    for name in ("h.0.attn.c_q.weight", "value_embeds.1.weight"):
        assert np.abs(params[name]).max() <= bound
        assert np.std(params[name]) == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not np.any(params["h.0.attn.c_proj.weight"])
    assert not np.any(params["smear_lambda"])
    np.testing.assert_allclose(params["resid_lambdas"], np.linspace(1.15, 1.05, 4), rtol=1e-6)
    backend.init(1)
    backend.init(0)
    np.testing.assert_array_equal(backend.get_params()["wte.weight"], params["wte.weight"])


@pytest.mark.parametrize(("length", "window"), [(1, 0), (40, 0), (40, 7), (40, 39), (40, 999)])
def test_attention_equals_the_textbook(length, window):
    rng = np.random.default_rng(length)
    q = rng.standard_normal((2, length, 4, 8))
    k, v = rng.standard_normal((2, 2, length, 2, 8))
    expected = np.zeros_like(q)
    for b, t, h in np.ndindex(2, length, 4):
        seen = slice(max(0, t - window), t + 1)
        scores = np.exp(k[b, seen, h // 2] @ q[b, t, h] / np.sqrt(8))
        expected[b, t, h] = scores / scores.sum() @ v[b, seen, h // 2]
    tensors = (torch.from_numpy(x).float() for x in (q, k, v))
    np.testing.assert_allclose(attention.attention(*tensors, window=window), expected, atol=2e-6)


def test_bfloat16_activations_keep_float32_weights_and_logits():
    backend = make_backend(MODERN, dtype="bfloat16")
    hidden, _ = backend.model.hidden(torch.arange(20)[None])
    assert hidden.dtype == torch.bfloat16
    assert backend.model.logits(hidden).dtype == torch.float32
    assert {p.dtype for p in backend.model.parameters()} == {torch.float32}


# --- the loss ------------------------------------------------------------------------------------


def test_chunked_cross_entropy_equals_autograd(monkeypatch):
    """Value and both gradients, over several uneven chunks, a padded vocabulary and ignored ids."""
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 11, 16, generator=generator, requires_grad=True)
    head = torch.randn(128, 16, generator=generator, requires_grad=True)
    targets = torch.randint(-1, 100, (3, 11), generator=generator)
    kept = (targets >= 0).float()
    logits = 15 * torch.tanh(hidden @ head[:100].T / 15)
    plain = F.cross_entropy(logits.reshape(-1, 100), targets.flatten(), ignore_index=-1) * 2
    expected = torch.autograd.grad(plain * kept.sum() / 2, (hidden, head))
    ours = loss.cross_entropy(hidden, head, targets, kept, 100, 15.0)
    torch.testing.assert_close(ours, plain * kept.sum() / 2, rtol=1e-6, atol=0)
    for grad, wanted in zip(torch.autograd.grad(ours, (hidden, head)), expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6)


def test_score_is_the_loss_token_by_token(config):
    backend = make_backend(config)
    inputs, targets = (x[0] for x in random_batch(length=100))
    scores = backend.score(inputs, targets)
    log_probs = backend.model(torch.from_numpy(inputs)).log_softmax(-1)
    picked = log_probs.gather(2, torch.from_numpy(targets).long().clamp(min=0)[..., None])[..., 0]
    expected = np.where(targets < 0, 0, -picked.detach().numpy())
    np.testing.assert_allclose(scores.nll, expected, atol=1e-5)
    np.testing.assert_array_equal(scores.greedy, log_probs.argmax(-1))
    assert scores.nll.dtype == np.float32
    assert scores.greedy.dtype == np.int32


def test_score_does_not_depend_on_how_rows_are_grouped(monkeypatch):
    backend = make_backend(MODERN)
    inputs, targets = (x[0] for x in random_batch(rows=5))
    whole = backend.score(inputs, targets)
    monkeypatch.setattr("torch_ref.torch_backend.SCORE_TOKENS_ELSEWHERE", 130)
    parts = backend.score(inputs, targets)
    np.testing.assert_allclose(parts.nll, whole.nll, atol=1e-5)
    np.testing.assert_array_equal(parts.greedy, whole.greedy)


# --- generation ----------------------------------------------------------------------------------

ROWS = 4


def decode_batch(tokens, lengths, budgets, *, params=None, width=16, stop_ids=()):
    rows = range(len(tokens))
    params = params or [SamplingParams(temperature=0.0)] * len(tokens)
    return DecodeBatch(
        tokens=np.array(tokens, np.int32),
        lengths=np.array(lengths, np.int32),
        budgets=np.array(budgets, np.int32),
        uniforms=np.stack([sampling.uniforms(0, row, lengths[row] + 1, width) for row in rows]),
        prompt_lengths=np.array(lengths, np.int32),
        params=tuple(p if budget else None for p, budget in zip(params, budgets, strict=True)),
        stop_ids=frozenset(stop_ids),
    )


def filled_cache(backend, lengths, max_length=256):
    """Rows with the ids 0, 1, 2, ... and the token that follows each, greedily."""
    cache, newest = backend.new_cache(len(lengths), max_length), []
    for row, length in enumerate(lengths):
        cache, logits = backend.prefill(cache, row, np.arange(length, dtype=np.int32), 0)
        newest.append(int(logits.argmax()))
    return cache, newest


def test_decode_equals_the_oracle_for_ragged_rows(config):
    """One row starts beyond the short window, one crosses it while decoding."""
    backend = make_backend(config)
    lengths = [3, 200, 125, 17]
    cache, newest = filled_cache(backend, lengths)
    result = backend.decode(cache, decode_batch(newest, lengths, [6] * ROWS, width=6))
    for row, length in enumerate(lengths):
        greedy = SamplingParams(max_tokens=7, temperature=0.0)
        oracle = list(backend.model.generate(list(range(length)), greedy))
        assert [newest[row], *result.tokens[row].tolist()] == oracle


def test_rows_stop_at_their_budget_or_after_a_stop_id(config):
    backend = make_backend(config)
    lengths = [10, 20, 30, 40]
    cache, newest = filled_cache(backend, lengths)
    free = backend.decode(cache, decode_batch(newest, lengths, [16] * ROWS))
    stop = int(free.tokens[1, 5])
    first = free.tokens[1].tolist().index(stop)
    cache, _ = filled_cache(backend, lengths)
    budgets = [3, 16, 0, 1]
    result = backend.decode(cache, decode_batch(newest, lengths, budgets, stop_ids=[stop]))
    for row, most in enumerate([3, first + 1, 0, 1]):
        count = int(result.counts[row])
        assert count <= most
        assert count == most or result.tokens[row, count - 1] == stop
        np.testing.assert_array_equal(result.tokens[row, :count], free.tokens[row, :count])
        assert not result.tokens[row, count:].any()
    assert result.counts[1] == first + 1
    assert result.counts[2] == 0


def test_a_dispatch_continues_where_the_last_one_stopped(config):
    """Also a row that sat out a dispatch, and one that was full to the last slot meanwhile."""
    backend = make_backend(config)
    lengths = [10, 60, 30, 50]
    cache, newest = filled_cache(backend, lengths, max_length=60)
    free = backend.decode(cache, decode_batch(newest, lengths, [16, 0, 10, 0]))
    cache, _ = filled_cache(backend, lengths, max_length=60)
    first = backend.decode(cache, decode_batch(newest, lengths, [8, 0, 0, 0]))
    second = decode_batch([first.tokens[0, 7], *newest[1:]], [18, 60, 30, 50], [8, 0, 10, 0])
    second = backend.decode(first.cache, second)
    together = np.concatenate([first.tokens[0, :8], second.tokens[0, :8]])
    np.testing.assert_array_equal(together, free.tokens[0])
    np.testing.assert_array_equal(second.tokens[2], free.tokens[2])
    cache, logits = backend.prefill(second.cache, 1, np.array([59], np.int32), 59)
    _, fresh = backend.prefill(backend.new_cache(1, 60), 0, np.arange(60, dtype=np.int32), 0)
    np.testing.assert_allclose(logits, fresh, atol=1e-5)


def test_half_precision_decoding_reads_weights_cast_once_and_never_stale():
    backend = make_backend(MODERN, dtype="bfloat16")
    ids = torch.arange(50)[None]
    for _ in range(2):
        _, logits = backend.prefill(backend.new_cache(1, 64), 0, ids[0].numpy(), 0)
        cast = backend._decoding_model()
        assert cast is backend._decoding_model()
        assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
        assert torch.equal(cast(ids), backend.model(ids))
        np.testing.assert_allclose(logits, cast(ids)[0, -1].detach(), atol=0.1)
        backend.start_training(OptimizerConfig(), PLAN)
        train(backend, 1)


def test_weights_to_decode_with_are_made_without_a_second_float32_copy():
    class Making(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if not func.is_view and result.device.type != "meta":
                made.add((func.name(), result.dtype))
            return result

    backend, made = make_backend(MODERN, dtype="bfloat16"), set()
    with Making():
        backend._decoding_model()
    assert made == {("aten::_to_copy", torch.bfloat16)}


def test_an_idle_row_may_hold_more_than_those_that_decode():
    """Nothing is counted of it where its neighbours' penalties are."""
    backend = make_backend(MODERN)
    lengths = [10, 60, 12]
    params = [SamplingParams(temperature=0.0, presence_penalty=0.5)] * 3
    results = []
    for longest in (60, 14):
        cache, newest = filled_cache(backend, [10, longest, 12])
        lengths[1] = longest
        results.append(
            backend.decode(cache, decode_batch(newest, lengths, [4, 0, 4], params=params))
        )
    assert results[0].counts.tolist() == [4, 0, 4]
    np.testing.assert_array_equal(results[0].tokens, results[1].tokens)


def test_log_probabilities_are_of_the_unfiltered_distribution(config):
    backend = make_backend(config)
    cache, newest = filled_cache(backend, [10])
    params = [SamplingParams(temperature=0.5, top_k=5)]
    result = backend.decode(cache, decode_batch(newest, [10], [4], params=params, width=4))
    ids = [*range(10), newest[0], *result.tokens[0].tolist()]
    log_probs = backend.model(torch.tensor([ids])).log_softmax(-1)[0]
    expected = [log_probs[10 + i, ids[11 + i]].item() for i in range(4)]
    np.testing.assert_allclose(result.logprobs[0], expected, atol=1e-5)


def test_what_does_not_fit_is_refused():
    backend = make_backend(MODERN)
    cache, newest = filled_cache(backend, [10], max_length=12)
    with pytest.raises(ValueError, match="cannot put 3 tokens at position 10 of a row of 12"):
        backend.prefill(cache, 0, np.arange(3, dtype=np.int32), 10)
    with pytest.raises(ValueError, match="a row would hold 13 tokens, the cache has room for 12"):
        backend.decode(cache, decode_batch(newest, [10], [3]))


def test_the_sampler_is_the_definition():
    """200 rows with parameters of their own, ties among the logits included."""
    rng = np.random.default_rng(0)
    logits = np.round(rng.standard_normal((200, 300)).astype(np.float32) * 3, 1)
    params = [
        SamplingParams(
            temperature=float(rng.choice([0.0, 0.3, 1.0, 2.0])),
            top_k=int(rng.choice([0, 1, 5, 50, 1000])),
            top_p=float(rng.choice([1.0, 0.9, 0.3])),
            min_p=float(rng.choice([0.0, 0.05])),
        )
        for _ in range(200)
    ]
    uniforms = rng.random(200, np.float32)
    rows = device_sampling.row_params(params, torch.device("cpu"))
    tokens = device_sampling.sample(torch.from_numpy(logits), rows, torch.from_numpy(uniforms))
    expected = [sampling.sample(*row) for row in zip(logits, params, uniforms, strict=True)]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_numbers_draw_tokens_that_survive_the_filters(uniform):
    logits = torch.linspace(-3, 3, 300)[None]
    rows = device_sampling.row_params([SamplingParams(top_k=3)], logits.device)
    token = device_sampling.sample(logits, rows, torch.tensor([uniform]))
    assert int(token) in (297, 299)


# --- training ------------------------------------------------------------------------------------


def test_micro_batches_weigh_by_their_targets():
    """Two micro-batches of unequal counts give the step of one batch of all rows."""
    results = []
    for cut in (lambda x: x, lambda x: x.reshape(1, 4, -1)):
        backend = make_backend(MODERN)
        backend.start_training(OptimizerConfig(), PLAN)
        batch = tuple(cut(x) for x in random_batch())
        metrics = backend.train_step(*batch, schedule_at(0, ScheduleConfig(), PLAN))
        results.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_a_step_that_failed_leaves_no_gradient_to_the_next(monkeypatch):
    whole, failed = make_backend(MODERN), make_backend(MODERN)
    for backend in (whole, failed):
        backend.start_training(OptimizerConfig(), PLAN)
    once = iter([train_step.cross_entropy])  # for one micro-batch of two
    with monkeypatch.context() as patch:
        patch.setattr(train_step, "cross_entropy", lambda *args: next(once)(*args))
        with pytest.raises(StopIteration):
            train(failed, 1)
    assert train(failed, 2) == train(whole, 2)


def test_a_step_has_the_memory_of_the_weights_that_decoded(monkeypatch):
    backend = make_backend(MODERN, dtype="bfloat16")
    backend.start_training(OptimizerConfig(), PLAN)
    cast, found = weakref.ref(backend._decoding_model()), []

    def look(*args, **options):
        found.append(cast())
        return train_step.loss_and_grads(*args, **options)

    monkeypatch.setattr(torch_backend, "loss_and_grads", look)
    train(backend, 1)
    assert found == [None]


def test_float16_training_scales_its_loss_and_skips_overflows():
    exact, half = (make_backend(MODERN, dtype=dtype) for dtype in ("float32", "float16"))
    for backend in (exact, half):
        backend.start_training(OptimizerConfig(), PLAN)
    assert train(half, 3) == pytest.approx(train(exact, 3), abs=0.02)
    half._loss_scale.value = 2.0**40
    before = half.get_params()["wte.weight"]
    assert np.isfinite(train(half, 1)[0])
    np.testing.assert_array_equal(half.get_params()["wte.weight"], before)
    assert half._loss_scale.value == 2.0**39


def test_the_loss_scale_grows_after_good_steps():
    scale = train_step.LossScale(4.0, growth_steps=2)
    assert [scale.accepts(torch.tensor(x)) for x in (1.0, 1.0)] == [True, True]
    assert scale.value == 8.0
    assert not scale.accepts(torch.tensor(float("inf")))
    assert scale.value == 4.0


def test_an_overflow_starts_the_count_of_good_steps_anew():
    scale = train_step.LossScale(4.0, growth_steps=3)
    for norm in (1.0, 1.0, float("inf"), 1.0, 1.0):
        scale.accepts(torch.tensor(norm))
    assert scale.value == 2.0


@pytest.mark.parametrize(
    ("limits", "skipped"),
    [(Limits(0.1, np.inf), 1), (Limits(np.inf, 1e-6), 1), (Limits(1e9, 1e9), 0)],
)
def test_a_step_above_its_limits_changes_nothing(limits, skipped):
    backend = make_backend(MODERN)
    backend.start_training(OptimizerConfig(), PLAN)
    held = backend.get_params() | backend.get_optimizer_state()
    before = {name: value.copy() for name, value in held.items()}  # some are the tensors themselves
    metrics = backend.train_step(
        *random_batch(), schedule_at(0, ScheduleConfig(), PLAN), limits=limits
    )
    after = backend.get_params() | backend.get_optimizer_state()
    assert float(metrics["skipped"]) == skipped
    same = all(np.array_equal(after[name], value) for name, value in before.items())
    assert same == bool(skipped)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_without_a_gradient_changes_nothing_and_is_not_skipped(dtype):
    """Where all groups agree, Muon made a whole step of old momentum, and Adam a smaller one."""
    backend = make_backend(MODERN, dtype=dtype)
    backend.start_training(OptimizerConfig(), PLAN)
    train(backend, 2)
    held = backend.get_params() | backend.get_optimizer_state()
    before = {name: value.copy() for name, value in held.items()}
    momenta = {name: np.any(x) for name, x in before.items() if name.startswith(("muon", "adam"))}
    assert all(momenta.values()) and momenta
    inputs, targets = random_batch()
    advantages = np.zeros(targets.shape, np.float32)
    moving = schedule_at(2, ScheduleConfig(), PLAN)
    metrics = backend.train_step(inputs, targets, moving, advantages)
    figures = {name: float(value) for name, value in metrics.items()}
    assert figures == {"loss": 0, "grad_norm": 0, "skipped": 0}
    assert_same_arrays(backend.get_params() | backend.get_optimizer_state(), before)
    train(backend, 1, first=2)
    assert not np.array_equal(backend.get_params()["wte.weight"], before["wte.weight"])


def test_weights_without_targets_get_no_gradient():
    """A batch in which nothing counts: a loss of zero and finite weights."""
    backend = make_backend(MODERN)
    backend.start_training(OptimizerConfig(), PLAN)
    inputs, targets = random_batch()
    metrics = backend.train_step(
        inputs, np.full_like(targets, -1), schedule_at(0, ScheduleConfig(), PLAN)
    )
    assert float(metrics["loss"]) == 0
    assert float(metrics["grad_norm"]) == 0
    assert all(np.isfinite(x).all() for x in backend.get_params().values())


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, dtype):
    straight = make_backend(MODERN, dtype=dtype)
    straight.start_training(OptimizerConfig(), PLAN)
    train(straight, 2)
    straight.save(tmp_path / "step")
    straight.wait()
    resumed = TorchBackend(MODERN, dtype=dtype)
    resumed.init(5)
    resumed.start_training(OptimizerConfig(), PLAN)
    resumed.load(tmp_path / "step")
    assert train(resumed, 2, first=2) == train(straight, 2, first=2)
    assert_same_arrays(resumed.get_params(), straight.get_params())
    assert [p.name for p in tmp_path.iterdir()] == ["step"]
    if dtype == "float16":  # and its loss scale will grow when the other's does
        assert resumed._loss_scale.good_steps == straight._loss_scale.good_steps == 4
        assert resumed._loss_scale.value == straight._loss_scale.value


def test_weights_load_without_optimizer_state(tmp_path):
    backend = make_backend(MODERN)
    backend.save(tmp_path / "step")
    other = TorchBackend(MODERN)
    other.load(tmp_path / "step")
    assert_same_arrays(other.get_params(), backend.get_params())
    other.start_training(OptimizerConfig(), PLAN)
    with pytest.raises(FileNotFoundError, match=r"no optimizer\.pt in"):
        other.load(tmp_path / "step")


def test_weights_of_another_model_are_listed_and_change_nothing(tmp_path):
    backend = make_backend(MODERN)
    before = backend.get_params()
    make_backend(PRESETS["classic"]).save(tmp_path / "step")
    with pytest.raises(ValueError, match="another model") as error:
        backend.load(tmp_path / "step")
    assert "missing smear_lambda" in str(error.value)
    assert "h.0.attn.c_k.weight has shape (64, 64), the model wants (32, 64)" in str(error.value)
    with pytest.raises(ValueError, match="unexpected extra"):
        backend.set_params(before | {"extra": np.zeros(1, np.float32)})
    assert_same_arrays(backend.get_params(), before)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path, damage):
    backend = make_backend(MODERN)
    backend.save(tmp_path / "step")
    path = tmp_path / "step" / weights.PARAMS
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:1000], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(ValueError, match=r"params\.pt is damaged"):
        backend.load(tmp_path / "step")


def test_a_pickle_that_executes_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / "step").mkdir()
    torch.save({"x": Attack()}, tmp_path / "step" / weights.PARAMS)
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        TorchBackend(MODERN).load(tmp_path / "step")
    assert not (tmp_path / "owned").exists()


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    backend = make_backend(MODERN)

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        backend.save(tmp_path / "step")
    assert list(tmp_path.iterdir()) == []


# --- the machine ---------------------------------------------------------------------------------


def test_jax_is_never_loaded():
    program = "import sys, torch_ref.torch_backend; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_class_implements_the_protocol():
    assert backend_class("torch") is TorchBackend
    public = {name for name in vars(Backend) if not name.startswith("_")}
    assert public <= set(dir(TorchBackend))


def test_a_backend_without_weights_says_so():
    with pytest.raises(ValueError, match="call init, load or set_params"):
        TorchBackend(MODERN).get_params()
