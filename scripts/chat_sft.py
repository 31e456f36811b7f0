"""Supervised finetuning: fewer and better conversations, on top of midtraining.

    python -m scripts.chat_sft                   # the deepest midtrained model, one pass
    python -m scripts.chat_sft --source base --data offline
    python -m scripts.chat_sft --data mine.jsonl --epochs 3

Reads the hub's task sets when `data_download --all` has fetched them, and offline tasks otherwise.
A file of your own has a line for each conversation: {"messages": [...]}, {"question", "answer"}
or {"question", "choices", "answer"}; one in twenty is held out. Batch and learning rates are those
of the base run unless given.
"""

from dataclasses import dataclass
from typing import Annotated

from jaxchat import cli
from jaxchat.finetune import Lesson, finetune
from jaxchat.finetune_options import FinetuneOptions
from jaxchat.stages import StageName, find_output
from jaxchat.tasks.mixtures import (
    default_source,
    sample_questions,
    sft_mixture,
    title,
    validation_mixture,
)


@dataclass(frozen=True)
class Config(FinetuneOptions):
    """Every option of finetuning."""

    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "mid"
    """Stage of the model to start from: base, mid, sft or rl."""
    init_lr_frac: float = 0.2
    """Factor on every learning rate, of those that the base run began with."""
    warmdown_ratio: float = 1.0
    """Share of the run over which the learning rate falls."""


def main(config: Config) -> None:
    """Train on the mixture, and add a section to the report."""
    # before slow work
    find_output("sft", config.source, config.model_tag, config.step, config.output_tag)
    sources = config.data or (default_source(),)
    lesson = Lesson(
        stage="sft",
        script="chat_sft",
        title=f"Supervised finetuning ({title(sources)})",
        train=sft_mixture(*sources, identity=config.identity),
        val=validation_mixture(*sources),
        questions=sample_questions(*sources),
    )
    finetune(config, lesson)


if __name__ == "__main__":
    cli.run(main, Config)
