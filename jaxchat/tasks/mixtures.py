"""What each chat stage reads and what chat_eval asks: DESIGN's mixtures, and their offline twins.

`hub` is the real thing. `offline` needs no network: the documentation stands in for general
conversation and for MMLU and ARC, generated word problems for GSM8K; its sizes suit a model that
trains for minutes on a CPU, and its scores compare with nothing but each other.
"""

from pathlib import Path

from jaxchat.tasks.arc import ARC
from jaxchat.tasks.arithmetic import Arithmetic
from jaxchat.tasks.base import Task, TaskMixture
from jaxchat.tasks.customjson import IDENTITY, CustomJSON
from jaxchat.tasks.documentation import DocumentationChoice, DocumentationQA
from jaxchat.tasks.gsm8k import GSM8K
from jaxchat.tasks.hub import missing_sets
from jaxchat.tasks.humaneval import HumanEval
from jaxchat.tasks.mmlu import MMLU
from jaxchat.tasks.smoltalk import SmolTalk
from jaxchat.tasks.spellingbee import SimpleSpelling, SpellingBee

SOURCES = ("hub", "offline")

SEED = 42
"""Of every shuffle."""

CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
"""The tasks whose centred mean is ChatCORE."""

OFFLINE_EVAL = ("Documentation", "Arithmetic", "HumanEval", "SpellingBee", "SimpleSpelling")
"""What is asked without the hub's sets."""

QUESTIONS = {
    "hub": (
        "Who are you?",
        "What is the capital of France?",
        "A book costs 12 dollars. How much do 7 books cost?",
        "How many times does the letter r occur in strawberry?",
    ),
    "offline": (
        "Who are you?",
        "What does numpy.linalg.solve do?",
        "A book costs 12 dollars. How much do 7 books cost?",
        "How many times does the letter r occur in strawberry?",
    ),
}
"""What a chat model is asked when a run shows samples, by source."""

SPELLING_EVAL = 256
"""Questions of SpellingBee, as upstream."""

ARITHMETIC_EVAL = 1000


def default_source() -> str:
    """What to read when nobody says: the hub's sets when all have been downloaded."""
    return "offline" if missing_sets() else "hub"


def check_source(source: str) -> None:
    """Raise for a source that does not exist or is not here, with the command that fetches it."""
    if source not in SOURCES:
        raise ValueError(f"data {source!r}: choose one of {', '.join(SOURCES)}")
    if source == "hub" and (missing := missing_sets()):
        raise FileNotFoundError(
            f"the task sets {', '.join(missing)} are not complete on this machine; fetch them "
            "with python -m scripts.data_download --all, or use the offline tasks"
        )


def mid_mixture(source: str, *, identity: Path = IDENTITY) -> TaskMixture:
    """Midtraining: the formats of conversation, choice and tool, in bulk."""
    check_source(source)
    persona = CustomJSON(identity)
    if source == "hub":
        tasks: list[Task] = [
            SmolTalk("train"),
            MMLU("auxiliary_train"),
            GSM8K("train"),
            *_repeat(persona, 2000),
            SimpleSpelling("train", 200_000),
            SpellingBee("train", 80_000),
        ]
    else:
        tasks = [
            DocumentationQA("train"),
            DocumentationChoice("train").shuffled(SEED)[:24_000],
            Arithmetic("train", 8_000),
            *_repeat(persona, 800),
            SimpleSpelling("train", 4_000),
            SpellingBee("train", 4_000),
        ]
    return TaskMixture(tasks, seed=SEED, name=f"midtraining ({source})")


def sft_mixture(source: str, *, identity: Path = IDENTITY) -> TaskMixture:
    """Finetuning: fewer and better conversations."""
    check_source(source)
    persona = CustomJSON(identity)
    if source == "hub":
        tasks: list[Task] = [
            ARC("Easy", "train"),
            ARC("Challenge", "train"),
            GSM8K("train"),
            SmolTalk("train")[:10_000],
            *_repeat(persona, 1000),
            SimpleSpelling("train", 300),
            SpellingBee("train", 300),
        ]
    else:
        # indices that midtraining has not seen where there are more of them
        tasks = [
            DocumentationChoice("train").shuffled(SEED)[24_000:32_000],
            DocumentationQA("train").shuffled(SEED)[:2_000],
            Arithmetic("train", 12_000)[8_000:],
            *_repeat(persona, 400),
            SimpleSpelling("train", 4_300)[4_000:],
            SpellingBee("train", 5_000)[4_000:],
        ]
    return TaskMixture(tasks, seed=SEED, name=f"finetuning ({source})")


def validation_mixture(source: str) -> Task:
    """Held-out conversations, for the validation loss of both stages."""
    check_source(source)
    if source == "hub":
        tasks: list[Task] = [SmolTalk("test"), MMLU("test")[:5_200], GSM8K("test")[:420]]
    else:
        tasks = [
            DocumentationQA("val"),
            DocumentationChoice("val"),
            Arithmetic("test", 400),
            SpellingBee("test", 200),
        ]
    return TaskMixture(tasks, seed=SEED, name=f"validation ({source})")


def rl_tasks(source: str) -> tuple[Task, Task]:
    """What reinforcement learning trains on and what it is judged on."""
    check_source(source)
    if source == "hub":
        return GSM8K("train"), GSM8K("test")
    return Arithmetic("train", 20_000), Arithmetic("test", ARITHMETIC_EVAL)


def eval_names(source: str) -> tuple[str, ...]:
    """The tasks that a source is evaluated on."""
    return CHATCORE if source == "hub" else OFFLINE_EVAL


def eval_task(name: str, *, sandbox: str = "monty") -> Task:
    """An evaluation task by name, upper or lower case; its test split."""
    known = {each.lower(): each for each in (*CHATCORE, *OFFLINE_EVAL)}
    if name.lower() not in known:
        raise ValueError(f"task {name!r}: choose one of {', '.join(known.values())}")
    match known[name.lower()]:
        case "ARC-Easy":
            return ARC("Easy", "test")
        case "ARC-Challenge":
            return ARC("Challenge", "test")
        case "MMLU":
            return MMLU("test")
        case "GSM8K":
            return GSM8K("test")
        case "HumanEval":
            return HumanEval(sandbox=sandbox)
        case "SpellingBee":
            return SpellingBee("test", SPELLING_EVAL)
        case "SimpleSpelling":
            return SimpleSpelling("test", SPELLING_EVAL)
        case "Arithmetic":
            return Arithmetic("test", ARITHMETIC_EVAL)
        case _:
            return DocumentationChoice("val")


def _repeat(task: Task, rows: int) -> list[Task]:
    """`task` as often as it takes to make at least about `rows` conversations of it."""
    return [task] * max(1, round(rows / len(task)))
