"""One jitted, donated step: (state, batch) -> (state, metrics).

Gradients accumulate over the micro-batches inside the jit, each device on its own rows; they meet
in one sum per step, however many micro-batches there are; where weights are divided over `fsdp`, in
one sum per micro-batch. The loss is the mean over every counted target of the whole batch, so
micro-batches of unequal counts weigh what they should. Weights turn it into a policy gradient: an
advantage per token, and the same mean.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxchat import devices, sharding
from jaxchat.gpt import GPT
from jaxchat.loss import cross_entropy
from jaxchat.params import Params, bind
from jaxchat.schedule import StepSchedule
from jaxchat.spikes import NO_LIMITS, Limits


class TrainState(NamedTuple):
    """Everything a step reads and replaces."""

    params: Params
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """What a step reports; still on the device when it returns."""

    loss: Float[Array, ""]
    """Mean nats per counted target."""
    grad_norm: Float[Array, ""]
    """Global norm of the mean gradient."""
    skipped: Float[Array, ""]
    """1 where the step was not finite or above its limits, and changed nothing."""


Batch = tuple[Int[Array, "A B T"], Int[Array, "A B T"], Float[Array, "A B T"] | None]
"""Inputs, targets, and a weight for every target, or None where all count alike."""

TrainStep = Callable[..., tuple[TrainState, StepMetrics]]
"""(state, batch, schedule, limits) -> (state, metrics)."""


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh,
    placements: TrainState | None = None,
    *,
    remat: str = "none",
    updating: Any = None,
) -> TrainStep:
    """Compile-ready step over `mesh`; the state passed in is donated.

    `placements` holds a sharding for every array of the state, which goes out as it came in: the
    step then compiles once. None leaves it to the compiler. `remat` is memory.py's;
    `updating` says where the optimizer state is updated, if not where it rests.
    """

    def step(
        state: TrainState, batch: Batch, schedule: StepSchedule, limits: Limits = NO_LIMITS
    ) -> tuple[TrainState, StepMetrics]:
        loss, grads = loss_and_grads(graphdef, state.params, batch, mesh, remat=remat)
        if updating is not None:
            state = TrainState(state.params, jax.device_put(state.opt_state, updating))
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, schedule=schedule
        )
        grad_norm = optax.tree.norm(grads)
        # one finite check: what is below a limit is no NaN, and infinity is no limit for infinity
        fine = (loss <= limits.loss) & (grad_norm <= limits.grad_norm)
        fine &= jnp.isfinite(loss + grad_norm)
        teaches = fine & (grad_norm > 0)  # Muon makes a whole step of any momentum, however old
        new = TrainState(jax.tree.map(jnp.add, state.params, updates), opt_state)
        kept = jax.tree.map(lambda after, before: jnp.where(teaches, after, before), new, state)
        return kept, StepMetrics(loss, grad_norm, 1 - fine.astype(jnp.float32))

    replicated = sharding.place(mesh, sharding.REPLICATED)
    outputs = None if placements is None else (placements, replicated)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=outputs,
        compiler_options=devices.step_options(mesh.size),
    )


def loss_and_grads(
    graphdef: nnx.GraphDef, params: Params, batch: Batch, mesh: Mesh, *, remat: str = "none"
) -> tuple[Float[Array, ""], Params]:
    """Weighted mean loss over the counted targets of all micro-batches, and its gradient.

    Of weights that are divided over `fsdp`, every block gathers its own, once more for the backward
    pass; the embeddings and lm_head are gathered once a micro-batch.
    """
    placements = {name: sharding.weight(mesh, name, x.shape) for name, x in params.items()}
    shares = {name: sharding.without(sharding.TENSOR, spec) for name, spec in placements.items()}
    divided = {name for name, spec in shares.items() if sharding.FSDP in spec}
    inside = {name: name.split(".", 2)[2] for name in params if name.startswith("h.")}
    of_block = {inside[name]: placements[name] for name in inside}
    gather = partial(_whole, placements=of_block) if divided else None

    def local_sum(
        params: Params, inputs: Array, targets: Array, weights: Array | None
    ) -> Float[Array, ""]:
        outside = {name: x for name, x in params.items() if name not in inside}
        model = bind(graphdef, params | _whole(outside, placements))
        assert isinstance(model, GPT)
        hidden, _ = model.hidden(inputs, remat=remat, gather=gather)
        counted = (targets >= 0).astype(jnp.float32)
        weights = counted if weights is None else counted * weights
        config = model.config
        return cross_entropy(
            hidden,
            model.lm_head.weight[...],
            targets,
            weights,
            config.vocab_size,
            config.logit_softcap,
        )

    rows = (sharding.DATA, sharding.FSDP)
    alone = sharding.row_shares(mesh) == 1

    def on_device(params: Params, *batch: Array | None) -> tuple[Array, Params]:
        def accumulate(carry: tuple[Array, Params], micro: tuple[Array | None, ...]) -> tuple:
            return jax.tree.map(jnp.add, carry, gradient(params, *micro)), None

        gradient = jax.value_and_grad(local_sum)
        inputs, targets, _ = batch
        assert inputs is not None and targets is not None
        if len(inputs) == 1:
            total, grads = gradient(params, *jax.tree.map(lambda x: x[0], batch))
        else:  # all in one loop: of a first one before it, XLA would hold the activations as well
            nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
            (total, grads), _ = jax.lax.scan(accumulate, nothing, batch)
        count = jnp.sum(targets >= 0).astype(jnp.float32)
        if not alone:
            total, count = jax.lax.psum((total, count), rows)
            # gathering a share has summed its gradient over fsdp
            grads = {
                **jax.lax.psum({n: g for n, g in grads.items() if n not in divided}, rows),
                **jax.lax.psum({n: g for n, g in grads.items() if n in divided}, sharding.DATA),
            }
        scale = 1 / jnp.maximum(count, 1.0)
        return total * scale, {name: grads[name] * scale for name in params}

    if alone:
        return on_device(params, *batch)

    spread = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(shares, *[sharding.MICRO_BATCHES] * 3),
        out_specs=(sharding.REPLICATED, shares),
        # tensor is left to the compiler, which divides the products as the weights are divided
        axis_names=set(rows),
        check_vma=False,
    )
    return spread(params, *batch)


def _whole(params: Mapping[str, Array], placements: Mapping[str, P]) -> Params:
    """Weights of which some are divided over `fsdp`, each made whole."""
    return {
        name: _gather(x, placements[name]) if sharding.FSDP in placements[name] else x
        for name, x in params.items()
    }


def _gather(x: Array, spec: P) -> Array:
    """A weight made whole over `fsdp`, each device keeping its part of `tensor`.

    By hand on both axes: of a gather on one, the compiler would make a gather on both.
    """
    axis = tuple(spec).index(sharding.FSDP)
    kept = sharding.without(sharding.FSDP, spec)
    collect = jax.shard_map(
        lambda part: jax.lax.all_gather(part, sharding.FSDP, axis=axis, tiled=True),
        in_specs=kept,
        out_specs=kept,
        axis_names={sharding.TENSOR},
        check_vma=False,
    )
    return collect(x)
