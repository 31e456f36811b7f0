"""Midtraining and finetuning: what a stage inherits, learns, reports, and continues exactly."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxchat import cli, loss
from jaxchat import finetune as stage_module
from jaxchat.backend import IGNORE, backend_class
from jaxchat.chat_loader import ChatLoader
from jaxchat.chat_packing import forecast
from jaxchat.checkpoint import META, CheckpointStore
from jaxchat.config import GPTConfig, OptimizerConfig
from jaxchat.conversation import render
from jaxchat.finetune import Lesson, finetune
from jaxchat.finetune_options import FinetuneOptions, Inherited, batch_for, optimizer_of
from jaxchat.loss_eval import conversation_batches
from jaxchat.memory import Savings
from jaxchat.micro_batch import settle_rows
from jaxchat.plan import TrainingPlan
from jaxchat.report import KeyValues, Report, Subject, Table, subject_of
from jaxchat.stages import find_checkpoint, load_model, stage_directory
from jaxchat.tasks.arithmetic import Arithmetic
from jaxchat.tasks.base import TaskMixture
from jaxchat.tasks.customjson import IDENTITY, CustomJSON
from jaxchat.tokenizer import Tokenizer
from jaxchat.tracker import read_metrics
from scripts import chat_rl, chat_sft, mid_train
from tests.models import assert_same_arrays
from tests.test_chat_loader import Given
from tests.test_conversation import SHAPES
from torch_ref import loss as torch_loss

README = Path(__file__).parents[1] / "README.md"
TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
STEPS, BASE_STEPS = 6, 3
LENGTH, ROWS = 128, 8  # a row for each of the forced devices
BASE_RATES = OptimizerConfig().scaled(10)  # so small a batch gets 4% of that
BASE_PLAN = TrainingPlan(LENGTH * ROWS, BASE_STEPS, 0.1, 0.0, 0)


def make_base(root, name):
    """A base directory with a pretrained model, its optimizer state included."""
    TOKENIZER.save(root / "tokenizer")
    config = GPTConfig.from_depth(
        1, aspect_ratio=32, head_dim=32, vocab_size=TOKENIZER.vocab_size, sequence_len=LENGTH
    )
    backend = backend_class(name)(config, dtype="float32")
    backend.init(0)
    backend.start_training(BASE_RATES, BASE_PLAN)
    backend.set_optimizer_state(
        {
            key: np.full_like(value, BASE_STEPS if key.startswith("adam.count") else 1e-4)
            for key, value in backend.get_optimizer_state().items()
        }
    )
    store = CheckpointStore(stage_directory("base", "tiny"))
    meta = {
        "tokenizer": TOKENIZER.fingerprint,
        "optimizer": asdict(BASE_RATES),
        "plan": asdict(BASE_PLAN),
        "config": {"device_batch_size": 1},  # of a smaller card
        "run": "of the base",
    }
    store.save(BASE_STEPS, backend, meta)
    store.finish()


@pytest.fixture(scope="module", params=["jax", "torch"])
def pretrained(request, tmp_path_factory):
    """The name of a backend, and a base directory with a base model of its making."""
    root = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXCHAT_BASE_DIR", str(root))
        make_base(root, request.param)
    return request.param, root


@pytest.fixture
def backend(pretrained, tmp_path, monkeypatch):
    """The name of a backend; the base directory is a copy of the test's own."""
    name, root = pretrained
    shutil.copytree(root, tmp_path / "base")
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "base"))
    return name


def teach(backend, stage="mid", **changes):
    """Train a stage on sums and on who the model is; its checkpoints."""
    lesson = Lesson(
        stage=stage,
        script={"mid": "mid_train", "sft": "chat_sft"}[stage],
        title="A lesson",
        train=TaskMixture([Arithmetic("train", 60), CustomJSON(IDENTITY)], name="a mixture"),
        val=Arithmetic("test", 20),
        questions=("Who are you?",),
    )
    options = {
        "model_tag": "tiny",
        "num_iterations": STEPS,
        "eval_every": 3,
        "eval_tokens": LENGTH * ROWS,
    }
    finetune(FinetuneOptions(backend=backend, **(options | changes)), lesson)
    return CheckpointStore(stage_directory(stage, "tiny"))


def metrics(store, name):
    rows = read_metrics(store.directory / "metrics.jsonl")
    return {row["step"]: row[name] for row in rows if name in row}


def test_a_stage_inherits_learns_and_reports(backend, tmp_path, capsys):
    mid = teach(backend, init_lr_frac=0.5)
    count = 60 + len(CustomJSON(IDENTITY))
    assert f"context of 128 tokens: of {count} conversations " in capsys.readouterr().out
    meta = mid.read_meta(STEPS)
    assert meta["optimizer"] == asdict(BASE_RATES.scaled(0.5))
    assert meta["plan"]["total_batch_size"] == BASE_PLAN.total_batch_size
    assert meta["plan"]["weight_decay"] == 0.0
    assert meta["source"] == {
        "stage": "base",
        "step": BASE_STEPS,
        "run": "of the base",
        "warm_start": False,
    }
    losses = metrics(mid, "train/loss")
    assert losses[STEPS] < losses[1] - 0.2
    for share in ("truncated", "dropped", "padding", "supervised"):
        assert all(0 <= value <= 1 for value in metrics(mid, f"data/{share}").values())
    assert metrics(mid, "data/truncated")[STEPS] > 0  # LENGTH is short for some conversations

    sft = teach(backend, "sft", source="mid")
    assert sft.read_meta(STEPS)["source"]["run"] == meta["run"]
    # a fraction is one of the base run's rates, not of what midtraining made of them
    assert sft.read_meta(STEPS)["optimizer"] == asdict(BASE_RATES)
    sections = {section.stage: section for section in Report(tmp_path / "base").sections()}
    assert {"mid_train", "chat_sft"} <= sections.keys()
    assert subject_of(sections["chat_sft"]) == Subject(
        "sft", "tiny", sft.read_meta(STEPS)["run"], STEPS
    )
    mixture, packing = sections["mid_train"].parts[:2]
    assert isinstance(mixture, Table) and isinstance(packing, KeyValues)
    assert mixture.rows == [["Arithmetic", 60], ["identity.jsonl", len(CustomJSON(IDENTITY))]]
    assert set(packing.values) == {
        *("data/truncated", "data/dropped", "data/padding", "data/supervised")
    }


def test_a_file_of_ones_own_is_taught_and_the_readmes_code_talks_to_the_result(
    backend, tmp_path, monkeypatch, capsys
):
    """Without anything of the project's own in between."""
    talk = '{"messages": [{"role": "user", "content": "N"}, {"role": "assistant", "content": "b"}]}'
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(talk.replace("N", str(i)) for i in range(100)))
    words = f"-i base -g tiny --data {path} --epochs 0.1 --backend {backend}".split()
    chat_sft.main(cli.parse(chat_sft.Config, words))
    shown = capsys.readouterr().out
    train, val = CustomJSON(path).split()
    assert f"conversations (mine.jsonl {len(train)})" in shown
    assert f"'{val[0]['messages'][0]['content']}' -> " in shown
    (section,) = (s for s in Report(tmp_path / "base").sections() if s.stage == "chat_sft")
    assert section.title == "Supervised finetuning (mine.jsonl)"
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), scope := {})
    assert capsys.readouterr().out.endswith(scope["reply"].text + "\n")
    assert scope["reply"].ids


@pytest.mark.parametrize(
    ("batch", "pass_tokens", "unit", "expected"),
    [
        (1024, 10240, 128, 1024),
        (1024, 10239, 128, 512),
        (1024, 3000, 128, 256),
        (1024, 100, 128, 128),
        (1024, 100, 1024, 1024),
        (3 * 1024, 100, 1024, 3 * 1024),
        (3 * 1024, 100, 128, 3 * 128),
        (2**19, 45_000, 2048, 4096),
    ],
)
def test_a_batch_leaves_a_pass_ten_steps_where_rows_allow_it(batch, pass_tokens, unit, expected):
    assert batch_for(batch, pass_tokens=pass_tokens, unit=unit) == expected


def teach_little(backend, folder, **changes):
    """Midtraining on less than a row; its checkpoints."""
    path = folder / "few.jsonl"
    path.write_text(
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]\n' * 9
    )
    mixture = TaskMixture([CustomJSON(path)], name="few")
    lesson = Lesson("mid", "mid_train", "Few", mixture, mixture, ())
    options = {"model_tag": "tiny", "num_iterations": 1}
    finetune(FinetuneOptions(backend=backend, **(options | changes)), lesson)
    return CheckpointStore(stage_directory("mid", "tiny"))


@pytest.mark.parametrize(("asked", "expected"), [(None, LENGTH), (2 * LENGTH, 2 * LENGTH)])
def test_little_data_is_not_one_step_of_many_passes(backend, tmp_path, asked, expected):
    if backend == "jax":  # eight devices take a row each
        asked, expected = asked and 8 * asked, 8 * expected
    meta = teach_little(backend, tmp_path, total_batch_size=asked).read_meta(1)
    assert meta["plan"]["total_batch_size"] == expected
    assert meta["plan"]["lr_scale"] == pytest.approx((expected / 2**19) ** 0.5)
    assert Inherited.of(meta).total_batch_size == BASE_PLAN.total_batch_size


def test_a_batch_cut_to_little_data_ends_with_its_stage(backend, tmp_path):
    """The next one took it for the base run's: two rows a step of whatever it read."""
    mid = teach_little(backend, tmp_path).read_meta(1)
    sft = teach(backend, "sft", source="mid", num_iterations=1).read_meta(1)
    if backend == "torch":  # eight devices take a row each, which is all of the base run's
        assert mid["plan"]["total_batch_size"] == LENGTH
    assert sft["plan"]["total_batch_size"] == BASE_PLAN.total_batch_size
    assert Inherited.of(sft) == replace(Inherited.of(mid), backend=backend)
    old = {"plan": mid["plan"]}  # what checkpoints said that are older than this test
    assert Inherited.of(old).total_batch_size == mid["plan"]["total_batch_size"]


def test_a_run_that_goes_on_keeps_the_batch_that_it_began_with(backend, tmp_path, capsys):
    """Cut to little data it depends on the micro-batch, and so lowering that, as the advice on
    memory says, made it another run."""
    path = CheckpointStore(stage_directory("base", "tiny")).path(BASE_STEPS) / META
    base = json.loads(path.read_text())
    base["plan"]["total_batch_size"] *= 8
    path.write_text(json.dumps(base))
    options = {"num_iterations": 2, "save_every": 1}
    store = teach_little(backend, tmp_path, device_batch_size=2, **options)
    plan = store.read_meta(2)["plan"]
    shutil.rmtree(store.path(2))
    teach_little(backend, tmp_path, device_batch_size=1, **options)
    assert "continuing at step 1" in capsys.readouterr().out
    assert store.read_meta(2)["plan"] == plan
    fresh = teach_little(backend, tmp_path, device_batch_size=1, resume="never").read_meta(1)
    assert 2 * fresh["plan"]["total_batch_size"] == plan["total_batch_size"]


def test_what_fits_here_counts_and_not_what_fitted_the_source(backend):
    """Its 64 rows were taken where 16 fit, and its single one on the largest card."""
    options = {"total_batch_size": 2 * ROWS * LENGTH, "num_iterations": 2, "save_every": 1}
    devices = 8 if backend == "jax" else 1
    store = teach(backend, **options)
    assert store.read_meta(2)["config"]["device_batch_size"] == 2 * ROWS // devices
    teach(backend, device_batch_size=1, resume="never", **options)
    shutil.rmtree(store.path(2))
    teach(backend, **options)  # a run that goes on keeps its own
    assert store.read_meta(2)["config"]["device_batch_size"] == 1


def test_memory_is_saved_as_in_the_sources_run_or_as_asked_for(backend, monkeypatch):
    """The remedies that are named when memory is short could not be given."""
    given = []
    monkeypatch.setattr(
        stage_module,
        "settle_rows",
        lambda *rest, **options: given.append(options) or settle_rows(*rest, **options),
    )
    asked = teach(backend, num_iterations=1, remat="block", card=80)
    kept = teach(backend, "sft", source="mid", num_iterations=1)
    for store in (asked, kept):
        config = store.read_meta(1)["config"]
        assert (config["remat"], config["offload_optimizer"]) == ("block", False)
    assert [(options["card"], options["new_model"]) for options in given] == [
        (80, False),
        (None, False),
    ]


@pytest.mark.parametrize("script", [chat_sft, chat_rl])
def test_savings_are_inherited_where_nothing_is_asked_for(script):
    def found(words):
        return cli.parse(script.Config, words.split()).savings(Savings("products", True))

    assert found("") == Savings("products", True)
    assert found("--remat none") == Savings("none", True)
    assert found("--card 80") == Savings("none", False)
    assert found("--card 24 --offload-optimizer") == Savings("none", True)
    assert found("--card 8 --remat products") == Savings("products", True)
    assert script.Config(offload_optimizer=True).savings(Savings()) == Savings("none", True)
    for words in ("--card 12", "--remat some"):
        with pytest.raises(SystemExit):
            found(words)


def test_a_stage_may_go_on_from_its_own_result_under_another_name(backend, tmp_path, capsys):
    first = teach(backend, num_iterations=1)
    with pytest.raises(ValueError, match="the place of mid model 'tiny'"):
        teach(backend, source="mid")
    for _ in range(2):  # once more, as after a kill: the newest model is its own result now
        teach(backend, source="mid", model_tag=None, num_iterations=2, output_tag="more")
    more = CheckpointStore(stage_directory("mid", "more"))
    assert (first.steps(), more.steps()) == ([1], [2])
    assert more.read_meta(2)["source"]["run"] == first.read_meta(1)["run"]
    told = capsys.readouterr().out
    assert "\nmore: 2 steps in" in told and told.endswith("scripts.chat_cli -i mid -g more\n")
    assert load_model("mid", backend=backend, model_tag="more").tag == "more"


@pytest.mark.slow
def test_a_stopped_stage_continues_exactly(backend):
    """The second half again, from the checkpoint before it: the same losses, bit for bit."""
    options = {"save_every": 2, "keep_checkpoints": 9}
    store = teach(backend, **options)
    losses, weights = metrics(store, "train/loss"), params(store, backend)
    assert store.steps() == [2, 4, 6]
    for step in (4, 6):
        shutil.rmtree(store.path(step))
    teach(backend, **options)
    assert metrics(store, "train/loss") == losses
    assert_same_arrays(params(store, backend), weights)
    with pytest.raises(ValueError, match=r"belongs to another run:\n.*matrix_lr"):
        teach(backend, matrix_lr=0.5)


def params(store, backend):
    return backend_class(backend).read(store.path(STEPS), optimizer=False).params


@pytest.mark.slow
def test_a_warm_start_takes_over_the_optimizer(backend):
    """Adam's counts go on from the base run's; a cold start begins at 0."""
    counts = {}
    for warm in (True, False):
        store = teach(backend, warm_start=warm, resume="never")
        state = backend_class(backend).read(store.path(STEPS), optimizer=True).optimizer
        counts[warm] = {int(v) for key, v in state.items() if key.startswith("adam.count")}
    assert counts == {True: {BASE_STEPS + STEPS}, False: {STEPS}}


def test_a_pass_is_its_rows_and_the_held_out_examples_are_validation(backend, monkeypatch):
    read = []
    for reader in (ChatLoader, conversation_batches):
        monkeypatch.setattr(
            stage_module,
            reader.__name__,
            lambda task, *rest, _read=reader, **options: (
                read.append(task) or _read(task, *rest, **options)
            ),
        )
    store = teach(backend, num_iterations=None, epochs=0.5, eval_every=99)
    mixture = TaskMixture([Arithmetic("train", 60), CustomJSON(IDENTITY)], name="a mixture")
    rows = forecast(mixture, TOKENIZER, sequence_len=LENGTH).rows
    assert store.steps()[-1] == round(0.5 * rows / ROWS) > 2
    assert read[0].name == "a mixture"
    assert {task.fingerprint for task in read[1:]} == {Arithmetic("test", 20).fingerprint}


def test_a_stage_that_starts_over_is_what_the_next_one_loads(backend, capsys):
    teach(backend, num_iterations=2)
    store = teach(backend, num_iterations=1, resume="never")
    assert store.steps() == [1]
    (aside,) = store.directory.glob("replaced-*")
    assert CheckpointStore(aside).steps() == [2]
    teach(backend, "sft", source="mid", model_tag=f"tiny/{aside.name}", num_iterations=1)
    told = capsys.readouterr().out
    assert told.endswith(f"-i sft -g tiny/{aside.name}\n"), "which is there:"
    assert find_checkpoint("sft", f"tiny/{aside.name}").step == 1


def test_a_mesh_divides_the_weights_and_changes_nothing(backend):
    if backend == "torch":
        with pytest.raises(ValueError, match="--mesh fsdp=8: torch divides rows alone"):
            teach(backend, mesh="fsdp=8")
        return
    model = load_model("base", backend=backend, model_tag="tiny", mesh="data=2,fsdp=4")
    (shard, *_) = model.backend.params["wte.weight"].addressable_shards
    assert 4 * shard.data.size == model.backend.params["wte.weight"].size
    with pytest.raises(ValueError, match="is 6 device"):
        teach(backend, mesh="fsdp=3")
    losses = [
        metrics(teach(backend, num_iterations=2, mesh=mesh, resume="never"), "train/loss")
        for mesh in ("auto", "data=2,fsdp=4")
    ]
    np.testing.assert_allclose(*(list(found.values()) for found in losses), rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["num_iterations", "total_batch_size", "epochs", "device_batch_size"]
)
def test_a_stage_of_nothing_is_refused_by_its_flag(name):
    with pytest.raises(ValueError, match=rf"--{name.replace('_', '-')} 0: must be above 0"):
        FinetuneOptions(**{name: 0})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--matrix-lr -1", "--matrix-lr -1.0: must be at least 0"),
        ("--embedding-lr nan", "--embedding-lr nan: must be at least 0"),
        ("--unembedding-lr inf", "--unembedding-lr inf: must be at least 0, and finite"),
        ("--init-lr-frac inf", "--init-lr-frac inf: must be at least 0, and finite"),
        ("--init-lr-frac nan", "--init-lr-frac nan: must be above 0"),
        ("--epochs inf", "--epochs inf: must be at least 0, and finite"),
        ("--eval-tokens -5", "--eval-tokens -5: must be above 0"),
        ("--eval-every 0", "--eval-every 0: must be above 0"),
        ("--sample-every 0", "--sample-every 0: must be above 0"),
        ("--save-every -1", "--save-every -1: must be above 0"),
        ("--keep-checkpoints 0", "--keep-checkpoints 0: must be above 0"),
    ],
)
def test_what_pretraining_refuses_finetuning_refuses_too(words, message, capsys):
    """A negative rate trained a model away from what it was shown, and saved it."""
    for script in (chat_sft, mid_train):
        with pytest.raises(SystemExit):
            cli.parse(script.Config, words.split())
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert FinetuneOptions(matrix_lr=0.0).matrix_lr == 0


def test_validation_does_not_depend_on_the_seed(backend):
    """Of more conversations than fit, each took its own: one model had two figures."""
    figures = [
        metrics(teach(backend, seed=seed, num_iterations=1, resume="never"), "val/bpb")[0]
        for seed in (1, 2)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(ValueError, match=f"--seed {seed}: give a number from 0 to 2147483647"):
        FinetuneOptions(seed=seed)


def test_two_runs_cannot_share_a_folder(backend):
    store = CheckpointStore(stage_directory("mid", "tiny"))
    with store.claim(), pytest.raises(OSError, match="tiny"):
        teach(backend)


def test_options_override_what_is_inherited():
    options = FinetuneOptions(matrix_lr=1.0, embedding_lr=2.0, unembedding_lr=3.0, init_lr_frac=0.5)
    found = optimizer_of(options, BASE_RATES)
    rates = (found.matrix_lr, found.wte.lr, found.value_embeds.lr, found.lm_head.lr)
    assert rates == (0.5, 1.0, 0.5, 1.5)
    assert found.x0_lambdas.lr == BASE_RATES.x0_lambdas.lr / 2
    assert optimizer_of(FinetuneOptions(), BASE_RATES) == BASE_RATES
    assert Inherited.of({}).optimizer == OptimizerConfig()  # an imported model says nothing
    with pytest.raises(ValueError, match="--init-lr-frac 0: must be above 0"):
        FinetuneOptions(init_lr_frac=0)


# --- what is learnt from --------------------------------------------------------------------------


def jax_gradient(hidden, head, targets, weights):
    rest = [jnp.asarray(x) for x in (head, targets, weights)]
    gradient = jax.grad(lambda h: loss.cross_entropy(h, *rest, len(head), 15.0))
    return np.asarray(gradient(jnp.asarray(hidden)))


def torch_gradient(hidden, head, targets, weights):
    h = torch.tensor(hidden, requires_grad=True)
    arrays = (torch.tensor(x) for x in (head, targets, weights))
    torch_loss.cross_entropy(h, *arrays, len(head), 15.0).backward()
    return h.grad.numpy()


@pytest.mark.parametrize("gradient", [jax_gradient, torch_gradient])
@pytest.mark.parametrize("shape", ["system", "two exchanges", "tool", "tool with empty output"])
def test_the_gradient_from_user_tokens_and_tool_output_is_exactly_zero(shape, gradient):
    """A row of the packer through the loss: what each position hands back to the model."""
    conversation, _ = SHAPES[shape]
    task = Given([conversation])
    with ChatLoader(task, TOKENIZER, rows_per_batch=1, sequence_len=100) as loader:
        batch = next(loader)
    rng = np.random.default_rng(0)
    hidden, head = (
        rng.normal(size=size).astype(np.float32)
        for size in ((1, 100, 8), (TOKENIZER.vocab_size, 8))
    )
    weights = (batch.targets != IGNORE).astype(np.float32)
    (rows,) = gradient(hidden, head, batch.targets, weights)
    _, mask = render(TOKENIZER, conversation)
    learnt = np.abs(rows[: len(mask) - 1]).sum(axis=-1) > 0
    assert learnt.tolist() == [bool(m) for m in mask[1:]]
