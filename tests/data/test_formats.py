"""Each format's columns, and which of its tokens are trained on."""

import json

import pytest

from ardor.data.formats import (
    FORMATS,
    Completion,
    examples_of,
    preference_pair,
    preference_sides,
    read_preference,
    recognise,
)
from ardor.data.readers import Row
from ardor.errors import DataError
from ardor.text.chat import CHATML, ChatTemplate, supervise
from ardor.text.example import completion, document

ASK, ANSWER = "What is a cat?", "A small animal."
TURNS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}]
SHAREGPT = [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]

# The same question and answer in every format that becomes a conversation.
CONVERSATIONS = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": SHAREGPT},
    "prompt-completion": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "alpaca": {"instruction": ASK, "input": "", "output": ANSWER},
    "dolly": {"instruction": ASK, "context": None, "response": ANSWER},
    "question-answer": {"question": ASK, "answer": ANSWER},
}


def row(values, where="pairs.jsonl:17"):
    return Row(values, where)


def trained_on(tokenizer, example):
    return tokenizer.decode(t for t, s in zip(example.tokens, example.supervised, strict=True) if s)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_conversation_format_gives_the_same_example(tokenizer, name):
    values = CONVERSATIONS[name]
    assert recognise(values).name == name
    assert examples_of(row(values), tokenizer, CHATML) == supervise(tokenizer, CHATML, TURNS)


@pytest.mark.parametrize("columns", ["messages", "prompt, completion"])
def test_turns_of_sharegpt_are_read_in_any_column_of_messages(tokenizer, columns):
    turns = CONVERSATIONS["sharegpt"]["conversations"]
    values = {"messages": turns}
    if columns != "messages":
        values = {"prompt": turns[:-1], "completion": turns[-1:]}
    assert examples_of(row(values), tokenizer, CHATML) == supervise(tokenizer, CHATML, TURNS)


def test_every_format_is_tested_here():
    assert {format.name for format in FORMATS} == {*CONVERSATIONS, "text", "segments", "preference"}


@pytest.mark.parametrize(
    "values", [*CONVERSATIONS.values(), {"prompt": "a", "completion": " b"}, {"text": "the cat"}]
)
def test_every_format_ends_with_a_stop_token_that_is_trained_on(tokenizer, values):
    (example,) = examples_of(row(values), tokenizer, CHATML)
    assert example.supervised[-1]
    assert tokenizer.token(example.tokens[-1]) in ("<|im_end|>", "<|endoftext|>")


def test_strings_of_prompt_and_completion_use_no_template(tokenizer):
    values = {"prompt": "the cat", "completion": " sat"}
    expected = completion(tokenizer, "the cat", " sat")
    assert examples_of(row(values), tokenizer, CHATML) == [expected]
    assert examples_of(row(values), tokenizer, None) == [expected]
    assert trained_on(tokenizer, expected) == " sat<|endoftext|>"


def test_text_is_a_document(tokenizer):
    found = examples_of(row({"text": "the cat"}), tokenizer, None)
    assert found == [document(tokenizer, "the cat")]


def test_answers_inside_a_prompt_of_messages_are_not_trained_on(tokenizer):
    values = {"prompt": [*TURNS, TURNS[0]], "completion": [{"role": "assistant", "content": "No."}]}
    (example,) = examples_of(row(values), tokenizer, CHATML)
    assert trained_on(tokenizer, example) == "No.<|im_end|>"
    (whole,) = examples_of(
        row({"messages": [*values["prompt"], *values["completion"]]}), tokenizer, CHATML
    )
    assert whole.tokens == example.tokens
    assert trained_on(tokenizer, whole) == f"{ANSWER}<|im_end|>No.<|im_end|>"


def test_answers_inside_a_prompt_are_not_trained_on_even_in_rows_of_their_own(tokenizer):
    # Only the last answer is written as it was said, as with templates that drop thoughts.
    forgetful = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and not loop.last %}-{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    answer = {"role": "assistant", "content": "No."}
    turns = [*TURNS, TURNS[0], answer]
    assert len(examples_of(row({"messages": turns}), tokenizer, forgetful)) == 2
    values = {"prompt": turns[:3], "completion": [answer]}
    (example,) = examples_of(row(values), tokenizer, forgetful)
    assert trained_on(tokenizer, example) == "No.<|im_end|>"


def test_an_input_and_a_system_prompt_are_part_of_the_conversation(tokenizer):
    values = {"instruction": "Translate.", "input": "cat", "output": "Katze", "system": "Be brief."}
    (example,) = examples_of(row(values), tokenizer, CHATML)
    text = tokenizer.decode(example.tokens)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "user\nTranslate.\n\ncat<|im_end|>" in text
    values = {"conversations": SHAREGPT, "system": "Be brief."}
    (example,) = examples_of(row(values), tokenizer, CHATML)
    assert tokenizer.decode(example.tokens).startswith("<|im_start|>system\nBe brief.")


def test_conversations_may_hold_the_keys_of_messages(tokenizer):
    found = examples_of(row({"conversations": TURNS}), tokenizer, CHATML)
    assert found == supervise(tokenizer, CHATML, TURNS)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (("instruction", "input", "output", "text"), "alpaca"),  # tatsu-lab/alpaca
        (("prompt", "prompt_id", "messages"), "messages"),  # UltraChat
        (("id", "conversations"), "sharegpt"),
        (("question", "answer", "context"), "question-answer"),
        (("text", "label"), "text"),
    ],
)
def test_the_more_telling_columns_decide(columns, name):
    values = dict.fromkeys(columns)
    format = recognise(values)
    assert format.name == name
    assert not set(format.unread(values)) & set(format.columns)


def test_columns_that_are_not_read_are_known():
    values = {"question": "a", "answer": "b", "context": "c", "id": 3}
    assert recognise(values).unread(values) == ("context", "id")


@pytest.mark.parametrize(
    "values",
    [
        {"text": " \n"},
        {"prompt": "a", "completion": ""},
        {"instruction": "a", "output": ""},
        {"messages": TURNS[:1]},
        {"messages": [TURNS[0], {"role": "assistant", "content": " "}]},
        {"prompt": TURNS, "completion": TURNS[:1]},
    ],
)
def test_a_row_without_an_answer_gives_no_example(tokenizer, values):
    assert examples_of(row(values), tokenizer, CHATML) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promt": "a", "completion": "b"}, "found the columns promt, completion; known formats"),
        (
            {"promt": "a", "completion": "b"},
            "known formats are messages; .*; prompt . completion; .*; text",
        ),
        ({"promt": "a", "completion": "b"}, "nearest is prompt-completion: rename 'promt' to"),
        ({"instruction": "a"}, "nearest is alpaca: add 'output'"),
        ({}, r"found the columns \(none\)"),
        ({"text": 3}, r"\(text\): column 'text' holds int 3, expected a string"),
        ({"text": None}, "column 'text' holds null"),
        ({"messages": "hello"}, "column 'messages' holds str 'hello', expected a list"),
        ({"messages": []}, "holds an empty list"),
        ({"messages": [{"role": "user"}]}, "message 1 of 1 has no 'content'"),
        ({"messages": ["hello"]}, "message 1 of 1 is str"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 3}]}, "'content' is int"),
        ({"conversations": [{"from": "nobody", "value": "a"}]}, "turn 1 is from 'nobody'; known"),
        ({"conversations": [{"form": "human"}]}, "turn 1 holds form; expected 'from' and 'value'"),
        ({"prompt": "a", "completion": TURNS}, "expected two strings or two lists of messages"),
        ({"instruction": "a", "input": 3, "output": "b"}, "column 'input' holds int 3"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tokenizer, values, message):
    with pytest.raises(DataError, match=message) as caught:
        examples_of(row(values), tokenizer, CHATML)
    assert str(caught.value).startswith("pairs.jsonl:17 ")


def test_a_conversation_without_a_template_is_refused(tokenizer):
    with pytest.raises(DataError, match="needs a chat template .* chat_template=chatml"):
        examples_of(row({"messages": TURNS}), tokenizer, None)


# ---- segments ----


def test_segments_are_trained_on_where_their_label_says_so(tokenizer):
    parts = [
        ("<|im_start|>user\nhi<|im_end|>", False),
        ("the cat<|im_end|>", True),
        ("\nso", False),
    ]
    values = {"segments": [{"text": text, "label": label} for text, label in parts]}
    (example,) = examples_of(row(values), tokenizer, None)
    assert tokenizer.decode(example.tokens) == "".join(text for text, _ in parts)
    assert trained_on(tokenizer, example) == "the cat<|im_end|>"
    control = {tokenizer.id("<|im_start|>"), tokenizer.id("<|im_end|>")}
    assert sum(token in control for token in example.tokens) == 3  # here they count
    train = {"segments": [{"text": text, "train": label} for text, label in parts]}
    assert examples_of(row(train), tokenizer, None) == [example]
    nothing = {"segments": [{"text": "a", "label": False}]}
    assert examples_of(row(nothing), tokenizer, None) == []


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "holds an empty list, expected a list of segments"),
        ("text", "holds str 'text', expected a list of segments"),
        (["text"], "segment 1 holds str 'text'; expected an object"),
        ([{"text": None, "label": True}], "segment 1: 'text' is null; expected a string"),
        (
            [{"text": "a", "label": True}, {"text": "a"}],
            "segment 2: 'label' is null; expected true",
        ),
        ([{"text": "a", "label": "yes"}], "segment 1: 'label' is str 'yes'; expected true"),
    ],
)
def test_segments_that_cannot_be_read_are_named(tokenizer, segments, message):
    with pytest.raises(DataError, match=rf"pairs.jsonl:17 \(segments\): .*{message}"):
        examples_of(row({"segments": segments}), tokenizer, None)


# ---- preferences ----

BETTER, WORSE = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
PREFERENCES = [
    {"prompt": TURNS[:1], "chosen": [BETTER], "rejected": [WORSE]},
    {"chosen": [TURNS[0], BETTER], "rejected": [TURNS[0], WORSE]},
    {"prompt": ASK, "chosen": [TURNS[0], BETTER], "rejected": [TURNS[0], WORSE]},  # UltraFeedback
    {"prompt": ASK, "chosen": [BETTER], "rejected": [WORSE]},  # which does not repeat it
    {
        "prompt": [{"from": "human", "value": ASK}],
        "chosen": [{"from": "gpt", "value": "Yes."}],
        "rejected": [{"from": "gpt", "value": "No."}],
    },
]


@pytest.mark.parametrize("values", PREFERENCES)
def test_a_preference_is_a_pair_with_one_prompt(tokenizer, values):
    assert recognise(values).name == "preference"
    chosen, rejected = preference_pair(row(values), tokenizer, CHATML)
    prompt = chosen.supervised.index(True)
    assert chosen.tokens[:prompt] == rejected.tokens[:prompt]
    assert trained_on(tokenizer, chosen) == "Yes.<|im_end|>"
    assert trained_on(tokenizer, rejected) == "No.<|im_end|>"
    assert [chosen] == supervise(tokenizer, CHATML, [TURNS[0], BETTER])


def test_a_preference_of_strings_finds_its_prompt():
    given = {"prompt": "the cat", "chosen": " sat", "rejected": " ran"}
    implied = {"chosen": "the cat sat", "rejected": "the cat sang"}
    assert read_preference(given).rejected == Completion("the cat", " ran")
    found = read_preference(implied)
    assert found.chosen == Completion("the cat", " sat")  # parted at a word, not after "sa"
    assert found.rejected == Completion("the cat", " sang")


def test_a_preference_is_not_trained_on_unless_asked_for(tokenizer):
    values = PREFERENCES[0]
    with pytest.raises(DataError, match=r"17 \(preference\): .* set preferences=chosen"):
        examples_of(row(values), tokenizer, CHATML)
    (example,) = examples_of(row(values), tokenizer, CHATML, preferences="chosen")
    assert trained_on(tokenizer, example) == "Yes.<|im_end|>"


def test_pairs_that_teach_nothing_are_none(tokenizer):
    blank = {"prompt": "a", "chosen": " ", "rejected": "b"}
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    assert preference_pair(row(blank), tokenizer, None) is None
    assert preference_pair(row(same), tokenizer, None) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "there is no column 'rejected'"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "prompt holds int 3, expected a string"),
        ({"chosen": "b", "rejected": [WORSE]}, "expected two strings or two lists of messages"),
        ({"chosen": [TURNS[0]], "rejected": [WORSE]}, "'chosen' has no assistant message after"),
    ],
)
def test_a_preference_that_cannot_be_read_is_named(tokenizer, values, message):
    with pytest.raises(DataError, match=rf"pairs.jsonl:17 \(preference\): .*{message}"):
        preference_pair(row(values), tokenizer, CHATML)


# ---- tools ----

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
LISTS = ChatTemplate(
    "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if mood %}{{ mood }}{% endif %}"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_tools_are_given_to_the_template(tokenizer, tools, column):
    turns = TURNS if column == "messages" else SHAREGPT
    found = examples_of(row({column: turns, "tools": tools}), tokenizer, LISTS)
    assert found == supervise(tokenizer, LISTS, TURNS, tools=TOOLS)
    assert "weather" in tokenizer.decode(found[0].tokens)
    without = examples_of(row({column: turns, "tools": ""}), tokenizer, LISTS)
    assert without == supervise(tokenizer, LISTS, TURNS) != found
    values = {"messages": TURNS, "tools": [], "documents": None}
    assert examples_of(row(values), tokenizer, LISTS) == without
    assert recognise(values).unread(values) == ("documents",) * 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tools": "[{"}, "column 'tools' holds a string that is not JSON"),
        ({"tools": {"name": "x"}}, "column 'tools' holds dict .*, expected a list of objects"),
        ({"chat_template_kwargs": 3}, "column 'chat_template_kwargs' holds int 3"),
    ],
)
def test_tools_that_cannot_be_read_are_named(tokenizer, extra, message):
    with pytest.raises(DataError, match=message):
        examples_of(row({"messages": TURNS} | extra), tokenizer, LISTS)


def test_a_system_prompt_counts_among_the_given_messages(tokenizer):
    values = {"prompt": TURNS[:1], "completion": TURNS[1:], "system": "Be brief."}
    (example,) = examples_of(row(values), tokenizer, CHATML)
    assert tokenizer.decode(example.tokens).startswith("<|im_start|>system\nBe brief.")
    assert trained_on(tokenizer, example) == f"{ANSWER}<|im_end|>"


def test_fields_of_turns_are_passed_on(tokenizer):
    turns = [SHAREGPT[0] | {"name": "ann"}, SHAREGPT[1]]
    content = recognise({"conversations": turns}).read({"conversations": turns})
    assert content.messages[0] == TURNS[0] | {"name": "ann"}


def test_rows_with_images_are_refused(tokenizer):
    said = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a cat"}]
    pair = {"prompt": "what is it?", "chosen": "a cat", "rejected": "a mat"}
    for column in ("image", "images"):
        row = Row({"messages": said, column: ["cat.png"]}, "a.jsonl:3")
        with pytest.raises(DataError, match=rf"a\.jsonl:3: column '{column}' holds images"):
            examples_of(row, tokenizer, CHATML)
        with pytest.raises(DataError, match=r"a\.jsonl:4: column .* holds images"):
            preference_sides(Row({**pair, column: ["cat.png"]}, "a.jsonl:4"), tokenizer, None)
        empty = Row({"messages": said, column: []}, "a.jsonl:5")
        assert examples_of(empty, tokenizer, CHATML)
