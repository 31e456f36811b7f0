"""Export a model for other programs.

    python -m scripts.export --format hf -o DIR                  # the finetuned model
    python -m scripts.export --format hf -o DIR -i base -g d12   # a chosen one

DIR becomes a Hugging Face folder: weights, configuration, tokenizer, chat template and a model card
with the report's results. Stock transformers loads a model of the classic preset; one of the modern
preset brings its code and is loaded with trust_remote_code=True.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from jaxchat import cli
from jaxchat.artifacts import base_dir
from jaxchat.backend import DEFAULT_BACKEND, BackendName
from jaxchat.export import export_hugging_face, make_way, sections_of
from jaxchat.report import Report, Subject
from jaxchat.stages import StageName, load_model


@dataclass(frozen=True)
class Config:
    """Which model, and where it goes."""

    output: Annotated[Path, cli.arg(aliases=["-o"])]
    """Folder to make."""
    format: Literal["hf"] = "hf"
    """hf: Hugging Face transformers."""
    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "sft"
    """Stage of the model."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Model of that stage, such as d12; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Checkpoint of that model; the newest when not set."""
    backend: BackendName = DEFAULT_BACKEND
    """Framework that reads the checkpoint."""


def main(config: Config) -> None:
    """Load, write, and say where."""
    make_way(config.output)
    model = load_model(
        config.source, backend=config.backend, model_tag=config.model_tag, step=config.step
    )
    subject = Subject(config.source, model.tag, model.meta.get("run"), model.meta["step"])
    sections = sections_of(Report(base_dir()).sections(), subject)
    name = f"jaxchat {config.source} {model.tag}"
    export_hugging_face(model, config.output, name=name, source=config.source, sections=sections)
    size = sum(path.stat().st_size for path in config.output.iterdir())
    print(f"{name}, step {model.meta['step']}: {size:,} bytes in {config.output}")


if __name__ == "__main__":
    cli.run(main, Config)
