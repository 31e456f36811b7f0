"""The tokenizer: byte-level BPE, nine special tokens, and a file that anyone can read.

rustbpe learns the merges and encodes; tiktoken reads the same ranks and is the oracle of the
tests (`as_tiktoken`). The one idea: a tokenizer *is* its split pattern and its list of token bytes
in order of rank; the merges, the Hugging Face file, the byte counts and the fingerprint all follow
from that. Special tokens have the ids after the last merge and no text ever encodes to one. Left
out: normalisation of any kind, unknown tokens, and the chat format (conversation.py).

On disk a tokenizer is a directory:

- `tokenizer.bpe`, the only file that `load` reads (bpe_file.py);
- `tokenizer.json`, the same tokenizer for Hugging Face `tokenizers`;
- `token_bytes.npy`, int32 (V,), the bytes of each token and 0 for specials (bits per byte).
"""

import codecs
import io
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import tiktoken

import rustbpe
from jaxchat import artifacts, bpe_file
from jaxchat.hugging_face_bpe import merges_of, tokenizer_json

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
"""GPT-4's, but with numbers cut into at most two digits: small vocabularies have no room for 1000
three-digit tokens (nanochat)."""

SPECIAL_NAMES = (
    "bos",
    "user_start",
    "user_end",
    "assistant_start",
    "assistant_end",
    "python_start",
    "python_end",
    "output_start",
    "output_end",
)
"""In the order of their ids, after the last merge. Each is written `<|name|>`."""

MIN_VOCAB_SIZE = 256 + len(SPECIAL_NAMES)
"""Every byte and every special: a tokenizer without merges."""

TOKENIZER_FILE = "tokenizer.bpe"
HUGGING_FACE_FILE = "tokenizer.json"
TOKEN_BYTES_FILE = "token_bytes.npy"


class Tokenizer:
    """Text to ids and back. Immutable and safe to share between threads."""

    def __init__(self, tokens: Sequence[bytes], *, pattern: str = SPLIT_PATTERN) -> None:
        """`tokens[rank]` are the bytes of each ordinary token; the first 256 are the bytes.

        Raises ValueError when they are not, or when a token occurs twice.
        """
        if list(tokens[:256]) != [bytes([b]) for b in range(256)]:
            raise ValueError("the first 256 tokens must be the single bytes in order")
        if len(set(tokens)) != len(tokens):
            raise ValueError(f"{len(tokens) - len(set(tokens))} tokens occur more than once")
        self.pattern = pattern
        self.special_names = SPECIAL_NAMES
        self._ordinary = tuple(tokens)
        specials = (f"<|{name}|>".encode() for name in SPECIAL_NAMES)
        self._tokens = (*self._ordinary, *specials)
        self._special_ids = {n: len(tokens) + i for i, n in enumerate(SPECIAL_NAMES)}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        pattern: str = SPLIT_PATTERN,
        progress: Callable[[str, int, int | None], object] | None = None,
    ) -> Self:
        """Learn `vocab_size` tokens (specials included) from `texts`.

        `progress(stage, done, total)` is called now and then: "counting" texts, "merging" pairs.
        A corpus that is too small yields fewer: compare the result's `vocab_size`. Raises
        ValueError for a vocabulary without room for bytes and specials, and for an empty corpus.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_NAMES)} special "
                f"tokens need at least {MIN_VOCAB_SIZE} (32768 is usual)"
            )
        trainer = rustbpe.Tokenizer()
        well_formed = (_well_formed(text) for text in texts)
        with warnings.catch_warnings():
            # said by the result's size: scripts/tok_train.py tells the user and the report
            warnings.filterwarnings("ignore", message="the texts are too small for a vocabulary")
            trainer.train_from_iterator(
                well_formed, vocab_size - len(SPECIAL_NAMES), pattern=pattern, progress=progress
            )
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        if len(ranks) == 256 and vocab_size > MIN_VOCAB_SIZE:
            raise ValueError(
                "the corpus is empty: it has no two bytes to merge. Fetch one with "
                "`python -m scripts.data_download`"
            )
        return cls([bytes(token) for token, _ in ranks], pattern=pattern)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read `tokenizer.bpe` in `directory`.

        Raises FileNotFoundError when there is none, ValueError when it is damaged or of a format
        that this version does not know.
        """
        path = Path(directory) / TOKENIZER_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {path}: train one with `python -m scripts.tok_train`"
            )
        head, _, body = path.read_bytes().partition(b"\n")
        header = bpe_file.parse_header(path, head, SPECIAL_NAMES)
        if bpe_file.digest(header["pattern"], header["specials"], body) != header.get("sha256"):
            raise ValueError(f"{path} is damaged (wrong checksum): {bpe_file.RESTORE}")
        tokenizer = cls(bpe_file.parse_ranks(body, source=path), pattern=header["pattern"])
        if tokenizer._header() != header:
            raise ValueError(f"{path} is damaged (the header does not fit): {bpe_file.RESTORE}")
        return tokenizer

    def save(self, directory: str | Path) -> None:
        """Write the three files of the module's docstring, `tokenizer.bpe` last, all atomically."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        table = io.BytesIO()
        np.save(table, self.token_bytes, allow_pickle=False)
        for name, content in (
            (TOKEN_BYTES_FILE, table.getvalue()),
            (HUGGING_FACE_FILE, json.dumps(self.to_hugging_face(), ensure_ascii=False).encode()),
            (TOKENIZER_FILE, json.dumps(self._header()).encode() + b"\n" + self._body),
        ):
            with artifacts.atomic_write(directory / name, "wb") as file:
                file.write(content)

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return len(self._tokens)

    @property
    def bos_id(self) -> int:
        """The token that starts every document."""
        return self._special_ids["bos"]

    def special_id(self, name: str) -> int:
        """Id of a special token by its bare name (`"user_start"`). Raises ValueError if unknown."""
        if name not in self._special_ids:
            raise ValueError(f"no special token {name!r}; there are {', '.join(SPECIAL_NAMES)}")
        return self._special_ids[name]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never a special one. Lone surrogates are read as U+FFFD."""
        return self._encoder.encode(_well_formed(text))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text in one call, on every processor: a uint32 (T,) array each."""
        return self._encoder.batch_encode([_well_formed(text) for text in texts])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of `ids`; a special is its `<|name|>`. ValueError if out of range."""
        return b"".join(map(self._token, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes per token, int32 (V,), 0 for specials.

        Raw bytes, also where a token is a part of a character: counting its decoded text instead
        makes bits per byte read 0.27% low (upstream's bug).
        """
        lengths = [len(token) for token in self._ordinary] + [0] * len(SPECIAL_NAMES)
        table = np.array(lengths, np.int32)
        table.flags.writeable = False
        return table

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids (sha256, 64 hex digits)."""
        return bpe_file.digest(self.pattern, self.special_names, self._body)

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pair that each token from rank 256 on was merged from, in order of rank."""
        return merges_of(self._ordinary)

    def as_tiktoken(self) -> tiktoken.Encoding:
        """The same tokenizer in tiktoken: the reference for encoding and decoding."""
        return self._tiktoken

    def to_hugging_face(self) -> dict[str, Any]:
        """The same tokenizer as the content of Hugging Face's `tokenizer.json`."""
        return tokenizer_json(self.pattern, self._ordinary, self._special_ids)

    @cached_property
    def _encoder(self) -> rustbpe.Tokenizer:
        """What encodes. `encode` and `encode_batch` are the only callers."""
        ranks = [(token, rank) for rank, token in enumerate(self._ordinary)]
        return rustbpe.Tokenizer.from_ranks(self.pattern, ranks)

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            name="jaxchat",
            pat_str=self.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self._ordinary)},
            special_tokens={f"<|{name}|>": id for name, id in self._special_ids.items()},
        )

    def _header(self) -> dict[str, Any]:
        return bpe_file.make_header(
            self.pattern, self.special_names, self.vocab_size, self.fingerprint
        )

    @property
    def _body(self) -> bytes:
        return bpe_file.write_ranks(self._ordinary)

    def _token(self, id: int) -> bytes:
        if not 0 <= id < len(self._tokens):
            raise ValueError(f"token id {id} is outside the vocabulary of {len(self._tokens)}")
        return self._tokens[id]


class StreamDecoder:
    """Ids in one at a time, text out as soon as it is whole: never half a UTF-8 character.

    The pieces of `push` and a final `flush` add up to `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that `id` completes; empty while a character waits for its last bytes."""
        return self._utf8.decode(self._tokenizer.decode_bytes([id]))

    def flush(self) -> str:
        """What is left when no id follows: U+FFFD for an unfinished character, else nothing."""
        return self._utf8.decode(b"", final=True)


def _well_formed(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 cannot hold, replaced as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
