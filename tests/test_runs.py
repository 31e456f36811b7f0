"""Research runs: what a sweep launches and skips, the fits against known laws, the notebook."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from jaxchat import cli, scaling
from jaxchat.config import GPTConfig, OptimizerConfig, flops_per_token, scaling_params
from jaxchat.plan import micro_batches
from jaxchat.scaling import Run
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import Tracker
from scripts import base_train, sweep_table

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "scripts" / "runs"
NOTEBOOK = ROOT / "dev" / "scaling_analysis.ipynb"
SWEEPS = ("miniseries", "scaling_laws", "time_to_gpt2", "cpu_scaling")

# --- The fits -------------------------------------------------------------------------------------


def run_of(params, tokens, bpb, *, flops=1e15, tag="r"):
    """A run with just what the fits read."""
    return Run(tag, 4, 64, params, params, tokens, flops, flops, bpb, 1.0, None, Path(tag))


def chinchilla_sweep(budgets, *, alpha=0.34, beta=0.28):
    """Runs on the loss surface of Hoffmann et al.: E + A / N^alpha + B / D^beta, C = 6 N D.

    The best N is G (C / 6)^a with a = beta / (alpha + beta) (their equation 4).
    """
    surface = {"E": 1.69, "A": 406.4, "B": 410.7}
    a = beta / (alpha + beta)
    scale = (alpha * surface["A"] / (beta * surface["B"])) ** (1 / (alpha + beta))
    best = {c: scale * (c / 6) ** a for c in budgets}
    runs = []
    for flops, optimum in best.items():
        for n in optimum * np.geomspace(1 / 3, 3, 7):
            d = flops / (6 * n)
            loss = surface["E"] + surface["A"] / n**alpha + surface["B"] / d**beta
            runs.append(run_of(round(n), round(d), loss, flops=flops))
    return runs, best, a


def test_the_law_of_a_known_loss_surface_is_recovered():
    """The surface is no parabola in log N, so its bottom is only nearly that of the fit."""
    runs, best, exponent = chinchilla_sweep([1e18, 1e19, 1e20, 1e21])
    law = scaling.fit_scaling_law(scaling.by_budget(runs))
    for valley in law.valleys:
        assert valley.params == pytest.approx(best[valley.flops], rel=0.05)
        assert 6 * valley.params * valley.tokens == pytest.approx(valley.flops, rel=1e-3)
    assert law.params.exponent == pytest.approx(exponent, abs=0.005)
    assert law.tokens.exponent == pytest.approx(1 - exponent, abs=0.005)
    spread = [one.params.exponent for one in scaling.leave_one_size_out(scaling.by_budget(runs))]
    assert len(spread) == len({run.scaling_params for run in runs})
    assert all(abs(each - exponent) < 0.02 for each in spread)


def test_a_parabola_comes_back_exactly():
    sizes = [1_000, 2_500, 4_000, 9_000]
    runs = [run_of(n, 10**6 // n, 1.5 + 0.2 * math.log(n / 3_000) ** 2) for n in sizes]
    valley = scaling.fit_valley(runs)
    assert valley.params == pytest.approx(3_000, rel=1e-9)
    assert valley.bpb == pytest.approx(1.5)
    assert valley.at(np.array([9_000.0])) == pytest.approx(runs[-1].val_bpb)


@pytest.mark.parametrize(
    ("bpb", "message"),
    [
        ([1.0, 1.1, 1.3, 1.6], "do not bracket the best size: add smaller"),
        ([1.6, 1.3, 1.1, 1.0], "do not bracket the best size: add larger"),
        ([1.0, 1.2, 1.2, 1.1], "do not bracket the best size"),  # a hill
        ([1.0, 1.1], "2 model sizes within a factor of 4.0 of the best: a parabola takes"),
    ],
)
def test_runs_that_show_no_valley_are_refused(bpb, message):
    runs = [run_of(1_000 * 2**i, 1_000, value) for i, value in enumerate(bpb)]
    with pytest.raises(ValueError, match=message):
        scaling.fit_valley(runs)


def test_a_power_law_comes_back_exactly_and_one_point_gives_none():
    law = scaling.fit_power_law([1e3, 1e5, 1e8], [2 * x**0.73 for x in (1e3, 1e5, 1e8)])
    assert (law.scale, law.exponent) == pytest.approx((2, 0.73))
    with pytest.raises(ValueError, match="1 budgets"):
        scaling.fit_power_law([1e3, 1e3], [1, 2])


# --- From folders to the notebook -----------------------------------------------------------------


def write_run(base, tag, model, flops, bpb, *, batch=2048, core=None, finished=True):
    """The folder that pretraining leaves: a checkpoint's meta.json and the metrics."""
    folder = base / "base_checkpoints" / tag
    plan = base_train.plan_of(
        base_train.Config(target_flops=flops, total_batch_size=batch), model, OptimizerConfig()
    )
    steps = plan.num_iterations
    tracker = Tracker(folder / "metrics.jsonl")
    tracker.log(0, {"val/bpb": 3.0})
    # a long run's rows are alike: a few stand for all, each with its share of the tokens
    rows = min(steps, 10)
    for step in np.linspace(steps / rows, steps, rows).round().astype(int).tolist():
        figures = {"batch_tokens": plan.target_tokens / rows, "tokens_per_second": 1e4}
        tracker.log(step, {"train/loss": 5.0} | {f"train/{k}": v for k, v in figures.items()})
    if finished:
        tracker.log(steps, {"val/bpb": bpb})
    tracker.close()
    checkpoint = folder / f"step_{steps:06d}"
    checkpoint.mkdir()
    meta = {
        "model": asdict(model),
        "plan": asdict(plan),
        "config": {"target_flops": flops},
        "train_seconds": plan.target_tokens / 1e4,
    }
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    if core is not None:
        label, value = core
        (checkpoint / "base_eval.csv").write_text(
            f"Task,Accuracy,Centered\na,0.5,0.1\n{label},,{value}\n"
        )
    return plan


def models(widths):
    return [
        GPTConfig.from_depth(4, aspect_ratio=w // 4, head_dim=8, vocab_size=512, sequence_len=128)
        for w in widths
    ]


EXPONENT = 0.43


def write_sweep(base):
    """Runs whose bits per byte are parabolas in ln N with bottoms that grow as C^EXPONENT."""
    for flops in (1e11, 1e12, 1e13):
        best = 230_000 * (flops / 1e12) ** EXPONENT
        for model in models((32, 40, 48, 64, 80, 96, 128)):
            depth = math.log(scaling_params(model) / best) ** 2
            bpb = 2 - 0.1 * math.log10(flops) + 0.05 * depth
            write_run(base, f"cpu_{flops:.0e}_w{model.n_embd}", model, flops, bpb)


def test_runs_are_read_from_what_training_leaves(base_dir):
    [small, large] = models((32, 64))
    plan = write_run(base_dir, "mini_d4", large, 1e12, 1.25, core=("CORE", 0.11))
    write_run(base_dir, "mini_d3", small, 1e12, 1.5, core=("embedded tasks, not CORE", 0.3))
    write_run(base_dir, "mini_d5", small, 1e12, 1.5, finished=False)
    write_run(base_dir, "other", small, 1e12, 1.5)
    write_run(base_dir, "mini_imported", small, 1e12, 1.5)
    (meta,) = base_dir.glob("base_checkpoints/mini_imported/step_*/meta.json")
    meta.write_text(json.dumps({"model": asdict(small)}))
    (base_dir / "base_checkpoints" / "mini_d6").mkdir()
    first, second = scaling.read_runs("mini_*")
    assert (first.tag, first.core) == ("mini_d3", None)  # what is not CORE is not called so
    assert (second.tag, second.core, second.val_bpb) == ("mini_d4", 0.11, 1.25)
    assert (second.depth, second.width, second.tokens) == (4, 64, plan.target_tokens)
    assert second.flops == plan.target_tokens * flops_per_token(large)
    assert second.flops == pytest.approx(1e12, rel=0.01)
    loss, bpb = scaling.curve(second, "train/loss"), scaling.curve(second, "val/bpb")
    assert loss.flops[-1] == pytest.approx(second.flops)
    assert loss.seconds[-1] == pytest.approx(second.train_seconds)
    assert (bpb.flops[0], bpb.flops[-1], bpb.values) == (0, loss.flops[-1], [3.0, 1.25])


def rewrite(meta, change):
    """Change a stored meta.json in place."""
    stored = json.loads(meta.read_text())
    change(stored)
    meta.write_text(json.dumps(stored))


def test_what_cannot_be_read_is_left_out_with_a_warning(base_dir, capsys):
    """And what another version has written: that ended the whole table in a traceback."""
    model = models((32,))[0]
    faults = ("cut", "empty", "short", "budget", "config", "field", "plan", "metrics")
    for tag in (*faults, "back", "whole"):
        write_run(base_dir, f"mini_{tag}", model, 1e12, 1.5, core=("CORE", 0.3))
    runs = base_dir / "base_checkpoints"
    meta = {tag: next(runs.glob(f"mini_{tag}/*/meta.json")) for tag in faults}
    meta["cut"].write_text(meta["cut"].read_text()[:40])
    (meta["empty"].parent / "base_eval.csv").write_text("")
    (meta["short"].parent / "base_eval.csv").write_text("CORE\n")
    rewrite(meta["budget"], lambda stored: stored["config"].clear())
    rewrite(meta["config"], lambda stored: stored.update(config=None))
    rewrite(meta["field"], lambda stored: stored["model"].update(n_expert=8))
    rewrite(meta["plan"], lambda stored: stored["plan"].clear())
    (runs / "mini_metrics" / "metrics.jsonl").write_text('{"val/bpb": 1.5}\n')
    [newest] = runs.glob("mini_back/step_*")  # the last one was lost
    newest.rename(newest.with_name("step_000001"))
    assert [run.tag for run in scaling.read_runs("mini_*")] == ["mini_whole"]
    warned = capsys.readouterr().err
    told = dict(re.findall(r"leaving out \S*/mini_(\w+), which cannot be read: (.+)", warned))
    assert set(told) == set(faults)
    assert told["budget"] == "'target_flops' is missing"
    assert "n_expert" in told["field"]
    sweep_table.main(sweep_table.Config(tags="mini_*"))
    assert "mini_whole" in capsys.readouterr().out


def test_a_skipped_step_leaves_no_hole_in_a_curve(base_dir):
    model = models((32,))[0]
    write_run(base_dir, "mini_d4", model, 1e12, 1.25)
    figures = {"train/batch_tokens": 1.0, "train/tokens_per_second": 1e4}
    row = {"step": 2, "train/loss": None, "train/skipped": 1.0, **figures}
    with open(base_dir / "base_checkpoints" / "mini_d4" / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    [run] = scaling.read_runs("mini_*")
    assert set(scaling.curve(run, "train/loss").values) == {5.0}


def test_no_column_of_the_table_is_cut(base_dir, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = models((32,))[0]
    for tag in ("flops_2.15e18_d20", "flops_2.15e18_d18"):
        write_run(base_dir, tag, model, 1e12, 1.1)
    sweep_table.main(sweep_table.Config(tags="flops_*"))
    shown = capsys.readouterr().out
    assert "…" not in shown
    [first, second] = [line.split() for line in shown.splitlines() if "flops_2.15e18" in line]
    assert (first[0], second[0]) == ("flops_2.15e18_d18", "flops_2.15e18_d20")
    assert len(first) == len(second) == len(sweep_table.COLUMNS) - 1  # no CORE


@pytest.mark.parametrize("sizes", [(), (32,), (32, 40, 48)])
def test_the_notebook_draws_what_there_is_without_a_law(base_dir, monkeypatch, sizes):
    monkeypatch.setenv("MPLBACKEND", "agg")
    for number, model in enumerate(models(sizes)):
        write_run(base_dir, f"cpu_1e12_w{model.n_embd}", model, 1e12, 1.5 - 0.1 * number)
    write_run(base_dir, "mini_d2", models((32,))[0], 1e12, 1.1)
    names = run_notebook()
    assert names["valleys"] == []
    assert list(names["series"]) == ["mini_*"], "the last cell has run"


def run_notebook():
    """Every cell in turn; the names they leave."""
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    names["plt"].close("all")
    return names


def test_the_notebook_recovers_a_known_law_and_writes_its_picture(base_dir, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    write_sweep(base_dir)
    plan = GPTConfig.from_depth(2, vocab_size=512, sequence_len=128)
    for tag, core in (("mini_d2", 0.05), ("gpt2_d2", 0.26)):
        write_run(base_dir, tag, plan, 1e12, 1.1, batch=65536, core=("CORE", core))
    run_notebook()
    shown = capsys.readouterr().out
    assert f"N (parameters) ~ C^{EXPONENT}; without one size: {EXPONENT} to {EXPONENT} (" in shown
    tokens = float(re.search(r"D \(tokens\) ~ C\^([\d.]+)", shown)[1])
    assert tokens == pytest.approx(1 - EXPONENT, abs=0.05)  # attention: C is only nearly 6 N D
    assert "not used" not in shown
    assert (base_dir / "scaling.png").stat().st_size > 10_000


def test_the_notebook_and_its_picture_are_small_and_were_executed():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], NOTEBOOK.stat().st_size < 400_000) == (4, True)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
    assert not any(out["output_type"] == "error" for cell in code for out in cell["outputs"])
    assert (ROOT / "dev" / "cpu_scaling.png").stat().st_size < 100_000


# --- The scripts ----------------------------------------------------------------------------------


def dry_run(name, **settings):
    """The commands of a research script, as the script itself expands them."""
    shell = subprocess.run(
        ["bash", str(RUNS / f"{name}.sh")],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "DRY_RUN": "1", **settings},
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line)[2:] for line in shell.stdout.splitlines()]


def trainings(name, **settings):
    return [
        cli.parse(base_train.Config, words[1:])
        for words in dry_run(name, **settings)
        if words[0] == "scripts.base_train"
    ]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", SWEEPS)
def test_every_run_has_a_tag_of_its_own_and_its_batch_divides(name, devices):
    configs = trainings(name)
    assert len({config.tag for config in configs}) == len(configs) > 0
    for config in configs if devices == 1 or name != "cpu_scaling" else []:
        vocabulary = 2048 if name == "cpu_scaling" else 32768
        shape = base_train.shape_of(config, vocab_size=vocabulary)
        plan = base_train.plan_of(config, shape, base_train.optimizer_of(config))
        micro_batches(
            plan,
            sequence_len=config.sequence_len,
            device_batch_size=config.device_batch_size or 1,  # memory decides on some divisor
            devices=devices,
        )
        assert plan.num_iterations > config.warmup_steps


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "cpu_scaling"])
def test_on_gpus_memory_says_how_many_rows_fit(name):
    """32 rows of depth 24 were once asked for, which 80 GB do not hold."""
    assert {config.device_batch_size for config in trainings(name)} == {None}
    [first, *_] = trainings(name, EXTRA="--device-batch-size 2")
    assert first.device_batch_size == 2


def test_the_sweeps_are_the_ones_they_say():
    assert [c.depth for c in trainings("miniseries")] == [8, 10, 12, 14, 16, 18, 20]
    grid = {(c.target_flops, c.depth) for c in trainings("scaling_laws", BUDGETS="1e17 2e17")}
    assert grid == {(c, d) for c in (1e17, 2e17) for d in (10, 12, 14, 16, 18, 20)}
    assert len({c.total_batch_size for c in trainings("scaling_laws")}) == 1
    [speed] = trainings("time_to_gpt2")
    assert (speed.depth, speed.target_param_data_ratio) == (24, 8)
    assert "0.256525" in dry_run("time_to_gpt2")[-1]
    toys = trainings("cpu_scaling", BUDGETS="1e9", WIDTHS="32 64", EXTRA="--seed 7")
    assert [base_train.shape_of(c, 512).n_embd for c in toys] == [32, 64]
    assert {c.seed for c in toys} == {7}


def told(script, cwd, **settings):
    """What a script that is started in `cwd` says before it does anything."""
    shell = subprocess.run(
        ["bash", str(script)],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "DRY_RUN": "1", **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    return shell.returncode, shell.stdout, shell.stderr


@pytest.mark.parametrize("script", ["speedrun_jax.sh", *(f"scripts/runs/{n}.sh" for n in SWEEPS)])
def test_sbatch_runs_a_copy_of_a_script_without_its_neighbours(tmp_path, script):
    """And whatever is started within a job knows where that was submitted, perhaps elsewhere."""
    settings = {"JAXCHAT_TIER": "none"}  # ends the pipeline, which has no DRY_RUN
    copy = shutil.copy(ROOT / script, tmp_path / "slurm_script")
    usual = told(ROOT / script, tmp_path, **settings)
    assert "choose node, gpu" in usual[2] or "base_train" in usual[1]
    assert told(copy, tmp_path, SLURM_SUBMIT_DIR=str(ROOT), **settings) == usual
    assert told(ROOT / script, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), **settings) == usual
    status, said, error = told(copy, tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), **settings)
    assert (status, said) == (1, "")
    assert f"cd: {tmp_path}/scripts/" in error


def ledger(base, commands):
    """Run shell commands after the ledger has been sourced."""
    script = f"set -euo pipefail\n. {RUNS / 'ledger.sh'}\n{commands}"
    env = {**os.environ, "JAXCHAT_BASE_DIR": str(base), "SKIP_SETUP": "1"}
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)


def test_what_has_finished_is_skipped_and_what_failed_is_not(base_dir):
    table = base_dir / "t.csv"
    command = f"once a sweep_table --tags 'mini_*' -o {table}"
    failed = ledger(base_dir, command)
    assert failed.returncode == 2
    assert "no finished run has a tag like 'mini_*'" in failed.stderr
    write_run(base_dir, "mini_d4", models((32,))[0], 1e12, 1.5)
    assert ledger(base_dir, command).returncode == 0
    header, row = table.read_text().splitlines()
    assert header == ",".join(sweep_table.COLUMNS)
    assert row.startswith("mini_d4,4,32,")
    table.unlink()
    again = ledger(base_dir, command)
    assert again.stdout == "--- a: done before\n"
    assert not table.exists()
    changed = ledger(base_dir, f"{command} --goal 0")
    assert changed.returncode == 1  # no CORE, so the goal is missed
    assert "mini_d4: CORE not measured on all examples" in changed.stdout
    assert ledger(base_dir, command).stdout.startswith("--- sweep_table ")


TRAINED = "once a base_train --depth 2; once a.core base_eval -g a; "


@pytest.mark.parametrize(
    ("changed", "does", "done"),
    [
        ("once a base_train --seed 7", "return 2", {"a", "a.core"}),
        ("once a base_train --seed 7", "return 1", {"a.core"}),
        ("once a base_train --seed 7", "return 143", {"a.core"}),
        ("once a base_train --seed 7", "kill -KILL $$", {"a.core"}),
        ("once a base_train --resume never", "return 2", {"a.core"}),
        ("once a.core base_eval -g a --max-per-task 9", "return 2", {"a", "a.core"}),
        ("once a base_train --save-every 9", "return 0", {"a"}),
    ],
)
def test_what_is_refused_takes_no_mark_away(base_dir, changed, does, done):
    """EXTRA="--seed 7" on what had finished cost it its marks, and with them a CORE evaluation.

    The mark of what stands on a run may outlive the run's, and goes when that is written again.
    """
    succeeds = "launch() { true; }; "
    assert ledger(base_dir, succeeds + TRAINED + "once ab x").returncode == 0
    marks = base_dir / "runs"
    before = {path.name: path.read_text() for path in marks.iterdir()}
    assert set(before) == {"a", "a.core", "ab"}
    ledger(base_dir, f"launch() {{ {does}; }}; {changed}")
    assert {path.name for path in marks.iterdir()} == done | {"ab"}
    if does != "return 0":
        assert all((marks / name).read_text() == before[name] for name in done)
    again = ledger(base_dir, succeeds + TRAINED).stdout
    assert again.count("done before") == (2 if done == {"a", "a.core"} else 0)


def test_a_sweep_refuses_a_tokenizer_of_another_size(base_dir):
    made = base_dir / "tokenizer" / "tokenizer.bpe"
    made.parent.mkdir()
    done = "mkdir -p $ledger; echo data_download --dataset embedded >$ledger/data; "
    trains = ledger(base_dir, done + "launch() { echo $*; }; prepare embedded 0 300")
    assert "tok_train --corpus embedded --vocab-size 300" in trains.stdout
    (base_dir / "runs" / "tokenizer").unlink()
    Tokenizer.train(["words and more words make a vocabulary"] * 3, vocab_size=280).save(
        made.parent
    )
    refused = ledger(base_dir, done + "prepare embedded 0 300")
    assert refused.returncode == 2
    assert "this sweep wants a tokenizer of 300 tokens" in refused.stderr
    assert ledger(base_dir, done + "prepare embedded 0 280").returncode == 0
    # nor one that another sweep has made
    (base_dir / "runs" / "tokenizer").write_text("tok_train --corpus embedded --vocab-size 280\n")
    assert ledger(base_dir, done + "prepare embedded 0 300").returncode == 2
    (made.parent / "tokenizer.bpe").unlink()
    lost = ledger(base_dir, done + "launch() { echo $*; }; prepare embedded 0 280")
    assert "tok_train --corpus embedded --vocab-size 280" in lost.stdout


@pytest.mark.parametrize(("core", "status"), [(0.2566, 0), (0.2565, 1)])
def test_the_time_to_gpt2_is_told_only_when_its_core_is_passed(base_dir, capsys, core, status):
    model = models((32,))[0]
    plan = write_run(base_dir, "gpt2_d4", model, 1e12, 1.1, core=("CORE", core))
    with pytest.raises(SystemExit) as stop:
        sweep_table.main(sweep_table.Config(tags="gpt2_d4", goal=0.256525))
    assert stop.value.code == status
    verdict = "passes" if status == 0 else "does not pass"
    told = f"CORE {core:.6f} {verdict} 0.256525"
    shown = capsys.readouterr().out
    assert told in shown
    assert f"({plan.target_tokens / 1e4:.0f} s)" in shown


@pytest.mark.slow
def test_a_small_sweep_trains_for_real_and_the_second_time_does_nothing(base_dir):
    settings = {
        **os.environ,
        "JAXCHAT_BASE_DIR": str(base_dir),
        "SKIP_SETUP": "1",
        "BUDGETS": "2e9",
        "WIDTHS": "32 48",
        "DEPTH": "2",
        "VOCAB": "512",
        "EXTRA": "--eval-tokens 2048",
    }
    sweep = ["bash", str(RUNS / "cpu_scaling.sh")]
    settings.pop("XLA_FLAGS")  # as a user has it: one CPU device
    subprocess.run(sweep, env=settings, check=True)
    runs = scaling.read_runs("cpu_*")
    assert [run.width for run in runs] == [32, 48]
    assert all(run.flops == pytest.approx(2e9, rel=0.5) and run.val_bpb < 8 for run in runs)
    again = subprocess.run(sweep, env=settings, check=True, capture_output=True, text=True)
    done = re.findall(r"^--- (.*): done before$", again.stdout, flags=re.MULTILINE)
    assert done == ["data", "cpu_2e9_w32", "cpu_2e9_w48"]
