"""The models of the pipeline's stages: where they are, which there are, and loading one.

A model is a folder of checkpoints below its stage's, named by depth unless it was given a name.
What a checkpoint is made of, checkpoint.py knows.
"""

import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxchat.artifacts import base_dir
from jaxchat.backend import DEFAULT_BACKEND, Backend, backend_class
from jaxchat.checkpoint import CheckpointStore, load_arrays
from jaxchat.config import GPTConfig
from jaxchat.tokenizer import Tokenizer

StageName: TypeAlias = Literal["base", "mid", "sft", "rl"]
"""Stages of the pipeline that make a model."""

Resume: TypeAlias = Literal["auto", "never"]
"""Whether a run continues what is there, or starts anew and sets that aside."""

STAGE_FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
"""Where each stage of the pipeline keeps its models, below the base directory."""

STAGE_SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
"""What trains them."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to use, with the tokenizer it was trained with."""

    backend: Backend
    tokenizer: Tokenizer
    meta: Mapping[str, Any]
    tag: str
    """Which model of its stage."""
    path: Path
    """The folder of the checkpoint."""


def stage_directory(source: str, model_tag: str) -> Path:
    """The folder that holds the checkpoints of one model of one stage.

    ValueError for a tag that is no folder below the stage's: `d4`, or `d4/replaced-<time>`.
    """
    if any(part in ("", ".", "..") for part in model_tag.split("/")):
        raise ValueError(f"model tag {model_tag!r}: give the name of a folder, as in d4")
    return _stage_folder(source) / model_tag


def tag_of(source: str, directory: Path) -> str:
    """By what tag a stage's folder of checkpoints is found: what `stage_directory` makes of it."""
    return directory.relative_to(_stage_folder(source)).as_posix()


def _stage_folder(source: str) -> Path:
    if source not in STAGE_FOLDERS:
        raise ValueError(f"source {source!r}: choose one of {', '.join(STAGE_FOLDERS)}")
    return base_dir() / STAGE_FOLDERS[source]


def model_tags(source: str) -> list[str]:
    """The models of a stage; FileNotFoundError, with the remedy, when there is none."""
    folder, tags = _stage_folder(source), _tags(source)
    if not tags:
        others = [stage for stage in STAGE_FOLDERS if _tags(stage)]
        remedy = (
            f"take another stage's (-i {others[-1]})"
            if others
            else "make one of each stage with bash speedrun_jax.sh"
        )
        raise FileNotFoundError(
            f"no {source} model in {folder}: train one with "
            f"python -m scripts.{STAGE_SCRIPTS[source]}, or {remedy}"
        )
    return tags


def _tags(source: str) -> list[str]:
    folders = _stage_folder(source).glob("*")
    return sorted(path.name for path in folders if CheckpointStore(path).steps())


def find_model_tag(source: str, *, but: str | None = None) -> str:
    """The deepest model of a stage (`d<depth>`), or the newest when no tag is of that form.

    `but` is chosen only where there is no other.
    """
    tags, folder = model_tags(source), _stage_folder(source)
    tags = [tag for tag in tags if tag != but] or tags
    depths = {tag: int(tag[1:]) for tag in tags if re.fullmatch(r"d\d+", tag)}
    if depths:
        return max(depths, key=lambda tag: depths[tag])
    return max(tags, key=lambda tag: (folder / tag).stat().st_mtime)


def how_to_talk(source: str, model_tag: str) -> str:
    """For the end of a stage: the command that talks to its result."""
    return f"talk to it: python -m scripts.chat_cli -i {source} -g {shlex.quote(model_tag)}"


class Found(NamedTuple):
    """A checkpoint that is there."""

    tag: str
    store: CheckpointStore
    step: int


def find_checkpoint(source: str, model_tag: str | None = None, step: int | None = None) -> Found:
    """A stage's model by tag and step, or the deepest and the newest.

    Costs nothing: to be asked before slow work. FileNotFoundError says what is there instead.
    """
    tag = model_tag or find_model_tag(source)
    store = CheckpointStore(stage_directory(source, tag))
    steps = store.steps()
    if not steps:
        known = ", ".join(model_tags(source))
        raise FileNotFoundError(f"no {source} model {tag!r} in {store.directory.parent}: {known}")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise FileNotFoundError(
            f"no checkpoint of step {step} in {store.directory}; steps there: {known}"
        )
    return Found(tag, store, steps[-1] if step is None else step)


def find_source(
    stage: str, source: str, model_tag: str | None, step: int | None, output_tag: str | None
) -> Found:
    """What a stage begins with, which is not its own result.

    The same command, repeated after a kill, would find that as the newest model. Errors of
    `find_checkpoint`.
    """
    if not model_tag and source == stage:
        model_tag = find_model_tag(source, but=output_tag)
    return find_checkpoint(source, model_tag, step)


def find_output(
    stage: str, source: str, model_tag: str | None, step: int | None, output_tag: str | None
) -> Path:
    """Where a stage leaves what it makes of a model: under the model's name, or another.

    Errors of `find_checkpoint`, and ValueError for a name that is no plain one and for the model's
    own place: continued there, a run would take its own result for what it began with.
    """
    if output_tag is not None:
        check_new_tag("--output-tag", output_tag)
    found = find_source(stage, source, model_tag, step, output_tag)
    output = stage_directory(stage, output_tag or found.tag)
    if output.exists() and output.samefile(found.store.directory):
        raise ValueError(
            f"the result would take the place of {source} model {found.tag!r}, of which it is "
            "made: name it with --output-tag"
        )
    return output


def check_new_tag(flag: str, tag: str) -> None:
    """ValueError, naming the flag, for what cannot be the name of a model that is to be made.

    Below another folder it would be listed nowhere.
    """
    if not re.fullmatch(r"[^./-][^/]*", tag):
        raise ValueError(
            f"{flag} {tag!r}: give the name of one folder, which does not begin with a dot or a "
            "dash"
        )


def recorded(store: CheckpointStore, backend: Backend, fact: str, *, resume: Resume) -> Any:
    """What the run that goes on in this folder was made of; None where one begins anew.

    For what must be known before `restore` can load it. All processes must ask, and the first one's
    answer counts.
    """
    answer = None
    for step in reversed(store.steps()) if resume == "auto" else ():
        with suppress(OSError, ValueError):  # damaged: `restore` says so
            answer = store.read_meta(step).get(fact)
            break
    return backend.gather(answer)[0]


def load_model(
    source: str,
    *,
    backend: str = DEFAULT_BACKEND,
    model_tag: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    device: int | None = None,
    mesh: str | None = None,
) -> LoadedModel:
    """Load the weights of a stage's model: by tag and step, or the deepest and the newest.

    `device`: the one local device to put them on; None uses all of them, shared as `mesh` says.
    """
    tag, store, step = find_checkpoint(source, model_tag, step)
    meta = store.read_meta(step)
    tokenizer = tokenizer_of(meta, store.path(step))
    config = GPTConfig(**meta["model"])
    model = backend_class(backend)(config, dtype=dtype, device=device, mesh=mesh)
    load_arrays(model, store.path(step), meta, training=False)
    return LoadedModel(model, tokenizer, meta, tag, store.path(step))


def tokenizer_of(meta: Mapping[str, Any], path: Path) -> Tokenizer:
    """What the checkpoint in `path` was trained with: the base directory's, or an earlier one.

    ValueError where neither `tok_train` has it now nor left it beside the one that replaced it.
    """
    newest, trained_with = Tokenizer.load(base_dir() / "tokenizer"), meta.get("tokenizer")
    if newest.fingerprint == trained_with:
        return newest
    for directory in base_dir().glob("tokenizer-replaced-*"):
        with suppress(OSError, ValueError):  # damaged: it was another's
            earlier = Tokenizer.load(directory)
            if earlier.fingerprint == trained_with:
                return earlier
    raise ValueError(
        f"{path} was trained with tokenizer {trained_with}, but the base directory holds "
        f"{newest.fingerprint}; point JAXCHAT_BASE_DIR at the run's own folder, or train the "
        "model again"
    )
