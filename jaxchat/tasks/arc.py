"""ARC: science questions of grade-school exams (arXiv 1803.05457), in two difficulties."""

from jaxchat.conversation import Conversation
from jaxchat.tasks.base import MultipleChoice, ask_choice
from jaxchat.tasks.hub import HubRows

SUBSETS = {"Easy": "arc-easy", "Challenge": "arc-challenge"}


class ARC(MultipleChoice):
    """`subset` is Easy or Challenge, `split` train or test. Most questions have four choices."""

    def __init__(self, subset: str, split: str) -> None:
        if subset not in SUBSETS:
            raise ValueError(f"ARC subset {subset!r}: choose one of {', '.join(SUBSETS)}")
        self.name = f"ARC-{subset}"
        self._rows = HubRows(SUBSETS[subset], split)

    def _examples(self) -> int:
        return len(self._rows)

    def _example(self, index: int) -> Conversation:
        row = self._rows[index]
        # some rows number their choices 1 to 4: the key is looked up, not interpreted
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        if row["answerKey"] not in labels:
            raise ValueError(f"{self.name}[{index}]: key {row['answerKey']!r} is not in {labels}")
        return ask_choice(row["question"], texts, labels.index(row["answerKey"]))

    def _identity(self) -> str:
        return self._rows.identity
