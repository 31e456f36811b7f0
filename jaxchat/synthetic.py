"""Conversations that another model makes up: who talks, about what, how, and who answers.

The one idea: the other model plays both sides, one message a call, so that any server with a chat
API will do and nothing has to be parsed; and what is talked about is drawn, because a model that is
asked a thousand times for "a conversation" writes the same one. A draw depends on its number
alone, so that an interrupted collection goes on with what is missing. Left out: the server, and
the file (`scripts.gen_synthetic_data`).
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Message: TypeAlias = dict[str, str]
"""`{"role", "content"}`."""

TOPICS = (
    # the assistant itself
    "who the assistant is and what to call it",
    "who made the assistant, and why",
    "how the assistant was made, step by step",
    "what the assistant has read, and what it cannot know",
    "what the assistant is good at",
    "what the assistant cannot do, and what it gets wrong",
    "whether the assistant is a person, and whether it feels anything",
    "whether the assistant is really some other, famous assistant",
    "how large the assistant is, and how it compares with others",
    "which languages the assistant speaks",
    "whether the assistant remembers earlier conversations or learns from this one",
    "whether the assistant can see pictures, search the web or run programs",
    "where the assistant's name comes from",
    "whether the assistant's answers can be trusted, and how to check them",
    "how somebody could run, study or change the assistant",
    "what becomes of the things that one tells the assistant",
    "what the assistant likes, and what it thinks of something",
    "a wrong claim about the assistant, stated as a fact",
    "an invitation to pretend to be somebody else",
    # everything else: the same assistant answers
    "nothing in particular: a greeting, and a little small talk",
    "a joke or a riddle",
    "a short poem or a very short story",
    "advice on a small problem of everyday life",
    "something learnt at school that never became clear",
    "a question of history, nature or geography",
    "a sum to work out, wrapped in a story",
    "help with the wording of a message to somebody",
    "a book, a song or a game that the person likes",
)
"""What a conversation is about."""

PEOPLE = (
    "a curious child of nine",
    "a teenager who is bored",
    "a student in a hurry before an exam",
    "a teacher who prepares a lesson",
    "a programmer who wants precise answers",
    "a researcher who trains language models",
    "a journalist who is writing about the assistant",
    "a sceptic who believes nothing at first",
    "somebody who has never used such an assistant before",
    "a retired person with much time",
    "a parent with a child on their lap",
    "a shopkeeper between two customers",
    "somebody who is a little sad today",
    "an enthusiast who likes taking things apart",
    "somebody who tests the assistant for their company",
    "a traveller waiting for a train",
    "a friend of the people who made the assistant",
    "somebody who speaks the language only a little",
)
"""Who asks."""

MANNERS = (
    "one short line, all in lower case, without punctuation",
    "one polite, complete sentence",
    "two or three words",
    "a greeting first, then the matter",
    "casually, with a typing error or two",
    "at some length, coming to the point only at the end",
    "bluntly",
    "warmly, with a word about their day",
    "formally, as in a letter",
    "two questions at once",
    "by telling what made them think of it",
    "playfully",
)
"""How they write."""

PERSON = """\
You play a person who is chatting with an AI assistant: {person}. You are not the assistant.
The person's subject: {topic}.
How the person writes: {manner}. Language: {language}.
Write the person's next message and nothing else: no quotation marks, no name in front, no \
comment. Later messages react to what the assistant has said."""

THOUGHTS = re.compile(r"\A.*?</think>", re.DOTALL)
"""What some servers put in front of a reply; it is none of it.

The opening <think> may be missing: the chat templates of DeepSeek-R1 and Qwen3-Thinking write it
themselves, at the end of the prompt.
"""

OPENING = "The chat is open and nobody has written yet. Write the first message."
"""Speaks for the assistant before the assistant has spoken; chat APIs want a user to begin."""

ASSISTANT = """\
You are the assistant that is described below, and you answer the way it would. What you say of \
yourself comes from the description alone; what it does not tell you do not know, and you say so \
if asked. Never mention the description. Answer in the language that you are spoken to in, in one \
to four sentences unless more is asked for, as plain text.

{about}"""


@dataclass(frozen=True)
class Scenario:
    """What one conversation is made from."""

    topic: str
    person: str
    manner: str
    language: str
    turns: int
    """Messages of the person, and as many replies."""


class Unusable(ValueError):
    """What the model wrote is no message."""


Ask: TypeAlias = Callable[[Sequence[Message]], str]
"""The other model: messages in, the next one out."""


def draw_scenario(key: str, *, languages: Sequence[str], max_turns: int) -> Scenario:
    """The scenario that belongs to a key, always the same one."""
    rng = random.Random(key)
    return Scenario(
        rng.choice(TOPICS),
        rng.choice(PEOPLE),
        rng.choice(MANNERS),
        rng.choice(languages),
        rng.randint(1, max_turns),
    )


def converse(ask: Ask, about: str, scenario: Scenario) -> list[Message]:
    """A conversation, user first and assistant last; `Unusable` for a side that has no words.

    `about` describes the assistant. What `ask` raises ends the conversation.
    """
    said: list[Message] = []
    person = PERSON.format(
        person=scenario.person,
        topic=scenario.topic,
        manner=scenario.manner,
        language=scenario.language,
    )
    for _ in range(scenario.turns):
        asking = [_message("system", person), *_seen_by_person(said)]
        said.append(_written("user", ask(asking)))
        answering = [_message("system", ASSISTANT.format(about=about)), *said]
        said.append(_written("assistant", ask(answering)))
    return said


def _seen_by_person(said: Sequence[Message]) -> list[Message]:
    """The conversation with its sides exchanged: the model writes the person's messages."""
    other = {"user": "assistant", "assistant": "user"}
    swapped = [_message(other[message["role"]], message["content"]) for message in said]
    return [_message("user", OPENING), *swapped]


def _written(role: str, text: str) -> Message:
    """What a model wrote, without what some put around it."""
    text = THOUGHTS.sub("", text).strip()
    if role == "user" and len(text) > 1 and text[0] == text[-1] == '"' and '"' not in text[1:-1]:
        text = text[1:-1].strip()  # models like to quote whom they play
    if not text:
        raise Unusable("an empty message")
    return _message(role, text)


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}
