"""`tokenizer.bpe`: a tokenizer as one file that people and tiktoken can read.

Line 1 is a JSON header (format, version, pattern, specials, vocab_size, sha256); then one
`base64(token) rank` per line in order of rank, as in tiktoken's files. The sha256 covers pattern,
specials and ranks, and is the tokenizer's fingerprint.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT, VERSION = "jaxchat-tokenizer", 1

RESTORE = "copy it again, or train a new one with `python -m scripts.tok_train`"


def make_header(
    pattern: str, specials: Sequence[str], vocab_size: int, fingerprint: str
) -> dict[str, Any]:
    """The content of line 1."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "pattern": pattern,
        "specials": list(specials),
        "vocab_size": vocab_size,
        "sha256": fingerprint,
    }


def parse_header(path: Path, line: bytes, specials: Sequence[str]) -> Mapping[str, Any]:
    """Line 1 of the file at `path`. ValueError for what this version does not read."""
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):  # the latter for a file of brackets
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is no tokenizer of this project, or damaged: {RESTORE}")
    if header.get("version") != VERSION or header.get("specials") != list(specials):
        raise ValueError(
            f"{path} has version {header.get('version')} and special tokens "
            f"{header.get('specials')}; this program reads version {VERSION} with "
            f"{list(specials)}: {RESTORE}"
        )
    if not isinstance(header.get("pattern"), str):
        raise ValueError(f"{path} is damaged (no split pattern): {RESTORE}")
    return header


def write_ranks(tokens: Iterable[bytes]) -> bytes:
    """All lines but the first."""
    lines = (b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    return b"".join(lines)


def parse_ranks(body: bytes, *, source: str | Path) -> list[bytes]:
    """Tokens in order of rank from `base64(token) rank` lines (tiktoken's format).

    Raises ValueError, naming `source` and the line, for anything else.
    """
    tokens: list[bytes] = []
    for number, line in enumerate(body.splitlines()):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            in_order = int(rank) == number
        except ValueError:  # binascii.Error is one
            in_order = False
        if not in_order:
            raise ValueError(f"{source} is damaged at rank {number}: {line!r:.60}")
    return tokens


def digest(pattern: str, specials: Iterable[str], body: bytes) -> str:
    """Hash of everything that decides the ids (sha256, 64 hex digits)."""
    return hashlib.sha256(json.dumps([pattern, list(specials)]).encode() + b"\n" + body).hexdigest()
