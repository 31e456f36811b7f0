"""MMLU: four-choice questions on 57 subjects (arXiv 2009.03300), and their training set."""

from jaxchat.conversation import Conversation
from jaxchat.tasks.base import MultipleChoice, ask_choice
from jaxchat.tasks.hub import HubRows


class MMLU(MultipleChoice):
    """`split` is auxiliary_train (100 K questions of other exams) or test (14 K)."""

    name = "MMLU"

    def __init__(self, split: str) -> None:
        self._rows = HubRows("mmlu", split)

    def _examples(self) -> int:
        return len(self._rows)

    def _example(self, index: int) -> Conversation:
        row = self._rows[index]
        return ask_choice(row["question"], row["choices"], row["answer"])

    def _identity(self) -> str:
        return self._rows.identity
