"""Bring in a model from elsewhere: an upstream nanochat checkpoint or a Hugging Face folder.

    python -m scripts.import_model --source nanochat ~/.cache/nanochat/base_checkpoints/d20
    python -m scripts.import_model --source hf DIR --stage sft

It becomes a checkpoint of a stage, with its tokenizer, in the base directory. A folder that
scripts.export wrote says stage and step itself. All of it is checked first; what does not fit is
told in one error and then nothing is written. Nothing in the files is executed.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from jaxchat import cli, convert
from jaxchat.artifacts import base_dir
from jaxchat.backend import DEFAULT_BACKEND, BackendName, backend_class
from jaxchat.checkpoint import CheckpointStore
from jaxchat.config import GPTConfig, count_params
from jaxchat.foreign_tokenizer import PICKLE_FILE, read_pickled_tokenizer, read_tokenizer_json
from jaxchat.stages import STAGE_FOLDERS, StageName, check_new_tag, how_to_talk, stage_directory
from jaxchat.tensor_files import read_safetensors
from jaxchat.tokenizer import HUGGING_FACE_FILE, Tokenizer


@dataclass(frozen=True)
class Config:
    """What to read, and what to call it here."""

    path: cli.Positional[Path]
    """Folder that holds the model."""
    source: Literal["nanochat", "hf"]
    """nanochat: model_*.pt and meta_*.json; hf: config.json and safetensors."""
    stage: Annotated[StageName | None, cli.arg(aliases=["-i"])] = None
    """What it is here; as its export or its parent folder's name says when not set, or base."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Its name here; d<layers> when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """nanochat: which checkpoint, or the newest; hf: its number here, or its export's, or 0."""
    tokenizer: Path | None = None
    """Its tokenizer.pkl or tokenizer.json; looked for in the folder and beside it when not set."""
    backend: BackendName = DEFAULT_BACKEND
    """Format to write; both backends read both."""

    def __post_init__(self) -> None:
        if self.step is not None and self.step < 0:
            raise ValueError(f"step {self.step} must be at least 0")


class Foreign(NamedTuple):
    """A model in our form, and where it comes from."""

    config: GPTConfig
    params: dict[str, np.ndarray]
    tokenizer: Tokenizer
    step: int
    origin: Mapping[str, Any]
    stage: str | None = None
    """Where the model itself says it."""


def main(config: Config) -> None:
    """Read and check everything, then write."""
    if not config.path.is_dir():
        raise FileNotFoundError(f"{config.path} is not a folder")
    if config.model_tag is not None:
        check_new_tag("--model-tag", config.model_tag)
    model = read_nanochat(config) if config.source == "nanochat" else read_hugging_face(config)
    if model.tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {model.tokenizer.vocab_size} tokens, the model "
            f"{model.config.vocab_size}: give the model's own with --tokenizer"
        )
    stage = config.stage or model.stage or stage_of(config.path)
    tag = config.model_tag or f"d{model.config.n_layer}"
    store = CheckpointStore(stage_directory(stage, tag))
    if store.steps():
        raise ValueError(f"{store.directory} holds a model already: choose another --model-tag")
    write(model, store, config.backend)
    print(
        f"{stage} model {tag}, step {model.step}: "
        f"{sum(count_params(model.config).values()):,} parameters and "
        f"{model.tokenizer.vocab_size:,} tokens, in {store.path(model.step)}"
    )
    print(how_to_talk(stage, tag))


def stage_of(path: Path) -> str:
    """By the name of the folder that the model's is in, which upstream and we have in common."""
    stages = {folder: stage for stage, folder in STAGE_FOLDERS.items()}
    return stages.get(path.resolve().parent.name, "base")


def read_nanochat(config: Config) -> Foreign:
    """An upstream checkpoint of either generation."""
    # torch takes four seconds to import, and the other source does not need it
    from torch_ref.weights import load_file

    found = {
        int(match[1]): path
        for path in config.path.glob("model_*.pt")
        if (match := re.fullmatch(r"model_(\d+)\.pt", path.name))
    }
    step = max(found, default=None) if config.step is None else config.step
    if step not in found:
        raise FileNotFoundError(
            f"no model_*.pt {'' if config.step is None else f'of step {config.step} '}in "
            f"{config.path}; steps there: {', '.join(map(str, sorted(found))) or 'none'}"
        )
    path = found[step]
    meta = read_json(path.with_name(path.name.replace("model_", "meta_")).with_suffix(".json"))
    if not isinstance(meta.get("model_config"), dict):
        raise ValueError(f"the meta file beside {path} has no model_config")
    tokenizer = read_tokenizer(config)
    model, params = convert.from_nanochat(load_file(path), meta["model_config"])
    origin = {"source": "nanochat", "file": str(path), "meta": meta}
    return Foreign(model, params, tokenizer, step, origin)


def read_hugging_face(config: Config) -> Foreign:
    """A folder of `NanoChatForCausalLM`, or one that scripts.export wrote."""
    described = read_json(config.path / "config.json")
    tokenizer = read_tokenizer(config)
    model, params = convert.from_hugging_face(read_safetensors(config.path), described)
    origin = {"source": "hf", "file": str(config.path), "config": described}
    stage, exported_step = exported_as(described)
    step = exported_step if config.step is None else config.step
    return Foreign(model, params, tokenizer, step, origin, stage)


def exported_as(described: Mapping[str, Any]) -> tuple[str | None, int]:
    """Stage and step that scripts.export wrote into config.json: no stage and 0 where it did not.

    ValueError for what it never writes.
    """
    said = described.get(convert.HUGGING_FACE_ORIGIN)
    if said is None:
        return None, 0
    stage, step = (said.get("stage"), said.get("step")) if isinstance(said, dict) else (None, None)
    if stage not in STAGE_FOLDERS or type(step) is not int or step < 0:
        raise ValueError(
            f"config.json says {convert.HUGGING_FACE_ORIGIN}={said!r:.80}, which should be a stage "
            f"({', '.join(STAGE_FOLDERS)}) and a step from 0 on: correct the entry or remove it"
        )
    return stage, step


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file. ValueError when it is anything else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def read_tokenizer(config: Config) -> Tokenizer:
    """The one asked for, or found in the folder, or where upstream's base directory has it."""
    folders = (config.path, config.path.parent.parent / "tokenizer")
    names = (PICKLE_FILE, HUGGING_FACE_FILE)
    places = [folder / name for folder in folders for name in names]
    path = config.tokenizer or next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"no tokenizer found at {', '.join(map(str, places))}: name it with --tokenizer"
        )
    return (read_pickled_tokenizer if path.suffix == ".pkl" else read_tokenizer_json)(path)


def write(model: Foreign, store: CheckpointStore, backend: str) -> None:
    """Write tokenizer and checkpoint, or neither.

    ValueError when the base directory has another tokenizer: its models need that one.
    """
    directory = base_dir() / "tokenizer"
    is_new = not directory.exists()
    if not is_new and Tokenizer.load(directory).fingerprint != model.tokenizer.fingerprint:
        raise ValueError(
            f"{directory} holds another tokenizer, which the models beside it need; import into "
            "a folder of its own by setting JAXCHAT_BASE_DIR"
        )
    writer = backend_class(backend)(model.config)
    writer.set_params(model.params)
    meta = {"tokenizer": model.tokenizer.fingerprint, "imported": model.origin}
    try:
        model.tokenizer.save(directory)
        store.save(model.step, writer, meta)
        store.finish()
    except BaseException:
        if is_new:
            shutil.rmtree(directory, ignore_errors=True)
        raise


if __name__ == "__main__":
    cli.run(main, Config)
