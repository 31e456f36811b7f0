"""A stage's model is found by tag and step, and what is missing is said with what is there."""

import os

import pytest

from jaxchat.checkpoint import META, CheckpointStore
from jaxchat.stages import (
    check_tokenizer,
    find_checkpoint,
    find_model_tag,
    find_output,
    load_model,
    stage_directory,
)
from jaxchat.tokenizer import Tokenizer


def trained(tag, steps=(10, 20, 30)):
    """What a finished run leaves, as far as finding it goes."""
    for step in steps:
        path = CheckpointStore(stage_directory("base", tag)).path(step)
        path.mkdir(parents=True)
        (path / META).write_text("{}")


def test_the_deepest_model_is_found_or_the_missing_one_explained(base_dir):
    with pytest.raises(FileNotFoundError, match=r"train one with python -m scripts\.base_train"):
        find_model_tag("base")
    with pytest.raises(FileNotFoundError, match=r"train one with python -m scripts\.chat_sft"):
        find_model_tag("sft")
    for tag in ("d4", "d12", "wide"):
        trained(tag)
    assert find_model_tag("base") == "d12"
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


def test_another_tokenizer_is_refused_by_name(tmp_path):
    tokenizer = Tokenizer.train(iter(["some text and some more text"]), vocab_size=270)
    check_tokenizer({"tokenizer": tokenizer.fingerprint}, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="was trained with tokenizer other"):
        check_tokenizer({"tokenizer": "other"}, tokenizer, tmp_path)


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
