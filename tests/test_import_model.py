"""Models from elsewhere arrive bit for bit, or not at all and with the reason."""

import collections
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch

from jaxchat import convert
from jaxchat.config import GPTConfig
from jaxchat.foreign_tokenizer import read_pickled_tokenizer, read_tokenizer_json
from jaxchat.stages import STAGE_FOLDERS, find_checkpoint, how_to_talk, load_model
from jaxchat.tensor_files import read_safetensors, write_safetensors
from jaxchat.tokenizer import Tokenizer
from scripts.import_model import Config, main
from tests.models import CLASSIC
from tests.test_convert import model_config, weights

TEXTS = ["the model reads text and the reader reads the model, again and again"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, vocab_size=290)


@pytest.fixture(params=["modern", "classic"])
def config(request, tokenizer):
    modern = GPTConfig(
        sequence_len=128,
        vocab_size=tokenizer.vocab_size,
        n_layer=2,
        n_head=2,
        n_kv_head=2,
        n_embd=32,
    )
    return modern if request.param == "modern" else modern.classic()


@pytest.fixture
def foreign(tmp_path_factory):
    """A folder as upstream's base directory has it."""
    folder = tmp_path_factory.mktemp("upstream") / "base_checkpoints" / "d2"
    folder.mkdir(parents=True)
    return folder


def as_nanochat(folder, config, tokenizer, *, step=7, dtype=torch.float32):
    """Write what upstream writes: tensors, meta and the pickled tiktoken encoding."""
    tensors = {n: torch.tensor(x) for n, x in convert.to_nanochat(weights(config)).items()}
    tables = {"transformer.wte.weight"} | {n for n in tensors if n.startswith("value_embeds")}
    stored = {n: x.to(dtype) if n in tables else x for n, x in tensors.items()}
    torch.save(stored, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 0.9, "model_config": model_config(config)}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    pickled = folder.parent.parent / "tokenizer" / "tokenizer.pkl"
    pickled.parent.mkdir(exist_ok=True)
    pickled.write_bytes(pickle.dumps(tokenizer.as_tiktoken()))
    return {n: x.float().numpy() for n, x in stored.items()}


def as_hugging_face(folder, config, tokenizer):
    tensors, described = convert.to_hugging_face(weights(config), config)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_hugging_face()))


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upstream_checkpoints_arrive_bit_for_bit(config, foreign, tokenizer, base_dir, dtype):
    """Both generations; upstream keeps embeddings in bfloat16, which float32 holds exactly."""
    stored = as_nanochat(foreign, config, tokenizer, dtype=dtype)
    as_nanochat(foreign, config, tokenizer, step=3)
    main(Config(foreign, "nanochat", backend="torch"))
    loaded = load_model("base", backend="torch")
    assert loaded.backend.config == config
    assert loaded.meta["step"] == 7
    assert loaded.meta["imported"]["meta"]["val_bpb"] == 0.9
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    for name, value in convert.to_nanochat(loaded.backend.get_params()).items():
        assert value.tobytes() == stored[name].tobytes(), name


def test_hugging_face_folders_arrive_for_either_backend(config, foreign, tokenizer, base_dir):
    as_hugging_face(foreign, config, tokenizer)
    main(Config(foreign, "hf", stage="sft", model_tag="guest", backend="torch"))
    params = load_model("sft", backend="jax").backend.get_params()
    mine, _ = convert.to_hugging_face(params, config)
    for name, value in read_safetensors(foreign).items():
        assert mine[name].tobytes() == value.tobytes(), name


def test_one_of_several_steps_can_be_chosen(foreign, tokenizer, base_dir, config):
    for step in (3, 7):
        as_nanochat(foreign, config, tokenizer, step=step)
    main(Config(foreign, "nanochat", step=3, backend="torch"))
    assert load_model("base", backend="torch").meta["step"] == 3
    with pytest.raises(FileNotFoundError, match="steps there: 3, 7"):
        main(Config(foreign, "nanochat", step=4, model_tag="other", backend="torch"))


@pytest.mark.parametrize("stage", STAGE_FOLDERS)
def test_the_stage_is_what_the_folder_above_says(stage, tmp_path, tokenizer, base_dir, capsys):
    """An upstream sft model became a base model unless one thought of --stage."""
    config = replace(CLASSIC, vocab_size=tokenizer.vocab_size)
    folder = tmp_path / "upstream" / STAGE_FOLDERS[stage] / "d4"
    folder.mkdir(parents=True)
    as_nanochat(folder, config, tokenizer)
    main(Config(folder, "nanochat", backend="torch"))
    tag, _, step = find_checkpoint(stage)
    assert (tag, step) == ("d4", 7)
    assert capsys.readouterr().out.splitlines()[-1] == how_to_talk(stage, "d4")
    main(Config(folder, "nanochat", stage="mid", model_tag="asked", backend="torch"))
    assert find_checkpoint("mid", "asked").step == 7


def test_a_step_is_no_negative_number(foreign):
    with pytest.raises(ValueError, match="step -1 must be at least 0"):
        Config(foreign, "hf", step=-1)


def damage(folder, case, config, tokenizer):
    """Make the folder wrong in one way; returns what the error must tell."""
    path = folder / "model_000007.pt"
    tensors = torch.load(path, weights_only=True)
    meta = json.loads((folder / "meta_000007.json").read_text())
    match case:
        case "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            return "model_000007.pt is damaged"
        case "missing tensor":
            del tensors["lm_head.weight"]
            told = r"missing lm_head\.weight"
        case "extra tensor":
            tensors["mtp.weight"] = torch.zeros(2)
            told = r"unexpected mtp\.weight"
        case "wrong shape":
            tensors["lm_head.weight"] = torch.zeros(5, 5)
            told = r"lm_head\.weight has shape \(5, 5\)"
        case "not tensors":
            tensors = {"lm_head.weight": [1, 2]}
            told = "something else than a dict of tensors"
        case "no meta":
            (folder / "meta_000007.json").unlink()
            return r"meta_000007\.json"
        case "damaged meta":
            (folder / "meta_000007.json").write_text("{")
            return r"meta_000007\.json is damaged"
        case "other architecture":
            meta["model_config"] |= {"n_layer": 3}
            told = r"missing h\.2\."
        case "other vocabulary":
            other = Tokenizer.train(TEXTS, vocab_size=280)
            pickled = folder.parent.parent / "tokenizer" / "tokenizer.pkl"
            pickled.write_bytes(pickle.dumps(other.as_tiktoken()))
            told = "the tokenizer has 280 tokens, the model 290"
        case "no tokenizer":
            (folder.parent.parent / "tokenizer" / "tokenizer.pkl").unlink()
            told = "no tokenizer found at .*--tokenizer"
    torch.save(tensors, path)
    if (folder / "meta_000007.json").exists():
        (folder / "meta_000007.json").write_text(json.dumps(meta))
    return told


@pytest.mark.parametrize(
    "case",
    [
        "truncated",
        "missing tensor",
        "extra tensor",
        "wrong shape",
        "not tensors",
        "no meta",
        "damaged meta",
        "other architecture",
        "other vocabulary",
        "no tokenizer",
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_written(
    case, foreign, tokenizer, config, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "base"))
    as_nanochat(foreign, config, tokenizer)
    told = damage(foreign, case, config, tokenizer)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        main(Config(foreign, "nanochat", backend="torch"))
    assert not (tmp_path / "base").exists() or everything(tmp_path / "base") == []


def damage_hugging_face(folder, case):
    """Make the folder wrong in one way; returns what the error must tell."""
    path, described = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors = read_safetensors(folder)
    match case:
        case "truncated":
            path.write_bytes(path.read_bytes()[:-100])
            return r"model\.safetensors is damaged"
        case "no weights":
            path.unlink()
            return r"no model\.safetensors"
        case "missing, extra and misshapen tensors":
            del tensors["lm_head.weight"]
            tensors["model.norm.weight"] = np.zeros(3, np.float32)
            wte = "wte.weight" if "wte.weight" in tensors else "model.embed_tokens.weight"
            tensors[wte] = tensors[wte][:7]
            told = r"missing lm_head(.|\n)*unexpected model\.norm(.|\n)*wte\.weight has shape \(7"
        case "other architecture":
            described["model_type"] = "llama"
            told = "model_type is 'llama'"
        case "damaged config":
            (folder / "config.json").write_text("{")
            return r"config\.json is damaged"
        case "other vocabulary":
            other = Tokenizer.train(TEXTS, vocab_size=280)
            (folder / "tokenizer.json").write_text(json.dumps(other.to_hugging_face()))
            told = "the tokenizer has 280 tokens, the model 290"
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
            told = "no tokenizer found at .*--tokenizer"
    write_safetensors(path, tensors)
    (folder / "config.json").write_text(json.dumps(described))
    return told


@pytest.mark.parametrize(
    "case",
    [
        "truncated",
        "no weights",
        "missing, extra and misshapen tensors",
        "other architecture",
        "damaged config",
        "other vocabulary",
        "no tokenizer",
    ],
)
def test_what_is_wrong_with_a_hugging_face_folder_is_told_and_nothing_is_written(
    case, foreign, tokenizer, config, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(tmp_path / "base"))
    as_hugging_face(foreign, config, tokenizer)
    told = damage_hugging_face(foreign, case)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        main(Config(foreign, "hf", backend="torch"))
    assert not (tmp_path / "base").exists() or everything(tmp_path / "base") == []


def test_models_that_are_there_are_left_alone(foreign, tokenizer, config, base_dir):
    as_nanochat(foreign, config, tokenizer)
    main(Config(foreign, "nanochat", backend="torch"))
    before = everything(base_dir)
    with pytest.raises(ValueError, match="holds a model already: choose another --model-tag"):
        main(Config(foreign, "nanochat", backend="torch"))
    words = "quick brown foxes jumping over lazy dogs while seven wizards mix potions"
    other = Tokenizer.train([words] * 3, vocab_size=290)
    as_nanochat(foreign, config, other)
    with pytest.raises(ValueError, match=r"holds another tokenizer.*\n?.*JAXCHAT_BASE_DIR"):
        main(Config(foreign, "nanochat", model_tag="other", backend="torch"))
    assert everything(base_dir) == before


def test_a_failed_write_takes_its_tokenizer_along(
    foreign, tokenizer, config, base_dir, monkeypatch
):
    as_nanochat(foreign, config, tokenizer)

    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr("torch_ref.weights.save_folder", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        main(Config(foreign, "nanochat", backend="torch"))
    assert not [path for path in base_dir.rglob("*") if path.is_file()]
    with pytest.raises(FileNotFoundError):
        load_model("base", backend="torch")


def test_tokenizers_arrive_whole(tokenizer, tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.as_tiktoken()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.to_hugging_face()))
    for read, name in (
        (read_pickled_tokenizer, "tokenizer.pkl"),
        (read_tokenizer_json, "tokenizer.json"),
    ):
        assert read(tmp_path / name).fingerprint == tokenizer.fingerprint


class Malicious:
    """Runs a command when a plain unpickler reads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def asks_for(module, name):
    """A pickle, written by hand, that calls `module.name` with the path that follows."""
    call = b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    return lambda path: call + b"(V" + str(path).encode() + b"\ntR."


ATTACKS = {
    "a command": asks_for("os", "system"),
    "code": asks_for("builtins", "eval"),
    "an import": asks_for("importlib", "import_module"),
    "a way around": asks_for("copyreg", "_reconstructor"),
    "another name of the module": asks_for("tiktoken.core", "functools"),
    "a name behind the class": lambda path: (
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93\x8c\x01xR."
    ),
    "an extension": lambda path: b"\x80\x02\x82\x01.",
    "an object of the outside": lambda path: b"Poutside\n.",
    "the class with arguments": lambda path: b"ctiktoken.core\nEncoding\n(Vx\ntR.",
    "a class as the class's state": lambda path: b"ctiktoken.core\nEncoding\n(tRcos\nsystem\nb.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_pickle_gets_nothing(attack, tmp_path):
    path, marker = tmp_path / "tokenizer.pkl", tmp_path / "owned"
    path.write_bytes(ATTACKS[attack](f"touch {marker}"))
    with pytest.raises(ValueError, match=r"tokenizer\.pkl is no pickled tiktoken Encoding"):
        read_pickled_tokenizer(path)
    assert not marker.exists()


def test_a_plain_unpickler_would_have_run_it(tmp_path):
    """The attack is real; ours is what keeps it from happening."""
    marker = tmp_path / "owned"
    pickle.loads(ATTACKS["a command"](f"touch {marker}"))
    assert marker.exists()


def test_a_hostile_model_file_gets_nothing(foreign, tokenizer, config, base_dir):
    as_nanochat(foreign, config, tokenizer)
    torch.save({"lm_head.weight": Malicious(base_dir / "owned")}, foreign / "model_000007.pt")
    with pytest.raises(ValueError, match=r"model_000007\.pt is damaged or not a checkpoint"):
        main(Config(foreign, "nanochat", backend="torch"))
    assert everything(base_dir) == []


def test_nothing_in_a_pickle_is_executed(tmp_path):
    path, marker = tmp_path / "tokenizer.pkl", tmp_path / "owned"
    for content, told in (
        (Malicious(marker), r"posix\.system|nt\.system"),
        ({"ranks": Malicious(marker)}, r"posix\.system|nt\.system"),
        (collections.OrderedDict(), r"collections\.OrderedDict"),
        ({"name": "x"}, "no pickled tiktoken Encoding"),
        (b"bytes", "no pickled tiktoken Encoding"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=told):
            read_pickled_tokenizer(path)
    assert not marker.exists()


def test_a_pickle_that_lies_about_its_content_is_refused(tokenizer, tmp_path):
    """The class may be tiktoken's while the state is not."""
    path = tmp_path / "tokenizer.pkl"
    whole = pickle.dumps(tokenizer.as_tiktoken())
    for content in (whole[:-20], whole[:50], b"", whole.replace(b"pat_str", b"pat_xyz")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.pkl"):
            read_pickled_tokenizer(path)


def split(stored, number):
    return stored["pre_tokenizer"]["pretokenizers"][number]


def by_transformers(tokenizer, stored):
    """Written anew by the library itself, which also changes what decides nothing."""
    from transformers import PreTrainedTokenizerFast

    fast = tokenizers.Tokenizer.from_str(json.dumps(stored))
    return json.loads(PreTrainedTokenizerFast(tokenizer_object=fast).backend_tokenizer.to_str())


def every_way_to_merge(tokenizer, stored):
    """As transformers' converter from tiktoken: all pairs that spell a token, and as one text."""
    vocab = stored["model"]["vocab"]
    pairs = (
        (text[:cut], text[cut:])
        for text in list(vocab)[256:]
        for cut in range(1, len(text))
        if {text[:cut], text[cut:]} <= vocab.keys()
    )
    merges = sorted(pairs, key=lambda pair: vocab["".join(pair)])
    assert len(merges) > len(stored["model"]["merges"])
    stored["model"] |= {"merges": [" ".join(pair) for pair in merges], "ignore_merges": True}
    return stored


def like_upstreams(tokenizer, stored):
    """Upstream trains with byte_fallback; a decoder and offsets give no ids."""
    stored["model"] |= {"byte_fallback": True, "continuing_subword_prefix": ""}
    split(stored, 1)["trim_offsets"] = True
    stored["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    return stored


@pytest.mark.parametrize("rewrite", [by_transformers, every_way_to_merge, like_upstreams])
def test_the_same_tokenizer_may_be_written_in_other_words(rewrite, tokenizer, tmp_path):
    stored = rewrite(tokenizer, json.loads(json.dumps(tokenizer.to_hugging_face())))
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    read = read_tokenizer_json(tmp_path / "tokenizer.json")
    assert read.fingerprint == tokenizer.fingerprint
    theirs = tokenizers.Tokenizer.from_str(json.dumps(stored))
    for text in (*TEXTS, "other words, 1234 and ünïcödé"):
        assert theirs.encode(text, add_special_tokens=False).ids == read.encode(text)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t["model"].update(type="Unigram"), "made of Unigram, Split, ByteLevel"),
        (lambda t: t["added_tokens"].pop(), r"<\|output_end\|> is missing"),
        (lambda t: t["added_tokens"][0].update(id=3), r"<\|bos\|> is 3, not 281"),
        (lambda t: t["model"]["vocab"].update({"\u4e00": 400}), "stands for no byte"),
        (lambda t: t["model"]["vocab"].update({"thethe": 900}), "ranks are not 0, 1, 2"),
        (lambda t: t.pop("model"), "damaged, or no byte-level BPE"),
        (lambda t: split(t, 1).update(add_prefix_space=True), "ByteLevel has add_prefix_space=Tr"),
        (lambda t: split(t, 1).pop("use_regex"), "ByteLevel has use_regex=None, ours False"),
        (lambda t: split(t, 0).update(behavior="Removed"), "behavior='Removed', ours 'Isolated'"),
        (lambda t: split(t, 0).update(invert=True), "Split has invert=True, ours False"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "it has a normalizer, {'type': 'NFC'}"),
        (lambda t: t["model"].update(dropout=0.1), "BPE has dropout=0.1, ours none"),
        (lambda t: t["model"].update(end_of_word_suffix="w"), "has end_of_word_suffix='w'"),
        (lambda t: t["model"].update(merges=t["model"]["merges"][:3]), "22 of our 25 merges"),
        (lambda t: t["model"]["merges"].reverse(), "merges are in another order"),
        (lambda t: t["model"]["merges"].append(["q", "q"]), "1 merges give no token: 'qq'"),
        (lambda t: t["model"].pop("merges"), "damaged, or no byte-level BPE.*merges"),
        (lambda t: t["model"]["merges"].append(["a", 2]), "damaged, or no byte-level BPE"),
        (lambda t: t["model"]["vocab"].update(a="a"), "not all of its ranks are whole numbers"),
    ],
)
def test_another_kind_of_tokenizer_is_told(change, told, tokenizer, tmp_path):
    stored = json.loads(json.dumps(tokenizer.to_hugging_face()))
    change(stored)
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=told):
        read_tokenizer_json(tmp_path / "tokenizer.json")


def test_safetensors_in_parts_and_in_bfloat16(tmp_path):
    """Written by torch's own writer, which knows bfloat16."""
    import safetensors.torch

    tensors = {
        "a": torch.randn(3, 4).bfloat16(),
        "b": torch.randn(5).half(),
        "c": torch.randn(2, 2),
    }
    safetensors.torch.save_file({"a": tensors["a"]}, tmp_path / "model-1.safetensors")
    safetensors.torch.save_file({n: tensors[n] for n in "bc"}, tmp_path / "model-2.safetensors")
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    read = read_safetensors(tmp_path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value.float().numpy())
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model-2\.safetensors"):
        read_safetensors(tmp_path)
