"""A stage's model is found by tag and step, and what is missing is said with what is there."""

import os
import shlex
from types import SimpleNamespace

import pytest

from jaxchat.checkpoint import META, CheckpointStore
from jaxchat.stages import (
    find_checkpoint,
    find_model_tag,
    find_output,
    find_source,
    how_to_talk,
    load_model,
    recorded,
    stage_directory,
    tag_of,
    tokenizer_of,
)
from jaxchat.tokenizer import Tokenizer
from scripts import base_train

OURSELVES = SimpleNamespace(gather=lambda value: [value])
"""A backend of one process."""


def trained(tag, steps=(10, 20, 30), source="base"):
    """What a finished run leaves, as far as finding it goes."""
    for step in steps:
        path = CheckpointStore(stage_directory(source, tag)).path(step)
        path.mkdir(parents=True)
        (path / META).write_text("{}")


def test_the_deepest_model_is_found_or_the_missing_one_explained(base_dir):
    with pytest.raises(FileNotFoundError, match=r"train one with python -m scripts\.base_train"):
        find_model_tag("base")
    with pytest.raises(FileNotFoundError, match=r"scripts\.chat_sft, or .* bash speedrun_jax.sh"):
        find_model_tag("sft")
    for tag in ("d4", "d12", "wide", "d24-wide"):
        trained(tag)
    stage_directory("base", "d99").mkdir()  # of a run that has saved nothing yet
    assert find_model_tag("base") == "d12"
    with pytest.raises(FileNotFoundError, match=r"scripts\.chat_sft, or .*another .*\(-i base\)"):
        find_model_tag("sft")
    trained("d4", source="mid")
    with pytest.raises(FileNotFoundError, match=r"scripts\.chat_sft, or .*another .*\(-i mid\)"):
        find_model_tag("sft")
    with pytest.raises(ValueError, match="source 'bass': choose one of base, mid"):
        stage_directory("bass", "d4")


def test_without_depths_the_newest_model_is_found(base_dir):
    for age, tag in enumerate(("narrow", "wide")):
        trained(tag)
        os.utime(stage_directory("base", tag), (1000 - age, 1000 - age))
    assert find_model_tag("base") == "narrow"


def test_the_newest_step_is_taken_unless_another_is_asked_for(base_dir):
    trained("d4")
    assert find_checkpoint("base").step == 30
    assert find_checkpoint("base", step=10).step == 10


def test_a_result_has_the_name_of_its_source_or_another_but_not_its_place(base_dir):
    trained("d4")
    assert find_output("mid", "base", None, None, None) == stage_directory("mid", "d4")
    assert find_output("mid", "base", None, None, "new") == stage_directory("mid", "new")
    assert find_output("base", "base", None, 20, "new") == stage_directory("base", "new")
    for output_tag in (None, "d4"):
        with pytest.raises(ValueError, match=r"the place of base model 'd4'.*--output-tag"):
            find_output("base", "base", "d4", None, output_tag)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        find_output("mid", "base", None, 7, None)


@pytest.mark.parametrize(
    "name", ["", "d4/", "./d4", "d4/.", "../base_checkpoints/d4", ".", "a/b", "-g"]
)
def test_the_name_of_a_result_is_one_folder(base_dir, name):
    """Some of these were the source's own folder, which `--resume never` then moved aside."""
    trained("d4")
    with pytest.raises(ValueError, match=r"--output-tag '.*': give the name of one folder"):
        find_output("base", "base", "d4", None, name)
    if name:  # an empty one asks for the default
        with pytest.raises(ValueError, match=r"--model-tag '.*': give the name of one folder"):
            base_train.Config(model_tag=name)


def test_a_link_to_the_models_own_place_is_its_own_place(base_dir):
    trained("d4")
    stage_directory("base", "other").symlink_to(stage_directory("base", "d4"))
    with pytest.raises(ValueError, match="the place of base model 'd4'"):
        find_output("base", "base", "d4", None, "other")


@pytest.mark.parametrize("tag", ["d4/", "./d4", "../mid_checkpoints/d4", "/d4"])
def test_a_tag_is_a_folder_below_its_stages(tag):
    with pytest.raises(ValueError, match="give the name of a folder"):
        stage_directory("base", tag)


def test_a_run_that_was_set_aside_is_a_model_like_any_other(base_dir):
    """How a stage ended that began with one: `-g replaced-20261128-120000`, which is not there."""
    tag = "d4/replaced-20261128-120000"
    trained(tag)
    assert find_checkpoint("base", tag).tag == tag
    output = find_output("mid", "base", tag, None, None)
    assert output == stage_directory("mid", tag)
    assert tag_of("mid", output) == tag
    assert how_to_talk("mid", tag).endswith(f"-i mid -g {tag}")
    *_, last = shlex.split(how_to_talk("mid", "my model"))
    assert last == "my model"


def test_a_repeated_command_does_not_begin_with_its_own_result(base_dir):
    """Where no tag is a depth the newest model counts: after a kill that was the result."""
    trained("old")
    trained("mine")
    os.utime(stage_directory("base", "old"), (1000, 1000))
    assert find_source("base", "base", None, None, "mine").tag == "old"
    assert find_output("base", "base", None, None, "mine") == stage_directory("base", "mine")
    assert find_source("mid", "base", None, None, "mine").tag == "mine", "of another stage"
    with pytest.raises(ValueError, match="the place of base model 'mine'"):
        find_output("base", "base", "mine", None, "mine")
    trained("d4")
    trained("d8")
    assert find_source("base", "base", None, None, "d8").tag == "d4"


def test_the_only_model_there_is_cannot_be_its_own_source(base_dir):
    trained("mine")
    with pytest.raises(ValueError, match="the place of base model 'mine'"):
        find_output("base", "base", None, None, "mine")


def test_what_goes_on_says_what_it_is_made_of(base_dir):
    """The newest checkpoint that can be read, unless the run starts over."""
    store = CheckpointStore(stage_directory("base", "d4"))
    assert recorded(store, OURSELVES, "plan", resume="auto") is None
    trained("d4")
    for step, text in ((10, '{"plan": "a"}'), (20, '{"plan": "b"}'), (30, '{"plan"')):
        (store.path(step) / META).write_text(text)
    assert recorded(store, OURSELVES, "plan", resume="auto") == "b"
    assert recorded(store, OURSELVES, "plan", resume="never") is None


def test_a_model_finds_the_tokenizer_that_another_has_replaced(base_dir):
    """It refused the new one, and the user had to give the old one its name again."""
    made = {}
    for size, name in ((272, "tokenizer-replaced-1"), (270, "tokenizer-replaced-2"), (268, "")):
        tokenizer = Tokenizer.train(iter(["some text and some more text"]), vocab_size=size)
        tokenizer.save(base_dir / (name or "tokenizer"))
        made[size] = tokenizer.fingerprint
    (base_dir / "tokenizer-replaced-2/tokenizer.bpe").write_text("damaged")
    for size in (272, 268):
        found = tokenizer_of({"tokenizer": made[size]}, base_dir)
        assert (found.fingerprint, found.vocab_size) == (made[size], size)
    for lost in (made[270], "other"):
        with pytest.raises(ValueError, match=f"was trained with tokenizer {lost}"):
            tokenizer_of({"tokenizer": lost}, base_dir)


def test_a_model_of_another_tokenizer_is_not_loaded(base_dir):
    Tokenizer.train(iter(["some text and some more text"]), vocab_size=270).save(
        base_dir / "tokenizer"
    )
    trained("d4", steps=(10,))
    (base_dir / "base_checkpoints/d4/step_000010" / META).write_text('{"tokenizer": "other"}')
    with pytest.raises(ValueError, match="was trained with tokenizer other"):
        load_model("base", backend="torch")


def test_a_step_that_is_not_there_lists_those_that_are(base_dir):
    trained("d4")
    with pytest.raises(FileNotFoundError, match="steps there: 10, 20, 30"):
        load_model("base", backend="jax", model_tag="d4", step=11)
    with pytest.raises(FileNotFoundError, match=r"no base model 'd9' in .*: d4"):
        load_model("base", backend="jax", model_tag="d9")
