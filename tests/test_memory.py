"""What fits: the choice of micro-batches, remat, the optimizer state in host memory."""

import copy
import math
import re
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat import cli, devices, runtime
from jaxchat.config import OptimizerConfig, ScheduleConfig
from jaxchat.finetune_options import FinetuneOptions
from jaxchat.jax_backend import JaxBackend
from jaxchat.memory import (
    CARDS,
    REMAT,
    USABLE,
    Savings,
    StepMemory,
    largest_that_fits,
    readable,
    savings_of,
)
from jaxchat.micro_batch import settle_rows
from jaxchat.params import bind, split
from jaxchat.plan import plan_training
from jaxchat.schedule import schedule_at
from jaxchat.train_step import loss_and_grads
from tests.models import MODERN, assert_same_arrays, make_perturbed
from tests.test_train_step import mesh_of, random_batch

SMALL = replace(MODERN, n_layer=1)
OPTIMIZER = OptimizerConfig()
PLAN = plan_training(SMALL, OPTIMIZER, num_iterations=10, total_batch_size=16 * 64)


@given(
    choices=st.sets(st.integers(1, 512), min_size=1, max_size=10).map(sorted),
    fixed=st.floats(0, 1e3),
    slope=st.floats(1e-3, 1e3),
    curve=st.floats(0, 10),
    limit=st.floats(0, 1e5),
)
def test_the_largest_that_fits_is_found_with_few_questions(choices, fixed, slope, curve, limit):
    asked = []

    def need(n):
        asked.append(n)
        return fixed + slope * n + curve * n * n

    fitting = [n for n in choices if fixed + slope * n + curve * n * n <= limit]
    assert largest_that_fits(choices, need, limit) == (max(fitting) if fitting else None)
    assert len(asked) == len(set(asked)), "a compilation is not repeated"


def test_a_straight_line_takes_at_most_four_questions():
    """What a step needs is nearly one: the whole, the guess, and its neighbours."""
    choices = [2**n for n in range(10)]
    for limit in np.linspace(10, 700, 50):
        asked = []
        largest_that_fits(choices, lambda n: asked.append(n) or 9.0 + n, limit)  # noqa: B023
        assert len(asked) <= 4


def test_presets_give_way_to_what_is_asked_for():
    assert savings_of(None, None, False) == Savings("none")
    assert savings_of(8, None, False) == CARDS[8].savings == Savings("block", True)
    assert savings_of(8, "none", False) == Savings("none", True)
    assert savings_of(24, "products", True) == Savings("products", True)
    source = Savings("offload", True)
    assert savings_of(None, None, False, before=source) == source
    assert savings_of(None, "none", False, before=source) == Savings("none", True)
    assert savings_of(24, None, False, before=source) == Savings()
    with pytest.raises(ValueError, match="--card 12: choose one of 8, 16, 24, 80"):
        savings_of(12, None, False)
    with pytest.raises(ValueError, match="--remat some: choose one of none, products"):
        savings_of(None, "some", False)


@pytest.fixture(scope="module")
def gradients():
    """Loss and gradients without remat."""
    return compute_gradients("none")


def compute_gradients(remat):
    graphdef, params = split(make_perturbed(SMALL))
    both = jax.jit(lambda p, b: loss_and_grads(graphdef, p, b, mesh_of(1), remat=remat))
    return both(params, (*random_batch((1, 2, 64)), None))


@pytest.mark.parametrize("remat", REMAT[1:])
def test_remat_changes_no_gradient(gradients, remat):
    loss, grads = compute_gradients(remat)
    assert float(loss) == pytest.approx(float(gradients[0]), rel=1e-6)
    for name, expected in gradients[1].items():
        # a scalar's gradient is one sum over every activation, whose terms cancel
        relative = 1e-4 if expected.size == 1 else 1e-5
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(grads[name], expected, atol=relative * scale, err_msg=name)


def saved_bytes(remat, capsys):
    """What waits for the backward pass, weights left out, as JAX lists it: on the device alone."""
    graphdef, params = split(make_perturbed(MODERN))
    inputs = random_batch((1, 2, 64))[0][0]

    def total(params):
        return jnp.sum(bind(graphdef, params).hidden(jnp.asarray(inputs), remat=remat)[0])

    capsys.readouterr()
    jax.ad_checkpoint.print_saved_residuals(total, params)
    lines = capsys.readouterr().out.splitlines()
    of_activations = [
        line
        for line in lines
        if not re.search("from the argument|output of transpose .*product", line)
    ]
    found = [
        re.match(r"(?:bool|[a-z]+(\d+))(<host>)?\[([\d,]*)\]", line) for line in of_activations
    ]
    assert len(found) > 10
    assert all(found)
    return sum(
        int(bits or 8) // 8 * math.prod(int(n) for n in dims.split(",") if n)
        for bits, host, dims in (match.groups() for match in found)
        if host is None
    )


def test_each_policy_keeps_less_than_the_one_before(capsys):
    """Bytes of activations on the device: a block's products are half of them, its input little."""
    kept = {remat: saved_bytes(remat, capsys) for remat in REMAT}
    assert kept["products"] < 0.5 * kept["none"], kept
    assert kept["block"] < 0.5 * kept["products"], kept
    assert kept["offload"] < kept["block"], kept


def train(backend, savings, steps=4):
    backend.init(0)
    backend.start_training(OPTIMIZER, PLAN, savings)
    losses = []
    for step in range(steps):
        inputs, targets = random_batch((1, 16, 64), seed=step)
        schedule = schedule_at(step, ScheduleConfig(), PLAN)
        losses.append(float(backend.train_step(inputs, targets, schedule)["loss"]))
    return losses


@pytest.mark.parametrize("mesh", ["data=8", pytest.param("data=2,fsdp=4", marks=pytest.mark.slow)])
def test_an_offloaded_optimizer_state_trains_alike(mesh, tmp_path):
    plain, offloaded = JaxBackend(SMALL, mesh=mesh), JaxBackend(SMALL, mesh=mesh)
    expected = train(plain, Savings())
    np.testing.assert_allclose(
        train(offloaded, Savings(offload_optimizer=True)), expected, rtol=1e-6
    )
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(offloaded._opt_state)}
    assert kinds == {"pinned_host"}, "it rests in host memory after a step"

    offloaded.save(tmp_path)
    offloaded.wait()
    plain.load(tmp_path)
    assert_same_arrays(plain.get_optimizer_state(), offloaded.get_optimizer_state())
    again = JaxBackend(SMALL, mesh=mesh)
    again.init(1)
    again.start_training(OPTIMIZER, PLAN, Savings(offload_optimizer=True))
    again.load(tmp_path)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(again._opt_state)} == {"pinned_host"}
    inputs, targets = random_batch((1, 16, 64), seed=9)
    schedule = schedule_at(9, ScheduleConfig(), PLAN)
    losses = [float(b.train_step(inputs, targets, schedule)["loss"]) for b in (plain, again)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.fixture(scope="module")
def backend():
    """One device, and a batch of 16 rows of 64 tokens."""
    backend = JaxBackend(SMALL, device=0)
    backend.init(0)
    backend.start_training(OPTIMIZER, PLAN)
    return backend


@pytest.fixture(scope="module")
def needs(backend):
    """What the step needs with each micro-batch that divides the batch."""
    return {n: backend.step_memory((16 // n, n, 64)) for n in (1, 2, 4, 8, 16)}


def test_a_step_says_what_it_needs(backend, needs):
    assert {n.weights for n in needs.values()} == {4 * sum(x.size for x in backend.params.values())}
    assert {n.optimizer for n in needs.values()} == {
        sum(x.nbytes for x in jax.tree.leaves(backend._opt_state))
    }
    activations = [needs[n].working for n in (2, 4, 8, 16)]
    assert activations == sorted(set(activations))
    # gradients, and at least the hidden state of every layer
    least = needs[16].weights + 16 * 64 * SMALL.n_embd * 4 * SMALL.n_layer
    assert least < needs[16].working < 100 * least


def test_two_micro_batches_need_no_more_than_one(backend):
    """XLA ran the first beside a loop of one round, and held the activations of both."""
    one, two = (backend.step_memory((count, 8, 64)).working for count in (1, 2))
    assert two < 1.2 * one


def test_shares_of_a_device_are_counted():
    whole, divided = JaxBackend(SMALL, mesh="data=8"), JaxBackend(SMALL, mesh="fsdp=8")
    found = []
    for backend in (whole, divided):
        backend.init(0)
        backend.start_training(OPTIMIZER, PLAN)
        found.append(backend.step_memory((1, 16, 64)))
    assert found[1].weights < 0.2 * found[0].weights
    assert found[1].optimizer == pytest.approx(found[0].optimizer, rel=0.1)


@pytest.mark.parametrize("fitting", [1, 2, 4, 8, 16])
def test_the_largest_micro_batch_that_fits_is_taken_and_the_budget_printed(
    backend, needs, fitting, capsys
):
    limit = (needs[fitting].total + 1) / USABLE
    small = with_memory(backend, limit)
    assert settle_rows(small, PLAN, sequence_len=64) == fitting
    said = capsys.readouterr().out
    assert f"a step with --device-batch-size {fitting} needs {needs[fitting]}" in said
    assert fitting == 16 or f"{fitting * 2} would need" in said


def test_every_compilation_is_told_before_it_begins(backend, needs, monkeypatch, capsys):
    """Nothing was said for 85 s of them."""
    told = []

    def listen(shape):
        told.append(capsys.readouterr().out.strip())
        return needs[shape[1]]

    monkeypatch.setattr(backend, "step_memory", listen)
    small = with_memory(backend, (needs[4].total + 1) / USABLE)
    assert settle_rows(small, PLAN, sequence_len=64) == 4
    room = readable(needs[4].total + 1)
    words = (
        rf"fitting rows into {re.escape(room)} per device: compiling .*--device-batch-size (\d+)"
    )
    asked = [int(re.fullmatch(words, line)[1]) for line in told]
    assert asked[0] == 16 and 4 in asked


def test_one_row_that_does_not_fit_names_the_flags(backend, needs):
    small = with_memory(backend, needs[1].total / USABLE - 1)
    with pytest.raises(ValueError, match=r"--remat block .*--offload-optimizer.*--mesh fsdp=N"):
        settle_rows(small, PLAN, sequence_len=64)


def test_a_model_that_is_there_cannot_be_made_smaller(backend, needs):
    """Finetuning named flags that it does not have."""
    small = with_memory(backend, needs[1].total / USABLE - 1)
    with pytest.raises(ValueError, match="--sequence-len or --depth"):
        settle_rows(small, PLAN, sequence_len=64)
    with pytest.raises(ValueError, match="may be used") as refused:
        settle_rows(small, PLAN, sequence_len=64, new_model=False)
    options = {field.name for field in fields(FinetuneOptions)}
    named = re.findall(r"--([a-z-]+)", str(refused.value))
    assert "remat" in named and {name.replace("-", "_") for name in named} <= options


def test_what_is_asked_for_is_done_with_a_warning(backend, needs, capsys):
    small = with_memory(backend, needs[2].total / USABLE)
    assert settle_rows(small, PLAN, sequence_len=64, asked=8) == 8
    assert "warning: that may be more than there is" in capsys.readouterr().out
    assert settle_rows(small, PLAN, sequence_len=64, asked=1) == 1
    assert "warning" not in capsys.readouterr().out


def test_a_run_keeps_its_micro_batch_where_it_divides(backend, needs):
    small = with_memory(backend, needs[2].total / USABLE + 1)
    assert settle_rows(small, PLAN, sequence_len=64, before=1) == 1
    assert settle_rows(small, PLAN, sequence_len=64, before=3) == 2
    assert settle_rows(small, PLAN, sequence_len=64, before=1, asked=4) == 4
    # nothing to choose from: plan.micro_batches has the message
    assert settle_rows(small, PLAN, sequence_len=100, asked=7) == 7
    assert settle_rows(small, PLAN, sequence_len=64, asked=0) == 0, "which it refuses"


def test_a_card_is_no_larger_than_the_device(backend, needs, capsys):
    large, small = (with_memory(backend, n) for n in (10**12, (needs[2].total + 1) / USABLE))
    assert settle_rows(large, PLAN, sequence_len=64, card=8) == 16
    assert f"of {8 * USABLE:.3g} GB" in capsys.readouterr().out
    assert settle_rows(small, PLAN, sequence_len=64, card=8) == 2


@pytest.mark.parametrize("compiling", [1, 4, 0])
def test_what_does_not_even_compile_does_not_fit(backend, monkeypatch, capsys, compiling):
    """A TPU's compiler raises where a GPU's says how much would be needed."""
    needed = backend.step_memory

    def refused(shape):
        if shape[1] > compiling:
            raise RuntimeError("RESOURCE_EXHAUSTED: ran out of memory in memory space hbm")
        return needed(shape)

    monkeypatch.setattr(backend, "step_memory", refused)
    large = with_memory(backend, 10**12)
    if compiling:
        assert settle_rows(large, PLAN, sequence_len=64) == compiling
        assert f"--device-batch-size {compiling} needs" in capsys.readouterr().out
    else:
        with pytest.raises(ValueError, match="one row at a time needs more per device"):
            settle_rows(large, PLAN, sequence_len=64)


def test_any_other_error_of_a_compilation_is_no_question_of_memory(backend, monkeypatch):
    def fails(shape):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(backend, "step_memory", fails)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        settle_rows(with_memory(backend, 10**12), PLAN, sequence_len=64)


def test_the_smallest_device_of_all_processes_decides(backend, needs, monkeypatch):
    one = with_memory(backend, (needs[4].total + 1) / USABLE)
    for other, rows in [((needs[2].total + 1) / USABLE, 2), (10**12, 4), (None, 16)]:
        monkeypatch.setattr(one, "gather", lambda own, other=other: [own, other])
        assert settle_rows(one, PLAN, sequence_len=64) == rows


def test_a_step_is_compiled_with_the_rows_of_all_devices(monkeypatch):
    eight, shapes = with_memory(JaxBackend(SMALL, mesh="data=8"), 10**12), []

    def listen(shape):
        shapes.append(shape)
        return StepMemory(1, 1, 1)

    monkeypatch.setattr(eight, "step_memory", listen)
    assert settle_rows(eight, PLAN, sequence_len=64, asked=1) == 1
    assert settle_rows(eight, PLAN, sequence_len=64) == 2
    assert shapes == [(2, 8, 64), (1, 16, 64)]


def test_without_a_known_memory_a_device_takes_65536_tokens_and_a_macs_8192(backend, monkeypatch):
    unknown = with_memory(backend, None)
    plan = replace(PLAN, total_batch_size=2**19)
    assert settle_rows(unknown, plan, sequence_len=2048) == 32
    assert settle_rows(unknown, plan, sequence_len=2**17) == 1
    monkeypatch.setattr(unknown, "devices", unknown.devices._replace(platform="mps"))
    assert settle_rows(unknown, plan, sequence_len=2048) == 4


def test_the_step_that_was_measured_is_the_one_that_runs(backend):
    """It is compiled once, and does what the other would."""
    inputs, targets = random_batch((2, 8, 64))
    schedule = schedule_at(0, ScheduleConfig(), PLAN)
    backend.init(0)
    backend.start_training(OPTIMIZER, PLAN)
    expected = float(backend.train_step(inputs, targets, schedule)["loss"])
    assert backend._train_step._cache_size() == 1
    backend.init(0)
    backend.start_training(OPTIMIZER, PLAN)
    backend.step_memory((2, 8, 64))
    assert float(backend.train_step(inputs, targets, schedule)["loss"]) == expected
    assert backend._train_step._cache_size() == 0


def test_a_training_step_does_not_keep_the_weights_of_the_last_samples(backend):
    """The copy that generation makes in the compute dtype."""
    backend.init(0)
    backend.start_training(OPTIMIZER, PLAN)
    cache, before = backend.prefill(backend.new_cache(1, 16), 0, np.zeros(2, np.int32), 0)
    assert backend._decoder._weights
    backend.train_step(*random_batch((2, 8, 64)), schedule_at(0, ScheduleConfig(), PLAN))
    assert not backend._decoder._weights
    after = backend.prefill(cache, 0, np.zeros(2, np.int32), 0)[1]
    assert np.abs(after - before).max() > 0


def with_memory(backend, memory_bytes):
    """The same backend on a smaller device; it shares arrays and compiled steps."""
    small = copy.copy(backend)
    small.devices = backend.devices._replace(memory_bytes=memory_bytes)
    return small


@pytest.mark.parametrize("options", [devices.SEVERAL_GPUS, devices.GRAPHS], ids=["step", "decode"])
def test_xla_knows_the_options_for_gpus(options):
    """Their names are checked wherever XLA runs; what they gain takes GPUs to measure."""
    double = jax.jit(lambda x: 2 * x, compiler_options=options)
    assert double(jnp.float32(2)) == 4
    wrong = jax.jit(lambda x: 3 * x, compiler_options={"xla_gpu_no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        wrong(jnp.float32(2))


def test_the_memory_of_the_machine_is_what_the_kernel_says():
    with open("/proc/meminfo") as info:
        kilobytes = int(info.readline().split()[1])
    assert 0 < runtime.memory_bytes() <= 1024 * kilobytes
    devices = JaxBackend(SMALL).devices
    assert 0 < devices.count * devices.memory_bytes < runtime.memory_bytes()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_names_the_flags(error, capsys, monkeypatch):
    def main(config):
        raise error

    monkeypatch.setattr("sys.argv", ["base_train"])
    with pytest.raises(SystemExit, match="2"):
        cli.run(main, NoOptions)
    assert "--device-batch-size" in capsys.readouterr().err


@dataclass(frozen=True)
class NoOptions:
    """A script without options."""


def test_figures_are_for_people():
    assert str(StepMemory(3 * 10**9, 0, 42 * 10**6)) == (
        "3.04 GB (weights 3 GB, optimizer 0 MB, the step itself 42 MB)"
    )
