"""Bits per byte of a model on both splits, and what it writes.

    python -m scripts.base_loss
    python -m scripts.base_loss --source sft --corpus climbmix --split-tokens 1000000

A section of the report. Left out: how the loss fell, which base_train's section shows.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from jaxchat import cli
from jaxchat.artifacts import base_dir
from jaxchat.backend import DEFAULT_BACKEND, BackendName
from jaxchat.dataset import Corpus, default_corpus, open_corpus
from jaxchat.engine import Engine
from jaxchat.loss_eval import bits_per_byte, text_batches
from jaxchat.plan import check_positive
from jaxchat.progress import make_console, progress_bar
from jaxchat.report import Report, Samples, Table, model_facts
from jaxchat.request import Request
from jaxchat.sampling_params import CHAT_TOP_K, TEXT_TEMPERATURE, SamplingParams
from jaxchat.stages import LoadedModel, StageName, load_model

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "Returns the",
    "Compute the",
    "Parameters\n----------\n",
    "Return a new array",
)
"""What the model continues."""


@dataclass(frozen=True)
class Config:
    """Which model, on how much text."""

    source: Annotated[StageName, cli.arg(aliases=["-i"])] = "base"
    """Stage of the model: base, mid, sft or rl."""
    model_tag: Annotated[str | None, cli.arg(aliases=["-g"])] = None
    """Which model of the stage; the deepest when not set."""
    step: Annotated[int | None, cli.arg(aliases=["-s"])] = None
    """Which checkpoint; the newest when not set."""
    corpus: str | None = None
    """climbmix, fineweb-edu, embedded, or the path of texts; if unset what base_train read."""
    split_tokens: int = 20 * 2**19
    """Tokens of each split to score, at most all it has."""
    device_batch_size: int = 16
    """Rows per device and batch."""
    max_tokens: int = 64
    """Length of each sample."""
    backend: BackendName = DEFAULT_BACKEND
    """jax or torch."""

    def __post_init__(self) -> None:
        check_positive(
            split_tokens=self.split_tokens,
            device_batch_size=self.device_batch_size,
            max_tokens=self.max_tokens,
        )


def main(config: Config) -> None:
    """Score both splits, sample, print, and add a section to the report."""
    started = time.monotonic()
    report = Report(base_dir())
    report.check_writable()
    model = load_model(
        config.source, backend=config.backend, model_tag=config.model_tag, step=config.step
    )
    corpus = corpus_for(config, model.meta)
    console = make_console()
    console.print(describe(config, model, corpus))
    scores = {split: score(config, model, corpus, split) for split in ("train", "val")}
    greedy = complete(model, SamplingParams(max_tokens=config.max_tokens, temperature=0.0))
    params = SamplingParams(config.max_tokens, temperature=TEXT_TEMPERATURE, top_k=CHAT_TOP_K)
    drawn = complete(model, params)
    for prompt, text in greedy:
        console.print(f"{prompt!r} -> {text!r}")
    for split, value in scores.items():
        console.print(f"{split}: {value:.4f} bits per byte")
    facts = f"{config.source} step {model.meta['step']} on {corpus.name}"
    report.add(
        f"{config.source}_loss",
        f"Bits per byte and samples ({config.source})",
        [
            Table(["split", "bits per byte"], list(scores.items()), facts),
            Samples(greedy, "Greedy"),
            Samples(drawn, f"Temperature {params.temperature}, top-k {params.top_k}"),
            model_facts(config.source, model.tag, model.meta),
        ],
        wall_seconds=time.monotonic() - started,
        figures={f"{split} bpb": value for split, value in scores.items()},
    )


def corpus_for(config: Config, meta: Mapping[str, Any]) -> Corpus:
    """The corpus asked for, else the one in a pretraining's options, else what is there.

    That of the pretraining is read as it was then, whatever files have come since. `meta` is the
    checkpoint's. ValueError where the corpus is gone.
    """
    trained_on = (meta.get("config") or {}).get("corpus")
    if not trained_on or config.corpus not in (None, trained_on):
        return open_corpus(config.corpus or default_corpus())
    try:
        return open_corpus(trained_on, shards=meta.get("shards"))
    except ValueError as error:
        raise ValueError(
            f"{error} (the model was trained on it; name another with --corpus)"
        ) from error


def describe(config: Config, model: LoadedModel, corpus: Corpus) -> str:
    """What is scored on what, and whether that is known not to be what the model learnt from."""
    what = f"scoring {config.source} {model.tag} step {model.meta['step']} on {corpus.name}"
    if model.meta.get("corpus", corpus.fingerprint) == corpus.fingerprint:
        return what
    return f"{what}, which it was not trained on, or which has changed since"


def score(config: Config, model: LoadedModel, corpus: Corpus, split: str) -> float:
    """Bits per byte of a split, or of `split_tokens` of it, in rows as long as in training."""
    with progress_bar(f"scoring {split}") as on_progress:
        taken = text_batches(
            corpus,
            model.tokenizer,
            on_progress,
            split=split,
            tokens=config.split_tokens,
            rows_per_batch=config.device_batch_size * model.backend.devices.count,
            sequence_len=model.backend.config.sequence_len,
        )
        return bits_per_byte(model.backend, taken, model.tokenizer.token_bytes)


def complete(model: LoadedModel, params: SamplingParams) -> list[tuple[str, str]]:
    """Prompt and continuation of each of `PROMPTS`."""
    tokenizer = model.tokenizer
    requests = [Request([tokenizer.bos_id, *tokenizer.encode(p)], params) for p in PROMPTS]
    replies = Engine(model.backend, tokenizer).complete(requests)
    return [(prompt, reply.text) for prompt, reply in zip(PROMPTS, replies, strict=True)]


if __name__ == "__main__":
    cli.run(main, Config)
