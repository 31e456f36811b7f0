"""The benchmarks: their arithmetic, and that each prints a table of finite numbers at toy size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import figures, loader, memory, scaling, startup, train_step
from benchmarks.figures import Figure, share
from jaxchat import cli
from jaxchat.backend import DeviceInfo
from jaxchat.config import GPTConfig
from jaxchat.memory import REMAT, StepMemory

ROOT = Path(__file__).parents[1]

TINY = {"vocab_size": 300, "rows": 8, "aspect_ratio": 32, "head_dim": 32}
"""Eight rows, because tests run on eight devices."""

BENCHMARKS = ("loader", "memory", "scaling", "startup", "train_step")


def rows_of(output):
    """The cells of every printed line that is not a heading."""
    lines = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def assert_finite(rows, columns):
    """Every cell but the first begins with a positive number that is no NaN."""
    for row in rows:
        assert len(row) == len(columns)
        for name, cell in zip(columns[1:], row[1:], strict=True):
            number = re.match(r"[\d,.]+", cell)
            assert number, f"{name} of {row[0]} is {cell!r}"
            assert "nan" not in cell
            assert "inf" not in cell


def test_a_figure_is_a_median_with_half_its_quartiles_distance():
    figure = Figure([1.0, 2.0, 3.0, 4.0, 100.0])
    assert figure.median == 3.0
    assert figure.spread == pytest.approx(1 / 3)  # quartiles 2 and 4
    assert f"{figure:.1f}" == "3.0 ±33%"


def test_one_measurement_has_no_spread():
    assert Figure([2.0]).spread == 0


def test_ratios_are_of_medians_not_medians_of_ratios():
    a, b = Figure([1.0, 4.0, 9.0]), Figure([9.0, 2.0, 1.0])
    assert a.over(b) == 2.0


def test_a_share_without_a_ceiling_is_a_dash():
    assert share(None) == "-"
    assert share(0.0004) == "0.04%"


def test_an_accelerator_trains_half_a_million_tokens_a_step():
    """The batch at which the learning rates are tuned, in micro-batches that fit 80 GB."""
    for task in train_step.tasks(train_step.Config(platform="gpu"), 20):
        assert task.tokens == 2**19
        assert (task.rows, task.sequence_len, task.vocab_size) == (16, 2048, 32768)


def test_a_cpu_compares_both_frameworks_on_the_same_step():
    tasks = train_step.tasks(train_step.Config(platform="cpu"), 4)
    assert [(t.name, t.backend, t.compiled) for t in tasks] == [
        ("jax", "jax", True),
        ("torch", "torch", False),
        ("torch.compile", "torch", True),
    ]
    assert len({(t.depth, t.rows, t.sequence_len, t.vocab_size, t.tokens) for t in tasks}) == 1


def test_both_frameworks_get_one_device_of_the_same_kind(monkeypatch):
    """On eight GPUs JAX's eight once stood beside torch's one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    for platform, expected in (
        ("gpu", {"CUDA_VISIBLE_DEVICES": "3"}),
        ("cpu", {"JAX_PLATFORMS": "cpu", "JAXCHAT_DEVICE": "cpu"}),
    ):
        tasks = train_step.tasks(train_step.Config(platform=platform), 12)
        assert [task.environment for task in tasks] == [expected] * len(tasks)


def test_a_side_that_does_not_find_its_device_is_no_comparison(base_dir, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    sizes = {"depths": (1,), "sequence_len": 16, "batch_tokens": 128, "rounds": 1}
    with pytest.raises(ValueError, match="jax runs on cpu, not on gpu"):
        train_step.main(train_step.Config(platform="gpu", sides=("jax",), **sizes, **TINY))


def test_a_warm_start_wants_its_cold_one_first():
    startup.Config(sides=("torch", "jax cold", "jax warm"))
    for sides in (("jax warm",), ("jax warm", "jax cold"), ("torch.compile cold", "jax warm")):
        with pytest.raises(ValueError, match="'jax warm' wants 'jax cold' before it"):
            startup.Config(sides=sides)


def test_a_batch_that_does_not_divide_names_one_that_does():
    config = train_step.Config(platform="cpu", rows=8, sequence_len=16, batch_tokens=300)
    with pytest.raises(ValueError, match="use 256"):
        train_step.tasks(config, 4)


def rounded_width(task):
    """Whole heads of it."""
    return GPTConfig.from_depth(
        task.depth, aspect_ratio=task.aspect_ratio, head_dim=task.head_dim
    ).n_embd


def test_a_sweep_over_depth_keeps_the_width(monkeypatch):
    sweeps = []

    def note(config, sweep):
        sweeps.append(sweep)
        figures = {"matmul_flops": 1.0, "flops_per_token": 1, "peak_flops": None, "peak_bytes": 1}
        return [scaling.Row(task.name, Figure([1.0]), figures) for task in sweep]

    monkeypatch.setattr(scaling, "measure", note)
    monkeypatch.setattr(scaling, "over_time", lambda config, task: note(config, [task]))
    scaling.main(scaling.Config())
    depths = sweeps[0]
    assert {task.depth * task.aspect_ratio for task in depths} == {256}
    assert all(task.environment for sweep in sweeps for task in sweep)
    sweeps.clear()
    scaling.main(scaling.Config(depths=(2, 3, 6, 12), backend="torch"))
    assert {rounded_width(task) for task in sweeps[0]} == {256}
    assert len(sweeps) == 3, "torch has no devices to vary"
    assert {task.tokens for sweep in sweeps for task in sweep} == {4096}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_explains_the_benchmark(name, capsys):
    module = sys.modules[f"benchmarks.{name}"]
    with pytest.raises(SystemExit):
        cli.parse(module.Config, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"python -m benchmarks.{name}" in said
    assert "--rounds" in said or name == "memory"  # which compiles, and measures no time


def test_a_step_is_measured_where_the_command_line_and_our_tokenizer_are_missing(tmp_path):
    for name in ("tyro", "rustbpe"):
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__)")
    sizes = {"depths": (1,), "sequence_len": 16, "rounds": 2, "steps": 1, **TINY}
    code = "from benchmarks.train_step import *\n"
    code += f"main(Config(platform='cpu', sides=('jax',), **{sizes}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "JAXCHAT_BASE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = rows_of(done.stdout)
    assert [row[0] for row in rows] == ["jax"]
    assert_finite(rows, train_step.COLUMNS)


class Weighed:
    """A backend whose every step needs what depth 24 would."""

    def __init__(self, config, **_):
        self.config, self.devices = config, DeviceInfo("gpu", 8, "8 x NVIDIA H100 80GB HBM3", None)

    def init(self, seed): ...

    def start_training(self, *_): ...

    def step_memory(self, shape):
        return StepMemory(12_345_678_901, 23_456_789_012, 10**9 * shape[1] // 8)


def test_the_table_of_memory_fits_a_terminal_and_each_policy_is_told(monkeypatch, capsys):
    """Headers were `weigh…` and `optim…`, and two rows `offlo…`."""
    monkeypatch.setattr(memory, "JaxBackend", Weighed)
    monkeypatch.setattr(figures, "console", lambda: Console(width=80))
    memory.main(memory.Config(depth=24))
    told = capsys.readouterr()
    assert "…" not in told.out
    assert [row[0] for row in rows_of(told.out)] == [*REMAT, "+ moments"]
    assert told.err.splitlines() == [
        *(f"compiling a step with --remat {remat}" for remat in REMAT),
        "compiling a step with --remat offload --offload-optimizer",
    ]


@pytest.mark.slow
def test_memory_of_a_step_by_what_saves_some(base_dir, capsys):
    sizes = {"aspect_ratio": 32, "head_dim": 32, "vocab_size": 300}
    memory.main(memory.Config(depth=1, sequence_len=64, **sizes))
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == [*REMAT, "+ moments"]
    for row in rows:
        fitting = [int(cell) for cell in row[5:]]
        assert fitting == sorted(fitting)
        assert fitting[0] > 1000  # of rows that need kilobytes


@pytest.mark.slow
def test_a_step_of_every_side(base_dir, capsys):
    sizes = {"depths": (1,), "sequence_len": 16, "rounds": 2, "steps": 2}
    train_step.main(train_step.Config(platform="cpu", **sizes, **TINY))
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["jax", "torch", "torch.compile"]
    assert_finite(rows, train_step.COLUMNS)


@pytest.mark.slow
def test_a_cold_and_a_warm_start(base_dir, capsys):
    sides = ("jax cold", "jax warm")
    config = startup.Config(depth=2, sequence_len=16, rounds=1, sides=sides, **TINY)
    startup.main(config)
    rows = rows_of(capsys.readouterr().out)
    assert [row[0] for row in rows] == list(sides)
    assert_finite(rows, startup.COLUMNS)


@pytest.mark.slow
def test_every_sweep_of_cost(base_dir, capsys):
    config = scaling.Config(
        depth=2,
        sequence_len=32,
        batch_tokens=256,
        depths=(1, 2),
        lengths=(16, 32),
        device_counts=(1, 2),
        late_steps=3,
        rounds=1,
        vocab_size=300,
        aspect_ratio=32,
        head_dim=32,
    )
    scaling.main(config)
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 2 + 2 + 2 + 3
    assert_finite(rows, scaling.COLUMNS)


@pytest.mark.slow
def test_a_loader_is_measured_alone_and_under_training(base_dir, capsys):
    folder = base_dir / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Document {number} says: " + "word " * 50)
    sizes = {"depth": 1, "sequence_len": 16, "batches": 2, "steps": 2, "rounds": 2}
    loader.main(loader.Config(corpus=str(folder), **sizes, **TINY))
    rows = rows_of(capsys.readouterr().out)
    assert [len(row) for row in rows] == [3] * 5
    assert_finite(rows, ("what", "figure", "share"))
