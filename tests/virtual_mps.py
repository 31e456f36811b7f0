"""A Mac's GPU for machines that have none: tensors that claim to be on MPS and compute on the CPU.

Every operation on such a tensor is held to the rules of the real device: no float64, no CPU tensor
among its operands (0-D ones too, which some kernels forgive and others do not), and a kernel for
MPS in the table that PyTorch itself is built from, so that nothing needs the CPU fallback. The one
idea: to C++ the tensors are on `meta`, which exists everywhere; only Python sees `mps`, and what is
dispatched runs on the tensor behind. Left out: what kernels do with particular dtypes and sizes,
which only the device can tell.
"""

import contextlib
import importlib.util
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MPS, CPU = torch.device("mps"), torch.device("cpu")

ANYWHERE = {
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
}
"""Kernels made of other operations, or of none."""


class OnMps(torch.Tensor):
    """A tensor of the pretended device; `host` holds its numbers."""

    device = property(lambda self: MPS)

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "OnMps":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device="meta",
            requires_grad=host.requires_grad,
        )

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor that has left its device")


class Rules(TorchDispatchMode):
    """Runs operations on the tensors behind; AssertionError where the device could not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.largest_bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled; hiding from the compiler costs its import and half of every call."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in operands if isinstance(x, OnMps)]
        behind, options = tree_map(lambda x: x.host if isinstance(x, OnMps) else x, (args, kwargs))
        is_made_here = str(kwargs.get("device")) == "meta"
        if is_made_here:
            options["device"] = CPU
        results = func(*behind, **options)
        if not ours and not is_made_here:
            return results
        if str(kwargs.get("device")) == "cpu":
            return results  # it goes to the host
        self._check(func, operands, results)
        if torch.Tag.inplace_view in func.tags:  # the shape of the wrapper changes too
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
        known = {id(x.host): x for x in ours}
        return tree_map(lambda x: _wrap(x, known), results)

    def _check(self, func: Any, operands: list[torch.Tensor], results: Any) -> None:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.seen[name] += 1
        strangers = [tuple(x.shape) for x in operands if not isinstance(x, OnMps)]
        assert not strangers or "copy" in name, f"{name} mixes in CPU tensors {strangers}"
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor):
                assert x.dtype != torch.float64, f"{name} makes a float64 tensor"
                self.largest_bytes = max(self.largest_bytes, x.nbytes)
        assert kernels(name) & (ANYWHERE | {"MPS"}), f"{name} has no MPS kernel: {kernels(name)}"


class Placement(TorchFunctionMode):
    """Makes the tensors that Python asks for with `device=mps`, which C++ refuses to hear of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
            args[0][args[1]].fill_(args[2])  # C++ would make a scalar on the meta device
            return None
        makes_none = func in (torch._C._nn._parse_to, torch.device)
        if makes_none or not any(_is_mps(x) for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if args and isinstance(args[0], OnMps):  # there already
            args = [x for x in args if not _is_mps(x)]
            kwargs = {name: x for name, x in kwargs.items() if not _is_mps(x)}
            return func(*args, **kwargs) if len(args) + len(kwargs) > 1 else args[0]
        made = func(
            *(CPU if _is_mps(x) else x for x in args),
            **{name: CPU if _is_mps(x) else x for name, x in kwargs.items()},
        )
        assert made.dtype != torch.float64, f"{func} makes a float64 tensor"
        return OnMps(made)


@contextlib.contextmanager
def virtual_mps(monkeypatch: Any) -> Iterator[Rules]:
    """The machine is a Mac while the block lasts."""
    monkeypatch.setenv("JAXCHAT_DEVICE", "mps")
    monkeypatch.delenv("JAXCHAT_DTYPE", raising=False)
    monkeypatch.setattr(torch.backends.mps, "is_available", cache(lambda: True))
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with Rules() as rules, Placement():
            yield rules
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _wrap(x: Any, known: dict[int, OnMps]) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return known[id(x)] if id(x) in known else OnMps(x)


def _is_mps(x: Any) -> bool:
    return isinstance(x, str | torch.device) and str(x) == "mps"


@cache
def kernels(name: str) -> frozenset[str]:
    """The devices for which PyTorch has this operation, by its own table."""
    entry = _table().get(name, {"dispatch": {}})
    places = {place.strip() for key in entry.get("dispatch", {}) for place in key.split(",")}
    if "structured_delegate" in entry:
        return frozenset(places | kernels(entry["structured_delegate"]))
    return frozenset(places if "dispatch" in entry else {"CompositeImplicitAutograd"})


@cache
def _table() -> dict[str, dict[str, Any]]:
    spec = importlib.util.find_spec("torchgen")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "packaged/ATen/native/native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with path.open() as file:
        return {entry["func"].split("(")[0]: entry for entry in yaml.load(file, loader)}
