"""GSM8K: word problems of grade school, solved step by step (arXiv 2110.14168).

Its solutions mark every calculation, `48/2 = <<48/2=24>>24`; here those become calls of the
calculator, which is how the model learns to use it.
"""

from jaxchat.conversation import Conversation
from jaxchat.tasks.answers import call_parts, same_answer
from jaxchat.tasks.base import Kind, Task, exchange, reference
from jaxchat.tasks.hub import HubRows


class GSM8K(Task):
    """`split` is train (7,473 problems) or test (1,319)."""

    name = "GSM8K"
    kind: Kind = "generative"

    def __init__(self, split: str) -> None:
        self._rows = HubRows("gsm8k", split)

    def evaluate(self, problem: Conversation, reply: str) -> bool:
        return same_answer(reply, reference(problem))

    def _examples(self) -> int:
        return len(self._rows)

    def _example(self, index: int) -> Conversation:
        row = self._rows[index]
        return exchange(row["question"], call_parts(row["answer"]))

    def _identity(self) -> str:
        return self._rows.identity
