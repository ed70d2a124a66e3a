"""Many rows at once give what each row gives alone."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ardor.data import encode as encode_module
from ardor.data.dataset import Dataset
from ardor.data.encode import Encoder
from ardor.data.formats import Conversation, conversation_examples
from ardor.data.plan import Planner
from ardor.data.readers import Row
from ardor.errors import DataError
from ardor.text.chat import CHATML, ChatTemplate

PARTS = [*"ab \n\t'<|>", "é", "日", "🙂", "<|im_end|>", "</think>", "<think>"]
SAID = st.lists(st.sampled_from(PARTS), min_size=1, max_size=12).map("".join)
PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "ChatML": CHATML,
    "trims": ChatTemplate(PLAIN + "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}" + PROMPT),
    "joins and trims": ChatTemplate(
        PLAIN + "{{ (' ' + m.content + ' ').strip() }}<|im_end|>{% endfor %}" + PROMPT
    ),
    "asks": ChatTemplate(
        PLAIN + "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}" + PROMPT
    ),
    "asks for the start": ChatTemplate(
        PLAIN + "{% if m.content.startswith('a') %}A:{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}" + PROMPT
    ),
    "measures": ChatTemplate(
        PLAIN + "{{ m.content | length }}{{ m.content }}<|im_end|>{% endfor %}" + PROMPT
    ),
    "hides what it reads": ChatTemplate(
        PLAIN + "{% set c = m.content ~ '' %}{{ c | upper if 'b' in c else c }}<|im_end|>"
        "{% endfor %}" + PROMPT
    ),
    "forgets": ChatTemplate(
        PLAIN + "{% if m.role == 'assistant' and not loop.last %}-{% else %}{{ m.content }}"
        "{% endif %}<|im_end|>{% endfor %}" + PROMPT
    ),
}
PLANNED = {"ChatML", "trims", "joins and trims", "asks", "asks for the start", "forgets"} | {
    "hides what it reads"  # the rendering tells
}


def conversation(contents, system=False):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    messages += [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": messages}


def rows_of(values, file="a.jsonl"):
    return [Row(value, f"{file}:{i}", file) for i, value in enumerate(values, 1)]


def outcome(rows, tokenizer, template, fast):
    """The examples of each row, up to the error that ends them; slow, by the reference."""
    found = []
    try:
        for item in Encoder(tokenizer, template, fast=fast)(rows):
            found.append([(e.tokens.tolist(), e.supervised.tolist()) for e in item.examples])
    except DataError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=8, deadline=None)
@given(contents=st.lists(st.lists(SAID, min_size=2, max_size=4), min_size=4, max_size=8))
def test_conversations_are_encoded_together_as_alone(tokenizer, name, contents):
    rows = rows_of(conversation(c[: len(c) // 2 * 2], system=len(c) == 3) for c in contents)
    template = TEMPLATES[name]
    fast = outcome(rows, tokenizer, template, True)
    assert fast == outcome(rows, tokenizer, template, False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_planned_unless_it_reads_what_it_writes(tokenizer, name):
    planner = Planner(tokenizer, TEMPLATES[name])
    rows = [Conversation(tuple(conversation([f"q {i}", f"the x {i}"])["messages"])) for i in "123"]
    drafts = [planner.drafts(row) for row in rows]
    assert drafts[0] is None  # the first of a shape is not worth a plan
    assert [draft is not None for draft in drafts[1:]] == [name in PLANNED] * 2


def test_a_plan_is_not_used_where_the_template_would_do_otherwise(tokenizer):
    def drafts(template, *answers):
        planner = Planner(tokenizer, TEMPLATES[template])
        said = [conversation(["q", answer])["messages"] for answer in ("x", "y", *answers)]
        return [planner.drafts(Conversation(tuple(messages))) for messages in said][2:]

    assert drafts("asks", "z", "</think>z")[0] and not drafts("asks", "z", "</think>z")[1]
    assert drafts("trims", "z")[0] and not drafts("trims", " z")[0]
    assert drafts("ChatML", " z")[0]  # it copies, and so the space stays
    assert not drafts("ChatML", " ")[0]


def test_a_plan_that_the_reference_contradicts_is_never_used(tokenizer, monkeypatch):
    planner = Planner(tokenizer, CHATML)
    rows = [Conversation(tuple(conversation(["q", c])["messages"])) for c in "xyz"]
    assert planner.drafts(rows[0]) is None and planner.drafts(rows[1])
    wrong = Planner(tokenizer, CHATML)
    drafted = wrong._drafted
    monkeypatch.setattr(wrong, "_drafted", lambda example: drafted(example)[:-1])
    assert [wrong.drafts(row) for row in rows] == [None] * 3


def test_fields_beside_the_content_are_part_of_a_shape(tokenizer):
    named = ChatTemplate(
        PLAIN.replace("m.role", "m.name or m.role") + "{{ m.content }}<|im_end|>"
        "{% endfor %}" + PROMPT
    )
    planner = Planner(tokenizer, named)
    for name in ("ann", "bob"):
        for content in ("x", "y", "z"):
            messages = conversation([content, "answer"])["messages"]
            messages[0]["name"] = name
            said = Conversation(tuple(messages))
            drafts = planner.drafts(said)
            if drafts is not None:
                expected = conversation_examples(said, tokenizer, named)
                assert [planner._encoded(draft) for draft in drafts] == expected
    assert len(planner._plans) == 2


@pytest.mark.parametrize(
    "values",
    [
        [{"text": text} for text in ("the cat", " ", "<|im_end|> sat", "é\n", "日本")],
        [
            {"prompt": p, "completion": c}
            for p, c in (("the", " cat"), ("", "a"), ("<|im_start|>x", "<|im_end|>"), ("a", " "))
        ],
        [
            {"segments": [{"text": "the<|im_end|> ", "label": False}, {"text": t, "label": True}]}
            for t in ("cat<|endoftext|>", "sat", "")
        ],
    ],
)
def test_other_formats_are_encoded_together_as_alone(tokenizer, values):
    rows = rows_of(values)
    fast = outcome(rows, tokenizer, CHATML, True)
    assert fast == outcome(rows, tokenizer, CHATML, False) and len(fast) == len(rows)


def test_the_first_bad_row_is_named_after_the_rows_before_it(tokenizer):
    good, half = {"text": "the cat"}, {"text": "half \ud83d of it"}
    for bad, message in ((half, "half of a surrogate"), ({"text": 3}, "holds int 3")):
        rows = rows_of([good, good, bad, good, {"text": None}])
        for fast in (True, False):
            found = outcome(rows, tokenizer, None, fast)
            assert len(found) == 3 and found[2].startswith("a.jsonl:3 (text): ")
            assert message in found[2]


def test_chunks_change_nothing(tokenizer, monkeypatch):
    rows = rows_of([{"text": f"the cat {i}"} for i in range(30)])
    whole = outcome(rows, tokenizer, None, True)
    monkeypatch.setattr(encode_module, "CHUNK_ROWS", 7)
    assert outcome(rows, tokenizer, None, True) == whole and len(whole) == 30


def test_a_long_text_is_cut_only_where_its_tokens_stay_the_same(tokenizer, monkeypatch):
    monkeypatch.setattr(encode_module, "LONG", 400)
    monkeypatch.setattr(encode_module, "WINDOW", 50)
    text = "the cat sat on the mat;\nwhat is a cat?\n\n  indented\n" * 40
    parts = encode_module._parts(tokenizer, text)
    assert len(parts) > 3 and "".join(parts) == text
    assert outcome(rows_of([{"text": text}]), tokenizer, None, True) == outcome(
        rows_of([{"text": text}]), tokenizer, None, False
    )
    monkeypatch.setattr(encode_module, "_splits", lambda *_: False)
    assert encode_module._parts(tokenizer, text) == [text]  # no border will do


def test_datasets_of_both_ways_are_the_same(tokenizer):
    rows = rows_of(conversation([f"what {i}?", "a cat " * i, "so?", "the mat"]) for i in range(20))
    for policy in ("drop", "truncate_left", "truncate_right"):
        cut = {"max_length": 60, "over_length": policy}
        fast = Dataset.build(rows, tokenizer, CHATML, **cut)
        slow = Dataset.build(rows, tokenizer, CHATML, fast=False, **cut)
        assert fast == slow and fast.census == slow.census
        assert json.dumps(fast.row_of.tolist()) == json.dumps(slow.row_of.tolist())
