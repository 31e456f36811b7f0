"""Final answers: what stands behind `####`, and calculator calls in running text.

The format of GSM8K (arXiv 2110.14168), which the other number tasks share: reasoning, with every
calculation marked `<<48/2=24>>`, then a last line `#### 24`.
"""

import re
from decimal import Decimal, InvalidOperation

from jaxchat.calculator import evaluate

MARK = "####"
"""Stands before a final answer."""

_NUMBER = r"\$?\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?|-?\.[0-9]+)"
_ANSWER = re.compile(MARK + r"\s*" + _NUMBER)
_CALL = re.compile(r"<<([^<>]*)>>")


def final_answer(text: str) -> Decimal | None:
    """The number behind the last `####`, commas and a dollar sign ignored; None without one."""
    found = _ANSWER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:  # no such number is left by the pattern; the type does not know
        return None


def same_answer(reply: str, answer: str) -> bool:
    """Whether both texts end in the same number: 18, 18.0 and 18.00 are the same."""
    wanted = final_answer(answer)
    return wanted is not None and final_answer(reply) == wanted


def final_words(text: str) -> str:
    """What stands on the line of the last `####`, without case, spaces and full stop around it."""
    _, _, behind = text.rpartition(MARK) if MARK in text else ("", "", "")
    return " ".join(behind.partition("\n")[0].split()).rstrip(".").casefold()


def agrees(reply: str, answer: str) -> bool:
    """As `same_answer`, where the answer is a number and nothing else; else by the words."""
    wanted = final_words(answer)
    if re.fullmatch(_NUMBER, wanted):
        return same_answer(reply, answer)
    return bool(wanted) and final_words(reply) == wanted


def call_parts(text: str) -> list[dict[str, str]]:
    """`text` as the parts of an assistant message, its `<<a=b>>` as calls of the calculator.

    The output is what the calculator says to `a`, because that is what stands there when the model
    calls it (`24.0` for `48/2`); `b` where the calculator refuses or disagrees with it.
    """
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(_CALL.split(text)):
        if number % 2 == 0:
            if piece:
                parts.append({"type": "text", "text": piece})
            continue
        expression, _, stated = piece.rpartition("=")
        if not expression.strip():
            parts.append({"type": "text", "text": stated})
            continue
        parts += call(expression, stated)
    return parts


def call(expression: str, stated: str | None = None) -> list[dict[str, str]]:
    """A call of the calculator and its output; `stated` as in `call_parts`.

    ValueError when the calculator refuses and nothing is stated.
    """
    output = evaluate(expression)
    if stated is not None and (output is None or not _close(output, stated)):
        output = stated
    if output is None:
        raise ValueError(f"the calculator refuses {expression!r}")
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": output}]


def _close(output: str, stated: str) -> bool:
    """Whether they agree as far as `stated` was rounded; a hundredth is the coarsest seen."""
    try:
        return abs(float(output) - float(stated.replace(",", ""))) <= 0.01 * max(
            1.0, abs(float(output))
        )
    except ValueError:
        return False
