"""Exported folders are whole, say the truth about the model, and come back bit for bit."""

import json
import os
import re
from pathlib import Path

import pytest

from jaxchat import export
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import GPTConfig
from jaxchat.report import Report, model_facts
from jaxchat.stages import LoadedModel, load_model, stage_directory
from jaxchat.tensor_files import read_safetensors
from jaxchat.tokenizer import Tokenizer
from scripts import export as export_script
from scripts import import_model
from tests.models import assert_same_arrays
from tests.test_convert import weights, without_padding
from torch_ref.torch_backend import TorchBackend

RUN = "f00d"
"""Id of the run that made the model."""

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["words and more words make a vocabulary"] * 3, vocab_size=280)


@pytest.fixture(params=["modern", "classic"])
def backend(request, tokenizer):
    modern = GPTConfig(
        sequence_len=128,
        vocab_size=tokenizer.vocab_size,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        n_embd=32,
    )
    backend = TorchBackend(modern if request.param == "modern" else modern.classic())
    backend.set_params(without_padding(weights(backend.config), backend.config))
    return backend


@pytest.fixture
def saved(backend, tokenizer, base_dir):
    """The model as a finished run leaves it."""
    tokenizer.save(base_dir / "tokenizer")
    store = CheckpointStore(stage_directory("sft", "d2"))
    store.save(40, backend, {"tokenizer": tokenizer.fingerprint, "run": RUN})
    store.finish()
    return backend


def run(folder, **options):
    export_script.main(export_script.Config(folder, backend="torch", **options))


def test_a_folder_has_what_transformers_looks_for(saved, tmp_path, base_dir):
    run(tmp_path / "out")
    own_code = set() if saved.config == saved.config.classic() else {"modeling_jaxchat.py"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | own_code
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == 280
    assert config["bos_token_id"] == 271
    assert config["eos_token_id"] == config["pad_token_id"] == 275
    assert (config["model_type"] == "nanochat") == (not own_code)
    tensors = read_safetensors(tmp_path / "out")
    assert tensors["lm_head.weight"].shape == (280, 32)  # the padding of 320 is gone
    if not own_code:
        assert len(tensors) == 6 * 2 + 2
        assert config["rms_norm_eps"] == 1e-6
        assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_an_export_comes_back_bit_for_bit(saved, tmp_path, monkeypatch, base_dir):
    run(tmp_path / "out")
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    import_model.main(import_model.Config(tmp_path / "out", "hf", stage="sft", backend="torch"))
    back = load_model("sft", backend="torch")
    assert back.backend.config == saved.config
    assert_same_arrays(back.backend.get_params(), saved.get_params())


def test_an_export_says_its_stage_and_step(saved, tmp_path, monkeypatch, base_dir):
    """It came back as a base model of step 0."""
    run(tmp_path / "out")
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    import_model.main(import_model.Config(tmp_path / "out", "hf", backend="torch"))
    assert load_model("sft", backend="torch").meta["step"] == 40
    asked = import_model.Config(tmp_path / "out", "hf", stage="rl", step=0, backend="torch")
    import_model.main(asked)
    assert load_model("rl", backend="torch").meta["step"] == 0


@pytest.mark.parametrize("said", ["sft", {"stage": "sft"}, {"stage": "best", "step": 1}])
def test_a_stage_that_no_export_writes_is_told(said):
    with pytest.raises(ValueError, match=r"config.json says jaxchat=.*correct the entry"):
        import_model.exported_as({"jaxchat": said})


def test_all_files_are_as_the_umask_says(saved, tmp_path):
    """The weights were for their owner alone, and a server of another user could not read them."""
    before = os.umask(0o027)
    try:
        run(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o640)


def test_a_reply_is_no_longer_than_the_context(saved, tmp_path):
    run(tmp_path / "out")
    said = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert said["max_new_tokens"] == saved.config.sequence_len == 128


def test_nothing_that_is_there_is_overwritten(saved, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    run(folder)  # an empty folder is as good as none
    before = (folder / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="there already and not an empty folder"):
        run(folder)
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_replaced_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    """It was told after everything had been written."""
    monkeypatch.setattr(export_script, "load_model", None)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for folder in (Path("."), tmp_path / "link"):
        with pytest.raises(ValueError, match=r"cannot be replaced .*: choose a folder in it"):
            run(folder)


def test_a_failed_export_leaves_nothing(saved, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(export, "write_safetensors", fail)
    target = tmp_path / "exports" / "out"
    with pytest.raises(OSError, match="the disk is full"):
        run(target)
    assert list(target.parent.iterdir()) == []


def add_section(base_dir, stage="chat_eval_sft", figure="ChatCORE", **facts):
    said = {"source": "sft", "tag": "d2", "run": RUN, "step": 40} | facts
    meta = {"run": said.pop("run"), "step": said.pop("step"), "tokenizer": "t"}
    parts = [model_facts(**said, meta=meta)]
    Report(base_dir).add(stage, "Section", parts, figures={figure: 0.2})


def card_of(folder, **options):
    run(folder, **options)
    return (folder / "README.md").read_text()


def test_the_card_shows_the_results_of_this_model(saved, base_dir, tmp_path):
    add_section(base_dir, "chat_sft", "val bpb")
    add_section(base_dir)
    add_section(base_dir, "sft_loss")
    add_section(base_dir, "base_eval", source="base")
    add_section(base_dir, tag="d4")  # beside this model's
    card = card_of(tmp_path / "out")
    assert "| chat_sft | val bpb | 0.2000 |" in card
    assert card.count("| chat_eval_sft | ChatCORE | 0.2000 |") == 1
    assert "| sft_loss | ChatCORE | 0.2000 |" in card
    assert "base_" not in card  # another stage's
    assert "| stage and step | sft, 40 |" in card
    assert "PyTorch 2.14 or later" in card
    assert "split_special_tokens=True" in card and "`<|python_start|>`" in card
    assert ("trust_remote_code=True" in card) == (saved.config != saved.config.classic())


def test_the_card_tells_how_to_use_the_folder(saved, tmp_path, monkeypatch, capsys):
    """Its code, carried out there; nothing is asked, as nobody is there to answer."""
    run(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    exec(compile(code, "README.md", "exec"), {})
    assert "<|user_start|>Why is the sky blue?" in capsys.readouterr().out


@pytest.mark.parametrize(
    "facts", [{"tag": "d4"}, {"run": "an earlier one"}, {"step": 20}, {"source": "mid"}]
)
def test_the_card_does_not_show_another_models_results(saved, base_dir, tmp_path, facts):
    """d4's ChatCORE was on the card of what was finetuned after it, under a tag of its own."""
    add_section(base_dir, "chat_sft", "val bpb")
    add_section(base_dir, **facts)
    card = card_of(tmp_path / "out")
    assert "val bpb" in card and "ChatCORE" not in card


def test_a_section_that_does_not_say_its_model_is_on_no_card(saved, base_dir, tmp_path):
    Report(base_dir).add("chat_eval_sft", "Evaluation", [], figures={"ChatCORE": 0.2})
    Report(base_dir).add("sft_loss", "Loss", [], figures={"val bpb": 0.9})
    assert "None were reported." in card_of(tmp_path / "out")


def test_a_model_that_is_not_there_is_told_before_anything_is_written(base_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no sft model"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_is_text_in_the_card(backend, tokenizer, tmp_path):
    model = LoadedModel(backend, tokenizer, {"step": 1}, "d1", Path("d1"))
    card = export.model_card(model, "a_b *c*", "base", [], is_stock=True)
    assert "# a\\_b \\*c\\*" in card
    assert 'tokenizer("<|bos|>The sky is"' in card
