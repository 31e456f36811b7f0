"""`Backend` on JAX: the nnx model, split once, behind a handful of jitted pure functions.

The object holds arrays and hands them to the functions of train_step.py, loss.py and decoding.py;
it computes nothing itself. Left out: schedules, data and checkpoint names, which belong to callers.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxchat import decoding, devices, distributed, kv_cache, optim, optimizer_state, sharding
from jaxchat.backend import DecodeBatch, DecodeResult, PromptScores, Scores, Snapshot
from jaxchat.config import GPTConfig, OptimizerConfig
from jaxchat.convert import check_params
from jaxchat.gpt import GPT
from jaxchat.kv_cache import KVCache
from jaxchat.loss import token_scores
from jaxchat.memory import NO_SAVINGS, Savings, StepMemory
from jaxchat.params import Params, bind, split
from jaxchat.plan import TrainingPlan
from jaxchat.prompt_scores import PromptScorer
from jaxchat.schedule import StepSchedule
from jaxchat.spikes import NO_LIMITS, Limits
from jaxchat.train_step import StepMetrics, TrainState, make_train_step

OFFLOADED = "pinned_host"
"""The kind of memory that an offloaded optimizer state rests in."""


class JaxBackend:
    """One model on every device of a mesh."""

    name = "jax"

    def __init__(
        self,
        config: GPTConfig,
        *,
        dtype: str | None = None,
        device: int | None = None,
        mesh: str | None = None,
    ) -> None:
        self.config = config
        devices.claim_memory()
        distributed.join()
        devices.check_platforms()
        distributed.check_joined()
        devices.enable_compilation_cache()
        self.dtype = devices.compute_dtype(dtype)
        devices.multiply_in(self.dtype)
        self._graphdef, self._shapes = _structure(config, self.dtype)
        self.mesh = _make_mesh(config, mesh, device)
        self.devices = devices.describe(self.mesh.size, sharding.row_shares(self.mesh))
        self._vote = distributed.Vote(self.mesh)
        self._replicated = sharding.place(self.mesh, sharding.REPLICATED)
        self._placements = sharding.weights(self.mesh, self._shapes)
        self._params: Params | None = None
        self._opt_state: Any = None
        self._train_step: Any = None
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._score = jax.jit(
            partial(_score, self._graphdef, self.mesh), out_shardings=self._replicated
        )
        self._logits = jax.jit(
            partial(_logits, self._graphdef, self.mesh), out_shardings=self._replicated
        )
        self._decoder = decoding.Decoder(self._graphdef, config, self.mesh)
        self._prompt_scorer = PromptScorer(self._graphdef, config)
        self._writers = {part: ocp.StandardCheckpointer() for part in ("params", "optimizer")}

    # --- weights -------------------------------------------------------------------------------

    @property
    def params(self) -> Params:
        if self._params is None:
            raise ValueError("this backend has no weights yet: call init, load or set_params")
        return self._params

    def init(self, seed: int) -> None:
        def draw() -> Params:
            model = GPT(self.config, self.dtype)
            model.init_weights(nnx.Rngs(seed))
            return split(model)[1]

        self._params = jax.jit(draw, out_shardings=self._placements)()

    def get_params(self) -> dict[str, np.ndarray]:
        whole = jax.jit(lambda x: x, out_shardings=self._replicated)  # of one: they are large
        return {name: np.asarray(whole(value)) for name, value in self.params.items()}

    def set_params(self, params: Mapping[str, np.ndarray]) -> None:
        check_params(params, {name: x.shape for name, x in self._shapes.items()})
        self._params = {
            name: distributed.put(np.asarray(params[name], np.float32), place)
            for name, place in self._placements.items()
        }

    def save(self, directory: Path) -> None:
        directory = directory.absolute()
        self._writers["params"].save(directory / "params", self.params)
        if self._opt_state is not None:
            self._writers["optimizer"].save(directory / "optimizer", self._opt_state)
        if self.devices.platform == "cpu" or _is_offloaded(self._opt_state):
            self.wait()  # the writer may read host arrays in place, and the next step donates them

    def load(self, directory: Path) -> None:
        directory = directory.absolute()
        like = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._placements[name])
            for name, x in self._shapes.items()
        }
        self._params = self._writers["params"].restore(directory / "params", like)
        if self._opt_state is None:
            return
        if optimizer_state.is_shaped_as(directory / "optimizer", self._opt_state):
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, self._opt_state)
            self._opt_state = self._writers["optimizer"].restore(directory / "optimizer", like)
        else:  # written on another number of devices
            state = optimizer_state.read_numpy(directory / "optimizer")
            self.set_optimizer_state(optimizer_state.flatten(state, self.params))

    def wait(self) -> None:
        for writer in self._writers.values():
            writer.wait_until_finished()

    @classmethod
    def read(cls, directory: Path, *, optimizer: bool) -> Snapshot:
        directory = directory.absolute()
        params = optimizer_state.read_numpy(directory / "params")
        if not optimizer:
            return Snapshot(params, None)
        state = optimizer_state.read_numpy(directory / "optimizer")
        return Snapshot(params, optimizer_state.flatten(state, params))

    # --- training ------------------------------------------------------------------------------

    def start_training(
        self, optimizer: OptimizerConfig, plan: TrainingPlan, savings: Savings = NO_SAVINGS
    ) -> None:
        transform = optim.make_optimizer(
            self.config,
            optimizer,
            plan,
            iteration_dtype=devices.iteration_dtype(),
            layout=sharding.MeshLayout(self.mesh),
        )
        abstract = jax.eval_shape(transform.init, self.params)
        updating, resting = None, sharding.optimizer_state(self.mesh, abstract)
        if savings.offload_optimizer:
            kinds = ("device", OFFLOADED)  # named, or the step would compute where it rests
            updating, resting = (sharding.in_memory(kind, resting) for kind in kinds)
        self._opt_state = jax.jit(transform.init, out_shardings=resting)(self.params)
        weights: Any = self._placements
        self._train_step = make_train_step(
            self._graphdef,
            transform,
            self.mesh,
            TrainState(weights, resting),
            remat=savings.remat,
            updating=updating,
        )
        self._compiled.clear()

    def step_memory(self, shape: tuple[int, int, int]) -> StepMemory:
        assert self._train_step is not None, "call start_training before step_memory"
        place = sharding.place(self.mesh, sharding.MICRO_BATCHES)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
        state = TrainState(self.params, self._opt_state)
        moving = StepSchedule(*(np.float32(0) for _ in StepSchedule._fields))
        bounds = Limits(*map(np.float32, NO_LIMITS))
        lowered = self._train_step.lower(state, (ids, ids, None), moving, bounds)
        self._compiled[shape] = step = lowered.compile()
        needed = step.memory_analysis()
        weights, optimizer = _device_bytes(state.params), _device_bytes(state.opt_state)
        whole = (
            needed.argument_size_in_bytes
            + needed.output_size_in_bytes
            - needed.alias_size_in_bytes
            + needed.temp_size_in_bytes
        )
        return StepMemory(weights, optimizer, working=whole - weights - optimizer)

    def agree(self, asked: bool) -> bool:
        return self._vote(asked)

    def gather(self, value: Any) -> list[Any]:
        return distributed.gather(value)

    def train_step(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        schedule: StepSchedule,
        weights: np.ndarray | None = None,
        limits: Limits = NO_LIMITS,
    ) -> Mapping[str, Array]:
        assert self._train_step is not None, "call start_training before train_step"
        shares = self.devices.count // self.devices.processes
        if inputs.shape[1] % shares:
            raise ValueError(
                f"micro-batches of {inputs.shape[1]} rows do not divide over {shares} "
                f"devices; use a device_batch_size that is a multiple of {shares}"
            )
        place = sharding.place(self.mesh, sharding.MICRO_BATCHES)
        batch = jax.tree.map(lambda x: distributed.put_rows(x, place), (inputs, targets, weights))
        moving = StepSchedule(*map(np.float32, schedule))
        state = TrainState(self.params, self._opt_state)
        bounds = Limits(*map(np.float32, limits))
        self._decoder.forget_weights()
        # what step_memory compiled need not compile again
        known = None if weights is not None else self._compiled.get(batch[0].shape)
        step = known or self._train_step
        (self._params, self._opt_state), metrics = step(state, batch, moving, bounds)
        assert isinstance(metrics, StepMetrics)
        return metrics._asdict()

    def get_optimizer_state(self) -> dict[str, np.ndarray]:
        assert self._opt_state is not None, "call start_training before get_optimizer_state"
        return optimizer_state.flatten(self._opt_state, self.params)

    def set_optimizer_state(self, state: Mapping[str, np.ndarray]) -> None:
        assert self._opt_state is not None, "call start_training before set_optimizer_state"
        check_params(state, optimizer_state.shapes(self._opt_state, self.params))
        self._opt_state = optimizer_state.fill(self._opt_state, state)

    # --- evaluation ----------------------------------------------------------------------------

    def score(self, inputs: np.ndarray, targets: np.ndarray) -> Scores:
        place = sharding.rows(self.mesh, inputs)
        placed = (distributed.put(inputs, place), distributed.put(targets, place))
        nll, greedy = self._score(self.params, *placed)
        return Scores(np.asarray(nll), np.asarray(greedy))

    def logits(self, inputs: np.ndarray, positions: np.ndarray) -> np.ndarray:
        place = sharding.rows(self.mesh, inputs)
        placed = (distributed.put(inputs, place), distributed.put(positions, place))
        return np.asarray(self._logits(self.params, *placed))

    # --- generation ----------------------------------------------------------------------------

    def new_cache(self, rows: int, max_length: int) -> KVCache:
        shares = sharding.row_shares(self.mesh)
        rows = shares * math.ceil(rows / shares)
        make = partial(kv_cache.make_cache, self.config, rows, max_length, self.dtype)
        return jax.jit(make, out_shardings=sharding.place(self.mesh, sharding.ROWS))()

    def prefill(
        self, cache: KVCache, row: int, ids: np.ndarray, start: int
    ) -> tuple[KVCache, np.ndarray]:
        return self._decoder.prefill(self.params, cache, row, ids, start)

    def copy_row(self, cache: KVCache, source: int, target: int, length: int) -> KVCache:
        return self._decoder.copy_row(cache, source, target, length)

    def decode(self, cache: KVCache, batch: DecodeBatch) -> DecodeResult:
        return self._decoder.decode(self.params, cache, batch)

    def score_prompt(self, ids: np.ndarray) -> PromptScores:
        return self._prompt_scorer(self._decoder.weights(self.params), ids)

    def warm_up(self, cache: KVCache, steps: int) -> KVCache:
        self._prompt_scorer.warm_up(self._decoder.weights(self.params), cache.max_length)
        return self._decoder.warm_up(self.params, cache, steps)


def _structure(config: GPTConfig, dtype: DTypeLike) -> tuple[nnx.GraphDef, Mapping[str, Any]]:
    """The model's graph and the shapes of its weights, without allocating them."""
    return split(nnx.eval_shape(lambda: GPT(config, dtype)))


def _is_offloaded(arrays: Any) -> bool:
    """Whether some of them lie in the host's memory, where `start_training` may put them."""
    return any(x.sharding.memory_kind == OFFLOADED for x in jax.tree.leaves(arrays))


def _device_bytes(arrays: Any) -> int:
    """Bytes of device memory that the first device's shares fill."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
        if x.sharding.memory_kind != OFFLOADED
    )


def _make_mesh(config: GPTConfig, mesh: str | None, device: int | None) -> Mesh:
    """The mesh asked for: `auto` and None put every device on the data axis."""
    if device is not None or mesh is None or mesh == "auto":
        return sharding.make_mesh(devices.pick(device))
    sizes = sharding.parse_mesh(mesh, len(jax.devices()))
    tensor = sizes[sharding.TENSOR]
    if config.n_head % tensor or config.n_kv_head % tensor:
        raise ValueError(
            f"--mesh {mesh}: tensor={tensor} does not divide {config.n_head} heads and "
            f"{config.n_kv_head} key/value heads"
        )
    made = sharding.make_mesh(sizes=sizes)
    distributed.check_rows_are_local(made)
    return made


def _score(
    graphdef: nnx.GraphDef, mesh: Mesh, params: Params, inputs: Array, targets: Array
) -> tuple:
    model = bind(graphdef, sharding.gathered(mesh, params))
    assert isinstance(model, GPT)
    hidden, _ = model.hidden(inputs)
    return token_scores(
        hidden,
        model.lm_head.weight[...],
        targets,
        vocab_size=model.config.vocab_size,
        softcap=model.config.logit_softcap,
    )


def _logits(
    graphdef: nnx.GraphDef, mesh: Mesh, params: Params, inputs: Array, positions: Array
) -> Array:
    model = bind(graphdef, sharding.gathered(mesh, params))
    assert isinstance(model, GPT)
    hidden, _ = model.hidden(inputs)
    return model.logits(jnp.take_along_axis(hidden, positions[:, None, None], axis=1)[:, 0])
