"""A byte-level BPE in Hugging Face's words: merges, printable bytes, `tokenizer.json`.

Ranks are all that a tokenizer is; the pair that each token was merged from follows from them.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any


def tokenizer_json(
    pattern: str, tokens: Sequence[bytes], special_ids: Mapping[str, int]
) -> dict[str, Any]:
    """The content of `tokenizer.json` for tokens in order of rank; specials by their bare name."""
    letters = byte_letters()
    written = ["".join(letters[byte] for byte in token) for token in tokens]
    of_token = dict(zip(tokens, written, strict=True))
    split = {"Regex": pattern}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": f"<|{name}|>", **flags, "special": True}
            for name, id in special_ids.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {text: rank for rank, text in enumerate(written)},
            "merges": [[of_token[left], of_token[right]] for left, right in merges_of(tokens)],
        },
    }


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that each token from rank 256 on was merged from, in order of rank.

    ValueError for a token that is not a merge of two tokens.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [_split(token, ranks) for token in tokens[256:]]


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: itself where printable, else U+0100 upwards."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, spare = [], 0x100
    for byte in range(256):
        letters.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return letters


def _split(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that `token` was merged from: BPE on its bytes, stopped before the last merge.

    Every pass merges all pairs of the lowest rank, so that a long run of one letter costs its
    length, not its square.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [left + right for left, right in pairwise(parts)]
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if ranks.get(best, len(ranks)) >= ranks[token]:
            break
        parts = list(_merged(parts, best))
    if len(parts) != 2:
        raise ValueError(f"token {token!r:.60} (rank {ranks[token]}) is not a merge of two tokens")
    return parts[0], parts[1]


def _merged(parts: Sequence[bytes], whole: bytes) -> Iterator[bytes]:
    """`parts` with every neighbouring pair that spells `whole` joined, left to right."""
    i = 0
    while i < len(parts):
        joined = i + 1 < len(parts) and parts[i] + parts[i + 1] == whole
        yield whole if joined else parts[i]
        i += 1 + joined
