"""`Backend` on PyTorch: CUDA, MPS or CPU, one process or several under torchrun.

The object holds the model and hands it to the functions of train_step.py, loss.py and decoding.py;
it computes nothing itself. Under torchrun every process is called alike, with the whole batch, and
works on its own rows. Left out: schedules, data and checkpoint names, which belong to callers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from jaxchat.backend import DecodeBatch, DecodeResult, PromptScores, Scores, Snapshot
from jaxchat.config import GPTConfig, OptimizerConfig
from jaxchat.convert import check_params
from jaxchat.memory import NO_SAVINGS, Savings
from jaxchat.plan import TrainingPlan
from jaxchat.schedule import StepSchedule
from jaxchat.spikes import NO_LIMITS, Limits
from torch_ref import decoding, kv_cache, runtime, spread_rows, weights
from torch_ref.gpt import GPT
from torch_ref.kv_cache import KVCache
from torch_ref.loss import token_scores
from torch_ref.optim import Optimizer, make_optimizer
from torch_ref.remat import REMAT
from torch_ref.sharding import join_ranks
from torch_ref.train_step import LossScale, global_norm, loss_and_grads

SCORE_TOKENS = {"cuda": 65536}
"""Most tokens of one evaluation forward by device type."""

SCORE_TOKENS_ELSEWHERE = 8192
"""On other devices: an 8 GB Mac holds the activations of this many."""

LOSS_SCALE = "loss_scale"
"""What float16 training keeps beside the optimizer state. It does not travel to other backends,
which have none: a run that comes back finds its scale anew."""


class TorchBackend:
    """One model on this process's device."""

    name = "torch"

    def __init__(
        self,
        config: GPTConfig,
        *,
        dtype: str | None = None,
        device: int | None = None,
        mesh: str | None = None,
    ) -> None:
        if mesh not in (None, "auto"):
            raise ValueError(f"--mesh {mesh}: torch divides rows alone; use --backend jax")
        self.config = config
        self.device = runtime.pick_device(device)
        self.dtype = runtime.compute_dtype(self.device, dtype)
        self.ranks = join_ranks(self.device)
        self.devices = runtime.describe(self.device, self.ranks.world)
        self._model = GPT(config, self.dtype).to(self.device)
        self._has_weights = False
        self._cast_model: GPT | None = None
        self._optimizer: Optimizer | None = None
        self._remat = "none"
        self._loss_scale = LossScale() if self.dtype == torch.float16 else None

    # --- weights -------------------------------------------------------------------------------

    @property
    def model(self) -> GPT:
        if not self._has_weights:
            raise ValueError("this backend has no weights yet: call init, load or set_params")
        return self._model

    def init(self, seed: int) -> None:
        self._model.init_weights(torch.Generator().manual_seed(seed))
        self._weights_changed()

    def get_params(self) -> dict[str, np.ndarray]:
        return weights.get_params(self.model)

    def set_params(self, params: Mapping[str, np.ndarray]) -> None:
        weights.set_params(self._model, params)
        self._weights_changed()

    def save(self, directory: Path) -> None:
        files: dict[str, Mapping[str, Tensor]] = {
            weights.PARAMS: dict(self.model.named_parameters())
        }
        if self._optimizer is not None:
            files[weights.OPTIMIZER] = self._optimizer.state() | self._scale_state()
        if self.ranks.rank == 0:
            weights.save_folder(directory, files)
        self.ranks.barrier()

    def load(self, directory: Path) -> None:
        params = weights.load_file(directory / weights.PARAMS)
        if self._optimizer is None:
            self.set_params(params)
            return
        state = weights.load_file(directory / weights.OPTIMIZER)
        scale = state.pop(LOSS_SCALE, None)
        check_params(state, self._optimizer.shapes())
        self.set_params(params)
        self.set_optimizer_state(state)
        if self._loss_scale is not None and scale is not None:
            self._loss_scale = LossScale(*scale.tolist())

    def wait(self) -> None:
        """`save` returns when the bytes are on disk."""

    @classmethod
    def read(cls, directory: Path, *, optimizer: bool) -> Snapshot:
        params = weights.load_file(directory / weights.PARAMS)
        if not optimizer:
            return Snapshot(params, None)
        state = weights.load_file(directory / weights.OPTIMIZER)
        state.pop(LOSS_SCALE, None)
        return Snapshot(params, state)

    def _weights_changed(self) -> None:
        self._has_weights, self._cast_model = True, None

    def _scale_state(self) -> dict[str, Tensor]:
        if self._loss_scale is None:
            return {}
        scale = self._loss_scale
        return {LOSS_SCALE: torch.tensor([scale.value, float(scale.good_steps)])}

    # --- training ------------------------------------------------------------------------------

    def start_training(
        self, optimizer: OptimizerConfig, plan: TrainingPlan, savings: Savings = NO_SAVINGS
    ) -> None:
        if savings.offload_optimizer or savings.remat not in REMAT:
            raise ValueError(
                f"torch saves memory by --remat {' or '.join(REMAT)} alone; use --backend jax for "
                "other policies and for --offload-optimizer"
            )
        self._remat = savings.remat
        self._optimizer = make_optimizer(
            dict(self.model.named_parameters()),
            self.config,
            optimizer,
            plan,
            iteration_dtype=runtime.iteration_dtype(self.device),
            ranks=self.ranks,
        )
        if self._loss_scale is not None:
            self._loss_scale = LossScale()

    def step_memory(self, shape: tuple[int, int, int]) -> None:
        """Nobody knows before the step has run."""
        del shape

    def agree(self, asked: bool) -> bool:
        votes = torch.tensor(float(asked), device=self.device)
        self.ranks.sum_in_place(votes)
        return bool(votes > 0)

    def gather(self, value: Any) -> list[Any]:
        return [value]  # every process is given the whole batch

    def train_step(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        schedule: StepSchedule,
        weights: np.ndarray | None = None,
        limits: Limits = NO_LIMITS,
    ) -> Mapping[str, Float[Tensor, ""]]:
        assert self._optimizer is not None, "call start_training before train_step"
        rows, world = inputs.shape[1], self.ranks.world
        if rows % world:
            raise ValueError(
                f"micro-batches of {rows} rows do not divide over {world} processes; use a "
                f"device_batch_size that is a multiple of {world}"
            )
        own = slice(self.ranks.rank * rows // world, (self.ranks.rank + 1) * rows // world)
        self._cast_model = None  # stale after the step, which needs its memory
        loss, grads = loss_and_grads(
            self.model,
            self._to_device(inputs[:, own]),
            self._to_device(targets[:, own]),
            None if weights is None else torch.from_numpy(weights[:, own]).to(self.device),
            count=max(1, int((targets >= 0).sum())),
            ranks=self.ranks,
            loss_scale=1.0 if self._loss_scale is None else self._loss_scale.value,
            remat=self._remat,
        )
        norm = global_norm(grads.values())
        fine = bool(torch.isfinite(loss + norm))
        fine &= bool((loss <= limits.loss) & (norm <= limits.grad_norm))
        accepted = self._loss_scale is None or self._loss_scale.accepts(norm)
        if accepted and fine and norm > 0:  # Muon makes a whole step of any momentum, however old
            self._optimizer.step(grads, schedule)
        return {"loss": loss, "grad_norm": norm, "skipped": torch.tensor(float(not fine))}

    def get_optimizer_state(self) -> dict[str, np.ndarray]:
        assert self._optimizer is not None, "call start_training before get_optimizer_state"
        return {name: x.numpy() for name, x in self._optimizer.state().items()}

    def set_optimizer_state(self, state: Mapping[str, np.ndarray]) -> None:
        assert self._optimizer is not None, "call start_training before set_optimizer_state"
        check_params(state, self._optimizer.shapes())
        self._optimizer.load({name: torch.from_numpy(np.array(x)) for name, x in state.items()})

    # --- evaluation ----------------------------------------------------------------------------

    def score(self, inputs: np.ndarray, targets: np.ndarray) -> Scores:
        x, y = self._to_device(inputs), self._to_device(targets)
        divided = self.ranks.divides(x)
        parts = [self._score(*part) for part in self._evaluation_parts(x, y)]
        nll, greedy = (torch.cat(column) for column in zip(*parts, strict=True))
        if divided:
            nll, greedy = self.ranks.gather(nll), self.ranks.gather(greedy)
        return Scores(nll.cpu().numpy(), greedy.cpu().numpy().astype(np.int32))

    def _evaluation_parts(self, inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, ...]]:
        """This process's rows, as many at a time as memory allows."""
        most = SCORE_TOKENS.get(self.device.type, SCORE_TOKENS_ELSEWHERE)
        rows = max(1, most // inputs.shape[1])
        own = (self.ranks.shard(x).split(rows) for x in (inputs, targets))
        return list(zip(*own, strict=True))

    @torch.no_grad()
    def _score(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden, _ = self.model.hidden(inputs)
        return token_scores(
            hidden,
            self.model.lm_head.weight,
            targets,
            vocab_size=self.config.vocab_size,
            softcap=self.config.logit_softcap,
        )

    def logits(self, inputs: np.ndarray, positions: np.ndarray) -> np.ndarray:
        x, where = self._to_device(inputs), self._to_device(positions)
        divided = self.ranks.divides(x)
        logits = torch.cat([self._logits(*part) for part in self._evaluation_parts(x, where)])
        return (self.ranks.gather(logits) if divided else logits).cpu().numpy()

    @torch.no_grad()
    def _logits(self, inputs: Tensor, positions: Tensor) -> Tensor:
        hidden, _ = self.model.hidden(inputs)
        rows = torch.arange(len(inputs), device=inputs.device)
        return self.model.logits(hidden[rows, positions])

    # --- generation ----------------------------------------------------------------------------

    def new_cache(self, rows: int, max_length: int) -> KVCache:
        own = -(-rows // self.ranks.world)
        return kv_cache.make_cache(self.config, own, max_length, self.dtype, self.device)

    def prefill(
        self, cache: KVCache, row: int, ids: np.ndarray, start: int
    ) -> tuple[KVCache, np.ndarray]:
        return spread_rows.prefill(self.ranks, self._decoding_model(), cache, row, ids, start)

    def copy_row(self, cache: KVCache, source: int, target: int, length: int) -> KVCache:
        return spread_rows.copy_row(self.ranks, cache, source, target, length)

    def decode(self, cache: KVCache, batch: DecodeBatch) -> DecodeResult:
        return spread_rows.decode(self.ranks, self._decoding_model(), cache, batch)

    def score_prompt(self, ids: np.ndarray) -> PromptScores:
        return decoding.score_prompt(self._decoding_model(), ids)

    def warm_up(self, cache: KVCache, steps: int) -> KVCache:
        """Nothing compiles: one token makes the libraries choose their kernels."""
        del steps
        return self.prefill(cache, 0, np.zeros(1, np.int32), 0)[0]

    def _decoding_model(self) -> GPT:
        """The model with weights in the compute dtype: cast once, not for every token."""
        if self.dtype == torch.float32:
            return self.model
        if self._cast_model is None:
            with torch.device("meta"):
                self._cast_model = GPT(self.config, self.dtype)
            cast = {name: x.to(self.dtype) for name, x in self.model.state_dict().items()}
            self._cast_model.load_state_dict(cast, assign=True)
        return self._cast_model

    def _to_device(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self.device)
