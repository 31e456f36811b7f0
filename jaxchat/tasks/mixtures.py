"""What each chat stage reads and what chat_eval asks: DESIGN's mixtures, and their offline twins.

`hub` is the real thing. `offline` needs no network: the documentation stands in for general
conversation and for MMLU and ARC, generated word problems for GSM8K; its sizes suit a model that
trains for minutes on a CPU, and its scores compare with nothing but each other. Anything else is a
file of your own (customjson.py), a part of which is held out wherever it is trained on.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from jaxchat.conversation import first_question
from jaxchat.tasks.arc import ARC
from jaxchat.tasks.arithmetic import Arithmetic
from jaxchat.tasks.base import Task, TaskMixture
from jaxchat.tasks.customjson import IDENTITY, CustomJSON, CustomProblems
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

OWN_QUESTIONS = 4
"""How many held-out questions of a file of one's own are asked then."""

SHORT = 200
"""Characters of a question that is shown rather than a longer one."""

SPELLING_EVAL = 256
"""Questions of SpellingBee, as upstream."""

ARITHMETIC_EVAL = 1000


def default_source() -> str:
    """What to read when nobody says: the hub's sets when all have been downloaded."""
    return "offline" if missing_sets() else "hub"


@lru_cache(maxsize=8)
def _read(source: str, facts: tuple[int, int] | None) -> tuple[CustomJSON, CustomJSON]:
    del facts  # a file that has changed since is read anew
    return CustomJSON(source).split()


def _own(source: str) -> tuple[CustomJSON, CustomJSON]:
    """What is trained on and what is held out of a file, which is read once."""
    path = Path(source).expanduser()
    return _read(source, (path.stat().st_mtime_ns, path.stat().st_size) if path.exists() else None)


def is_own(source: str) -> bool:
    """Whether a source names a file."""
    return source not in SOURCES and (source.endswith(".jsonl") or Path(source).is_file())


def check_source(source: str) -> None:
    """Raise for a source that does not exist or is not here, with the command that fetches it."""
    if source not in SOURCES and not is_own(source):
        raise ValueError(f"data {source!r}: choose one of {', '.join(SOURCES)}, or a jsonl file")
    if source == "hub" and (missing := missing_sets()):
        raise FileNotFoundError(
            f"the task sets {', '.join(missing)} are not complete on this machine; fetch them "
            "with python -m scripts.data_download --all, or use the offline tasks"
        )


def title(sources: Sequence[str]) -> str:
    """What a stage on these sources reads, for headings."""
    return ", ".join(Path(each).name if is_own(each) else f"{each} tasks" for each in sources)


def mid_mixture(*sources: str, identity: Path | None = None) -> TaskMixture:
    """Midtraining: the formats of conversation, choice and tool, in bulk."""
    return _mixture(sources, _mid_tasks, identity)


def sft_mixture(*sources: str, identity: Path | None = None) -> TaskMixture:
    """Finetuning: fewer and better conversations."""
    return _mixture(sources, _sft_tasks, identity)


def _mixture(
    sources: Sequence[str],
    tasks_of: Callable[[str, CustomJSON], list[Task]],
    identity: Path | None,
) -> TaskMixture:
    """All sources shuffled into each other.

    The project's identity belongs to its own tasks; another one also goes with files alone.
    """
    persona = CustomJSON(identity or IDENTITY)
    tasks: list[Task] = []
    for source in sources:
        check_source(source)
        tasks += [_own(source)[0]] if is_own(source) else tasks_of(source, persona)
    if identity and all(map(is_own, sources)):
        tasks.append(persona)
    return TaskMixture(tasks, seed=SEED, name=title(sources))


def _mid_tasks(source: str, persona: CustomJSON) -> list[Task]:
    if source == "hub":
        return [
            SmolTalk("train"),
            MMLU("auxiliary_train"),
            GSM8K("train"),
            *_repeat(persona, 2000),
            SimpleSpelling("train", 200_000),
            SpellingBee("train", 80_000),
        ]
    return [
        DocumentationQA("train"),
        DocumentationChoice("train").shuffled(SEED)[:24_000],
        Arithmetic("train", 8_000),
        *_repeat(persona, 800),
        SimpleSpelling("train", 4_000),
        SpellingBee("train", 4_000),
    ]


def _sft_tasks(source: str, persona: CustomJSON) -> list[Task]:
    if source == "hub":
        return [
            ARC("Easy", "train"),
            ARC("Challenge", "train"),
            GSM8K("train"),
            SmolTalk("train")[:10_000],
            *_repeat(persona, 1000),
            SimpleSpelling("train", 300),
            SpellingBee("train", 300),
        ]
    # indices that midtraining has not seen where there are more of them
    return [
        DocumentationChoice("train").shuffled(SEED)[24_000:32_000],
        DocumentationQA("train").shuffled(SEED)[:2_000],
        Arithmetic("train", 12_000)[8_000:],
        *_repeat(persona, 400),
        SimpleSpelling("train", 4_300)[4_000:],
        SpellingBee("train", 5_000)[4_000:],
    ]


def validation_mixture(*sources: str) -> Task:
    """Held-out conversations, for the validation loss of both stages."""
    tasks: list[Task] = []
    for source in sources:
        check_source(source)
        if is_own(source):
            tasks.append(_own(source)[1])
        elif source == "hub":
            tasks += [SmolTalk("test"), MMLU("test")[:5_200], GSM8K("test")[:420]]
        else:
            tasks += [
                DocumentationQA("val"),
                DocumentationChoice("val"),
                Arithmetic("test", 400),
                SpellingBee("test", 200),
            ]
    return TaskMixture(tasks, seed=SEED, name=f"validation ({title(sources)})")


def sample_questions(*sources: str) -> list[str]:
    """What a run on these sources asks its model now and then."""
    questions: list[str] = []
    for source in sources:
        questions += _own_questions(source) if is_own(source) else QUESTIONS[source]
    return questions


def _own_questions(source: str) -> list[str]:
    """The first questions of what is held out, short ones if there are any."""
    asked = dict.fromkeys(map(first_question, _own(source)[1]))
    return sorted(asked, key=lambda question: len(question) > SHORT)[:OWN_QUESTIONS]


def rl_tasks(source: str) -> tuple[Task, Task]:
    """What reinforcement learning trains on and what it is judged on."""
    check_source(source)
    if is_own(source):
        train, judged = CustomProblems(source).split()
        return train, judged.shuffled(SEED)  # of which the first are asked
    if source == "hub":
        return GSM8K("train"), GSM8K("test")
    return Arithmetic("train", 20_000), Arithmetic("test", ARITHMETIC_EVAL)


def eval_names(source: str) -> tuple[str, ...]:
    """The tasks that a source is evaluated on; a file is one."""
    if is_own(source):
        return (source,)
    return CHATCORE if source == "hub" else OFFLINE_EVAL


def eval_task(name: str, *, sandbox: str = "monty") -> Task:
    """An evaluation task by name, upper or lower case, its test split; or the whole of a file."""
    known = {each.lower(): each for each in (*CHATCORE, *OFFLINE_EVAL)}
    if name.lower() not in known:
        if is_own(name):
            return CustomProblems(name)
        choices = ", ".join(known.values())
        raise ValueError(f"task {name!r}: choose one of {choices}, or a jsonl file of questions")
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
