"""Markdown becomes markup that shows what was meant and can do nothing else."""

import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.server import markdown
from jaxchat.server.markdown import (
    BUDGET_S,
    MAX_FORMATTED_CHARS,
    MAX_HIGHLIGHTED_CHARS,
    TAGS,
    render_all,
    to_html,
)
from tests.page.corpus import XSS


class Elements(HTMLParser):
    """The tags and attributes of some markup, as a parser that we did not write sees them."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def assert_harmless(markup: str) -> None:
    for tag, attributes in Elements(markup).found:
        assert tag in TAGS
        allowed = {"href", "title", "rel", "target", "start", "data-language", "class", "align"}
        assert set(attributes) <= allowed
        href = attributes.get("href")
        if href is not None:
            scheme = href.split(":", 1)[0] if ":" in href.split("/", 1)[0] else ""
            assert scheme.lower() in {"", "http", "https", "mailto"}, href


@pytest.mark.parametrize("text", XSS)
def test_nothing_that_could_run_survives(text):
    assert_harmless(to_html(text))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*XSS, "\n\n", "> ", "- ", "`", "[", "](", ")", "<", "```\n"])))
def test_nothing_that_could_run_survives_in_company(pieces):
    assert_harmless(to_html("".join(pieces)))


def test_what_the_usual_elements_look_like():
    markup = to_html("# A\n\n**b** *c* ~~d~~ `e`\n\n1. f\n2. g\n\n> h\n\n- i\n\n***\n\nj\nk")
    tags = " ".join(tag for tag, _ in Elements(markup).found)
    assert tags == "h1 p strong em s code ol li li blockquote p ul li hr p br"


def test_code_is_coloured_by_its_language_and_otherwise_left_alone():
    assert '<span class="k">def</span>' in to_html("```python\ndef f(): pass\n```")
    assert '<pre data-language="python"><code>' in to_html("```python title=x\nx\n```")
    assert to_html("```brainfuck\n<+>\n```").startswith(
        '<pre data-language="brainfuck"><code>&lt;+&gt;\n</code>'
    )
    assert "<pre><code>  indented\nmore" in to_html("```\n  indented\nmore\n```")


def test_the_first_line_of_code_keeps_its_indentation():
    assert "<code>    <span" in to_html("```python\n    return 1\n```").replace(
        '<span class="w">    </span>', "    "
    )


def test_an_image_becomes_a_link_so_that_no_other_origin_is_asked():
    markup = to_html("![a *cat*](https://x.example/cat.png)")
    assert "<img" not in markup
    assert 'href="https://x.example/cat.png"' in markup and ">a cat</a>" in markup


def test_links_open_elsewhere_and_tell_nothing():
    markup = to_html("[x](https://x.example)")
    assert 'target="_blank"' in markup and 'rel="noopener noreferrer"' in markup


def test_cells_are_aligned_without_inline_style():
    markup = to_html("| a | b |\n|:-:|--:|\n| 1 | 2 |")
    assert '<td align="center">1</td>' in markup and '<td align="right">2</td>' in markup
    assert "style" not in markup


@pytest.mark.parametrize(
    "text",
    [
        "[" * 50_000,
        "*a " * 50_000,
        "> " * 20_000,
        "`" * 50_000,
        "- " * 20_000,
        "|" * 50_000 + "\n" + "|-" * 25_000,
        "|a|\n|-|\n" * (MAX_FORMATTED_CHARS // 8),  # 18 s
        "![[]()" * 10_000,
        "<" * 50_000,
        "```python\n" + "'" * 4 * MAX_HIGHLIGHTED_CHARS,
        "```python\n" + "'\\" * (MAX_HIGHLIGHTED_CHARS // 2),
        "```html\n" + "<a " * (MAX_HIGHLIGHTED_CHARS // 3),
        "```javascript\n" + "/" * MAX_HIGHLIGHTED_CHARS,
        "```bash\n" + "$(" * (MAX_HIGHLIGHTED_CHARS // 2),
        "```cpp\n" + "#if 0\n" * (MAX_HIGHLIGHTED_CHARS // 6),
    ],
    ids=lambda text: repr(text[:14]),
)
def test_no_text_takes_long(text):
    start = time.thread_time()
    to_html(text)
    assert time.thread_time() - start < 5  # a guard against exponential time, not a benchmark


@pytest.mark.parametrize(
    "text",
    [
        "```c\n" + "\n" * (MAX_HIGHLIGHTED_CHARS - 1) + "```",
        "```java\n" + "a " * (MAX_HIGHLIGHTED_CHARS // 2 - 1) + "\n```",
        f"|{'a|' * 90}\n|{'-|' * 90}\n" + "|\n" * 100,
    ],
    ids=["empty lines", "words", "cells"],
)
def test_a_request_gets_its_budget_of_time_and_no_more(text):
    start = time.thread_time()
    shown = render_all([text] * 20 + ["*last* <b>"])
    assert time.thread_time() - start < 3 * BUDGET_S
    assert shown[-1] == "<pre>*last* &lt;b&gt;</pre>"
    assert render_all(["*last*"]) == ["<p><em>last</em></p>\n"]


def test_a_table_behind_the_deadline_stays_text(monkeypatch):
    times = iter([0.5, 0.5])
    monkeypatch.setattr(markdown.time, "thread_time", lambda: next(times, 1.5))
    row = "|a|\n|-|\n|b|\n"
    assert to_html(f"{row}\n{row}", deadline=1.0).count("<table>") == 1


@pytest.mark.parametrize(
    "text",
    [
        (f"|{'a|' * 400}\n|{'-|' * 400}\n" + "|\n" * 160 + "\n") * 33,
        (f"|{'a|' * 24}\n|{'-|' * 24}\n" + "|\n" * 20 + "\n") * 400,
        f"[a]: http://{'x' * 32_000}\n\n" + "[a] " * 8000,
        f"[a]: b '{'x' * 32_000}'\n\n" + "![a] " * 6000,
    ],
    ids=["large tables", "small tables", "addresses", "titles"],
)
def test_no_text_becomes_many_times_as_long(text):
    assert len(text) <= MAX_FORMATTED_CHARS
    start = time.thread_time()
    shown = to_html(text)
    assert len(shown) < 12 * len(text)
    assert time.thread_time() - start < 5  # tables took 50 s, links a gigabyte of memory


def test_as_many_cells_as_an_answer_may_have_are_a_table():
    row = "|" + "a|" * 9 + "\n"
    shown = to_html(row + "|" + "-|" * 9 + "\n" + row * 900 + "\nbehind")
    assert shown.count("<td>") == 8100
    assert shown.endswith("<p>behind</p>\n")
    twice = to_html((row + "|" + "-|" * 9 + "\n" + row * 600 + "\n") * 2)
    assert twice.count("<td>") == 5400
    assert twice.count("<table>") == 1


def test_a_text_longer_than_any_answer_stays_plain():
    start = time.thread_time()
    (shown,) = render_all([f"|{'a|' * 400}\n|{'-|' * 400}\n{'|' + chr(10)}" * 150])
    assert time.thread_time() - start < 1
    assert shown.startswith("<pre>|a|a|")
