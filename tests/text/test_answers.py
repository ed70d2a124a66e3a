"""Which answers are trained on, with their calls and thoughts, and what is refused instead."""

from typing import Any

import pytest
import tokenizers

from ardor.errors import TextError
from ardor.text.chat import CHATML, ChatTemplate, prompt_ids, supervise
from ardor.text.messages import checked, trained_turns
from ardor.text.named import NAMED
from ardor.text.templates import template_named
from ardor.text.tokenizer import Tokenizer

from .conftest import TEXTS
from .wild import CONTROL, TAGS, WILD

CALL = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"q": "a"}}}
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "three"},
]


@pytest.fixture(scope="module")
def rich() -> Tokenizer:
    trained = Tokenizer.train(TEXTS, vocab_size=420, special_tokens=CONTROL)
    backend = tokenizers.Tokenizer.from_str(trained._backend.to_str())
    backend.add_tokens(list(TAGS))
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def trained(tokenizer: Tokenizer, rows) -> list[str]:
    """The text of each run that is trained on."""
    runs: list[list[int]] = []
    for row in rows:
        before = (False, *row.supervised)
        for token, on, was in zip(row.tokens, row.supervised, before, strict=False):
            if on and not was:
                runs.append([])
            if on:
                runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def flagged(*flags: Any, key: str = "train") -> list[dict[str, Any]]:
    """TURNS, with a flag on each answer that is not None."""
    pairs = zip((flag for flag in flags for _ in range(2)), TURNS, strict=True)
    return [
        turn | ({} if flag is None or turn["role"] == "user" else {key: flag})
        for flag, turn in pairs
    ]


# Flags


@pytest.mark.parametrize(
    ("flags", "train_on", "expected"),
    [
        ((None, None, None), "all", ["one", "two", "three"]),
        ((None, None, None), "last", ["three"]),
        ((None, False, None), "all", ["one", "three"]),
        ((True, None, None), "last", ["one", "three"]),
        ((True, None, False), "last", ["one"]),
        ((0, 1, 0), "all", ["two"]),
    ],
)
@pytest.mark.parametrize("key", ["train", "training", "weight"])
def test_which_answers_are_trained_on(flags, train_on, expected, key, rich):
    rows = supervise(rich, CHATML, flagged(*flags, key=key), train_on=train_on)
    assert trained(rich, rows) == [f"{text}<|im_end|>" for text in expected]
    # Nothing else changes: the same tokens, up to the last answer that counts.
    (whole,) = supervise(rich, CHATML, TURNS)
    (row,) = rows
    assert row.tokens == whole.tokens[: len(row.tokens)]


def test_given_messages_are_not_trained_on_whatever_they_say(rich):
    rows = supervise(rich, CHATML, flagged(True, None, None), given=2)
    assert trained(rich, rows) == ["two<|im_end|>", "three<|im_end|>"]


def test_a_flag_that_cannot_be_honoured_is_refused():
    for messages, reason in [
        (flagged("no", None, None), "message 2 of 6: 'train' is 'no'; expected true or false"),
        (flagged(2, None, None), "message 2 of 6: 'train' is 2"),
        ([TURNS[0] | {"train": True}, TURNS[1]], "message 1 of 2 is from 'user' and marked"),
        ([TURNS[0], TURNS[1] | {"train": True, "weight": 0}], "train and weight contradict"),
    ]:
        with pytest.raises(TextError, match=reason):
            trained_turns(messages, "all")
    assert trained_turns([TURNS[0] | {"train": False}, TURNS[1]], "all") == [1]


def test_nothing_left_to_train_on_is_an_error(rich):
    with pytest.raises(TextError, match="no assistant message is to be trained on"):
        supervise(rich, CHATML, flagged(False, False, False))
    empty = [TURNS[0], TURNS[1], TURNS[2], {"role": "assistant", "content": ""}]
    with pytest.raises(TextError, match="every assistant message that is trained on is empty"):
        supervise(rich, CHATML, empty, train_on="last")


# Thoughts


def qwen3() -> ChatTemplate:
    return ChatTemplate(WILD["qwen 3"].source, name="qwen 3")


def test_thoughts_are_trained_on_where_they_are_and_dropped_from_the_past(rich):
    thought = "<think>\nhm\n</think>\n\n"
    beside = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "thinking": "hm"},
    ]
    inside = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": f"{thought}b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": f"{thought}d"},
    ]
    for messages in (beside, inside):
        rows = supervise(rich, qwen3(), messages)
        assert trained(rich, rows) == [f"{thought}b<|im_end|>", f"{thought}d<|im_end|>"]
        prompts = [prompt_ids(rich, qwen3(), messages[:i]) for i in (1, 3)]
        assert [list(r.tokens[: len(p)]) for r, p in zip(rows, prompts, strict=True)] == prompts
        assert "hm" not in rich.decode(prompts[1])
        assert rows[1].tokens.count(rich.added["<think>"]) == 1


def test_a_thought_that_the_template_cuts_off_is_put_before_its_answer(rich):
    cut = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [TURNS[0], {"role": "assistant", "content": "<think>hm</think>\n\nyes"}]
    rows = supervise(rich, cut, messages)
    assert trained(rich, rows) == ["<think>hm</think>\n\nyes<|im_end|>"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"content": "<think>\nhm\n</think>\n\nyes"}, "hm\n</think>\n\nyes"),
        ({"content": "hm\n</think>\n\nyes"}, "hm\n</think>\n\nyes"),
        ({"content": "yes", "reasoning_content": "hm"}, "hm\n</think>\n\nyes"),
        ({"content": "yes"}, "\n</think>\n\nyes"),  # the model has to close what was opened
    ],
)
def test_a_thought_goes_on_in_the_one_that_the_prompt_has_opened(answer, expected, rich):
    template = template_named("deepseek-r1", rich)
    messages = [TURNS[0], {"role": "assistant", **answer}]
    (row,) = supervise(rich, template, messages)
    assert trained(rich, [row]) == [f"{expected}<｜end▁of▁sentence｜>"]
    prompt = prompt_ids(rich, template, messages[:1])
    assert list(row.tokens[: len(prompt)]) == prompt
    assert rich.decode(prompt).endswith("<｜Assistant｜><think>\n")


def test_a_prompt_without_thoughts_is_not_trained_to_think(rich):
    messages = [TURNS[0], {"role": "assistant", "content": "yes"}]
    (row,) = supervise(rich, qwen3(), messages, enable_thinking=False)
    assert trained(rich, [row]) == ["yes<|im_end|>"]
    messages[1]["reasoning_content"] = "hm"
    with pytest.raises(TextError, match="message 2 of 2 holds a thought, and the prompt says"):
        supervise(rich, qwen3(), messages, enable_thinking=False)


def test_a_thought_or_call_that_would_be_dropped_in_silence_is_refused(rich):
    with pytest.raises(TextError, match="a thought in 'reasoning_content', which ChatML does not"):
        supervise(rich, CHATML, [TURNS[0], TURNS[1] | {"reasoning_content": "hm"}])
    deaf = ChatTemplate(WILD["phi 3"].source, name="deaf")
    with pytest.raises(TextError, match="message 2 of 2 holds a call of 'f', which deaf does not"):
        supervise(rich, deaf, [TURNS[0], TURNS[1] | {"tool_calls": [CALL]}])
    # In the past, and where the message is not trained on, that is the template's business.
    turns = [TURNS[0], TURNS[1] | {"reasoning_content": "hm", "train": False}, *TURNS[2:4]]
    assert trained(rich, supervise(rich, CHATML, turns)) == ["two<|im_end|>"]


# Calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5", '<tool_call>\n{"name": "f", "arguments": {"q": "a"}}\n</tool_call><|im_end|>'),
        ("llama3.1", '{"name": "f", "parameters": {"q": "a"}}<|eot_id|>'),
        (
            "mistral-v3-tekken",
            '[TOOL_CALLS][{"name": "f", "arguments": {"q": "a"}, "id": "call00001"}]</s>',
        ),
    ],
)
@pytest.mark.parametrize("content", [None, "", ...])
def test_a_call_is_trained_on_up_to_the_stop_token(name, expected, content, rich):
    message = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    if content is ...:
        del message["content"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = supervise(rich, template_named(name, rich), [TURNS[0], message], tools=tools)
    assert trained(rich, rows) == [expected]


def test_a_call_after_words_and_a_result_are_one_conversation(rich):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "let me see", "tool_calls": [CALL]},
        {"role": "tool", "content": "42 <|im_end|>", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "it is 42"},
    ]
    (row,) = supervise(rich, template_named("qwen2.5", rich), messages)
    first, second = trained(rich, [row])
    assert first.startswith("let me see\n<tool_call>\n") and first.endswith("<|im_end|>")
    assert second == "it is 42<|im_end|>"
    assert row.tokens.count(rich.added["<|im_end|>"]) == 5  # and not the spelled one


def test_a_family_template_refuses_what_its_format_has_no_place_for(rich):
    for name in sorted(set(NAMED) - {"llama3.1", "mistral-v3", "mistral-v3-tekken"} - {
        "qwen2.5", "qwen3"
    }):  # fmt: skip
        template = ChatTemplate(NAMED[name].source, name=name, tokens=rich.names)
        with pytest.raises(TextError, match="no place for tools"):
            template.render(TURNS[:1], True, tools=[{"name": "f"}])
        with pytest.raises(TextError, match="no place for tool calls"):
            template.render([TURNS[0], {"role": "assistant", "tool_calls": [CALL]}])


# Bad input


def test_malformed_messages_are_named():
    good = {"role": "user", "content": "hi"}
    for wrong, reason in [
        ({"role": "user", "content": [{"type": "image"}]}, "of type 'image'; only text"),
        ({"role": "user", "content": [{"text": "a"}]}, r"a part of the content is \{'text': 'a'\}"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "a text part holds int"),
        ({"role": "assistant", "tool_calls": "f"}, "'tool_calls' is str; expected a list"),
        ({"role": "assistant", "tool_calls": ["f"]}, "a tool call is 'f'; expected an object"),
        ({"role": "assistant", "content": "", "thinking": 1}, "'thinking' is int; expected"),
        ({"role": "", "content": "a"}, "'role' is empty"),
        ({"role": None, "content": "a"}, "'role' is null"),
        ({"role": "user", "content": "a", "x": object()}, "holds a object, which is not text"),
    ]:
        with pytest.raises(TextError, match=f"^message 2 of 2.*{reason}"):
            checked([good, wrong])


def test_tools_and_documents_that_are_none_are_refused():
    for variables, reason in [
        ({"tools": "f"}, "'tools' is str; expected a list"),
        ({"tools": ["f"]}, "entry 1 of 'tools' is str; expected a JSON schema or a function"),
        ({"documents": [1]}, "entry 1 of 'documents' is int; expected an object"),
    ]:
        with pytest.raises(TextError, match=reason):
            CHATML.render(TURNS[:1], **variables)


def test_tools_that_the_template_does_not_write_are_refused(rich):
    deaf = ChatTemplate(WILD["phi 3"].source, name="deaf")
    with pytest.raises(TextError, match="deaf does not write the tools that it is given"):
        prompt_ids(rich, deaf, TURNS[:1], tools=[{"name": "f", "parameters": {}}])
    assert prompt_ids(rich, deaf, TURNS[:1], tools=[])


def test_an_answer_to_go_on_with_must_be_there():
    with pytest.raises(TextError, match="the last message has no content to go on with"):
        CHATML.render([{"role": "assistant", "content": ""}], continue_final_message=True)
    with pytest.raises(TextError, match="give one of them"):
        CHATML.render(TURNS[:1], True, continue_final_message=True)
    deaf = ChatTemplate("{{ messages[0].content[:1] }}", name="deaf")
    with pytest.raises(TextError, match="deaf: does not write the whole content"):
        deaf.render([{"role": "user", "content": "long"}], continue_final_message=True)


def test_the_tool_template_is_taken_where_there_are_tools(rich):
    plain = ChatTemplate("plain", name="default", variants={"tool_use": ChatTemplate("tools")})
    assert plain.render(TURNS[:1]) == "plain"
    assert plain.render(TURNS[:1], tools=[]) == "tools"  # as in transformers: also for none of them
    assert prompt_ids(rich, plain, TURNS[:1], tools=[]) == rich.encode_template("tools")
    assert plain.choose(None).name == "default"
