"""The table of placements, and what the compiler makes of it: read from the compiled step."""

import math
import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import distributed, optim, sharding
from jaxchat.config import OptimizerConfig, ScheduleConfig
from jaxchat.jax_backend import JaxBackend
from jaxchat.memory import REMAT
from jaxchat.params import split
from jaxchat.plan import plan_training
from jaxchat.schedule import StepSchedule, schedule_at
from jaxchat.train_step import TrainState, loss_and_grads, make_train_step
from tests.models import MODERN, make_perturbed

CONFIG = replace(MODERN, n_layer=2)
PLAN = plan_training(CONFIG, OptimizerConfig(), num_iterations=8, total_batch_size=1024)
SIZES = ({"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("data=2,fsdp=4", (2, 4, 1)), ("tensor=2", (4, 1, 2)), ("fsdp=2, tensor=2,data=2", (2, 2, 2))],
)
def test_a_mesh_is_read_and_what_is_left_goes_to_data(text, sizes):
    assert tuple(sharding.parse_mesh(text, 8).values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2,fsdp=2", r"is 4 device\(s\) and there are 8"),
        ("model=8", "sizes of data, fsdp, tensor"),
        ("fsdp=0", "sizes of"),
        ("fsdp=2,fsdp=4", "sizes of"),
        ("fsdp=3", "is 6 device"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        sharding.parse_mesh(text, 8)


def test_tensor_must_divide_the_heads():
    with pytest.raises(ValueError, match="tensor=4 does not divide 4 heads and 2 key/value heads"):
        JaxBackend(CONFIG, mesh="data=2,tensor=4")


def mesh_of(sizes):
    return sharding.make_mesh(jax.devices()[: math.prod(sizes.values())], sizes)


@dataclass(frozen=True)
class OnHost:
    """A device, as far as a mesh looks: of a host that JAX takes for a slice of its own."""

    id: int
    process_index: int
    slice_index: int
    device_kind: str = "NVIDIA H100"
    platform: str = "gpu"


def on_two_hosts(sizes):
    return sharding.make_mesh([OnHost(i, i // 4, i // 4) for i in range(8)], sizes)


def test_a_mesh_of_several_hosts_keeps_the_order_of_their_devices():
    """`jax.make_mesh` refuses them: no run on two hosts with GPUs could start."""
    mesh = on_two_hosts({"data": 2, "fsdp": 2, "tensor": 2})
    assert [device.id for device in mesh.devices.flat] == list(range(8))


def test_a_row_of_a_batch_stays_on_a_host():
    """Two would fill it with different tokens, without a word."""
    distributed.check_rows_are_local(on_two_hosts({"data": 2, "tensor": 4}))
    distributed.check_rows_are_local(on_two_hosts({"fsdp": 8}))
    with pytest.raises(ValueError, match=r"tensor=8 .* a row must stay within a process"):
        distributed.check_rows_are_local(on_two_hosts({"tensor": 8}))


@pytest.mark.parametrize(("count", "index", "rank"), [(2, 0, None), (1, 0, "1")])
def test_processes_of_which_no_launcher_has_told_are_refused(monkeypatch, count, index, rank):
    """Every one of them took itself for the first; or, told by a stray RANK, none did."""
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with pytest.raises(ValueError, match="set JAXCHAT_COORDINATOR"):
        distributed.check_joined()


def placed_bytes(tree):
    """Bytes on the first device."""
    first = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first]
    return sum(s.data.nbytes for s in shards)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_device_holds_its_share_and_no_more(sizes):
    """Weights are cut by fsdp x tensor, optimizer state by all eight; small arrays are whole."""
    mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    backend = JaxBackend(CONFIG, mesh=mesh)
    backend.init(0)
    backend.start_training(OptimizerConfig(), PLAN)
    tables = [x for x in backend.params.values() if x.size > 1000]
    share = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    assert placed_bytes(tables) == sum(x.nbytes for x in tables) // share
    moments = [x for x in jax.tree.leaves(backend._opt_state) if x.size > 1000]
    assert placed_bytes(moments) == sum(x.nbytes for x in moments) // 8


@pytest.fixture(scope="module", params=SIZES, ids=str)
def compiled(request):
    """The sizes of a mesh, and the instructions of the step compiled for it."""
    mesh = mesh_of(request.param)
    graphdef, params = split(make_perturbed(CONFIG))
    layout = sharding.MeshLayout(mesh)
    transform = optim.make_optimizer(CONFIG, OptimizerConfig(), PLAN, layout=layout)
    state = TrainState(params, transform.init(params))
    placements = TrainState(
        sharding.weights(mesh, params), sharding.optimizer_state(mesh, state.opt_state)
    )
    step = make_train_step(graphdef, transform, mesh, placements)
    ids = jnp.zeros((1, 8, 64), jnp.int32)
    schedule = StepSchedule(*map(np.float32, schedule_at(0, ScheduleConfig(), PLAN)))
    text = step.lower(jax.device_put(state, placements), (ids, ids, None), schedule).compile()
    return request.param, text.as_text().splitlines()


def shapes(lines, operation):
    """The result shapes of an operation, and the lines they stand in."""
    found = [line for line in lines if re.search(rf" {operation}(-start)?\(", line)]
    return [(_shape(line), line) for line in found]


def _shape(line):
    return tuple(map(int, re.search(r"= \(?f32\[([\d,]*)\]", line)[1].split(",")))


def test_orthogonalisation_stays_on_its_device(compiled):
    """Every product works on this device's matrices: stacks of eight, one each, whole."""
    _, lines = compiled
    products = [line for line in lines if " dot(" in line and "/orthogonalize/" in line]
    shapes_of = [_shape(line) for line in products]
    whole = {(64, 64), (32, 64), (256, 64), (64, 256), (32, 32), (2, 12), (2, 2)}
    assert products
    assert all(math.prod(shape) in {a * b for a, b in whole} for shape in shapes_of)
    meeting = r" (all-reduce|all-gather|all-to-all|collective-permute)(-start)?\("
    assert not [x for x in lines if "/orthogonalize/" in x and re.search(meeting, x)]


def test_optimizer_state_is_never_gathered(compiled):
    """What is gathered is one update for each table and each stack, and weights where fsdp cuts
    them: forward and backward. Moments would come on top."""
    sizes, lines = compiled
    _, params = split(make_perturbed(CONFIG))
    tables = [x for n, x in params.items() if x.ndim == 2 and not n.startswith("h.")]
    updates = len(tables) + 5
    cut = [n for n, x in params.items() if "fsdp" in sharding.weight(mesh_of(sizes), n, x.shape)]
    gathers = [line for _, line in shapes(lines, "all-gather")]
    for_use = [line for line in gathers if "/shard_map/" in line]
    assert len(for_use) <= 2 * len(cut)
    assert len(gathers) - len(for_use) <= updates


def gradients_of(mesh, remat):
    graphdef, _ = split(make_perturbed(CONFIG))
    return lambda params, batch: loss_and_grads(graphdef, params, batch, mesh, remat=remat)


def operations(mesh, remat):
    """How often a gradient gathers and multiplies, and what it sends to the host."""
    _, params = split(make_perturbed(CONFIG))
    ids = jnp.zeros((1, 8, 64), jnp.int32)
    text = str(jax.make_jaxpr(gradients_of(mesh, remat))(params, (ids, ids, None)))
    wanted = (r"= all_gather\[", r"= dot_general\[", "<host>")
    return tuple(len(re.findall(pattern, text)) for pattern in wanted)


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_blocks_gather_their_weights_twice_and_save_what_they_save_elsewhere(sizes, remat):
    """Kept from the first time, whole weights would be where `fsdp` is to divide them; and
    `--remat` did nothing there. Counted before XLA, which on a CPU merges both times again."""
    mesh = mesh_of(sizes)
    _, params = split(make_perturbed(CONFIG))
    cut = [n for n, x in params.items() if "fsdp" in sharding.weight(mesh, n, x.shape)]
    in_blocks = sum(name.startswith("h.") for name in cut)
    assert in_blocks > 10
    gathers, *others = operations(mesh, remat)
    assert gathers == len(cut) + in_blocks
    assert others == list(operations(mesh_of({"data": 2}), remat)[1:])


@pytest.mark.parametrize("remat", ["none", "offload"])
def test_divided_weights_have_the_gradients_of_whole_ones(remat):
    rng = np.random.default_rng(0)
    _, params = split(make_perturbed(CONFIG))
    ids = jnp.asarray(rng.integers(0, CONFIG.vocab_size, (1, 4, 64)), jnp.int32)
    batch = (ids, jnp.roll(ids, -1, axis=-1), None)
    alone = jax.jit(gradients_of(mesh_of({"data": 1}), "none"))(params, batch)
    divided = jax.jit(gradients_of(mesh_of({"fsdp": 2, "tensor": 2}), remat))(params, batch)
    assert float(divided[0]) == pytest.approx(float(alone[0]), rel=1e-6)
    for name, expected in alone[1].items():
        # a scalar's gradient is one sum over every activation, whose terms cancel
        relative, absolute = (1e-4, 1e-7) if expected.size == 1 else (1e-5, 0)
        bound = absolute + relative * float(jnp.abs(expected).max())
        np.testing.assert_allclose(divided[1][name], expected, atol=bound, err_msg=name)


def test_gradients_travel_to_their_stack_by_all_to_all(compiled):
    """Asked for in one go, the compiler would gather whole stacks on every device."""
    sizes, lines = compiled
    exchanges = [line for line in lines if re.search(r" all-to-all(-start)?\(", line)]
    assert bool(exchanges) == ("fsdp" in sizes)
    whole_stack = 8 * 256 * 64
    divided = [math.prod(shape) for shape, line in shapes(lines, "all-gather") if len(shape) == 3]
    assert all(size < whole_stack or "fsdp" not in sizes for size in divided)
