"""SmolTalk: general conversations, for small models (huggingface.co/HuggingFaceTB)."""

from jaxchat.conversation import Conversation
from jaxchat.tasks.base import Task
from jaxchat.tasks.hub import HubRows


class SmolTalk(Task):
    """`split` is train (460 K conversations) or test (24 K). Nothing to judge."""

    name = "SmolTalk"

    def __init__(self, split: str) -> None:
        self._rows = HubRows("smoltalk", split)

    def _examples(self) -> int:
        return len(self._rows)

    def _example(self, index: int) -> Conversation:
        return {"messages": self._rows[index]["messages"]}

    def _identity(self) -> str:
        return self._rows.identity
