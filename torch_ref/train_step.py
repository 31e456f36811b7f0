"""Loss and gradients of one step: micro-batches, float16 loss scaling, the sum over processes.

The loss is the mean over every counted target of the whole batch, so micro-batches of unequal
counts weigh what they should; weights turn it into a policy gradient. The twin of
`jaxchat/train_step.py`; the loss scale is this backend's own, because only here float16 is a
default (MPS).
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from torch_ref.gpt import GPT
from torch_ref.loss import cross_entropy
from torch_ref.sharding import Ranks


class LossScale:
    """Dynamic loss scaling (arXiv 1710.03740): float16 gradients stay inside float16's range.

    The scale doubles after `growth_steps` good steps; a step whose gradients overflowed is skipped
    and halves it.
    """

    def __init__(
        self, value: float = 2.0**16, good_steps: float = 0, *, growth_steps: int = 1000
    ) -> None:
        self.value, self.good_steps, self.growth_steps = value, int(good_steps), growth_steps

    def accepts(self, grad_norm: Tensor) -> bool:
        """Whether the step may be taken; adjusts the scale for the next. Waits for the device."""
        if not torch.isfinite(grad_norm).item():
            self.value, self.good_steps = self.value / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == self.growth_steps:
            self.value, self.good_steps = self.value * 2, 0
        return True


def loss_and_grads(
    model: GPT,
    inputs: Int[Tensor, "A B T"],
    targets: Int[Tensor, "A B T"],
    weights: Float[Tensor, "A B T"] | None = None,
    *,
    count: int,
    ranks: Ranks,
    loss_scale: float = 1.0,
    remat: str = "none",
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Weighted mean loss over the `count` counted targets of all micro-batches, and its gradient.

    `inputs`, `targets` and `weights` are this process's rows; `count` spans all processes.
    """
    model.zero_grad()  # of a step that failed halfway
    total = torch.zeros((), device=inputs.device)
    counted = (targets >= 0).float()
    weights = counted if weights is None else counted * weights
    for micro in zip(inputs, targets, weights, strict=True):
        nats = _summed_loss(model, *micro, remat=remat)
        (nats * (loss_scale / count)).backward()
        total += nats.detach()
    grads = {}
    for name, param in model.named_parameters():
        grads[name] = torch.zeros_like(param) if param.grad is None else param.grad
        param.grad = None
    ranks.sum_in_place(total, *grads.values())
    if loss_scale != 1.0:
        for grad in grads.values():
            grad /= loss_scale
    return total / count, grads


def _summed_loss(
    model: GPT,
    inputs: Int[Tensor, "B T"],
    targets: Int[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    *,
    remat: str,
) -> Float[Tensor, ""]:
    hidden, _ = model.hidden(inputs, remat=remat)
    config = model.config
    return cross_entropy(
        hidden,
        model.lm_head.weight,
        targets,
        weights,
        config.vocab_size,
        config.logit_softcap,
    )


def global_norm(tensors: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Euclidean norm over all entries of all tensors."""
    norms = [torch.linalg.vector_norm(x) for x in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))
