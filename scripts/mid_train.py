"""Midtraining: the base model learns the formats of conversation, multiple choice and tools.

    python -m scripts.mid_train                  # the deepest base model, one pass
    python -m scripts.mid_train --data offline --num-iterations 300

Reads the hub's task sets when `data_download --all` has fetched them,
and offline tasks otherwise. Batch sizes and learning rates are those of the base run unless given.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxchat import cli
from jaxchat.finetune import Lesson, finetune
from jaxchat.finetune_options import FinetuneOptions
from jaxchat.stages import find_checkpoint
from jaxchat.tasks.customjson import IDENTITY
from jaxchat.tasks.mixtures import QUESTIONS, default_source, mid_mixture, validation_mixture


@dataclass(frozen=True)
class Config(FinetuneOptions):
    """Every option of midtraining."""

    data: str | None = None
    """hub or offline: where the tasks come from; the hub's when they have been downloaded."""
    identity: Path = IDENTITY
    """Conversations that say who the model is: a jsonl file of {"messages": [...]}."""


def main(config: Config) -> None:
    """Train on the mixture, and add a section to the report."""
    find_checkpoint(config.source, config.model_tag, config.step)  # before slow work
    source = config.data or default_source()
    lesson = Lesson(
        stage="mid",
        script="mid_train",
        title=f"Midtraining ({source} tasks)",
        train=mid_mixture(source, identity=config.identity),
        val=validation_mixture(source),
        questions=QUESTIONS[source],
    )
    finetune(config, lesson)


if __name__ == "__main__":
    cli.run(main, Config)
