"""Final answers and calls of the calculator, read from text."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.tasks.answers import agrees, call_parts, final_answer, same_answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So it is\n#### 18", "18"),
        ("####18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### $5.50", "5.50"),
        ("#### -3", "-3"),
        ("#### .5", ".5"),
        ("#### 24.", "24"),
        ("#### 7 ducks", "7"),
        ("#### 1\nno wait\n#### 2", "2"),
        ("18", None),
        ("#### none", None),
        ("####", None),
        ("", None),
    ],
)
def test_the_final_answer_is_the_number_behind_the_mark(text, number):
    assert final_answer(text) == (None if number is None else Decimal(number))


@given(st.text(max_size=40) | st.text("#0123456789.,$- ", max_size=30))
def test_any_reply_has_an_answer_or_none(text):
    answer = final_answer(text)
    assert answer is None or answer.is_finite()
    assert same_answer(text, text) == (answer is not None)


def test_answers_are_compared_as_numbers():
    assert same_answer("#### 18.0", "#### 18")
    assert not same_answer("#### 18.5", "#### 18")
    assert not same_answer("18", "#### 18")
    assert not same_answer("#### 18", "no mark")


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("#### 18.0", "#### 18", True),
        ("#### 18 ducks", "#### 18", True),
        ("#### 1,000", "#### $1000", True),
        ("It is\n####  paris.\nSurely", "#### Paris", True),
        ("#### the left  one", "#### The left one", True),
        ("#### London\n#### Paris", "#### Paris", True),
        ("#### Paris\n#### London", "#### Paris", False),
        ("Paris", "#### Paris", False),
        ("#### Paris, France", "#### Paris", False),
        ("#### 12:45", "#### 12:30", False),
        ("#### 3", "#### 3rd street", False),
        ("", "no mark", False),
        ("####", "####", False),
    ],
)
def test_answers_agree_as_numbers_or_by_their_words(reply, answer, right):
    assert agrees(reply, answer) == right


def test_calls_say_what_the_calculator_says():
    """Golden: the tool's own output (24.0), because that is what the model will see."""
    text = "She sold 48/2 = <<48/2=24>>24 clips.\nThat is <<x=3>>3, or <<3/4=3/4>>3/4 of <<=7>>\n"
    assert call_parts(text) == [
        {"type": "text", "text": "She sold 48/2 = "},
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24.0"},
        {"type": "text", "text": "24 clips.\nThat is "},
        {"type": "python", "text": "x"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "3, or "},
        {"type": "python", "text": "3/4"},
        {"type": "python_output", "text": "3/4"},
        {"type": "text", "text": "3/4 of "},
        {"type": "text", "text": "7"},
        {"type": "text", "text": "\n"},
    ]


@pytest.mark.parametrize(
    ("stated", "output"), [("6", "6"), ("6.0", "6"), ("6.01", "6"), ("7", "7"), ("60", "60")]
)
def test_a_stated_result_wins_when_it_is_another(stated, output):
    """A data set rounds to a hundredth at most; what it says beyond that, it goes on with."""
    assert call_parts(f"<<2*3={stated}>>")[1]["text"] == output
