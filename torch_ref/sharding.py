"""Several processes as one: who owns which rows, and how the parts meet again.

The same division as `jaxchat/sharding.py`, by `torch.distributed`: every process holds all weights
and its own rows of a batch, while the optimizer state is cut over the processes (ZeRO, arXiv
1910.02054). Without torchrun there is one process and every function here is the identity.
"""

import atexit
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from jaxchat import runtime


@dataclass(frozen=True)
class Ranks:
    """This process among `world` equal ones."""

    rank: int = 0
    world: int = 1

    def divides(self, x: Tensor) -> bool:
        """Whether the leading axis of `x` is cut over the processes, or replicated."""
        return self.world > 1 and x.ndim > 0 and x.shape[0] % self.world == 0

    def shard(self, x: Tensor) -> Tensor:
        """This process's share of the leading axis, as a view; all of it where it is uneven."""
        return x.chunk(self.world)[self.rank] if self.divides(x) else x

    def gather_into(self, full: Tensor, part: Tensor) -> None:
        """Fill `full` with everybody's `shard(full)`."""
        if self.divides(full):
            dist.all_gather_into_tensor(full, part.clone())

    def gather(self, part: Tensor) -> Tensor:
        """Everybody's parts, all of one shape, joined along the leading axis."""
        if self.world == 1:
            return part
        full = part.new_empty(self.world * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(full, part.contiguous())
        return full

    def send_to_all(self, x: Tensor, owner: int) -> None:
        """Fill everybody's `x` with that of process `owner`."""
        if self.world > 1:
            dist.broadcast(x, owner)

    def send(self, x: Tensor, receiver: int) -> None:
        """Hand `x` to one process, which calls `receive`."""
        dist.send(x.contiguous(), receiver)

    def receive(self, like: Tensor, sender: int) -> Tensor:
        """What a process hands over by `send`, of the shape of `like`."""
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(x, sender)
        return x

    def sum_in_place(self, *tensors: Float[Tensor, "..."]) -> None:
        """Add up over the processes; one collective per tensor, all under way at once."""
        if self.world > 1:
            for work in [dist.all_reduce(x, async_op=True) for x in tensors]:
                work.wait()

    def barrier(self) -> None:
        """Wait for everybody."""
        if self.world > 1:
            dist.barrier()


def join_ranks(device: torch.device) -> Ranks:
    """The processes that torchrun started, meeting over NCCL on CUDA and gloo elsewhere."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        _check_alone()
        return Ranks()
    if device.type == "mps":
        raise ValueError(
            f"torchrun started {world} processes, but a Mac has one GPU: run without torchrun, or "
            "set JAXCHAT_DEVICE=cpu"
        )
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_end_gloo)
    return Ranks(dist.get_rank(), dist.get_world_size())


def _check_alone() -> None:
    """ValueError where each of several processes would take itself for the whole run."""
    started = None if "TORCHELASTIC_RUN_ID" in os.environ else runtime.launch()
    if started is not None and started.count != 1:
        raise ValueError(
            f"this is one of several processes, by {started.by}, but PyTorch hears of others from "
            "torchrun alone: start it with torchrun, or use --backend jax"
        )


def _end_gloo() -> None:
    """A thread of gloo's that still holds a tensor would abort an interpreter that ends.

    NCCL's processes end on their own: there, one that failed would wait for all others.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
