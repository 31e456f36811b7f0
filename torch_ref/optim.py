"""Muon for the matrices inside blocks, AdamW for everything else.

The model does not know its optimizer: `param_label` sorts weights by name, `make_optimizer` gives
each label its rule. What moves from step to step (learning-rate multiplier, momentum, weight decay)
arrives with every step. `jaxchat/optim.py` is the same file as optax transforms; here a rule owns
its state and changes weights in place, and under torchrun it holds and computes only its process's
share. Moments are float32.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from jaxchat.config import AdamGroup, GPTConfig, OptimizerConfig
from jaxchat.plan import TrainingPlan
from jaxchat.schedule import StepSchedule
from torch_ref.sharding import Ranks

Stack = Float[Tensor, "N out in"]
Tensors = Mapping[str, Tensor]
OptimizerState = dict[str, Tensor]
"""`muon.{momentum,second_moment}.<shape>`, `adam.{mu,nu}.<weight>` and `adam.count.<label>`."""

POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Five steps towards the polar factor (arXiv 2505.16932, safety 2e-2, cushion 2)."""

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


class Optimizer:
    """All rules together; its state is whole and on the CPU, however many processes share it."""

    def __init__(self, rules: Sequence["Muon | AdamW"]) -> None:
        self.rules = rules

    @torch.no_grad()
    def step(self, grads: Tensors, schedule: StepSchedule) -> None:
        """Update every weight in place; gradients are the same on every process."""
        for rule in self.rules:
            rule.step(grads, schedule)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What `state` will hold."""
        return {name: shape for rule in self.rules for name, shape in rule.shapes().items()}

    def state(self) -> OptimizerState:
        """Everything a later `load` needs, as CPU tensors. A collective under torchrun."""
        return {name: x for rule in self.rules for name, x in rule.state().items()}

    def load(self, state: Tensors) -> None:
        """Continue from a state of these `shapes`."""
        for rule in self.rules:
            rule.load(state)


def make_optimizer(
    params: Tensors,
    config: GPTConfig,
    optimizer: OptimizerConfig,
    plan: TrainingPlan,
    *,
    iteration_dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
) -> Optimizer:
    """The whole optimizer over a flat dict of weights, which it updates in place."""
    ranks = ranks or Ranks()
    width_scale = (config.n_embd / WIDTH_REFERENCE) ** -0.5
    groups: dict[str, dict[str, Tensor]] = {}
    for name, param in params.items():
        groups.setdefault(param_label(name), {})[name] = param.detach()
    adam = [
        AdamW(
            label,
            groups.get(label, {}),
            group,
            lr_scale=(width_scale if group.width_scaled else 1.0)
            * (plan.lr_scale if group.batch_scaled else 1.0),
            eps=optimizer.eps,
            ranks=ranks,
        )
        for label, group in optimizer.adam_groups.items()
    ]
    muon = Muon(
        groups["matrices"],
        lr=optimizer.matrix_lr * plan.lr_scale,
        beta2=optimizer.matrix_beta2,
        iteration_dtype=iteration_dtype,
        ranks=ranks,
    )
    return Optimizer([muon, *adam])


class AdamW:
    """AdamW (arXiv 1711.05101): decay by lr x weight decay, then the bias-corrected step.

    A process owns an equal share of a table's rows, or all of it where the rows do not divide.
    """

    def __init__(
        self,
        label: str,
        params: Tensors,
        group: AdamGroup,
        *,
        lr_scale: float,
        eps: float,
        ranks: Ranks,
    ) -> None:
        self.label, self.params, self.group, self.ranks = label, params, group, ranks
        self.lr, self.eps = group.lr * lr_scale, eps
        self.mu = {name: torch.zeros_like(ranks.shard(p)) for name, p in params.items()}
        self.nu = {name: torch.zeros_like(ranks.shard(p)) for name, p in params.items()}
        self.count = 0

    def step(self, grads: Tensors, schedule: StepSchedule) -> None:
        group = self.group
        self.count += 1
        lr = self.lr * schedule.lr_multiplier
        step_size = lr / (1 - group.beta1**self.count)
        root_correction = math.sqrt(1 - group.beta2**self.count)
        for name, param in self.params.items():
            p, g = self.ranks.shard(param), self.ranks.shard(grads[name])
            m, v = self.mu[name], self.nu[name]
            m.lerp_(g, 1 - group.beta1)
            v.lerp_(g * g, 1 - group.beta2)
            denominator = v.sqrt().div_(root_correction).add_(self.eps)
            p.mul_(1 - lr * group.weight_decay).addcdiv_(m, denominator, value=-step_size)
            self.ranks.gather_into(param, p)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        moments = {f"adam.{k}.{n}": p.shape for n, p in self.params.items() for k in ("mu", "nu")}
        return {**moments, f"adam.count.{self.label}": ()}

    def state(self) -> OptimizerState:
        state = {f"adam.count.{self.label}": torch.tensor(self.count, dtype=torch.int32)}
        for name, param in self.params.items():
            for key, part in (("mu", self.mu[name]), ("nu", self.nu[name])):
                whole = self.ranks.gather(part) if self.ranks.divides(param) else part
                state[f"adam.{key}.{name}"] = whole.to("cpu", copy=True)
        return state

    def load(self, state: Tensors) -> None:
        self.count = int(state[f"adam.count.{self.label}"])
        for name in self.params:
            self.mu[name].copy_(self.ranks.shard(state[f"adam.mu.{name}"]))
            self.nu[name].copy_(self.ranks.shard(state[f"adam.nu.{name}"]))


class Muon:
    """Orthogonalised momentum (Muon) with row equilibration, NorMuon and cautious decay.

    The learning rate of an (out, in) matrix is lr x sqrt(max(1, out / in)). Matrices of one shape
    are one stack, `"256x1024"`, in name order; a process owns an equal share of every stack, zero
    matrices appended where the count does not divide.
    """

    def __init__(
        self,
        params: Tensors,
        *,
        lr: float,
        beta2: float,
        iteration_dtype: torch.dtype = torch.float32,
        ranks: Ranks,
    ) -> None:
        self.params, self.ranks = params, ranks
        self.lr, self.beta2, self.iteration_dtype = lr, beta2, iteration_dtype
        self.names = _names_by_shape(params)
        stacks = {key: self._own_stack(params, key) for key in self.names}
        self.momentum = {key: torch.zeros_like(x) for key, x in stacks.items()}
        self.second_moment = {key: torch.zeros_like(_mean_square(x)) for key, x in stacks.items()}

    def step(self, grads: Tensors, schedule: StepSchedule) -> None:
        for key, names in self.names.items():
            update = nesterov(self.momentum[key], self._own_stack(grads, key), schedule.momentum)
            update = orthogonalize(equilibrate_rows(update), self.iteration_dtype)
            update = normalize_variance(self.second_moment[key], update, self.beta2)
            stack = self._own_stack(self.params, key)
            lr = self.lr * schedule.lr_multiplier * math.sqrt(max(1.0, _aspect(stack)))
            decay = torch.where(update * stack >= 0, schedule.weight_decay * stack, 0.0)
            stack.sub_(update.add_(decay), alpha=lr)
            for name, matrix in zip(names, self.ranks.gather(stack), strict=False):
                self.params[name].copy_(matrix)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: (len(self.names[key]), *part.shape[1:]) for name, key, part in self._moments()
        }

    def state(self) -> OptimizerState:
        return {
            name: self.ranks.gather(part)[: len(self.names[key])].to("cpu", copy=True)
            for name, key, part in self._moments()
        }

    def load(self, state: Tensors) -> None:
        for name, key, part in self._moments():
            own = self._own(range(len(self.names[key])))
            part.zero_()[: len(own)] = state[name][own.start : own.stop].to(part.device)

    def _moments(self) -> Iterator[tuple[str, str, Tensor]]:
        for key in self.names:
            yield f"muon.momentum.{key}", key, self.momentum[key]
            yield f"muon.second_moment.{key}", key, self.second_moment[key]

    def _own(self, matrices: range) -> range:
        share = -(-len(matrices) // self.ranks.world)
        return matrices[self.ranks.rank * share :][:share]

    def _own_stack(self, tensors: Tensors, key: str) -> Stack:
        """This process's matrices of one shape, zero-padded to everybody's share."""
        names = self.names[key]
        share = -(-len(names) // self.ranks.world)
        own = [tensors[names[i]] for i in self._own(range(len(names)))]
        return torch.stack(own + [torch.zeros_like(tensors[names[0]])] * (share - len(own)))


def nesterov(buffer: Stack, grad: Stack, momentum: float) -> Stack:
    """Move the momentum buffer, and return the gradient looked up one step ahead along it."""
    buffer.lerp_(grad, 1 - momentum)
    return grad.lerp(buffer, momentum)


def equilibrate_rows(x: Stack) -> Stack:
    """Give every row of a matrix the same norm, keeping the matrix's (arXiv 2603.28254)."""
    row_norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_norm = _frobenius(x) / math.sqrt(x.shape[-2])
    return x * (mean_norm / row_norms.clamp(min=TINY))


def orthogonalize(x: Stack, iteration_dtype: torch.dtype = torch.float32) -> Stack:
    """Nearly the polar factor, rescaled to its Frobenius norm (arXiv 2505.16932, 2602.21545)."""
    tall = x.shape[-2] > x.shape[-1]
    y = (x / (1.01 * _frobenius(x) + 1e-6)).to(iteration_dtype)
    for a, b, c in POLAR_EXPRESS:
        gram = y.mT @ y if tall else y @ y.mT
        polynomial = b * gram + c * (gram @ gram)
        y = a * y + (y @ polynomial if tall else polynomial @ y)
    y = y.float()
    return y * (math.sqrt(min(x.shape[-2:])) / _frobenius(y).clamp(min=TINY))


def normalize_variance(second: Tensor, x: Stack, beta2: float) -> Stack:
    """Even out the rows' (wide: columns') scale over time, at equal norm (arXiv 2510.05491)."""
    second.lerp_(_mean_square(x), 1 - beta2)
    scaled = x * second.clamp(min=TINY).rsqrt()
    return scaled * (_frobenius(x) / _frobenius(scaled).clamp(min=TINY))


def _mean_square(x: Stack) -> Tensor:
    return (x * x).mean(dim=-1 if _aspect(x) >= 1 else -2, keepdim=True)


def _aspect(x: Stack) -> float:
    return x.shape[-2] / x.shape[-1]


def _frobenius(x: Stack) -> Float[Tensor, "N 1 1"]:
    return (x * x).sum(dim=(-2, -1), keepdim=True).sqrt()


def _names_by_shape(params: Tensors) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in sorted(params, key=_natural):
        groups.setdefault("x".join(map(str, params[name].shape)), []).append(name)
    return groups


def _natural(name: str) -> tuple[str, ...]:
    """Layer 10 after layer 9: sort key of `h.10.attn.c_q.weight`."""
    return tuple(f"{int(part):08d}" if part.isdigit() else part for part in name.split("."))
