"""Muon for the matrices inside blocks, AdamW for everything else, as optax transforms.

The model does not know its optimizer: `param_label` sorts weights by name, `make_optimizer` gives
each label its transform. What moves from step to step (learning-rate multiplier, momentum, weight
decay) arrives as the extra argument `schedule`, so nothing recompiles. `torch_ref/optim.py` is the
same file in PyTorch. Moments are float32.
"""

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from jaxchat.config import AdamGroup, GPTConfig, OptimizerConfig
from jaxchat.plan import TrainingPlan
from jaxchat.schedule import StepSchedule
from jaxchat.sharding import Layout

Stack = Float[Array, "N out in"]
Weights = Mapping[str, Any]
"""Arrays by name; entries of other groups are `optax.MaskedNode`."""

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Five steps towards the polar factor (arXiv 2505.16932, safety 2e-2, cushion 2)."""

ONE_DEVICE = Layout()

TINY = 1e-10
"""Floor under every norm that is divided by."""

WIDTH_REFERENCE = 768
"""Width at which the embedding learning rates were tuned."""


def param_label(name: str) -> str:
    """The optimizer group of a weight: `matrices` is Muon's, the rest name AdamW groups."""
    if name.startswith("h."):
        return "matrices"
    if name.startswith(("smear", "backout")):
        return "gates"
    return name.split(".")[0]


def matrices_by_shape(params: Weights) -> dict[str, list[str]]:
    """Muon's stacks: `"256x1024"` and the names of its matrices in order."""
    matrices = {name: x for name, x in params.items() if param_label(name) == "matrices"}
    return _names_by_shape(matrices)


def make_optimizer(
    config: GPTConfig,
    optimizer: OptimizerConfig,
    plan: TrainingPlan,
    *,
    iteration_dtype: DTypeLike = jnp.float32,
    layout: Layout = ONE_DEVICE,
) -> optax.GradientTransformationExtraArgs:
    """The whole optimizer over a flat dict of weights; `update` takes `schedule=StepSchedule`.

    `layout` says where the arrays of the state lie, and brings gradients there.
    """
    width_scale = (config.n_embd / WIDTH_REFERENCE) ** -0.5
    transforms: dict[Hashable, optax.GradientTransformation] = {
        label: adamw(
            group,
            lr_scale=(width_scale if group.width_scaled else 1.0)
            * (plan.lr_scale if group.batch_scaled else 1.0),
            eps=optimizer.eps,
            layout=layout,
        )
        for label, group in optimizer.adam_groups.items()
    }
    transforms["matrices"] = muon(
        lr=optimizer.matrix_lr * plan.lr_scale,
        beta2=optimizer.matrix_beta2,
        iteration_dtype=iteration_dtype,
        layout=layout,
    )
    return optax.partition(transforms, lambda params: {name: param_label(name) for name in params})


class AdamState(NamedTuple):
    """First and second moments, and the number of updates made."""

    mu: dict[str, Array]
    nu: dict[str, Array]
    count: Array


def adamw(
    group: AdamGroup, *, lr_scale: float, eps: float, layout: Layout = ONE_DEVICE
) -> optax.GradientTransformationExtraArgs:
    """AdamW (arXiv 1711.05101): decay by lr x weight decay, then the bias-corrected step."""

    def init_fn(params: Weights) -> AdamState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        return AdamState(zeros, jax.tree.map(jnp.copy, zeros), jnp.zeros((), jnp.int32))

    def update_fn(
        grads: Weights, state: AdamState, params: Weights, *, schedule: StepSchedule
    ) -> tuple[Weights, AdamState]:
        grads = _named(layout.share, grads)
        count = state.count + 1
        t = count.astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: m + (1 - group.beta1) * (g - m), state.mu, grads)
        nu = jax.tree.map(lambda v, g: v + (1 - group.beta2) * (g * g - v), state.nu, grads)
        lr = group.lr * lr_scale * schedule.lr_multiplier
        step_size = lr / (1 - group.beta1**t)
        root_correction = jnp.sqrt(1 - group.beta2**t)

        def step(p: Array, m: Array, v: Array) -> Array:
            denominator = jnp.sqrt(v) / root_correction + eps
            return -(lr * group.weight_decay) * p - step_size * m / denominator

        shares = _named(layout.share, params)
        updates = _named(layout.share, jax.tree.map(step, shares, mu, nu))
        return updates, AdamState(mu, nu, count)

    # optax types an update as taking any keyword; ours takes one by name
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyrefly: ignore[bad-argument-type]


class MuonState(NamedTuple):
    """Stacks by matrix shape, `"256x1024"`: every matrix of that (out, in) shape, in name order."""

    momentum: dict[str, Stack]
    second_moment: dict[str, Array]
    """(N, out, 1) for tall and square matrices, (N, 1, in) for wide ones."""


def muon(
    *,
    lr: float,
    beta2: float,
    iteration_dtype: DTypeLike = jnp.float32,
    layout: Layout = ONE_DEVICE,
) -> optax.GradientTransformationExtraArgs:
    """Orthogonalised momentum (Muon) with row equilibration, NorMuon and cautious decay.

    The learning rate of an (out, in) matrix is lr x sqrt(max(1, out / in)).
    """

    def init_fn(params: Weights) -> MuonState:
        stacks = _stack_by_shape(params, layout.multiple)
        return MuonState(
            momentum={key: jnp.zeros_like(x) for key, x in stacks.items()},
            second_moment={key: jnp.zeros_like(_mean_square(x)) for key, x in stacks.items()},
        )

    def update_fn(
        grads: Weights, state: MuonState, params: Weights, *, schedule: StepSchedule
    ) -> tuple[Weights, MuonState]:
        directions, momentum, second = {}, {}, {}
        names = _names_by_shape(grads)
        for key, stack in _stack_by_shape(grads, layout.multiple).items():
            mine = layout.divide(names[key], stack)
            momentum[key], u = nesterov(state.momentum[key], mine, schedule.momentum)
            u = orthogonalize(equilibrate_rows(u), iteration_dtype)
            second[key], u = normalize_variance(state.second_moment[key], u, beta2)
            directions[key] = layout.restore(names[key], u)

        # decay is elementwise, so weights need not travel to their stack
        def step(u: Array, p: Array) -> Array:
            decay = jnp.where(u * p >= 0, schedule.weight_decay * p, 0.0)
            shape_factor = math.sqrt(max(1.0, p.shape[0] / p.shape[1]))
            return -(lr * shape_factor * schedule.lr_multiplier) * (u + decay)

        updates = jax.tree.map(step, _unstack(directions, grads), params)
        return updates, MuonState(momentum, second)

    # optax types an update as taking any keyword; ours takes one by name
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyrefly: ignore[bad-argument-type]


def nesterov(buffer: Stack, grad: Stack, momentum: ArrayLike) -> tuple[Stack, Stack]:
    """The new momentum buffer, and the gradient looked up one step ahead along it."""
    buffer = buffer + (1 - momentum) * (grad - buffer)
    return buffer, grad + momentum * (buffer - grad)


def equilibrate_rows(x: Stack) -> Stack:
    """Give every row of a matrix the same norm, keeping the matrix's (arXiv 2603.28254)."""
    row_norms = jnp.linalg.norm(x, axis=-1, keepdims=True)
    mean_norm = _frobenius(x) / math.sqrt(x.shape[-2])
    return x * (mean_norm / jnp.maximum(row_norms, TINY))


@jax.named_scope("orthogonalize")
def orthogonalize(x: Stack, iteration_dtype: DTypeLike = jnp.float32) -> Stack:
    """Nearly the polar factor, rescaled to its Frobenius norm (arXiv 2505.16932, 2602.21545)."""
    tall = x.shape[-2] > x.shape[-1]
    y = (x / (1.01 * _frobenius(x) + 1e-6)).astype(iteration_dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = y.mT @ y if tall else y @ y.mT
        polynomial = b * gram + c * (gram @ gram)
        y = a * y + (y @ polynomial if tall else polynomial @ y)
    y = y.astype(jnp.float32)
    return y * (math.sqrt(min(x.shape[-2:])) / jnp.maximum(_frobenius(y), TINY))


def normalize_variance(second: Array, x: Stack, beta2: float) -> tuple[Array, Stack]:
    """Even out the rows' (wide: columns') scale over time, at equal norm (arXiv 2510.05491)."""
    mean_square = _mean_square(x)
    second = second + (1 - beta2) * (mean_square - second)
    scaled = x * jax.lax.rsqrt(jnp.maximum(second, TINY))
    return second, scaled * (_frobenius(x) / jnp.maximum(_frobenius(scaled), TINY))


def _mean_square(x: Stack) -> Array:
    """(N, out, 1) of tall and square matrices, (N, 1, in) of wide ones."""
    axis = -1 if x.shape[-2] >= x.shape[-1] else -2
    return jnp.mean(x * x, axis=axis, keepdims=True)


def _frobenius(x: Stack) -> Float[Array, "N 1 1"]:
    return jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))


def _names_by_shape(params: Weights) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(params, key=_natural):
        if isinstance(params[name], optax.MaskedNode):
            continue
        groups.setdefault("x".join(map(str, params[name].shape)), []).append(name)
    return groups


def _named(function: Callable[[str, Array], Array], arrays: Weights) -> dict[str, Any]:
    """Apply a function of name and array; entries of other groups stay."""
    return {
        name: x if isinstance(x, optax.MaskedNode) else function(name, x)
        for name, x in arrays.items()
    }


def _natural(name: str) -> tuple[int | str, ...]:
    """Layer 10 after layer 9: sort key of `h.10.attn.c_q.weight`."""
    return tuple(f"{int(part):08d}" if part.isdigit() else part for part in name.split("."))


def _stack_by_shape(params: Weights, multiple: int) -> dict[str, Stack]:
    """Equal shapes as one stack, zero matrices appended up to a multiple of `multiple`."""
    stacks = {}
    for key, names in _names_by_shape(params).items():
        matrices = [params[name].astype(jnp.float32) for name in names]
        padding = -len(names) % multiple
        stacks[key] = jnp.stack(matrices + [jnp.zeros_like(matrices[0])] * padding)
    return stacks


def _unstack(stacks: Mapping[str, Stack], like: Weights) -> dict[str, Any]:
    """The inverse of `_stack_by_shape`, masked entries of `like` included."""
    matrices = dict(like)
    for key, names in _names_by_shape(like).items():
        for index, name in enumerate(names):
            matrices[name] = stacks[key][index]
    return matrices
