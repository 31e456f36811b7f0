"""The loader: how many tokens it packs, and how long a training step waits for them.

    python -m benchmarks.loader
    python -m benchmarks.loader --corpus DIR --depth 6

Alone, the loader hands out batches as fast as it can; its roofline is the tokenizer, encoding the
documents that those batches are packed from and nothing else. Under training it works while the
device does, as in scripts.base_train, and the share of a step is what the training loop waits for
the next batch.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.figures import Figure, print_table, share
from jaxchat import cli
from jaxchat.config import GPTConfig, OptimizerConfig, ScheduleConfig
from jaxchat.dataloader import REFILL_DOCS, PackedLoader
from jaxchat.dataset import Corpus, open_corpus
from jaxchat.jax_backend import JaxBackend
from jaxchat.plan import plan_training
from jaxchat.schedule import schedule_at
from jaxchat.tokenizer import Tokenizer

TOKENIZER_CHARS = 5_000_000
"""Text that the benchmark's own tokenizer is trained on."""

WARM_UP = 2
"""Steps that compile and fill pipelines."""


@dataclass(frozen=True)
class Config:
    """What is packed, and the model that trains on it."""

    corpus: str = "embedded"
    """embedded, climbmix, fineweb-edu, or a folder."""
    depth: int = 4
    """Layers of the model that trains."""
    sequence_len: int = 512
    """Tokens of a row."""
    vocab_size: int = 8192
    rows: int = 8
    """Rows of a step."""
    aspect_ratio: int = 64
    """Width per layer."""
    head_dim: int = 128
    """Width of an attention head."""
    batches: int = 200
    """Batches of a round of the loader alone."""
    steps: int = 10
    """Training steps of a round."""
    rounds: int = 3

    def __post_init__(self) -> None:
        if min(self.batches, self.steps, self.rounds) < 1:
            raise ValueError(
                f"batches={self.batches}, steps={self.steps} and rounds={self.rounds} must be "
                "at least 1"
            )


def main(config: Config) -> None:
    """Measure the loader alone, then under training, and print two tables."""
    corpus = open_corpus(config.corpus)
    texts = corpus.iter_texts("train", TOKENIZER_CHARS)
    tokenizer = Tokenizer.train(texts, vocab_size=config.vocab_size)
    loading = loader_speed(config, corpus, tokenizer)
    encoding = encoder_speed(config, corpus, tokenizer)
    steps, waits = under_training(config, corpus, tokenizer)
    tokens = config.rows * config.sequence_len
    print_table(
        f"{config.corpus} corpus, vocabulary {config.vocab_size}",
        ("alone", "tokens/s", "roofline"),
        [
            ("loader", f"{loading:,.0f}", share(loading.over(encoding))),
            ("tokenizer", f"{encoding:,.0f}", share(1.0)),
        ],
    )
    work = Figure(tokens / speed for speed in loading.values)
    print_table(
        f"A step of d{config.depth} on {tokens:,} tokens",
        ("under training", "ms", "share of a step"),
        [
            ("step", f"{steps.map(1e3):,.1f}", share(1.0)),
            ("the loop waits for a batch", f"{waits.map(1e3):,.3f}", share(waits.over(steps))),
            ("a batch takes the loader", f"{work.map(1e3):,.3f}", share(work.over(steps))),
        ],
    )


def loader_speed(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> Figure:
    """Tokens a second of batches that nobody is slow to take; the first has filled the buffers."""
    tokens = config.batches * config.rows * config.sequence_len
    with make_loader(config, corpus, tokenizer) as loader:
        next(loader)

        def take() -> None:
            for _ in range(config.batches):
                next(loader)

        return Figure(tokens / seconds(take) for _ in range(config.rounds))


def encoder_speed(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> Figure:
    """Tokens a second of the documents alone, as many at a time as the loader encodes."""
    tokens = config.batches * config.rows * config.sequence_len
    pieces, total = [], 0
    texts = itertools.cycle(corpus.iter_texts("train"))
    while total < tokens:
        pieces.append(list(itertools.islice(texts, REFILL_DOCS)))
        total += sum(map(len, tokenizer.encode_batch(pieces[-1])))

    def encode() -> None:
        for piece in pieces:
            tokenizer.encode_batch(piece)

    return Figure(total / seconds(encode) for _ in range(config.rounds))


def under_training(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> tuple[Figure, Figure]:
    """Seconds of every step, and those of them that the loop waited for the loader.

    As the training loop has it: a step is read after the next one has been dispatched.
    """
    shape = GPTConfig.from_depth(
        config.depth,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        vocab_size=tokenizer.vocab_size,
        sequence_len=config.sequence_len,
    )
    rules, schedule, count = OptimizerConfig(), ScheduleConfig(), config.rounds * config.steps
    tokens = config.rows * config.sequence_len
    plan = plan_training(shape, rules, num_iterations=WARM_UP + count, total_batch_size=tokens)
    backend = JaxBackend(shape)
    backend.init(0)
    backend.start_training(rules, plan)
    waits, marks, before = [], [], None
    with make_loader(config, corpus, tokenizer) as loader:
        for step in range(plan.num_iterations):
            begin = time.perf_counter()
            batch = next(loader)
            waits.append(time.perf_counter() - begin)
            metrics = backend.train_step(
                batch.inputs[None], batch.targets[None], schedule_at(step, schedule, plan)
            )
            if before is not None:
                float(before["loss"])
            before = metrics
            marks.append(time.perf_counter())
    lengths = [b - a for a, b in itertools.pairwise(marks)]
    return Figure(lengths[WARM_UP - 1 :]), Figure(waits[WARM_UP:])


def make_loader(config: Config, corpus: Corpus, tokenizer: Tokenizer) -> PackedLoader:
    return PackedLoader(
        corpus,
        tokenizer,
        split="train",
        rows_per_batch=config.rows,
        sequence_len=config.sequence_len,
    )


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main, Config)
