"""Markdown to HTML that is safe to put into the page.

The one idea: three libraries, each doing the one thing it is kept for. markdown-it-py parses
CommonMark with tables (raw HTML stays text), Pygments colours code with class names, and nh3
(ammonia) lets through only the tags, attributes and link schemes listed here, whatever the first
two produce. Left out: images (the page asks no other origin for anything), raw HTML, formulas.
"""

import html
import itertools
import math
import time
from collections.abc import Sequence

import nh3
import pygments
from markdown_it import MarkdownIt, rules_block
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES

MAX_HIGHLIGHTED_CHARS = 20_000
"""Longer code stays plain, as does what takes longer than the budget: some lexers take quadratic
time, 22 s for 20,000 empty lines of C."""

MAX_FORMATTED_CHARS = 2**16
"""Longer text stays plain; a reply of 4,096 tokens has about 20,000."""

MAX_CELLS = 10_000
"""Of all tables of a text, those included that shorter rows lack; what is beyond stays text. A text
of 64 kB could have two million."""

MAX_GROWTH = 4
"""Times its length that a text's content and links may have; what grows more stays plain, as one
long address would that thousands of links name."""

BUDGET_S = 1.0
"""Of a thread's time for the texts of one request; what is left then is shown as it is."""

LEXERS = {
    alias: name
    for name, aliases in {
        "bash": "bash sh shell zsh console",
        "c": "c h",
        "cpp": "cpp c++ cc",
        "css": "css",
        "diff": "diff patch",
        "go": "go golang",
        "html": "html xml svg",
        "java": "java",
        "javascript": "javascript js jsx",
        "json": "json",
        "python": "python py python3",
        "rust": "rust rs",
        "sql": "sql",
        "toml": "toml",
        "typescript": "typescript ts tsx",
        "yaml": "yaml yml",
    }.items()
    for alias in aliases.split()
}
"""Fence names that are coloured, and the lexer of each; a lexer is only loaded when used."""

DEADLINE, CELLS = "deadline", "cells"
"""Where the parser's environment holds it, and how many cells there are."""

TAGS = frozenset(
    ("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre")
).union(("span", "blockquote", "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td"))
"""What Markdown can make, and nothing else."""

ATTRIBUTES = {
    "a": {"href", "title"},
    "ol": {"start"},
    "pre": {"data-language"},
    "td": {"align"},
    "th": {"align"},
}

CLASSES = {"span": {name for name in STANDARD_TYPES.values() if name}}
"""Pygments' short names; page/prose.css gives them colours."""


def render_all(texts: Sequence[str]) -> list[str]:
    """The sanitised HTML of each text, within one budget of time."""
    deadline = time.thread_time() + BUDGET_S
    return [to_html(text, deadline) for text in texts]


def to_html(text: str, deadline: float = math.inf) -> str:
    """The sanitised HTML of `text`, one element per block.

    Plain where it is too long or comes behind `deadline`, code as soon as that has come (of
    `time.thread_time()`).
    """
    # half a surrogate pair, which JSON can spell and UTF-8 cannot hold, becomes U+FFFD
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    plain = f"<pre>{html.escape(text)}</pre>"
    if len(text) > MAX_FORMATTED_CHARS or time.thread_time() > deadline:
        return plain
    env = {DEADLINE: deadline, CELLS: 0}
    tokens = _PARSER.parse(text, env)
    if _size(tokens) > MAX_GROWTH * max(len(text), 1000):
        return plain
    return nh3.clean(
        _PARSER.renderer.render(tokens, _PARSER.options, env),
        tags=set(TAGS),
        attributes=ATTRIBUTES,
        allowed_classes=CLASSES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def _size(tokens: Sequence[Token]) -> int:
    """Characters of all content and attributes."""
    return sum(
        len(token.content)
        + sum(len(str(value)) for value in token.attrs.values())
        + _size(token.children or ())
        for token in tokens
    )


def _table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """markdown-it's own rule, up to `MAX_CELLS` in a text: it makes the cells that rows lack.

    Beyond, and after the deadline, nothing is a table, be it only to end a paragraph: to find that
    out anew at every line took 18 s for a text of 64 kB.
    """
    if state.env[CELLS] > MAX_CELLS or time.thread_time() > state.env[DEADLINE]:
        return False
    if silent or not rules_block.table(state, start, end, True):
        return rules_block.table(state, start, end, silent)
    rows = itertools.takewhile(lambda line: not state.isEmpty(line), range(start, end))
    columns = state.src.count("|", state.bMarks[start], state.eMarks[start]) + 1
    state.env[CELLS] += columns * sum(1 for _ in rows)
    return state.env[CELLS] <= MAX_CELLS and rules_block.table(state, start, end, False)


def _code(content: str, language: str, deadline: float) -> str:
    """A block of code, coloured where its language is known and while there is time."""
    body = _highlighted(content, language, deadline) or html.escape(content)
    label = f' data-language="{html.escape(language)}"' if language else ""
    return f"<pre{label}><code>{body}</code></pre>\n"


def _highlighted(content: str, language: str, deadline: float) -> str | None:
    name = LEXERS.get(language.lower())
    if name is None or len(content) > MAX_HIGHLIGHTED_CHARS:
        return None
    # stripnl would eat the first line's indentation together with empty lines before it
    lexer = get_lexer_by_name(name, stripnl=False, ensurenl=False)
    tokens = []
    for token in lexer.get_tokens(content):
        if time.thread_time() > deadline:
            return None
        tokens.append(token)
    return pygments.format(tokens, _FORMATTER)


class _Renderer(RendererHTML):
    """markdown-it's own, but for code, images (links to them), and cells.

    Cells say how they are aligned in an attribute, since the page allows no inline style.
    """

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        words = tokens[idx].info.split(maxsplit=1)
        return _code(tokens[idx].content, words[0] if words else "", env[DEADLINE])

    def code_block(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType
    ) -> str:
        return _code(tokens[idx].content, "", env[DEADLINE])

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[idx]
        label = self.renderInlineAsText(token.children or [], options, env) or "image"
        source = html.escape(str(token.attrGet("src") or ""))
        return f'<a href="{source}">{html.escape(label)}</a>'

    def th_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return _cell(tokens[idx])

    def td_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return _cell(tokens[idx])


def _cell(token: Token) -> str:
    style = str(token.attrGet("style") or "")
    side = style.removeprefix("text-align:")
    return f'<{token.tag} align="{side}">' if side else f"<{token.tag}>"


_FORMATTER = HtmlFormatter(nowrap=True)
_PARSER = MarkdownIt("commonmark", {"html": False, "breaks": True}, renderer_cls=_Renderer).enable(
    ["table", "strikethrough"]
)
_PARSER.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
