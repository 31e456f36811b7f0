"""Tasks to test with, and what they show."""

import itertools
import json

import pyarrow as pa
import pyarrow.parquet as pq

from jaxchat.tasks.base import Task
from jaxchat.tasks.hub import HUB_SETS
from jaxchat.tokenizer import Tokenizer
from tests.real_data import DATA

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'


class Numbers(Task):
    """0, 1, ... as conversations."""

    def __init__(self, count, name="numbers"):
        self.name, self.count = name, count

    def _examples(self):
        return self.count

    def _example(self, index):
        return {"messages": [{"role": "user", "content": f"{self.name} {index}"}]}

    def _identity(self):
        return f"{self.name} {self.count}"


def shown(task):
    return [conversation["messages"][0]["content"] for conversation in task]


def calls_of(conversation):
    for message in conversation["messages"]:
        if isinstance(message["content"], list):
            for part, following in itertools.pairwise(message["content"]):
                if part["type"] == "python":
                    yield part["text"], following["text"]


def write_split(name, split, rows, *, shards=1):
    directory = HUB_SETS[name].directory
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = directory / f"{split}-{number:05d}-of-{shards:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows[number::shards]), path)


def arc_row(question, texts, key, labels="ABCDE"):
    choices = {"text": texts, "label": list(labels[: len(texts)])}
    return {"id": "x", "question": question, "choices": choices, "answerKey": key}


def read_lines(path):
    return [json.loads(line) for line in (DATA / path).read_text().rstrip("\n").split("\n")]
