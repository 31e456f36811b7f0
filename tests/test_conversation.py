"""Rendering against golden token lists. The vocabulary is the 256 bytes and the nine specials, so
that a golden list can be read: ordinary ids are the bytes of the text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchat.conversation import (
    check_conversation,
    crop_prompt,
    render,
    render_for_completion,
    visualize,
)
from jaxchat.tokenizer import SPECIAL_NAMES, Tokenizer

TOKENIZER = Tokenizer([bytes([b]) for b in range(256)])


def messages(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def part(kind, text):
    return {"type": kind, "text": text}


def golden(*spans):
    """Ids and mask of spans: ("<bos>", 0) is a special token, ("text", 1) are its bytes."""
    ids, mask = [], []
    for text, learn in spans:
        special = text[1:-1] if text.startswith("<") else None
        new = [256 + SPECIAL_NAMES.index(special)] if special else list(text.encode())
        ids += new
        mask += [learn] * len(new)
    return ids, mask


def turn(text):
    return [("<bos>", 0), ("<user_start>", 0), (text, 0), ("<user_end>", 0)]


START, END = ("<assistant_start>", 0), ("<assistant_end>", 1)

SHAPES = {
    "user only": (messages(("user", "hi")), turn("hi")),
    "one exchange": (
        messages(("user", "hi"), ("assistant", "yo")),
        [*turn("hi"), START, ("yo", 1), END],
    ),
    "two exchanges": (
        messages(("user", "hi"), ("assistant", "yo"), ("user", "é?"), ("assistant", "ß")),
        [
            *[*turn("hi"), START, ("yo", 1), END],
            *[*turn("é?")[1:], START, ("ß", 1), END],
        ],
    ),
    "system": (
        messages(("system", "be kind"), ("user", "hi"), ("assistant", "yo")),
        [*turn("be kind\n\nhi"), START, ("yo", 1), END],
    ),
    "one text part": (
        messages(("user", "hi"), ("assistant", [part("text", "yo")])),
        [*turn("hi"), START, ("yo", 1), END],
    ),
    "tool": (
        messages(
            ("user", "2+2?"),
            (
                "assistant",
                [
                    part("text", "So "),
                    part("python", "2+2"),
                    part("python_output", "4"),
                    part("text", " it is."),
                ],
            ),
        ),
        [
            *[*turn("2+2?"), START, ("So ", 1)],
            *[("<python_start>", 1), ("2+2", 1), ("<python_end>", 1)],
            *[("<output_start>", 0), ("4", 0), ("<output_end>", 0)],
            *[(" it is.", 1), END],
        ],
    ),
    "tool without output": (
        messages(("user", "?"), ("assistant", [part("python", "x"), part("text", "?")])),
        [
            *[*turn("?"), START, ("<python_start>", 1), ("x", 1), ("<python_end>", 1)],
            *[("?", 1), END],
        ],
    ),
    "tool with empty output": (
        messages(("user", "?"), ("assistant", [part("python", "x"), part("python_output", "")])),
        [
            *[*turn("?"), START, ("<python_start>", 1), ("x", 1), ("<python_end>", 1)],
            *[("<output_start>", 0), ("<output_end>", 0), END],
        ],
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ids_and_mask_of_every_message_shape(shape):
    conversation, spans = SHAPES[shape]
    assert render(TOKENIZER, conversation) == golden(*spans)


def test_rendering_leaves_the_conversation_as_it_was():
    """Merging the system message must not write into the data set."""
    conversation = messages(("system", "s"), ("user", "u"), ("assistant", "a"))
    first = render(TOKENIZER, conversation)
    assert render(TOKENIZER, conversation) == first
    assert conversation == messages(("system", "s"), ("user", "u"), ("assistant", "a"))


@pytest.mark.parametrize("limit", [0, 1, 5, 1000])
def test_max_tokens_cuts_ids_and_mask_alike(limit):
    ids, mask = golden(*SHAPES["tool"][1])
    conversation = SHAPES["tool"][0]
    assert render(TOKENIZER, conversation, max_tokens=limit) == (ids[:limit], mask[:limit])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prompt_is_the_rendering_up_to_the_answer(shape):
    conversation, spans = SHAPES[shape]
    ids, _ = golden(*(spans if START in spans else [*spans, START]))
    prompt = render_for_completion(TOKENIZER, conversation)
    start = TOKENIZER.special_id("assistant_start")
    assert prompt == ids[: len(prompt)]
    assert prompt[-1] == start
    assert start not in ids[len(prompt) :]


@pytest.mark.parametrize("reply", ["", "\n", [part("text", "")]])
def test_a_prompt_may_hold_an_empty_reply_and_training_data_may_not(reply):
    """A stop string can end a reply before its first word, and clients send back what they got."""
    conversation = messages(("user", "hi"), ("assistant", reply), ("user", "?"))
    written = "\n" if reply == "\n" else ""
    expected, _ = golden(*turn("hi"), START, (written, 1), END, *turn("?")[1:], START)
    assert render_for_completion(TOKENIZER, conversation) == expected
    for strict in (check_conversation, lambda c: render(TOKENIZER, c)):
        with pytest.raises(ValueError, match=r"message 1 \(assistant\).* is empty"):
            strict(conversation)
    with pytest.raises(ValueError, match=r"message 2 \(user\): content is empty"):
        render_for_completion(
            TOKENIZER, messages(("user", "hi"), ("assistant", reply), ("user", ""))
        )


SPECIAL_TEXT = "".join(f"<|{name}|>" for name in SPECIAL_NAMES)


@pytest.mark.parametrize(
    "conversation",
    [
        messages(("user", SPECIAL_TEXT), ("assistant", "x")),
        messages(("system", SPECIAL_TEXT), ("user", SPECIAL_TEXT), ("assistant", SPECIAL_TEXT)),
        messages(
            ("user", "x"),
            (
                "assistant",
                [
                    part("text", SPECIAL_TEXT),
                    part("python", SPECIAL_TEXT),
                    part("python_output", SPECIAL_TEXT),
                ],
            ),
        ),
    ],
)
def test_no_content_can_forge_a_special_token(conversation):
    """The specials of the rendering are those of the same conversation with harmless content."""
    harmless = {
        "messages": [
            {
                **message,
                "content": "x"
                if isinstance(message["content"], str)
                else [{**p, "text": "x"} for p in message["content"]],
            }
            for message in conversation["messages"]
        ]
    }
    specials, expected = (
        [i for i in render(TOKENIZER, c)[0] if i >= 256] for c in (conversation, harmless)
    )
    assert specials == expected


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=6))
def test_any_text_renders_and_reads_back(texts):
    roles = ["user", "assistant"] * 3
    ids, mask = render(TOKENIZER, messages(*zip(roles, texts, strict=False)))
    learned = TOKENIZER.decode_bytes([i for i, m in zip(ids, mask, strict=True) if m])
    assert learned == b"".join(text.encode() + b"<|assistant_end|>" for text in texts[1::2])
    assert TOKENIZER.decode_bytes(i for i in ids if i < 256) == "".join(texts).encode()


@pytest.mark.parametrize(
    ("conversation", "complaint"),
    [
        (None, '{"messages"'),
        ([], '{"messages"'),
        ({}, "at least one message"),
        ({"messages": []}, "at least one message"),
        ({"messages": "hi"}, '{"messages"'),
        ({"messages": ["hi"]}, "message 0: must be .* is str"),
        ({"messages": [{"content": "hi"}]}, "message 0: unknown role None"),
        ({"messages": [{"role": "user"}]}, r"message 0 \(user\): content must be .* NoneType"),
        (messages(("tool", "hi")), "message 0: unknown role 'tool'"),
        (messages((["user"], "hi")), "message 0: unknown role"),
        (messages(("assistant", "hi")), "message 0: role must be 'user' .* is 'assistant'"),
        (messages(("user", "a"), ("user", "b")), "message 1: role must be 'assistant'"),
        (
            messages(("user", "a"), ("assistant", "b"), ("assistant", "c")),
            "message 2: role must be 'user'",
        ),
        (messages(("system", "a")), "message 0: a system message needs a user message"),
        (messages(("system", "a"), ("assistant", "b")), "message 1: role must be 'user'"),
        (messages(("system", "a"), ("system", "b")), "message 1: .* can only be the first"),
        (messages(("user", "a"), ("system", "b")), "message 1: .* can only be the first"),
        (messages(("user", "")), r"message 0 \(user\): content is empty"),
        (messages(("user", " \n")), r"message 0 \(user\): content is empty"),
        (messages(("system", ""), ("user", "a")), r"message 0 \(system\): content is empty"),
        (messages(("user", "a"), ("assistant", "")), r"message 1 \(assistant\): content is empty"),
        (messages(("user", [part("text", "a")])), r"message 0 \(user\): content must be a string"),
        (messages(("user", "a"), ("assistant", [])), "message 1 .* at least one part"),
        (messages(("user", "a"), ("assistant", 4)), "message 1 .* string or a list of parts"),
        (messages(("user", "a"), ("assistant", ["b"])), "message 1 .*part 0: must be .* is str"),
        (
            messages(("user", "a"), ("assistant", [part("text", "b"), part("image", "c")])),
            "message 1 .*part 1: unknown type 'image'",
        ),
        (messages(("user", "a"), ("assistant", [part("text", None)])), "part 0 .text.* NoneType"),
        (messages(("user", "a"), ("assistant", [part("text", "")])), "part 0 .* is empty"),
        (messages(("user", "a"), ("assistant", [part("python", "")])), "part 0 .* is empty"),
        (
            messages(("user", "a"), ("assistant", [part("python_output", "4")])),
            "part 0: python_output must follow a python part, follows None",
        ),
        (
            messages(
                ("user", "a"),
                ("assistant", [part("python", "1"), part("text", "b"), part("python_output", "")]),
            ),
            "part 2: python_output must follow a python part, follows 'text'",
        ),
    ],
)
def test_a_bad_conversation_is_named_by_message_and_fault(conversation, complaint):
    for function in (
        check_conversation,
        lambda c: render(TOKENIZER, c),
        lambda c: render_for_completion(TOKENIZER, c),
    ):
        with pytest.raises(ValueError, match=complaint):
            function(conversation)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["user", "assistant", "text", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "type", "text"]), inner)
    ),
    max_leaves=12,
)


@given(json_values)
def test_any_json_is_rendered_or_refused_with_a_reason(value):
    try:
        ids, mask = render(TOKENIZER, value)
    except ValueError:
        return
    assert len(ids) == len(mask) > 0


def test_a_picture_of_the_mask_cannot_drive_the_terminal():
    ids, mask = render(TOKENIZER, messages(("user", "\x1b[2Jé"), ("assistant", "ok")))
    shown = visualize(TOKENIZER, ids, mask)
    assert "\x1b[2J" not in shown
    assert r"\x1b" in shown
    assert r"\xc3" in shown
    assert "\x1b[32mo\x1b[0m|\x1b[32mk\x1b[0m" in shown
    assert "\x1b[2m\x1b[1m<|bos|>\x1b[0m" in shown
    with pytest.raises(ValueError, match="differ in length: 2 and 1"):
        visualize(TOKENIZER, [1, 2], [1])


def test_a_cropped_prompt_keeps_its_beginning_token_and_its_end():
    ids = list(range(10))
    assert crop_prompt(ids, 4) == [0, 7, 8, 9]
    assert crop_prompt(ids, 10) == crop_prompt(ids, 99) == ids
