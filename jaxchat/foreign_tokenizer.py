"""Tokenizers that others saved, read as data: upstream's `tokenizer.pkl` and `tokenizer.json`.

Upstream pickles a tiktoken `Encoding`. A pickle is a program, so it is run in a machine that knows
one name, tiktoken's class, and puts a plain holder in its place: whatever else the file asks for is
refused before anything is called. Both formats come down to a split pattern, token bytes in order
of rank, and the nine special tokens after them; anything else is another tokenizer, and one error
tells what differs. `tokenizer.json` can say far more, so whatever in it decides ids is compared
with what our own tokenizer would write.
"""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxchat.hugging_face_bpe import byte_letters
from jaxchat.tokenizer import SPECIAL_NAMES, Tokenizer

PICKLE_FILE = "tokenizer.pkl"

WITHOUT_EFFECT = ("trim_offsets",)
"""Of the splits: says where in the text a token stands, not which one it is."""

MODEL_SETTINGS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
"""Of Hugging Face's BPE, those that decide ids.

With a token for every byte nothing is unknown, whatever `unk_token`, `fuse_unk` and `byte_fallback`
say, and a token that is a merge of two tokens is found by merging, whatever `ignore_merges` says.
"""


def read_pickled_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a pickled tiktoken `Encoding`; nothing in the file is executed.

    ValueError for a damaged file, one that asks for any other name, and another tokenizer.
    """
    with open(path, "rb") as file:
        try:
            held = _EncodingUnpickler(file).load()
        except Exception as error:  # a damaged pickle may trip over anything
            raise ValueError(f"{path} is no pickled tiktoken Encoding: {error}") from error
    state = held.state if isinstance(held, _Holder) else None
    if not isinstance(state, dict) or state.keys() != ENCODING_FIELDS.keys():
        raise ValueError(f"{path} is no pickled tiktoken Encoding with ranks of its own")
    for name, kind in ENCODING_FIELDS.items():
        if not isinstance(state[name], kind):
            raise ValueError(f"{path} is damaged: {name} is {type(state[name]).__name__}")
    return _assemble(state["mergeable_ranks"], state["special_tokens"], state["pat_str"], path)


def read_tokenizer_json(path: Path) -> Tokenizer:
    """The tokenizer in Hugging Face's `tokenizer.json`: byte-level BPE with one split pattern.

    ValueError for a damaged file and any other kind of tokenizer.
    """
    try:
        stored = json.loads(path.read_bytes())
        model, splits = stored["model"], stored["pre_tokenizer"]["pretokenizers"]
        specials = {token["content"]: token["id"] for token in stored["added_tokens"]}
        patterns = [split["pattern"]["Regex"] for split in splits if split["type"] == "Split"]
        kinds = [model["type"], *(split["type"] for split in splits)]
        vocab = {text: id for text, id in model["vocab"].items() if text not in specials}
        merges = [_merge(written) for written in model["merges"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or no byte-level BPE: {error!r}") from error
    if kinds != ["BPE", "Split", "ByteLevel"]:
        raise ValueError(f"{path} is made of {', '.join(kinds)}, not of BPE, Split and ByteLevel")
    bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    try:
        ranks = {bytes(bytes_of[letter] for letter in text): id for text, id in vocab.items()}
    except KeyError as error:
        raise ValueError(f"{path} has {error} in a token, which stands for no byte") from error
    tokenizer = _assemble(ranks, specials, patterns[0], path)
    ours = tokenizer.to_hugging_face()
    if differing := [*_differences(stored, ours), *_merge_differences(merges, ours["model"])]:
        shown = "\n  ".join(differing)
        raise ValueError(f"{path} gives other ids than our tokenizer can:\n  {shown}")
    return tokenizer


def _differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    """Settings that give other ids than ours; the merges are another matter."""
    if stored.get("normalizer") is not None:
        yield f"it has a normalizer, {stored['normalizer']!r:.100}; ours has none"
    splits = (x["pre_tokenizer"]["pretokenizers"] for x in (stored, ours))
    for theirs, mine in zip(*splits, strict=True):
        for name in mine.keys() - set(WITHOUT_EFFECT):
            if theirs.get(name) != mine[name]:
                yield f"{mine['type']} has {name}={theirs.get(name)!r}, ours {mine[name]!r}"
    for name in MODEL_SETTINGS:
        if stored["model"].get(name):  # null, zero and the empty text are the same
            yield f"BPE has {name}={stored['model'][name]!r}, ours none"


def _merge_differences(merges: Sequence[tuple[str, str]], ours: Mapping[str, Any]) -> Iterator[str]:
    """Ours must all be there, in order of rank.

    Others may be there too: transformers' converter from tiktoken writes every pair that spells a
    token, which is how tiktoken, and ours, merge.
    """
    given = set(merges)
    missing = [tuple(pair) for pair in ours["merges"] if tuple(pair) not in given]
    if missing:
        yield f"{len(missing)} of our {len(ours['merges'])} merges are missing: {missing[0]}, ..."
    spelt = ["".join(pair) for pair in merges]
    if unknown := [text for text in spelt if text not in ours["vocab"]]:
        yield f"{len(unknown)} merges give no token: {unknown[0]!r}, ..."
    elif any(ours["vocab"][a] > ours["vocab"][b] for a, b in pairwise(spelt)):
        yield "its merges are in another order than its tokens"


def _merge(written: str | Sequence[str]) -> tuple[str, str]:
    """A pair, as `tokenizers` writes it, or as one text, as it did before 0.20."""
    left, right = written.split(" ") if isinstance(written, str) else written
    if not (isinstance(left, str) and isinstance(right, str)):
        raise TypeError(f"{written!r} is no merge")
    return left, right


def _assemble(
    ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str, path: Path
) -> Tokenizer:
    if not all(type(rank) is int for rank in ranks.values()):
        raise ValueError(f"{path} is damaged: not all of its ranks are whole numbers")
    tokens = sorted(ranks, key=lambda token: ranks[token])
    if [ranks[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError(f"{path}: its {len(tokens)} ranks are not 0, 1, 2, ...")
    wanted = {f"<|{name}|>": len(tokens) + i for i, name in enumerate(SPECIAL_NAMES)}
    differing = [
        f"{name} is {specials.get(name, 'missing')}, not {wanted.get(name, 'there')}"
        for name in wanted | dict(specials)
        if specials.get(name) != wanted.get(name)
    ]
    if differing:
        shown = "\n  ".join(differing[:20])
        raise ValueError(f"{path} has other special tokens than ours:\n  {shown}")
    try:
        tokenizer = Tokenizer(tokens, pattern=pattern)
        tokenizer.encode("one")  # compiles the pattern
        _ = tokenizer.merges
    except ValueError as error:
        raise ValueError(f"{path} holds a tokenizer that ours cannot be: {error}") from error
    return tokenizer


ENCODING_FIELDS = {
    "name": str,
    "pat_str": str,
    "mergeable_ranks": dict,
    "special_tokens": dict,
}
"""What tiktoken's `Encoding.__getstate__` gives."""


class _Holder:
    """Stands where the `Encoding` would, and keeps the state it would have been given."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Knows one class, and that one by an inert double."""

    def find_class(self, module_name: str, global_name: str, /) -> type[_Holder]:
        if (module_name, global_name) == ("tiktoken.core", "Encoding"):
            return _Holder
        raise pickle.UnpicklingError(
            f"it asks for {module_name}.{global_name}, which a tokenizer does not need; "
            "nothing of it was run"
        )
