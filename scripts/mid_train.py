"""Midtraining: the base model learns the formats of conversation, multiple choice and tools.

    python -m scripts.mid_train                  # the deepest base model, one pass
    python -m scripts.mid_train --data offline --num-iterations 300
    python -m scripts.mid_train --data offline --data mine.jsonl

Reads the hub's task sets when `data_download --all` has fetched them, and offline tasks otherwise.
A file of your own has a line for each conversation: {"messages": [...]}, {"question", "answer"}
or {"question", "choices", "answer"}; one in twenty is held out. Batch and learning rates are those
of the base run unless given.
"""

from dataclasses import dataclass

from jaxchat import cli
from jaxchat.finetune import Lesson, finetune
from jaxchat.finetune_options import FinetuneOptions
from jaxchat.stages import find_output
from jaxchat.tasks.mixtures import (
    default_source,
    mid_mixture,
    sample_questions,
    title,
    validation_mixture,
)


@dataclass(frozen=True)
class Config(FinetuneOptions):
    """Every option of midtraining."""


def main(config: Config) -> None:
    """Train on the mixture, and add a section to the report."""
    # before slow work
    find_output("mid", config.source, config.model_tag, config.step, config.output_tag)
    sources = config.data or (default_source(),)
    lesson = Lesson(
        stage="mid",
        script="mid_train",
        title=f"Midtraining ({title(sources)})",
        train=mid_mixture(*sources, identity=config.identity),
        val=validation_mixture(*sources),
        questions=sample_questions(*sources),
    )
    finetune(config, lesson)


if __name__ == "__main__":
    cli.run(main, Config)
