"""One trial of `benchmarks.tokenizer`: one trainer or encoder, in a process of its own.

Runs on any of the interpreters that the benchmark prepares, so it imports only what its subject
needs. Arguments: subject, text file (documents separated by U+001D), vocabulary, pattern name, and
for encoders a file of ranks. Prints one JSON object; "digest" is a hash of the ranks or the ids.
"""

import base64
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {"gpt4": GPT4, "gpt2": GPT2}

CHUNK_CHARS = 1 << 16


def documents(path: str) -> Iterator[str]:
    """The documents of a file, without holding it."""
    rest = ""
    with open(path, encoding="utf-8", newline="") as file:
        while chunk := file.read(CHUNK_CHARS):
            *whole, rest = (rest + chunk).split("\x1d")
            yield from whole
    if rest:
        yield rest


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of `work`."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


Result = Mapping[str, float | str]


def train(subject: str, path: str, vocab_size: int, pattern: str) -> Result:
    if subject == "rustbpe":
        import rustbpe

        tokenizer = rustbpe.Tokenizer()
        result = measured(
            lambda: tokenizer.train_from_iterator(
                documents(path), vocab_size, pattern=PATTERNS[pattern]
            )
        )
        return {**result, "peak_mb": peak_megabytes(), "digest": digest_of_ranks(tokenizer)}
    if subject == "gigabpe":
        import gigabpe  # pyrefly: ignore[missing-import]

        assert pattern == "gpt2", "gigabpe knows GPT-2's pattern only"
        return measured(lambda: gigabpe.train_bpe([path], vocab_size))
    if subject == "tokenizers":
        import tokenizers as hf

        tokenizer = hf.Tokenizer(hf.models.BPE())
        split = hf.pre_tokenizers.Split(hf.Regex(PATTERNS[pattern]), "isolated")
        as_bytes = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence([split, as_bytes])
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        )
        return measured(lambda: tokenizer.train_from_iterator(documents(path), trainer))
    raise ValueError(f"no trainer {subject!r}")


def digest_of_ranks(tokenizer: Any) -> str:
    ranks = sorted(tokenizer.get_mergeable_ranks(), key=lambda pair: pair[1])
    return hashlib.sha256(b"".join(b"%d %b" % (rank, bytes(t)) for t, rank in ranks)).hexdigest()


def encoder(
    subject: str, ranks_path: str, pattern: str
) -> Callable[[list[str]], Iterable[Iterable[int]]]:
    """A function that encodes documents one after the other on one thread."""
    if subject == "gigatoken":
        import gigatoken  # pyrefly: ignore[missing-import]

        tokenizer = gigatoken.Tokenizer.from_tiktoken(ranks_path, pretokenizer=pattern)
        return lambda texts: tokenizer.encode_batch(texts, parallel=False)
    with open(ranks_path, "rb") as file:
        rows = [line.split() for line in file]
    ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    if subject == "rustbpe":
        import rustbpe

        ours = rustbpe.Tokenizer.from_ranks(PATTERNS[pattern], list(ranks.items()))
        return lambda texts: ours.batch_encode(texts, threads=1)
    if subject == "tiktoken":
        import tiktoken

        theirs = tiktoken.Encoding(
            subject, pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
        )
        return lambda texts: [theirs.encode_to_numpy(text) for text in texts]
    raise ValueError(f"no encoder {subject!r}")


def encode(subject: str, path: str, pattern: str, ranks_path: str) -> Result:
    import numpy  # not by the trainers, and not while the clock runs

    texts = list(documents(path))
    run = encoder(subject, ranks_path, pattern)
    first, again = measured(lambda: run(texts)), measured(lambda: run(texts))
    times = {"first": first["cpu"], "again": again["cpu"]}
    walls = {"first_wall": first["wall"], "again_wall": again["wall"]}
    peak, digest = peak_megabytes(), hashlib.sha256()
    for ids in run(texts):
        digest.update(numpy.asarray(ids, numpy.uint32).tobytes() + b"|")
    return {**times, **walls, "peak_mb": peak, "digest": digest.hexdigest()}


def peak_megabytes() -> float:
    """Most memory that this process has held."""
    try:
        with open("/proc/self/status") as file:
            kib = next(line.split()[1] for line in file if line.startswith("VmHWM"))
    except OSError:  # not Linux, where ru_maxrss would begin with what the parent had
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return int(kib) / 1024


def main(task: str, subject: str, path: str, vocab_size: str, pattern: str, ranks: str) -> None:
    if task == "train":
        result = train(subject, path, int(vocab_size), pattern)
    else:
        result = encode(subject, path, pattern, ranks)
    print(json.dumps({"peak_mb": peak_megabytes(), **result}))


if __name__ == "__main__":
    main(*sys.argv[1:])
