"""Pictures of the page: light, dark, on a phone, stages side by side.

They go to `$JAXCHAT_SCREENSHOTS`, or where that is not set to the test's own folder; the best are
in dev/ for the README. What is asserted is only that something was drawn. The test wrote what the
answers say, and calls the model "scripted", so that no picture promises what no model said.
"""

import math
import os
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.page.scripted_server import Reply, says

PRIME = """A prime has **exactly two** divisors, so it is enough to look for a divisor up to the \
square root:

```python
def is_prime(n: int) -> bool:
    # a divisor above the root has a partner below it
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
```

| n | divisors | prime |
|--:|---|---|
| 91 | 7, 13 | no |
| 97 | – | yes |

Let me check the first row: """

DELTAS = [
    ("text", PRIME),
    ("python", "7 * 13"),
    ("python_output", "91"),
    ("text", "So 91 is *not* a prime."),
]

SENTENCE = [
    ("The", 0.62, "A In There"), (" sky", 0.41, " moon sun reason"),
    (" is", 0.93, " looks was has"), (" blue", 0.88, " dark clear a"),
    (" because", 0.79, " since ,"), (" air", 0.12, " the of sunlight"),
    (" scatters", 0.57, " molecules is bends"), (" short", 0.23, " blue the light"),
    (" waves", 0.36, " wavelengths er light"), (" more", 0.71, " of best the"),
    (" than", 0.97, " strongly ."), (" long", 0.84, " the red"), (" ones", 0.66, " waves er"),
    (".", 0.95, ", and"),
]  # fmt: skip


@pytest.fixture
def chat(chat, server):
    server.models = ["scripted"]
    chat.reload()
    expect(chat.page.locator("#model-name")).to_have_text("scripted")
    return chat


@pytest.fixture
def folder(tmp_path):
    return Path(os.environ.get("JAXCHAT_SCREENSHOTS", tmp_path))


def save(chat, folder: Path, name: str) -> None:
    chat.page.mouse.move(1, 1)
    expect(chat.page.locator(".message .prose.plain")).to_have_count(0)
    chat.settle()
    chat.page.screenshot(path=folder / f"{name}.png")
    assert (folder / f"{name}.png").stat().st_size > 10_000


def converse(chat, server) -> None:
    for title in ("Why is the sky blue?", "Ideas for a small garden", "Spell strawberry"):
        chat.button("New chat").click()
        chat.say(title)
    chat.button("New chat").click()
    server.play(Reply(DELTAS))
    chat.say("How do I test whether a number is prime?")
    expect(chat.page.locator(".code")).to_be_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_conversation(chat, server, folder, theme):
    chat.page.set_viewport_size({"width": 1200, "height": 760})
    chat.page.emulate_media(color_scheme=theme)
    converse(chat, server)
    save(chat, folder, theme)


def test_a_phone_in_the_middle_of_an_answer(chat, server, folder):
    chat.page.set_viewport_size({"width": 390, "height": 760})
    server.play(Reply([*DELTAS, *[("text", " word")] * 2], hold_after=len(DELTAS) + 2))
    chat.say("How do I test whether a number is prime?", wait=False)
    expect(chat.answers.last).to_contain_text("word word")
    save(chat, folder, "mobile")
    chat.page.keyboard.press("Escape")
    chat.wait_until_finished()


def test_four_stages_side_by_side(chat, server, folder):
    server.models = [f"{stage}-scripted" for stage in ("base", "mid", "sft", "rl")]
    chat.page.set_viewport_size({"width": 1320, "height": 640})
    chat.reload()
    chat.page.locator("#models summary").click()
    chat.page.get_by_role("switch", name="Several, side by side").check()
    for name in server.models:
        chat.page.get_by_role("checkbox", name=name).check()
    chat.page.keyboard.press("Escape")
    server.play(*(says(f"An answer of stage {name}.") for name in server.models))
    chat.say("What is the capital of France?")
    expect(chat.page.locator(".column")).to_have_count(4)
    save(chat, folder, "stages")


def test_the_token_view(chat, server, folder):
    chat.page.evaluate("localStorage.setItem('jaxchat.settings', '{\"tokenView\": true}')")
    chat.page.set_viewport_size({"width": 1000, "height": 560})
    chat.reload()
    tokens = []
    for text, share, others in SENTENCE:
        rest = [f" {word}" for word in others.split()]
        shares = [(1 - share) * 0.5 / 2**index for index in range(len(rest))]
        top = sorted([(share, text), *zip(shares, rest, strict=True)], reverse=True)
        tokens.append((text, math.log(share), [(word, math.log(p)) for p, word in top]))
    server.play(Reply([("text", text) for text, _, _ in tokens], tokens=tokens))
    chat.say("Why is the sky blue?")
    chat.button("Token view").click()
    chat.page.locator(".tokens .token").nth(5).focus()
    expect(chat.page.get_by_role("tooltip")).to_be_visible()
    save(chat, folder, "tokens")
