"""The model's calculator: arithmetic and `"text".count("x")`, without `eval`.

The one idea: what reaches the parser is already known to be harmless. A lexer accepts numbers,
plain string literals, operators, parentheses and `.count`, and nothing else; their number bounds
the nesting; then a whitelist walks the syntax tree and every intermediate value is bounded. So
every input is answered in well under a millisecond or refused with None, from any thread. Left
out: names, functions, comparisons, backslashes in strings, anything that is not a calculation.
"""

import ast
import math
import operator
import re
from collections.abc import Callable

MAX_CHARS = 1000
"""Longest expression, in characters."""

MAX_TOKENS = 200
"""Most tokens in an expression. Nesting cannot be deeper, so neither the parser nor we overflow."""

MAX_BITS = 1024
"""Largest magnitude of an integer, final or intermediate: the range of a float, 309 digits."""

_TOKEN = re.compile(
    r"""
      (?P<string>"[^"\\\r\n]*"|'[^'\\\r\n]*')
    | (?P<thousands>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,_]))
    | (?P<number>(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?)
    | (?P<count>\.[ \t]*count\b)
    | (?P<operator>\*\*|//|[-+*/%()])
    | (?P<space>[ \t]+)
    """,
    re.VERBOSE,
)

_BINARY: dict[type[ast.operator], Callable[[int | float, int | float], int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


class _Refused(Exception):
    """The expression is not a calculation, or its value is out of range."""


def evaluate(expression: str) -> str | None:
    """The value of `expression` as Python would print it, or None for anything but a calculation.

    Accepts integers and floats (`1_000`, `1,000`, `1e-3`), `+ - * / // % **`, signs, parentheses
    and `"text".count("x")` on string literals. Refused, among others: division by zero, results
    that are complex, infinite or beyond `MAX_BITS`, expressions beyond `MAX_CHARS`.
    Never raises and never blocks: time and memory are bounded for every input.
    """
    try:
        return str(_value(ast.parse(_lex(expression), mode="eval").body))
    except (_Refused, SyntaxError, ValueError, ArithmeticError, RecursionError):
        return None


def _lex(expression: str) -> str:
    """`expression` without thousands commas, once every token of it is known to be allowed."""
    if len(expression) > MAX_CHARS or '"""' in expression or "'''" in expression:
        raise _Refused
    source, position, count, lexed = expression.strip(), 0, 0, []
    while position < len(source):
        match = _TOKEN.match(source, position)
        if match is None or count == MAX_TOKENS:
            raise _Refused
        thousands = match.lastgroup == "thousands"
        lexed.append(match.group().replace(",", "") if thousands else match.group())
        count += match.lastgroup != "space"
        position = match.end()
    return "".join(lexed)


def _value(node: ast.expr) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left), _value(right)))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            return text.count(part)
    raise _Refused


def _power(base: int | float, exponent: int | float) -> int | float:
    """`base ** exponent`; an integer power that may be large is refused before it is computed."""
    integers = isinstance(base, int) and isinstance(exponent, int)
    # |base| >= 2^(bits - 1), so the power has more than (bits - 1) * exponent bits
    if integers and (abs(base).bit_length() - 1) * exponent > MAX_BITS:
        raise _Refused
    return _bounded(base**exponent)


def _bounded(value: int | float | complex) -> int | float:
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise _Refused
