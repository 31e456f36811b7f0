"""Three small tasks over the embedded corpus, for machines without the CORE bundle.

They have CORE's three kinds and run through the same evaluator, but they are *not* CORE and their
numbers compare with nothing else. All come from held-out documentation: choose the summary that
belongs to a name, choose the name that belongs to a summary, say the last word of a summary.
"""

import random
import re
from collections.abc import Sequence

from jaxchat.core_tasks import Task, make_task
from jaxchat.dataset import Corpus

NOTE = "embedded tasks, not CORE"
"""How every table and report calls them."""

CHOICES = 4
SEED = 7
MAX_SUMMARY_CHARS = 300


def embedded_tasks(corpus: Corpus) -> list[Task]:
    """The tasks, from the validation split of the embedded corpus."""
    known = summaries(corpus)
    rng = random.Random(SEED)
    return [_summary_of_name(known, rng), _name_of_summary(known, rng), _last_word(known)]


def summaries(corpus: Corpus) -> list[tuple[str, str]]:
    """(dotted name, first paragraph) of documents; each paragraph once."""
    found: dict[str, str] = {}
    for text in corpus.iter_texts("val"):
        name, _, body = text.partition("\n\n")
        summary = " ".join(body.split("\n\n")[0].split())
        whole = re.fullmatch(r"[A-Z][^:`*]{30,}\.", summary)
        if whole and len(summary) <= MAX_SUMMARY_CHARS:
            found.setdefault(summary, name)
    return [(name, summary) for summary, name in sorted(found.items())]


def _summary_of_name(known: Sequence[tuple[str, str]], rng: random.Random) -> Task:
    examples = []
    for name, summary in known:
        others = rng.sample([s for _, s in known if s != summary], CHOICES - 1)
        gold = rng.randrange(CHOICES)
        choices = [*others[:gold], summary, *others[gold:]]
        examples.append({"query": name, "choices": choices, "gold": gold})
    return make_task(
        label="summary_of_name",
        kind="multiple_choice",
        num_fewshot=0,
        delimiter="\n\n",
        baseline=100 / CHOICES,
        examples=examples,
    )


def _name_of_summary(known: Sequence[tuple[str, str]], rng: random.Random) -> Task:
    examples = []
    for name, summary in known:
        other = rng.choice([n for n, s in known if s != summary and n != name])
        gold = rng.randrange(2)
        contexts = [name, other] if gold == 0 else [other, name]
        examples.append({"context_options": contexts, "continuation": summary, "gold": gold})
    return make_task(
        label="name_of_summary",
        kind="schema",
        num_fewshot=0,
        delimiter="\n\n",
        baseline=50.0,
        examples=examples,
    )


def _last_word(known: Sequence[tuple[str, str]]) -> Task:
    examples = []
    for name, summary in known:
        context, _, word = summary.removesuffix(".").rpartition(" ")
        examples.append({"context": f"{name}\n\n{context}", "continuation": word})
    return make_task(
        label="last_word",
        kind="language_modeling",
        num_fewshot=0,
        delimiter=" ",
        baseline=0.0,
        examples=examples,
    )
